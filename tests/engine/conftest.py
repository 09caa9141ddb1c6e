"""Fixtures of the engine's tests."""

from tests.support.checkpoints import tiny

__all__ = ["tiny"]
