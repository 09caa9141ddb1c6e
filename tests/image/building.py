"""Build the base image and the image itself with buildah, and measure the layers."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.container.image import ImageError, build

from .log import Log, run

DEBIAN = "bookworm"
BASE = "localhost/llava-base:test"
IMAGE = "localhost/llava-sessions:test"
TOOLS = ("buildah", "debootstrap")
DOCUMENTATION = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists", "var/cache/apt")


@dataclass(frozen=True)
class Layer:
    """One layer of the image, with its size as a tar file and gzipped, as registries store it."""

    what: str
    made_by: str
    bytes: int
    gzip_bytes: int


def need_tools(log: Log) -> None:
    """Install buildah and debootstrap if they are missing. Raise `ImageError` without root."""
    if os.geteuid() != 0:
        raise ImageError("root is required for debootstrap and the container's mounts")
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        log.say(f"apt-get install {' '.join(missing)}")
        run(["apt-get", "update", "-q"])
        run(["apt-get", "install", "-qy", "--no-install-recommends", *missing])


def make_image(builder: Sequence[str], work: Path, log: Log) -> dict[str, Any]:
    """Build base and image. Return the build time and the sizes of the layers."""
    log.say(f"making a base image from Debian {DEBIAN} with debootstrap")
    _make_base(builder, work)
    log.say("building the image with torch for CPU")
    with (work / "build.log").open("wb") as file:
        try:
            seconds = build(builder, IMAGE, {"BASE_IMAGE": BASE, "TORCH": "cpu", "TORCH_CPU_INDEX": ""}, log=file)
        except ImageError as err:
            last = (work / "build.log").read_text(errors="replace").splitlines()[-15:]
            raise ImageError("\n".join([str(err), *last])) from None
    log.say(f"built in {seconds:.0f} s; measuring its layers")
    layers = _layers(builder, work)
    for layer in layers:
        log.say(f"  {layer.what:5}  {layer.bytes / 1e6:7.1f} MB, gzipped {layer.gzip_bytes / 1e6:6.1f} MB")
    own_bytes = sum(layer.bytes for layer in layers if layer.what == "own")
    own_gzip_bytes = sum(layer.gzip_bytes for layer in layers if layer.what == "own")
    log.say(f"own layers {own_bytes / 1e6:.1f} MB, gzipped {own_gzip_bytes / 1e6:.1f} MB")
    return {
        "build_s": round(seconds),
        "layers": [asdict(layer) for layer in layers],
        "own_bytes": own_bytes,
        "own_gzip_bytes": own_gzip_bytes,
        "image_bytes": sum(layer.bytes for layer in layers),
    }


def _make_base(builder: Sequence[str], work: Path) -> None:
    """Make an image with Debian's Python 3.11 and pip, without documentation, like the default BASE_IMAGE."""
    root = work / "base"
    packages = "ca-certificates,python3,python3-pip,python3-venv"
    run(["debootstrap", "--variant=minbase", f"--include={packages}", DEBIAN, str(root), *_mirror()])
    for folder in DOCUMENTATION:
        shutil.rmtree(root / folder, ignore_errors=True)
    container = run([*builder, "from", "scratch"])
    run([*builder, "add", "--quiet", container, str(root), "/"])
    run([*builder, "commit", "--quiet", "--rm", container, BASE])
    shutil.rmtree(root)


def _mirror() -> list[str]:
    """Return this machine's mirror of Debian's packages; empty on another system."""
    command = ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", f"Codename: {DEBIAN}"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return listing[:1]


def _layers(builder: Sequence[str], work: Path) -> list[Layer]:
    """Return the image's layers, from the files that a push to a registry would send."""
    folder = work / "oci"
    run([*builder, "push", "--quiet", "--format", "oci", IMAGE, f"oci:{folder}:test"])
    index = json.loads((folder / "index.json").read_text())
    manifest = json.loads(_blob(folder, index["manifests"][0]).read_text())
    history = json.loads(_blob(folder, manifest["config"]).read_text())["history"]
    made_by = [entry["created_by"] for entry in history if not entry.get("empty_layer")]
    found = []
    for number, (made, entry) in enumerate(zip(made_by, manifest["layers"], strict=True)):
        what = "base" if number == 0 else "torch" if "torch===" in made else "own"
        found.append(Layer(what, " ".join(made.split())[-80:], _unzipped_bytes(_blob(folder, entry)), entry["size"]))
    shutil.rmtree(folder)
    return found


def _blob(folder: Path, entry: dict[str, Any]) -> Path:
    return folder / "blobs" / entry["digest"].replace(":", "/")


def _unzipped_bytes(path: Path) -> int:
    count = 0
    with gzip.open(path) as file:
        while chunk := file.read(1 << 20):
            count += len(chunk)
    return count
