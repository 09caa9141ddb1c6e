"""The sizes of published checkpoints: parameters, features and KV caches. They are made of the table of families.

Tests hold them equal to the models that transformers makes and to the engine's real allocations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploy.pack.families import Checkpoint, Family, Tower, families, texts, towers

from .instances import MIB

KV_STEP_TOKENS = 256  # step in which the engine's KV caches grow
BYTES_PER_NUMBER = 2  # bfloat16, and float16 where the GPU has no other
SCALE_BYTES = 4  # float32, of each output of a linear and of each key and value in int8

# The engine's reserve for forwards (engine/budget.py of the handler): temporary tensors times a factor, fragments, and
# captured CUDA graphs.
WORKING_FACTOR = 1.25
FRAGMENTS_BYTES = 256 * MIB
CONTEXT_BYTES = 448 * MIB  # CUDA's context and the kernels that it loads; 400 to 450 MiB with CUDA 12 and 13

Precision = Literal["auto", "int8"]  # of `llava.weights` and `llava.kv_dtype`


@dataclass(frozen=True)
class Shape:
    """A published checkpoint and the precision in which its weights and its KV caches are stored."""

    family: Family
    checkpoint: Checkpoint
    weights: Precision = "auto"
    kv: Precision = "auto"

    @property
    def name(self) -> str:
        """The name in tables."""
        return self.checkpoint.name

    @property
    def tower(self) -> Tower:
        """The vision tower."""
        return towers()[self.family.towers[0]]

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.checkpoint.head_dim or self.checkpoint.hidden // self.checkpoint.heads

    @property
    def picture_tokens(self) -> int:
        """The tokens of the largest picture."""
        return self.family.tokens_of_picture(self.tower.side)

    @property
    def kv_token_bytes(self) -> int:
        """The size of the keys and values of one token in all layers, with their scales."""
        return sum(_kv_parts(self))

    @property
    def features_bytes(self) -> int:
        """The size of the features of one picture."""
        return self.picture_tokens * self.checkpoint.hidden * BYTES_PER_NUMBER

    @property
    def parameters(self) -> int:
        """The parameters of language model, vision tower and projector."""
        sizes = self.checkpoint
        text = texts()[sizes.text]
        q_width, kv_width = sizes.heads * self.head_dim, sizes.kv_heads * self.head_dim
        biases = q_width + 2 * kv_width if text.biases else 0
        norms = 2 * sizes.hidden + (2 * self.head_dim if text.head_norms else 0)
        attention = 2 * sizes.hidden * q_width + 2 * sizes.hidden * kv_width + biases
        layer = attention + 3 * sizes.hidden * sizes.intermediate + norms
        tables = 1 if sizes.tied else 2
        language = tables * sizes.vocabulary * sizes.hidden + sizes.layers * layer + sizes.hidden
        return language + self.tower.parameters + _projector_parameters(self)

    @property
    def linears(self) -> tuple[int, int]:
        """The weights and the outputs of the language model's linears, which `weights: int8` stores in int8.

        A tied head then has weights of its own.
        """
        sizes = self.checkpoint
        q_width, kv_width = sizes.heads * self.head_dim, sizes.kv_heads * self.head_dim
        outputs = q_width + 2 * kv_width + 2 * sizes.intermediate + 2 * sizes.hidden
        weights = 2 * sizes.hidden * (q_width + kv_width) + 3 * sizes.hidden * sizes.intermediate
        head = sizes.vocabulary * sizes.hidden
        return sizes.layers * weights + head, sizes.layers * outputs + sizes.vocabulary

    @property
    def weights_bytes(self) -> int:
        """The size of all weights."""
        if self.weights == "int8":
            linears, outputs = self.linears
            kept = self.parameters - linears
            if self.checkpoint.tied:
                kept += self.checkpoint.vocabulary * self.checkpoint.hidden
            return kept * BYTES_PER_NUMBER + linears + outputs * SCALE_BYTES
        return self.parameters * BYTES_PER_NUMBER

    def kv_bytes(self, tokens: int) -> int:
        """Return the size of the KV cache of a conversation with so many tokens."""
        return -(-tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS * self.kv_token_bytes

    def host_bytes(self, tokens: int) -> int:
        """Return the size of the KV cache in pinned RAM, whose blocks are powers of two."""
        steps = -(-tokens // KV_STEP_TOKENS)
        return steps * sum(1 << (KV_STEP_TOKENS * size - 1).bit_length() for size in _kv_parts(self))

    def session_bytes(self, text_tokens: int) -> int:
        """Return the size of a session with the largest picture and so many tokens of text."""
        return self.features_bytes + self.kv_bytes(self.picture_tokens + text_tokens)

    def clip_tokens(self, frames: int) -> int | None:
        """Return the tokens of a clip's features, or None if the family has no clips."""
        of_frame = self.family.tokens_of_frame(self.tower.side)
        return None if of_frame is None else frames * of_frame

    @property
    def working_mib(self) -> int:
        """Temporary tensors at their peak, of a forward of 2,048 tokens or of the pictures."""
        if "int8" in (self.weights, self.kv):
            return self.checkpoint.int8_working_mib
        return self.checkpoint.working_mib

    @property
    def reserve_bytes(self) -> int:
        """The GPU memory that the engine leaves to CUDA and to forwards."""
        return CONTEXT_BYTES + int(WORKING_FACTOR * self.working_mib * MIB) + FRAGMENTS_BYTES


def _kv_parts(shape: Shape) -> tuple[int, ...]:
    """Return the sizes of one token's numbers, and in int8 of its scales, in all layers."""
    keys_and_values = shape.checkpoint.layers * 2 * shape.checkpoint.kv_heads
    if shape.kv == "int8":
        return keys_and_values * shape.head_dim, keys_and_values * SCALE_BYTES
    return (keys_and_values * shape.head_dim * BYTES_PER_NUMBER,)


def _projector_parameters(shape: Shape) -> int:
    """Two linears with biases. Behind a pixel shuffle, they have a norm; with a grid, a token ends each line."""
    hidden = shape.checkpoint.hidden
    inputs = int(shape.tower.hidden / shape.family.downsample_ratio**2)
    norm = 2 * inputs if shape.family.downsample_ratio != 1 else 0
    line_end = hidden if shape.family.tiling == "grid" else 0
    return norm + inputs * hidden + hidden + hidden**2 + hidden + line_end


# Sources of the sizes: config.json of each checkpoint. Language models: "Llama 2" (Vicuna 7B and 13B), "Mistral 7B",
# "Yi" (34B), "The Llama 3 Herd of Models" (8B), "Qwen2 Technical Report", "Qwen2.5 Technical Report" and "Qwen3
# Technical Report", each in its table of model sizes.
# Tokens of a picture: 336/14 squared = 576 in LLaVA-1.5. LLaVA-NeXT encodes a picture whole and in up to four tiles
# (image_grid_pinpoints): 576 + 48 x 48 + 48 ends of line = 2928 at 672 x 672, its most. LLaVA-OneVision encodes a
# picture in up to 36 tiles and keeps at most 9 x 729 of their tokens (anyres_max_9): 729 + 81 x 81 + 81 ends of
# line = 7371. InternVL encodes a picture whole and in up to 12 tiles: 13 x 256 = 3328.
# Temporary tensors: counted in the engine's first chat with the largest picture (tests/engine/test_budget.py).
SHAPES = tuple(Shape(family, checkpoint) for family in families().values() for checkpoint in family.checkpoints)
