"""The memory that a process may use: the RAM, and the limits of control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_sessions.machine_memory import memory_bytes

RAM = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
MIB = 2**20
# What the kernel reports for "no limit" in version 1.
UNLIMITED_V1 = "9223372036854771712"


def tree(root: Path, cgroup: str | None, **files: str) -> Path:
    """Make a tree of /proc and /sys. `files`: content by path below /sys/fs/cgroup, with "__" for "/"."""
    if cgroup is not None:
        (root / "proc" / "self").mkdir(parents=True)
        (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, content in files.items():
        folder, _, file = name.rpartition("__")
        path = root / "sys" / "fs" / "cgroup" / folder.replace("__", "/")
        path.mkdir(parents=True, exist_ok=True)
        file = {"v1": "memory.limit_in_bytes", "v2": "memory.max"}[file]
        (path / file).write_text(f"{content}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (None, {}, RAM),
        ("0::/\n", {}, RAM),
        ("0::/\n", {"v2": "max"}, RAM),
        ("0::/\n", {"v2": str(64 * MIB)}, 64 * MIB),
        ("0::/\n", {"v2": str(2**60)}, RAM),
        ("", {"v2": str(64 * MIB)}, 64 * MIB),
        # the limit of a group above
        ("0::/kube/pod/box\n", {"kube__pod__box__v2": "max", "kube__pod__v2": str(64 * MIB)}, 64 * MIB),
        ("0::/kube/box\n", {"kube__box__v2": str(99 * MIB), "kube__v2": str(64 * MIB), "v2": "max"}, 64 * MIB),
        # the tree is mounted at the container's own group
        ("0::/kube/box\n", {"v2": str(64 * MIB)}, 64 * MIB),
        ("0::/../other\n", {"v2": "max"}, RAM),
        # version 1
        ("9:memory:/\n", {"memory__v1": UNLIMITED_V1}, RAM),
        ("9:memory:/docker/box\n", {"memory__v1": str(64 * MIB)}, 64 * MIB),
        ("4:cpu:/a\n9:hugetlb,memory:/box\n", {"memory__box__v1": str(64 * MIB), "memory__v1": UNLIMITED_V1}, 64 * MIB),
        ("4:cpu:/box\n", {"memory__box__v1": str(64 * MIB)}, RAM),
        # both, as on hosts that use version 1 for memory
        ("9:memory:/box\n0::/box\n", {"memory__box__v1": str(64 * MIB)}, 64 * MIB),
        ("no such line\n\n", {"v2": "not a number"}, RAM),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, cgroup: str | None, files: dict[str, str], expected: int) -> None:
    assert memory_bytes(tree(tmp_path, cgroup, **files)) == expected


def test_this_machine_has_memory() -> None:
    assert 0 < memory_bytes() <= RAM
