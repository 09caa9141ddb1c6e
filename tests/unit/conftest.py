"""Fixtures of the unit tests: a very small random checkpoint, made once, and clients that take their time."""

from pathlib import Path

import pytest

from llava_sessions import sequences
from tests.tiny_llava import make_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-1.5-style checkpoint with grouped-query attention."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client sends comes after the step before it; test_sequences.py has those that come meanwhile."""
    monkeypatch.setattr(sequences, "QUIET_S", -1.0)
    monkeypatch.setattr(sequences, "LINGER_S", -1.0)
