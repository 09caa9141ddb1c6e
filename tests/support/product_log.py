"""Owns telling what the product logged from what the test run did: threads that poll servers log beside it."""

from __future__ import annotations

import logging

import pytest


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """The product's own records, in order."""
    return [record for record in caplog.records if record.name.startswith("llava_sessions.")]
