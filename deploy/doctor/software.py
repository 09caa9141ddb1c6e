"""Check the programs: Python, the pinned packages, Java, HAProxy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .findings import REPO, Finding, Subject, error, ok, warning

_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)")
_MIN_HAPROXY = (2, 6)  # deploy.serve.haproxy has the same; a test compares them
_MIN_JAVA = 17  # so does deploy.serve.java


def check_python(_: Subject) -> Iterator[Finding]:
    """Report the version of Python and where it runs."""
    inside = "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    yield ok("python", f"Python {platform.python_version()} in {inside} ({sys.prefix})")


def check_packages(_: Subject, pins: Path = REPO / "requirements.txt") -> Iterator[Finding]:
    """Compare the installed packages with the pins."""
    missing, other = [], []
    expected = read_pins(pins)
    for name, version in expected.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed.partition("+")[0] != version:
            other.append(f"{name} must be {version}, got {installed}")
    if missing:
        yield error("packages", f"not installed: {', '.join(missing)}", "run: make env")
    for difference in other:
        yield error("packages", difference, "run: make env (it installs the versions that requirements.txt pins)")
    if not missing and not other:
        yield ok("packages", f"all {len(expected)} packages of requirements.txt have their pinned versions")


def read_pins(path: Path) -> dict[str, str]:
    """Return the pinned version of each package in a requirements file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {match[1]: match[2] for line in lines if (match := _PIN.match(line))}


def check_java(subject: Subject) -> Iterator[Finding]:
    """Check that Java is recent enough for TorchServe."""
    home = subject.environment.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else shutil.which("java", path=subject.environment.get("PATH"))
    origin = f" (JAVA_HOME is {home}; it has priority over PATH)" if home else ""
    remedy = f"install Java {_MIN_JAVA} or later, see: scripts/need_java.sh" + (", or unset JAVA_HOME" if home else "")
    banner = _output(java, "-version") if java else None
    if banner is None:
        yield error("java", f"Java is not found{origin}", remedy)
        return
    version = re.search(r'version "(\d+)([^"]*)', banner)
    if version is None or int(version[1]) < _MIN_JAVA:
        got = f"{version[1]}{version[2]}" if version else "a program without a version"
        yield error("java", f"Java must be {_MIN_JAVA} or later, got {got} at {java}{origin}", remedy)
        return
    yield ok("java", f"Java {version[1]}{version[2]} ({java})")


def check_haproxy(subject: Subject) -> Iterator[Finding]:
    """Check that HAProxy is installed and recent enough. A server runs without it, with less."""
    path = subject.environment.get("PATH", os.defpath)
    haproxy = shutil.which("haproxy", path=f"{path}:/usr/sbin")
    least = ".".join(map(str, _MIN_HAPROXY))
    remedy = "run: scripts/need_haproxy.sh --install"
    text = _output(haproxy, "-v") if haproxy else None
    if text is None:
        without = "HAProxy is not found: TorchServe itself listens, /ping answers 200 while the model loads"
        yield warning("haproxy", without, remedy)
        return
    version = re.search(r"version (\d+)\.(\d+)\S*", text)
    if version is None or (int(version[1]), int(version[2])) < _MIN_HAPROXY:
        got = version[0].removeprefix("version ") if version else "a program without a version"
        yield warning("haproxy", f"HAProxy must be {least} or later, got {got}: it is not used", remedy)
        return
    yield ok("haproxy", f"HAProxy {version[0].removeprefix('version ')} ({haproxy})")


def _output(program: str, option: str) -> str | None:
    """Return what a program prints, or None if it does not run."""
    try:
        done = subprocess.run([program, option], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr
