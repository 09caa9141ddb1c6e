"""Read the logs of one TorchServe: the lines of this start, and the reason of a failure."""

from __future__ import annotations

import time
from pathlib import Path

STARTUP_ERROR = "startup_error"  # begins the line with which the handler explains a failed start
NOISE = (  # lines that java prints at every start, independent of the log configuration
    "WARNING: sun.reflect.Reflection.getCallerClass",
    "nvidia-smi not available",
    "Model server started.",
)
_TAIL_BYTES = 1 << 16


class ServerLogs:
    """The log files in a folder, read from the end that they had when this object was made."""

    def __init__(self, folder: Path) -> None:
        self.console = folder / "console.log"
        self.frontend = folder / "ts_log.log"
        self.model = folder / "model_log.log"
        self._old_bytes = {path: _file_size(path) for path in (self.console, self.frontend, self.model)}

    def new_lines(self, path: Path, count: int) -> list[str]:
        """Return at most `count` last lines of a log, without lines of earlier starts."""
        return tail(path, count, self._old_bytes[path])

    def wait_for_last_lines(self, quiet_s: float = 1.0, timeout_s: float = 10.0) -> None:
        """Wait for the last lines of a dead worker, which java logs with a delay.

        Return when the handler has explained the failure, or when the log has not grown for `quiet_s`.
        """
        now = time.monotonic()
        deadline = now + timeout_s
        quiet_since = now
        size = _file_size(self.model)
        while now < deadline and now - quiet_since < quiet_s and not self.startup_errors():
            time.sleep(0.1)
            now = time.monotonic()
            if size != (size := _file_size(self.model)):
                quiet_since = now

    def startup_errors(self) -> list[str]:
        """Return the lines with which the handler explains a failed start."""
        lines = self.new_lines(self.model, 200)
        return [line[line.index(STARTUP_ERROR) :] for line in lines if f" {STARTUP_ERROR}" in line]

    def reason(self) -> str:
        """Return why the server failed: the handler's explanation if there is one, else the end of each log."""
        if errors := self.startup_errors():
            return "\n".join(dict.fromkeys(errors))
        parts = []
        for path in self._old_bytes:
            lines = [line for line in self.new_lines(path, 15) if not line.startswith(NOISE)]
            if lines:
                parts.append(f"--- {path.name}\n" + "\n".join(lines))
        return "\n".join(parts) or "(the logs are empty)"


def tail(path: Path, count: int, since: int = 0) -> list[str]:
    """Return at most `count` last lines of a log after its first `since` bytes, or of all of it if it has rolled."""
    size = _file_size(path)
    start = since if since <= size else 0
    try:
        with path.open("rb") as file:
            file.seek(max(start, size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def _file_size(path: Path) -> int:
    """Return the size in bytes; 0 if there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
