"""Owns how a message crosses the pipe between worker process and engine process. No torch; must not know what is said.

`multiprocessing.connection.Connection` writes each message behind its length. Both ends are ours, so the content may be
a pickle.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any

# Thirty-two tiled pictures or frames in float32 are below it; a length above it is no message of ours.
MAX_MESSAGE_BYTES = 4 * 2**30


def send(pipe: Connection, message: Any) -> None:
    """Write one message. Raises OSError when the other end is gone."""
    pipe.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(pipe: Connection) -> Any:
    """Wait for one message. Raises EOFError when the other end is gone, OSError on a broken or over-long one."""
    return pickle.loads(pipe.recv_bytes(MAX_MESSAGE_BYTES))
