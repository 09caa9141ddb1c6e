"""Shows in short what `python -m tests.soak.fuzz` shows at length: no request harms the server or anybody's chat."""

from __future__ import annotations

from pathlib import Path

from tests.support.fuzz import CONTROLS, fuzz, serving

THREADS = 4
IDLE_S = 4


def test_five_hundred_requests_that_nobody_sane_would_send(tmp_path: Path) -> None:
    with serving(tmp_path, CONTROLS + THREADS, IDLE_S) as server:
        run = fuzz(server, 500, seed=7, threads=THREADS)
    assert run.wrong == []
    assert run.counts["control: compared"] > 0
    assert sum(count for what, count in run.counts.items() if not what.startswith(("control", "leave"))) >= 500
