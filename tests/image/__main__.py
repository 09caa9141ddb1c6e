"""`make image-test`: build the image, run it as SageMaker does, hold a chat through it, and measure it.

The record is bench/results/image.json and image.log. Needs root, and nothing from a container registry: the base is
made with debootstrap, and the image with buildah in a storage that is deleted at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.container.image import ImageError
from deploy.options import Parser

from .building import IMAGE, make_image, need_tools
from .log import CheckError, Log, run
from .running import READY_LIMIT_S, STOP_LIMIT_S, check_refusal, try_container

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "models" / "shapes"
OWN_LAYERS_LIMIT_BYTES = 400_000_000
DISK_BYTES = 12 << 30  # for the builder's copies of all layers

NOTES = [
    "own_bytes: tar files of the layers above the base, less that with torch and what it requires; no weights there.",
    "gzip_bytes: what a registry keeps and counts. Both sizes are those of the files that `buildah push` writes.",
    "The base is a stand-in for python:3.11-slim-bookworm, made with debootstrap.",
    "ready_s: from the container's start until its first session is open.",
    "again_s: from the worker's death by SIGKILL to the end of the next chat.",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Test the image. Return the exit code: 1 after an error or above a limit."""
    args = parse_args(argv)
    log = Log(args.out / "image.log")
    try:
        with workplace(args.work) as work:
            found = test(work, log)
    except (ImageError, CheckError, OSError) as err:
        log.say(f"error: {err}")
        return 1
    except KeyboardInterrupt:
        log.say("interrupted")
        return 130
    document = {"bench": "image", "facts": facts(), **found, "notes": NOTES}
    (args.out / "image.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    problems = exceeded(found)
    for problem in problems:
        log.say(f"error: {problem}")
    log.say("a limit is exceeded" if problems else "all checks passed")
    return 1 if problems else 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(
        prog="python -m tests.image",
        description="Build the container's image with buildah, run it as SageMaker does, chat through it, measure it.",
    )
    add = parser.add_argument
    results = REPO / "bench" / "results"
    add("--out", type=Path, default=results, metavar="DIR", help="folder of the record (bench/results)")
    add("--work", type=Path, default=REPO / ".cache", metavar="DIR", help="folder of the temporary files (.cache)")
    return parser.parse_args(argv)


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Make a folder for the builder's storage and all other files. Delete it afterwards, with images and containers."""
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < DISK_BYTES:
        raise ImageError(f"{folder} must have {DISK_BYTES / 1e9:.0f} GB free, got {free / 1e9:.1f} GB")
    work = Path(tempfile.mkdtemp(prefix="image-test-", dir=folder))
    try:
        yield work
    finally:
        if str(work) in Path("/proc/self/mountinfo").read_text():
            print(f"{work} was not deleted: a file system is still mounted below it", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)


def test(work: Path, log: Log) -> dict[str, Any]:
    """Run every step. Return the measurements. Raise `ImageError` or `CheckError`."""
    os.environ["BUILDAH_ISOLATION"] = "chroot"
    builder = ["buildah", "--root", f"{work}/storage", "--runroot", f"{work}/run", "--storage-driver", "vfs"]
    need_tools(log)
    log.say("packing models/shapes")
    run([str(REPO / "build_mar.sh"), "--dtype", "float32", "--model", str(MODEL), "--output", str(work)])
    found = make_image(builder, work, log)
    root = Path(run([*builder, "mount", run([*builder, "from", IMAGE])]))
    log.say(f"without a model: {check_refusal(builder, root, work / 'refusal.log')}")
    return found | try_container(builder, root, work, log)


def exceeded(found: dict[str, Any]) -> list[str]:
    """Return the limits that are exceeded."""
    limits = {"own_bytes": OWN_LAYERS_LIMIT_BYTES, "ready_s": READY_LIMIT_S, "stopped_s": STOP_LIMIT_S}
    return [
        f"`{name}` must be at most {limit:,}, got {found[name]:,}"
        for name, limit in limits.items()
        if found[name] > limit
    ]


def facts() -> dict[str, Any]:
    """Return where and when this was measured."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=7"]
    commit = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": commit or None,
    }


if __name__ == "__main__":
    sys.exit(main())
