"""Send and receive messages on the pipe between worker process and engine process.

`multiprocessing.connection.Connection` writes each message after its length. Messages are pickles, which is
safe because both ends are processes of this program.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any

# Larger than 32 tiled pictures or frames in float32. A greater length means that the pipe is broken.
MAX_MESSAGE_BYTES = 4 * 2**30


def send(pipe: Connection, message: Any) -> None:
    """Write one message. Raises OSError if the other end is closed."""
    pipe.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(pipe: Connection) -> Any:
    """Wait for one message and return it. Raises EOFError if the other end is closed, OSError if the pipe is broken."""
    return pickle.loads(pipe.recv_bytes(MAX_MESSAGE_BYTES))
