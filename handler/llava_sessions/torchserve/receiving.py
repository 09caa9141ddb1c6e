"""How TorchServe's worker receives a batch: bodies as bytes, on the thread that calls the handler."""

from __future__ import annotations

import threading
import time

# Without this variable TorchServe's worker parses the JSON of every row in every step, also of rows that it has parsed
# before. TorchServe reads it for each body (ts/protocol/otf_message_handler.py), so the handler sets it in its process.
DECODE_VARIABLE = "TS_DECODE_INPUT_REQUEST"
RAW_BODIES = "false"

# CPU time of a thread that waits for a batch is below this, also with a signal handler in between.
_IDLE_CPU_S = 0.005


class ReceivingThread:
    """Detects whether a thread has worked since the last look. Without a batch, TorchServe's thread only waits."""

    def __init__(self, thread: threading.Thread) -> None:
        """`thread` must have started."""
        if thread.ident is None:
            raise ValueError("the thread must have started")
        self._clock = time.pthread_getcpuclockid(thread.ident)
        self._used_s = time.clock_gettime(self._clock)

    def has_worked(self) -> bool:
        """Return whether the thread has used the CPU since the last call."""
        before_s = self._used_s
        self._used_s = time.clock_gettime(self._clock)
        return self._used_s - before_s > _IDLE_CPU_S
