"""A sequence reaper that never waits."""

import pytest

from llava_sessions.torchserve import sequences


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each reaper treat a request as if it arrived long after the previous step.

    tests/unit/test_sequences.py covers the waits.
    """
    monkeypatch.setattr(sequences, "QUIET_S", -1.0)
    monkeypatch.setattr(sequences, "LINGER_S", -1.0)
