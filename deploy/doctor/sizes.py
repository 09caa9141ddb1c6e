"""The sizes of a checkpoint and of its sessions, from its config.json. docs/operations.md has the formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deploy.pack.checkpoint import weight_files
from deploy.pack.families import Family, TextModel, families, texts, towers
from deploy.sagemaker.capacity import KV_STEP_TOKENS, SCALE_BYTES

TEXT_TOKENS = 1024  # of a conversation, as in `llava-deploy capacity`
_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
Row = TypeVar("Row")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class SizesError(ValueError):
    """A value of config.json is not a size. The message is the problem."""


@dataclass(frozen=True)
class Sizes:
    """Sizes in bytes of a checkpoint's weights as stored, and of a session's parts.

    `linear_numbers`, `linear_outputs`: of the language model's linears. `tied_head`: the same two of a head that is the
    table of embeddings, else 0: with int8 weights such a head has weights of its own.
    """

    family: str
    stored_dtype: str
    stored_bytes: int
    hidden: int
    kv_numbers: int  # of one token in all layers
    head_dim: int
    linear_numbers: int
    linear_outputs: int
    tied_head: tuple[int, int]
    picture_tokens: int
    context_tokens: int

    @classmethod
    def read(cls, folder: Path) -> Sizes:
        """Return the sizes of a checkpoint that is complete. Raise `SizesError` for a number that is none."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = _row(families(), config.get("model_type"), "model_type")
        text = _text_sizes(_section(config, "text_config"), family)
        linears, tied_head = _language_linears(folder)
        return cls(
            family=family.type,
            stored_dtype=_stored_dtype(config),
            stored_bytes=sum(path.stat().st_size for path in weight_files(folder)),
            hidden=text.hidden,
            kv_numbers=text.layers * 2 * text.kv_heads * text.head_dim,
            head_dim=text.head_dim,
            linear_numbers=sum(rows * columns for rows, columns in linears),
            linear_outputs=sum(rows for rows, _ in linears),
            tied_head=tied_head,
            picture_tokens=_picture_tokens(config, family),
            context_tokens=text.context,
        )

    def weights_bytes(self, dtype: str, on_cuda: bool, weights: str = "auto") -> int:
        """Return the size of the weights in memory. On a CPU 16-bit weights stay 16-bit (decision 0008).

        `weights`: as `llava.weights`.
        """
        stored, loaded = _BYTES[self.stored_dtype], _BYTES[dtype]
        if not on_cuda:
            loaded = min(stored, loaded)
        whole = self.stored_bytes * loaded // stored
        if weights != "int8":
            return whole
        return whole - self.linear_numbers * loaded + self._int8_bytes

    @property
    def _int8_bytes(self) -> int:
        numbers, outputs = self.tied_head
        return self.linear_numbers + numbers + (self.linear_outputs + outputs) * SCALE_BYTES

    def features_bytes(self, dtype: str) -> int:
        """Return the size of the features of one picture."""
        return self.picture_tokens * self.hidden * _BYTES[dtype]

    def session_bytes(self, dtype: str, kv_dtype: str = "auto") -> int:
        """Return the size of a session with one picture and `TEXT_TOKENS` of text, at most a whole context."""
        tokens = min(self.picture_tokens + TEXT_TOKENS, self.context_tokens)
        return self.features_bytes(dtype) + self.kv_bytes(tokens, dtype, kv_dtype)

    def kv_bytes(self, tokens: int, dtype: str, kv_dtype: str = "auto") -> int:
        """Return the size of a KV cache with room for this number of tokens."""
        token_bytes = self.kv_numbers * _BYTES[dtype]
        if kv_dtype == "int8":
            token_bytes = self.kv_numbers + self.kv_numbers // self.head_dim * SCALE_BYTES
        return -(-tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS * token_bytes


def _language_linears(folder: Path) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return outputs and inputs of the language model's linears, and numbers and outputs of a tied head.

    From the headers of the weights' files, as the engine does (handler/llava_sessions/engine/weight_files.py).
    """
    linears = []
    embeddings = (0, 0)
    has_head = False
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            continue  # the index of shards
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            shape = entry.get("shape", ())
            is_language = "language_model" in name or name.startswith("lm_head")
            has_head = has_head or "lm_head" in name
            if "embed_tokens" in name:
                embeddings = (shape[0] * shape[1], shape[0])
            elif is_language and len(shape) == 2:
                linears.append((shape[0], shape[1]))
    return linears, (0, 0) if has_head else embeddings


def _row(table: Mapping[str, Row], kind: object, key: str) -> Row:
    """Return the row of families.toml for a model type. Raise `SizesError` if there is none: the loader refuses it."""
    row = table.get(str(kind))
    if row is None:
        raise SizesError(f"config.json: `{key}` must be {' or '.join(table)}, got {kind!r}")
    return row


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an object of config.json, empty if it is absent."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise SizesError(f"config.json: `{key}` must be an object, got {type(value).__name__}")
    return value


def _text_sizes(section: dict[str, Any], family: Family) -> TextModel:
    """Return the sizes of a `text_config`. Raise `SizesError` for a number that is none."""
    usual = _row(texts(), section.get("model_type", family.text), "text_config.model_type")
    for key in _COUNTS:
        _count(section, key, 1)
    return usual.with_values_of(section)


def _count(section: dict[str, Any], key: str, usual: int) -> int:
    """Return a number of config.json, or the usual one if it is absent."""
    value = section.get(key)
    if value is None:
        return usual
    if type(value) is not int or value < 1:
        raise SizesError(f"config.json: `{key}` must be an integer from 1, got {value!r}")
    return value


def _side(section: dict[str, Any], key: str, usual: int) -> int:
    """Return the side of a square in pixels, which config.json has as a number or as a pair."""
    value = section.get(key)
    is_square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return _count({key: value[0]} if is_square else section, key, usual)


def _stored_dtype(config: dict[str, Any]) -> str:
    text = _section(config, "text_config")
    found = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return found if found in _BYTES else "float16"


def _picture_tokens(config: dict[str, Any], family: Family) -> int:
    vision = _section(config, "vision_config")
    tower = _row(towers(), vision.get("model_type", family.towers[0]), "vision_config.model_type")
    side = _side(vision, "image_size", tower.image_size) // _side(vision, "patch_size", tower.patch_size)
    ratio = config.get("downsample_ratio")
    if ratio is not None and (not isinstance(ratio, float) or not 0 < ratio <= 1):
        raise SizesError(f"config.json: `downsample_ratio` must be a number from 0 to 1, got {ratio!r}")
    return family.tokens_of_picture(side, ratio)
