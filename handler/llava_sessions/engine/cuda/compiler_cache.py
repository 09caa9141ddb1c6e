"""The folder of Triton's compiled kernels, which must be writable."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_VARIABLES = ("TRITON_CACHE_DIR", "TRITON_HOME")


def choose_cache_folder() -> None:
    """Set TRITON_CACHE_DIR if Triton's default folder, `~/.triton`, is not writable and no other is configured.

    The folder is in the system's temporary folder and belongs to this user only, because Triton runs what it finds
    there. Call it before Triton's first compilation.
    """
    if any(os.environ.get(name) for name in _VARIABLES) or _is_writable(Path(os.path.expanduser("~"), ".triton")):
        return
    os.environ["TRITON_CACHE_DIR"] = str(_private_folder())


def _is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private_folder() -> Path:
    """Return the user's folder of the last start, or a new one if that could be another user's."""
    folder = Path(tempfile.gettempdir(), f"llava-triton-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700:
        return folder
    return Path(tempfile.mkdtemp(prefix="llava-triton-"))
