"""Fixtures of the unit tests: a very small random checkpoint, made once."""

from pathlib import Path

import pytest

from tests.tiny_llava import make_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-1.5-style checkpoint with grouped-query attention."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))
