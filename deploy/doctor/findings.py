"""A finding of a check, and the subject of all checks."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

REPO = Path(__file__).resolve().parents[2]
MIB = 2**20
GIB = 2**30
# The form of an ID on the hub. deploy.pack.source has the same; a test compares them.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is what to do; empty if nothing is."""

    level: Level
    check: str
    found: str
    remedy: str = ""

    def line(self) -> str:
        """Return the finding as a line of text."""
        remedy = f"  ->  {self.remedy}" if self.remedy else ""
        return f"{self.level:8} {self.check:14} {self.found}{remedy}"

    def record(self) -> dict[str, str]:
        """Return the finding as an object of `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """What is checked. `sessions`, `dtype` and `device` are None where the configuration decides.

    `environment` is that of the server to be started.
    """

    port: int = 8080
    model: str = "models/shapes"
    config: Path = REPO / "handler" / "model-config.yaml"
    properties: Path = REPO / "config.properties"
    worker_env: Path = REPO / "deploy" / "serve" / "local.env"
    output: Path = REPO / "model_store"
    sessions: int | None = None
    dtype: str | None = None
    device: str | None = None
    is_live: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder, or None if `model` is an ID on the hub.

        A name in a folder that exists is a folder too, even if there is none with this name.
        """
        path = Path(os.path.expanduser(self.model))
        if not os.path.exists(path) and not path.is_absolute():
            path = REPO / path
        is_inside = "/" in self.model and os.path.isdir(path.parent)
        return path if os.path.exists(path) or is_inside or not HUB_ID.fullmatch(self.model) else None


def ok(check: str, found: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding("ok", check, found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """Return a finding with which a server starts, but not as the user may expect."""
    return Finding("warning", check, found, remedy)


def error(check: str, found: str, remedy: str) -> Finding:
    """Return a finding with which a server does not start, or does not serve."""
    return Finding("error", check, found, remedy)
