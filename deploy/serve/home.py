"""The folder of one server: temporary files, logs, rendered configuration."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .processes import ServeError

SOCKET_PATH_LIMIT = 103  # bytes that every system allows in the path of a unix socket


@dataclass(frozen=True)
class ServerHome:
    """The folder of one server. A temporary one is deleted by `remove`."""

    folder: Path
    is_temporary: bool

    @classmethod
    def make(cls, folder: Path | None = None) -> ServerHome:
        """Use `folder`, or make a temporary one. Raise `ServeError` if its path is too long for unix sockets."""
        if folder is not None:
            home = Path(folder).resolve()
        else:
            # The temporary folder of a test runner or of a Mac can be too deep for the workers' sockets.
            base = tempfile.gettempdir()
            home = Path(tempfile.mkdtemp(prefix="llava-serve-", dir=base if len(base) < 60 else "/tmp"))
        if len(str(home / "tmp" / ".ts.sock.65535").encode()) > SOCKET_PATH_LIMIT:
            raise ServeError(f"{home}: this path is too long for unix sockets; choose a shorter home")
        (home / "logs").mkdir(parents=True, exist_ok=True)
        return cls(home, is_temporary=folder is None)

    @property
    def temp(self) -> Path:
        """The folder for temporary files."""
        return self.folder / "tmp"

    @property
    def logs(self) -> Path:
        """The folder for logs."""
        return self.folder / "logs"

    def clear_temp(self) -> None:
        """Make an empty folder for temporary files. A killed server leaves files in it."""
        shutil.rmtree(self.temp, ignore_errors=True)
        self.temp.mkdir()

    def remove(self, keep_logs: bool = False) -> None:
        """Delete a temporary home, or only the folders in it that hold no logs."""
        if not self.is_temporary:
            return
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path.is_dir() and path != self.logs:
                shutil.rmtree(path, ignore_errors=True)
