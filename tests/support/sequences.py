"""Makes the sequence reaper's waits end at once."""

import pytest

from llava_sessions.torchserve import sequences


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request arrives after the previous step has ended (test_sequences.py covers the others)."""
    monkeypatch.setattr(sequences, "QUIET_S", -1.0)
    monkeypatch.setattr(sequences, "LINGER_S", -1.0)
