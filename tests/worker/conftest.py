"""Fixtures of the worker's tests."""

from tests.support.checkpoints import tiny
from tests.support.sequences import unhurried

__all__ = ["tiny", "unhurried"]
