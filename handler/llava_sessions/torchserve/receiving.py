"""How TorchServe's worker receives a batch: bodies as bytes, and with what work."""

from __future__ import annotations

import contextlib
import threading
import time

import psutil

# Without this variable TorchServe's worker parses the JSON of every row in every step, also of rows that it has parsed
# before. TorchServe reads it for each body (ts/protocol/otf_message_handler.py), so the handler sets it in its process.
DECODE_VARIABLE = "TS_DECODE_INPUT_REQUEST"
RAW_BODIES = "false"

# CPU time per second. A waiting thread takes none, a frontend without requests 0.02 s.
_WAITING_THREAD_CPU_S = 0.005
_IDLE_FRONTEND_CPU_S = 0.1


class BatchTransfer:
    """Detects whether a batch is on its way: the frontend encodes it, or the worker's thread receives it.

    With large bodies both take seconds, in which the handler is not called. Without requests neither uses the CPU.
    """

    def __init__(self, thread: threading.Thread, frontend: psutil.Process | None) -> None:
        """`thread` calls the handler; it must have started. `frontend`: the process that sends batches."""
        if thread.ident is None:
            raise ValueError("the thread must have started")
        self._thread_clock = time.pthread_getcpuclockid(thread.ident)
        self._frontend = frontend
        self._thread_s = self._thread_cpu_s()
        self._frontend_s = self._frontend_cpu_s()

    def is_active(self) -> bool:
        """Return whether any of the two has worked since the last call. Call it about once a second."""
        thread_s = self._thread_cpu_s() - self._thread_s
        frontend_s = self._frontend_cpu_s() - self._frontend_s
        self._thread_s += thread_s
        self._frontend_s += frontend_s
        return thread_s > _WAITING_THREAD_CPU_S or frontend_s > _IDLE_FRONTEND_CPU_S

    def _thread_cpu_s(self) -> float:
        return time.clock_gettime(self._thread_clock)

    def _frontend_cpu_s(self) -> float:
        if self._frontend is not None:
            with contextlib.suppress(psutil.Error):
                times = self._frontend.cpu_times()
                return float(times.user + times.system)
        return 0.0
