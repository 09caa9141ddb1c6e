"""Build the container's image: with docker if its daemon answers, else with buildah.

This machine's pip settings are passed to the build as secrets, so that they are in no layer of the image. `make
image-test` builds and runs the image.
"""

from __future__ import annotations

import argparse
import configparser
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from deploy.options import Parser, error_prefix

REPO = Path(__file__).resolve().parents[2]
PROG = "python -m deploy.container.image"
TORCH = ("cuda", "cpu")
PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "cert")
SECRETS = Path("/run/secrets")  # folder of the secrets during the build
FOLDERS = Path("/run/pip")  # folder, during the build, of the folders that pip's settings name


class ImageError(RuntimeError):
    """The image cannot be built. The message is for the person at the terminal."""


@dataclass(frozen=True)
class PipSettings:
    """This machine's pip settings, for the build. `folders` are folders of this machine by their path in the build."""

    values: dict[str, str] = field(default_factory=dict)
    certificates: Path | None = None
    folders: dict[str, Path] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write a pip.conf, with one line for each value of a setting."""
        parser = configparser.RawConfigParser()
        parser["global"] = {key: value.replace(" ", "\n") for key, value in self.values.items()}
        with path.open("w", encoding="utf-8") as file:
            parser.write(file)


def pip_settings(listing: str) -> PipSettings:
    """Parse the output of `pip config list`: key='value' lines."""
    found = {}
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):  # the environment wins
        name, _, quoted = line.partition("=")
        key = name.rpartition(".")[2]
        if key in PIP_SETTINGS and quoted:
            found[key] = shlex.split(quoted)[0]
    folders: dict[str, Path] = {}
    values = {key: " ".join(_moved(part, folders) for part in value.split()) for key, value in found.items()}
    certificates = Path(values["cert"]) if "cert" in values else None
    if certificates:
        values["cert"] = str(SECRETS / "pip_cert")
    return PipSettings(values, certificates, folders)


def _moved(value: str, folders: dict[str, Path]) -> str:
    """Return the path or file: URL that a folder of this machine has in the build. Return other values unchanged."""
    url = urlsplit(value)
    path = Path(unquote(url.path))
    if url.scheme not in ("", "file") or not path.is_dir():
        return value
    # The pages of an index link to files outside its folder, so the parent folder is passed.
    top = path.parent if url.scheme else path
    inside = next((name for name, known in folders.items() if known == top), str(FOLDERS / str(len(folders))))
    folders[inside] = top
    moved = Path(inside) / path.relative_to(top)
    return f"file://{moved}" if url.scheme else str(moved)


def find_builder() -> str:
    """Return `docker` if its daemon answers, else `buildah`. Raise `ImageError` without both."""
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        return "docker"
    if shutil.which("buildah"):
        return "buildah"
    raise ImageError("no docker daemon answers and buildah is missing (Debian, Ubuntu: sudo apt-get install buildah)")


def build_command(
    builder: Sequence[str], tag: str, arguments: dict[str, str], pip: PipSettings, pip_conf: Path
) -> list[str]:
    """Return the command line of a build. `builder` is docker or buildah with global options, such as the storage."""
    command = [*builder, "build", "--file", str(REPO / "Dockerfile"), "--tag", tag]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    if pip.values:
        command += ["--secret", f"id=pip,src={pip_conf}"]
    if pip.certificates:
        command += ["--secret", f"id=pip_cert,src={pip.certificates}"]
    if builder[0] == "buildah":
        command += ["--layers", "--format", "docker"]  # one layer per instruction, as docker makes them
        for inside, outside in pip.folders.items():
            command += ["--volume", f"{outside}:{inside}:ro"]
    elif pip.folders:
        names = ", ".join(map(str, pip.folders.values()))
        raise ImageError(
            f"pip's settings name folders that docker cannot mount into a build ({names}); use --builder buildah"
        )
    return [*command, str(REPO)]


def build(builder: Sequence[str], tag: str, arguments: dict[str, str], log: IO[bytes] | None = None) -> float:
    """Build the image. Return the seconds that it took. Raise `ImageError`.

    The builder prints its progress on the terminal or into the file `log`.
    """
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    pip = pip_settings(listing)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llava-image-") as scratch:
        pip_conf = Path(scratch, "pip.conf")
        pip.write(pip_conf)
        command = build_command(builder, tag, arguments, pip, pip_conf)
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT if log else None, check=False).returncode
    if code:
        raise ImageError(f"{builder[0]} could not build the image (exit code {code}); see its last lines")
    return time.monotonic() - began


# --- the command line -------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(
        prog=PROG,
        description="Build the SageMaker container's image, without a model; build_mar.sh packs the model. pip's "
        "settings on this machine (index, proxy, certificates) are passed to the build as secrets and are in no layer.",
    )
    add = parser.add_argument
    add(
        "--torch",
        choices=TORCH,
        default="cuda",
        help="cuda needs NVIDIA driver 580 (default: %(default)s)",
    )
    add("--tag", help="the image's name (default: llava-sessions:cuda or :cpu)")
    add("--base", metavar="IMAGE", help="base image (default: BASE_IMAGE of the Dockerfile)")
    add("--builder", choices=["docker", "buildah"], help="default: docker if its daemon answers, else buildah")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the image. Return the exit code."""
    args = parse_args(argv)
    tag = args.tag or f"llava-sessions:{args.torch}"
    try:
        builder = args.builder or find_builder()
        print(f"building {tag} with {builder} ...", flush=True)
        seconds = build([builder], tag, {"TORCH": args.torch} | ({"BASE_IMAGE": args.base} if args.base else {}))
    except (ImageError, OSError) as err:
        print(f"{error_prefix(PROG)}error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"built {tag} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
