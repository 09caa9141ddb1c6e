"""Attention of single new tokens of many sessions on CUDA: rotation, store and attention in two launches per layer.

The number of launches does not depend on the number of sessions: the kernels (`ragged_kernels`) read the address of
each session's KV cache from a table. `cpu.token_attention` is the same for a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..fused.head_norms import HeadNorms

# Tokens of a piece: the work of one program of the first kernel. It is the same for all sessions, so that a session's
# numbers do not depend on the other sessions of the step. A session of 7,000 tokens alone has 55 pieces, with 4 KV
# heads 220 programs: enough for the 108 to 148 multiprocessors of a large GPU. A piece's result is 512 bytes of float32
# for each query head of 128 numbers. With 7 query heads for each KV head, writing and reading the results adds 11 % to
# the traffic of 16-bit keys and values. With shorter pieces it would be more.
PIECE = 128
# Numbers of a table for each place (row, address, capacity, stored tokens, first piece) and piece (place, first token).
_PLACE_NUMBERS = 5
_PIECE_NUMBERS = 2
# The kernels are compiled for tensors that start at a multiple of it, in bytes.
_ALIGNMENT = 16
# Pieces that an iteration of the second kernel merges.
_MERGED = 16
# Numbers of the keys of an iteration; the values are as many. Larger tiles take so many registers that fewer programs
# run at a time. tests/engine/test_ragged.py computes from the machine code for each kind of GPU that enough loads are
# under way.
_TILE = 4096
_WARPS = 4
# The same for a group without tensor cores (float32, or compute capability below 8). Larger tiles spill registers.
_PLAIN_TILE = 2048
_PLAIN_WARPS = 8
# Most query heads of a KV head. More of them spill registers.
_MOST_GROUP = 32

# A token of a step: its row, and the address, the capacity and the stored tokens of its session's KV cache.
Place = tuple[int, int, int, int]


@dataclass(frozen=True)
class RaggedTask:
    """The work that all layers of one forward share.

    `table`: int64 on the device, see `RaggedAttention.fill`. `tokens`, `pieces`: its counts, with spare ones. `mixed`,
    of `pieces * heads * head_dim` numbers, and `softmax`, of `pieces * heads * 2`: float32 memory on the device for the
    results of the pieces.
    """

    table: torch.Tensor
    tokens: int
    pieces: int
    mixed: torch.Tensor
    softmax: torch.Tensor


class RaggedAttention:
    """Attention of single tokens for one shape of heads, in float16, bfloat16 or float32.

    A KV cache is one memory block that starts with keys and values `[layers, 2, kv_heads, capacity, head_dim]`. With
    `kv_dtype=torch.int8` these are int8, and float32 scales `[layers, 2, kv_heads, capacity]` follow. The scale of one
    token's key (rotated and rounded to `dtype`) or value in one head is its largest magnitude / 127. The new token is
    quantized first: it attends to its own quantized key and value.

    All calls are asynchronous on the current stream of the current device, which must be `device`. An object is for one
    thread. For a CUDA graph, whose task is in memory of the caller, see `task_in` and `fill`.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kv_dtype: torch.dtype | None = None,
        layers: int = 0,
    ) -> None:
        """Choose the kernels' sizes. The first call compiles them.

        `kv_dtype`: int8, or `dtype` for None. `layers`: of each cache, used with int8 only: it gives the place of the
        scales. Raises ValueError for a shape or a precision that the kernels do not support, ImportError if Triton is
        not installed, and RuntimeError if Triton finds no device or no C compiler.
        """
        _check(heads, kv_heads, head_dim, dtype, kv_dtype or dtype, layers)
        from . import ragged_kernels  # it needs Triton, which only CUDA's wheels of torch bring

        self._device = device
        self._heads = heads
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self._layers = layers
        self._scale = head_dim**-0.5 * math.log2(math.e)
        group = heads // kv_heads
        is_quantized = kv_dtype == torch.int8
        self._align = math.gcd(16, head_dim * (1 if is_quantized else dtype.itemsize))
        is_plain = group > 1 and (dtype == torch.float32 or ragged_kernels.capability() < 80)
        width = max(16, _power_of_two(head_dim))
        sizes = {"HEAD_DIM": head_dim, "PIECE": PIECE, "WIDTH": width}
        attend_sizes = sizes | {
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "QUANTIZED": is_quantized,
            "ROWS": 1 if group == 1 else max(16, _power_of_two(group)),
            "BLOCK": min(64, (_PLAIN_TILE if is_plain else _TILE) // width),
            "ALIGN": self._align,
        }
        # For layers without and with norms of the heads.
        self._attend, self._attend_normed = (
            _Kernel(ragged_kernels.attend, attend_sizes, _PLAIN_WARPS if is_plain else _WARPS) for _ in range(2)
        )
        self._merge = _Kernel(ragged_kernels.merge, sizes | {"HEADS": heads, "BLOCK": _MERGED}, _WARPS)

    def task(self, places: Sequence[Place]) -> RaggedTask:
        """Return the task of one forward, with one asynchronous copy to the device.

        `places`, one per token: its row in the batch, the address and the capacity of its session's KV cache, and the
        number of tokens stored there. Raises ValueError, see `fill`.
        """
        tokens = len(places)
        pieces = count_pieces(places)
        is_cuda = self._device.type == "cuda"
        table = torch.empty(table_size(tokens, pieces), dtype=torch.int64, pin_memory=is_cuda)
        self.fill(table, places, tokens, pieces)
        return self.task_in(table.to(self._device, non_blocking=True), tokens, pieces)

    def task_in(self, table: torch.Tensor, tokens: int, pieces: int, scratch: torch.Tensor | None = None) -> RaggedTask:
        """Return a task whose table is memory of the caller, for a CUDA graph.

        `table`: int64 `[table_size(tokens, pieces)]`, contiguous, on the device; the kernels read its numbers when they
        run. `scratch`: float32 of at least `scratch_size(pieces)` numbers on the device, which tasks that do not run at
        the same time may share; allocated if None. Its numbers may be undefined. Raises ValueError if `scratch` is not
        aligned to 16 bytes.
        """
        size = self.scratch_size(pieces)
        if scratch is None:
            scratch = torch.empty(size, dtype=torch.float32, device=self._device)
        if scratch.data_ptr() % _ALIGNMENT:
            raise ValueError(f"`scratch` must be aligned to {_ALIGNMENT} bytes")
        mixed, softmax = scratch[:size].split((size - 2 * pieces * self._heads, 2 * pieces * self._heads))
        return RaggedTask(table, tokens, pieces, mixed, softmax)

    def scratch_size(self, pieces: int) -> int:
        """Return the float32 numbers of the scratch memory of a task."""
        return pieces * self._heads * (self._head_dim + 2)

    def fill(self, table: torch.Tensor, places: Sequence[Place], tokens: int, pieces: int) -> None:
        """Write the numbers of a task to host memory, which the caller copies to the task's table.

        `table`: int64 `[table_size(tokens, pieces)]`, contiguous, on the CPU. Up to `tokens` places and `pieces` pieces
        fit. Each row below `tokens` that has no place becomes a spare place: its row of `out` is zeros. Spare pieces do
        nothing. Raises ValueError if the places do not fit, if a cache has no room for its new token, or if its address
        is not aligned.
        """
        given = np.array(places, np.int64).reshape(-1, 4)
        counts = given[:, 3] // PIECE + 1
        needed = int(counts.sum())
        if len(given) > tokens or needed > pieces:
            raise ValueError(
                f"`places` must have at most {tokens} tokens and {pieces} pieces, got {len(given)} and {needed}"
            )
        if (given[:, 3] >= given[:, 2]).any():
            raise ValueError("`capacity` of each place must be above `stored`")
        if (given[:, 1] % self._align).any():
            raise ValueError(f"`address` of each place must be a multiple of {self._align}")
        _write(table.numpy(), given, counts, tokens, pieces)

    def __call__(
        self,
        task: RaggedTask,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> None:
        """Norm and rotate the tokens' queries and keys, append keys and values to the caches, and attend to all stored
        tokens.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`, not changed. `cos`, `sin`: `[rows, head_dim]`. `norms`: of
        the query and key heads, or None; computed in float32 and rounded as transformers' `Qwen3RMSNorm` rounds. All
        have precision `dtype`, are contiguous and start at a multiple of 16 bytes, as torch allocates. Writes the
        tokens' rows of `out`, `[rows, heads * head_dim]`. Raises ValueError for an address that is not aligned.
        """
        if (qkv.data_ptr() | cos.data_ptr() | sin.data_ptr() | out.data_ptr()) % _ALIGNMENT:
            raise ValueError(f"`qkv`, `cos`, `sin` and `out` must be aligned to {_ALIGNMENT} bytes")
        kernel = self._attend if norms is None else self._attend_normed
        weights = None if norms is None else norms.weights
        epsilon = None if norms is None else norms.epsilon
        kernel.launch(
            (task.pieces, self._kv_heads, 1),
            task.table, task.tokens, qkv, cos, sin, task.mixed, task.softmax, layer, self._layers, self._scale,
            weights, epsilon,
        )  # fmt: skip
        self._merge.launch((task.tokens, self._heads, 1), task.table, task.mixed, task.softmax, out)


class _Kernel:
    """A Triton kernel with its constants.

    The first launch compiles the kernel for types and alignments of its arguments. Later launches use the compiled form
    without a search for it, which takes most of the time of a launch. Therefore all launches must have the same types,
    and all pointers but that of the table must be aligned to 16 bytes.
    """

    def __init__(self, function: Any, constants: dict[str, int | bool], warps: int) -> None:
        self._function = function
        self._constants = {name: constants[name] for name in function.arg_names if name in constants}
        self._warps = warps
        self._compiled: Any = None  # stays None in the interpreter

    def launch(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch the kernel on the current stream."""
        if self._compiled is None:
            self._compiled = self._function[grid](*args, **self._constants, num_warps=self._warps)
        else:
            self._compiled[grid](*args, *self._constants.values())


def table_size(tokens: int, pieces: int) -> int:
    """Return the int64 numbers of a table."""
    return _PLACE_NUMBERS * tokens + _PIECE_NUMBERS * pieces


def count_pieces(places: Sequence[Place]) -> int:
    """Return the pieces that the sessions of a step have together."""
    return sum(stored // PIECE + 1 for *_, stored in places)


def _write(
    table: npt.NDArray[np.int64],
    given: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    tokens: int,
    pieces: int,
) -> None:
    """Write a table: `given`, the places `[tokens, 4]` with `counts` pieces each, and the spare ones."""
    used = len(given)
    first = np.cumsum(counts) - counts
    at = table[: _PLACE_NUMBERS * tokens].reshape(tokens, _PLACE_NUMBERS)
    at[:used, :4] = given
    at[:used, 4] = first
    if used < tokens:
        at[used:] = (0, 0, 0, 0, -1)
        spare = np.setdiff1d(np.arange(tokens), given[:, 0])
        at[used:, 0] = spare[: tokens - used]
    work = table[_PLACE_NUMBERS * tokens :].reshape(pieces, _PIECE_NUMBERS)
    place = np.repeat(np.arange(used), counts)
    work[: len(place), 0] = place
    work[: len(place), 1] = (np.arange(len(place)) - first[place]) * PIECE
    work[len(place) :] = (0, -1)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _check(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, layers: int) -> None:
    """Raise ValueError for a shape or precision that the kernels do not support."""
    if heads % kv_heads:
        raise ValueError(f"`heads` must be a multiple of `kv_heads`, got {heads} and {kv_heads}")
    if heads // kv_heads > _MOST_GROUP:
        raise ValueError(f"`heads` must be at most {_MOST_GROUP} for each KV head, got {heads} for {kv_heads}")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"`head_dim` must be a multiple of 8 and at most 256, got {head_dim}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"`dtype` must be float16, bfloat16 or float32, got {dtype}")
    if kv_dtype not in (dtype, torch.int8):
        raise ValueError(f"`kv_dtype` must be int8 or {dtype}, got {kv_dtype}")
    if kv_dtype == torch.int8 and layers < 1:
        raise ValueError(f"`layers` must be at least 1 with int8, got {layers}")
