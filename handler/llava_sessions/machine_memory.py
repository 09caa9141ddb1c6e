"""The memory that this process may use: the machine's RAM, or the limit of its container if that is smaller.

Linux limits a container by control groups, version 1 or 2 (Documentation/admin-guide/cgroup-v1/memory.rst and
cgroup-v2.rst of the kernel).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_V1_FILE = "memory.limit_in_bytes"
_V2_FILE = "memory.max"


def memory_bytes(root: Path = Path("/")) -> int:
    """Return the smallest of the RAM and all limits that apply. `root` has `proc` and `sys`, for tests."""
    ram_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([ram_bytes, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Yield the limits of this process's control groups and of all groups above them."""
    for folder, name in _group_files(root):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            yield int((folder / name).read_text())


def _group_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield each folder that may have a limit, and the name of the file with it.

    A container usually sees its own group at the top of the mounted tree, whatever /proc/self/cgroup names.
    """
    mounted = root / "sys" / "fs" / "cgroup"
    yield mounted, _V2_FILE
    yield mounted / "memory", _V1_FILE
    try:
        groups = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        number, controllers, path = (*group.split(":", 2), "", "")[:3]
        is_v2 = number == "0" and not controllers
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        top = mounted if is_v2 else mounted / "memory"
        inner = PurePosixPath(path.lstrip("/"))
        if ".." in inner.parts:
            continue  # the group is outside this process's view
        for folder in (inner, *inner.parents):
            yield top / folder, _V2_FILE if is_v2 else _V1_FILE
