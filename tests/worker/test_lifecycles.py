"""Random lives of sessions (tests/support/lifecycles.py): the same ones in every run. `make soak` runs many more."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st

from tests.support.lifecycles import WEIGHTED, live

SEQUENCES = 2_000
OPERATION = st.tuples(st.sampled_from(WEIGHTED), st.integers(0, 11))
LIVES = st.tuples(
    st.sampled_from((True, True, True, False)), st.lists(OPERATION, min_size=5, max_size=50), st.sampled_from((1, 2))
)


@hypothesis.settings(
    max_examples=SEQUENCES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(LIVES)
def test_whatever_happens_no_request_hangs_and_no_acknowledged_turn_is_lost(life) -> None:
    has_journal, operations, engines = life
    live(has_journal, operations, engines)
