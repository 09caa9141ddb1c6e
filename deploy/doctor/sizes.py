"""The sizes of a checkpoint and of its sessions, from its config.json. docs/operations.md has the formulas."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.pack.checkpoint import weight_files
from deploy.sagemaker.capacity import KV_STEP_TOKENS

TEXT_TOKENS = 1024  # of a conversation, as in `llava-deploy capacity`
# Text model -> hidden size, layers and KV heads where config.json omits them: the defaults of transformers.
_USUAL = {"llama": (4096, 32, 32), "mistral": (4096, 32, 8), "qwen2": (4096, 32, 32)}
# Family -> image tokens of the largest picture, as a multiple of those of one tile (deploy/sagemaker/capacity.py).
_TILES = {"llava": 1.0, "llava_next": 2928 / 576, "llava_onevision": 7371 / 729}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """Sizes in bytes of a checkpoint's weights as stored, and of a session's parts with `number_bytes` a number."""

    family: str
    stored_dtype: str
    stored_bytes: int
    hidden: int
    kv_numbers: int  # of one token in all layers
    picture_tokens: int
    context_tokens: int

    @classmethod
    def read(cls, folder: Path) -> Sizes:
        """Return the sizes of a checkpoint that is complete."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or {}
        hidden, layers, heads = _USUAL.get(text.get("model_type", "llama"), _USUAL["llama"])
        hidden = text.get("hidden_size", hidden)
        heads_of_queries = text.get("num_attention_heads", 32)
        head_dim = text.get("head_dim") or hidden // heads_of_queries
        kv_heads = text.get("num_key_value_heads") or text.get("num_attention_heads", heads)
        return cls(
            family=config.get("model_type", ""),
            stored_dtype=_stored_dtype(config),
            stored_bytes=sum(path.stat().st_size for path in weight_files(folder)),
            hidden=hidden,
            kv_numbers=text.get("num_hidden_layers", layers) * 2 * kv_heads * head_dim,
            picture_tokens=_picture_tokens(config),
            context_tokens=text.get("max_position_embeddings", 4096),
        )

    def weights_bytes(self, dtype: str, on_cuda: bool) -> int:
        """Return the size of the weights in memory. On a CPU 16-bit weights stay 16-bit (decision 0008)."""
        stored, loaded = _BYTES[self.stored_dtype], _BYTES[dtype]
        if not on_cuda:
            loaded = min(stored, loaded)
        return self.stored_bytes * loaded // stored

    def features_bytes(self, dtype: str) -> int:
        """Return the size of the features of one picture."""
        return self.picture_tokens * self.hidden * _BYTES[dtype]

    def session_bytes(self, dtype: str) -> int:
        """Return the size of a session with one picture and `TEXT_TOKENS` of text, at most a whole context."""
        tokens = min(self.picture_tokens + TEXT_TOKENS, self.context_tokens)
        return self.features_bytes(dtype) + self.kv_bytes(tokens, dtype)

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Return the size of a KV cache with room for this number of tokens."""
        steps = -(-tokens // KV_STEP_TOKENS)
        return steps * KV_STEP_TOKENS * self.kv_numbers * _BYTES[dtype]


def _stored_dtype(config: dict[str, Any]) -> str:
    text = config.get("text_config") or {}
    found = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return found if found in _BYTES else "float16"


def _picture_tokens(config: dict[str, Any]) -> int:
    vision = config.get("vision_config") or {}
    patches = (vision.get("image_size", 336) // vision.get("patch_size", 14)) ** 2
    return int(patches * _TILES.get(config.get("model_type", ""), 1.0))
