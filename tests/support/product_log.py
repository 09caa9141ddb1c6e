"""The product's log records, without those of the test run's own threads, such as clients that poll a server."""

from __future__ import annotations

import logging

import pytest


def product_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the records of the product's loggers, in order."""
    return [record for record in caplog.records if record.name.startswith("llava_sessions.")]
