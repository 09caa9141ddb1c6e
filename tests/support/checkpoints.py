"""The tiny random checkpoint that tests of the engine and of the worker share."""

from pathlib import Path

import pytest

from tests.support.tiny_llava import make_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random LLaVA-1.5-style checkpoint with grouped-query attention."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))
