"""The sizes of a checkpoint and of its sessions, from its config.json. docs/operations.md has the formulas."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.pack.checkpoint import weight_files
from deploy.sagemaker.capacity import KV_STEP_TOKENS, SCALE_BYTES

TEXT_TOKENS = 1024  # of a conversation, as in `llava-deploy capacity`
# Text model -> hidden size, layers and KV heads where config.json omits them: the defaults of transformers.
_USUAL = {"llama": (4096, 32, 32), "mistral": (4096, 32, 8), "qwen2": (4096, 32, 32)}
# Family -> image tokens of the largest picture, as a multiple of those of one tile (deploy/sagemaker/capacity.py).
_TILES = {"llava": 1.0, "llava_next": 2928 / 576, "llava_onevision": 7371 / 729}
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
        text = _section(config, "text_config")
        hidden, layers, heads = _USUAL.get(str(text.get("model_type", "llama")), _USUAL["llama"])
        hidden = _count(text, "hidden_size", hidden)
        heads_of_queries = _count(text, "num_attention_heads", 32)
        head_dim = _count(text, "head_dim", hidden // heads_of_queries)
        kv_heads = _count(text, "num_key_value_heads", _count(text, "num_attention_heads", heads))
        linears, tied_head = _language_linears(folder)
        return cls(
            family=config.get("model_type", ""),
            stored_dtype=_stored_dtype(config),
            stored_bytes=sum(path.stat().st_size for path in weight_files(folder)),
            hidden=hidden,
            kv_numbers=_count(text, "num_hidden_layers", layers) * 2 * kv_heads * head_dim,
            head_dim=head_dim,
            linear_numbers=sum(rows * columns for rows, columns in linears),
            linear_outputs=sum(rows for rows, _ in linears),
            tied_head=tied_head,
            picture_tokens=_picture_tokens(config),
            context_tokens=_count(text, "max_position_embeddings", 4096),
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


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an object of config.json, empty if it is absent."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise SizesError(f"config.json: `{key}` must be an object, got {type(value).__name__}")
    return value


def _count(section: dict[str, Any], key: str, usual: int) -> int:
    """Return a number of config.json, or the usual one if it is absent."""
    value = section.get(key)
    if value is None:
        return usual
    if type(value) is not int or value < 1:
        raise SizesError(f"config.json: `{key}` must be an integer from 1, got {value!r}")
    return value


def _stored_dtype(config: dict[str, Any]) -> str:
    text = _section(config, "text_config")
    found = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return found if found in _BYTES else "float16"


def _picture_tokens(config: dict[str, Any]) -> int:
    vision = _section(config, "vision_config")
    patches = (_count(vision, "image_size", 336) // _count(vision, "patch_size", 14)) ** 2
    return int(patches * _TILES.get(config.get("model_type", ""), 1.0))
