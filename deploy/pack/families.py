"""The families that are served, with sizes of their published checkpoints: the handler's families.toml.

Standard library only. The handler reads the same file (handler/llava_sessions/text/families.py), and its comments
describe the keys.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .job import HANDLER_DIR

TABLE = HANDLER_DIR / "llava_sessions/text/families.toml"


@dataclass(frozen=True)
class TextModel:
    """The sizes of a text model. `kv_heads` None: as many as heads. `head_dim` None: `hidden` divided by `heads`.

    `context`: in tokens.
    """

    hidden: int
    layers: int
    heads: int
    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    biases: bool = False
    head_norms: bool = False

    def with_values_of(self, text_config: Mapping[str, Any]) -> TextModel:
        """Return the sizes of a `text_config`: these where it omits a key, and no None.

        `num_key_value_heads` null: as many as heads, as in transformers.
        """

        def value(key: str, usual: int) -> int:
            found = text_config.get(key)
            return usual if found is None else found

        heads = value("num_attention_heads", self.heads)
        hidden = value("hidden_size", self.hidden)
        is_null = text_config.get("num_key_value_heads", heads) is None
        kv_heads = heads if is_null else value("num_key_value_heads", self.kv_heads or heads)
        return replace(
            self,
            hidden=hidden,
            layers=value("num_hidden_layers", self.layers),
            heads=heads,
            kv_heads=kv_heads,
            context=value("max_position_embeddings", self.context),
            head_dim=value("head_dim", self.head_dim or hidden // heads),
        )


@dataclass(frozen=True)
class Tower:
    """A vision tower of the published checkpoints, and its sizes where a config.json omits them."""

    title: str
    image_size: int  # in pixels, of each side
    patch_size: int
    hidden: int
    layers: int
    intermediate: int
    vectors: int
    layer_vectors: int = 0

    @property
    def side(self) -> int:
        """The patches on one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def parameters(self) -> int:
        """Its parameters: a transformer over the patches of a tile, with biases and two norms in each layer."""
        patches = (3 * self.patch_size**2 + self.side**2 + self.vectors) * self.hidden
        attention = 4 * (self.hidden**2 + self.hidden)
        mlp = 2 * self.hidden * self.intermediate + self.intermediate + self.hidden
        return patches + self.layers * (attention + mlp + (4 + self.layer_vectors) * self.hidden)


@dataclass(frozen=True)
class Checkpoint:
    """The sizes of the text model of published checkpoints, whose IDs on the hub are `ids`. `context`: in tokens.

    `tied`: the head is the table of embeddings. `working_mib`, `int8_working_mib`: temporary tensors at their peak on a
    GPU, with weights and KV caches in 16 bits and in int8.
    """

    name: str
    ids: tuple[str, ...]
    text: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    context: int
    working_mib: int
    int8_working_mib: int
    tied: bool = False
    head_dim: int | None = None


@dataclass(frozen=True)
class Family:
    """A family that is served. `side`, of the methods: the patches on one side of a tile."""

    type: str
    title: str
    class_name: str
    text: str
    towers: tuple[str, ...]
    tiling: Literal["none", "grid", "dynamic"]
    checkpoints: tuple[Checkpoint, ...]
    tiles: int = 0
    downsample_ratio: float = 1.0
    frame_tokens: Literal["pooled", "tile"] | None = None
    processor: str | None = None

    def tokens_of_tile(self, side: int, downsample_ratio: float | None = None) -> int:
        """Return the features of one tile. `downsample_ratio` None: that of the published checkpoints."""
        return int(side * (downsample_ratio or self.downsample_ratio)) ** 2

    def tokens_of_picture(self, side: int, downsample_ratio: float | None = None) -> int:
        """Return the features of the largest picture: those of its tiles and of the whole picture, and line ends."""
        line_ends = math.isqrt(self.tiles) * side if self.tiling == "grid" else 0
        return (self.tiles + 1) * self.tokens_of_tile(side, downsample_ratio) + line_ends

    def tokens_of_frame(self, side: int, downsample_ratio: float | None = None) -> int | None:
        """Return the features of one frame of a clip, or None if the family has no clips."""
        if self.frame_tokens == "pooled":
            return math.ceil(side / 2) ** 2
        return self.tokens_of_tile(side, downsample_ratio) if self.frame_tokens else None


@dataclass(frozen=True)
class Refused:
    """A well-known model that is not served. `remedy`: what to pack instead; empty if there is nothing similar."""

    type: str
    title: str
    reason: str
    remedy: str = ""


@functools.cache
def families() -> Mapping[str, Family]:
    """Return the families that are served, by the `model_type` of config.json, in the order of the table."""
    return {kind: _family(kind, row) for kind, row in _table()["families"].items()}


@functools.cache
def texts() -> Mapping[str, TextModel]:
    """Return the text models that are served, by the `model_type` of `text_config`: their sizes where it omits them."""
    return {kind: TextModel(**row) for kind, row in _table()["texts"].items()}


@functools.cache
def towers() -> Mapping[str, Tower]:
    """Return the vision towers that are served, by the `model_type` of `vision_config`."""
    return {kind: Tower(**row) for kind, row in _table()["towers"].items()}


@functools.cache
def refused() -> Mapping[str, Refused]:
    """Return the well-known models that are not served, by model type."""
    return {kind: Refused(kind, **row) for kind, row in _table()["refused"].items()}


def _family(kind: str, row: dict[str, Any]) -> Family:
    rest = {key: value for key, value in row.items() if key not in ("class", "towers", "checkpoints")}
    published = tuple(Checkpoint(**{**one, "ids": tuple(one["ids"])}) for one in row["checkpoints"])
    return Family(type=kind, class_name=row["class"], towers=tuple(row["towers"]), checkpoints=published, **rest)


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
