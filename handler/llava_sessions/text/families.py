"""The families that are served, and models that are not: families.toml, as the loader needs it.

Standard library only. deploy/pack/families.py reads the sizes of the published checkpoints from the same file.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("families.toml")


@dataclass(frozen=True)
class Family:
    """A family that is served. `type`: the `model_type` of its config.json.

    `class_name`: of its model in transformers. `text`, `towers`: model types of the text model of a config.json that
    names none, and of its vision towers, the usual one first. `processor`: the module of `text.processors` that makes
    its processor; None: transformers' own needs no torchvision. `has_clips`: its checkpoints were trained on clips.
    `ids`: of published checkpoints on the hub.
    """

    type: str
    title: str
    class_name: str
    text: str
    towers: tuple[str, ...]
    processor: str | None
    has_clips: bool
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A well-known model that is not served. `remedy`: what to pack instead; empty if there is nothing similar."""

    type: str
    title: str
    reason: str
    remedy: str


@functools.cache
def families() -> Mapping[str, Family]:
    """Return the families that are served, by model type, in the order of the table."""
    return {kind: _family(kind, row) for kind, row in _table()["families"].items()}


@functools.cache
def texts() -> tuple[str, ...]:
    """Return the model types of the text models that are served."""
    return tuple(_table()["texts"])


@functools.cache
def refused() -> Mapping[str, Refused]:
    """Return the well-known models that are not served, by model type."""
    rows = _table()["refused"].items()
    return {kind: Refused(kind, row["title"], row["reason"], row.get("remedy", "")) for kind, row in rows}


def _family(kind: str, row: dict[str, Any]) -> Family:
    return Family(
        type=kind,
        title=row["title"],
        class_name=row["class"],
        text=row["text"],
        towers=tuple(row["towers"]),
        processor=row.get("processor"),
        has_clips="frame_tokens" in row,
        ids=tuple(name for checkpoint in row["checkpoints"] for name in checkpoint["ids"]),
    )


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
