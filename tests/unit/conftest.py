"""Fixtures of the unit tests."""

from tests.support.sequences import unhurried

__all__ = ["unhurried"]
