"""One decoder layer as one call of compiled loops.

The parts of a layer follow each other without a return to Python.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numba
import torch
from numba import types

from ..fused.operations import RowNorm
from . import amx, amx_linear, amx_sessions, compiled, token_attention
from .amx_linear import ADDED, FIELDS, OUT, X
from .linears import TileLinear

# Fields of a task: the addresses of the tasks of both kinds of attention or 0, then the fields of the four linears.
_FIRST = 2
_PLACES = (token_attention.place, amx_sessions.place)

Tasks = tuple[ctypes.Array[ctypes.c_int64] | None, ctypes.Array[ctypes.c_int64] | None]


class CompiledLayer:
    """The linears, norms and attention of one layer. Not thread-safe."""

    def __init__(
        self,
        index: int,
        parts: Sequence[TileLinear],
        norms: tuple[RowNorm, RowNorm],
        tokens: token_attention.TokenAttention,
        sessions: amx_sessions.SessionAttention | None,
    ) -> None:
        """`index`: of the layer in the KV caches. `parts`: qkv, output, gate and up, down, of one class.

        `norms`: before attention and before the MLP. `tokens`, `sessions`: the attention of single new tokens, and that
        of several new tokens of a session.
        """
        self._index = index
        # Of the results between the parts: qkv, attention, hidden states, MLP.
        self._widths = [parts[0].result_features, parts[1].in_features, 0, parts[2].result_features]
        self._results: list[int] = []  # their addresses
        self._placed: tuple[int, ...] = ()
        self._most_inputs = max(part.in_features for part in parts)
        self._parts = parts, norms  # the task has their addresses
        self._task = (ctypes.c_int64 * (_FIRST + 4 * FIELDS))()
        for number, (part, norm) in enumerate(zip(parts, (norms[0], None, norms[1], None), strict=True)):
            at = _FIRST + number * FIELDS
            self._task[at : at + FIELDS] = part.fields(norm)[:]
        self._workspace = parts[0].loops.workspace
        self._loops = _compile(
            tokens.attend_all, None if sessions is None else sessions.attend_all, parts[0].loops.product
        )

    def __call__(self, rows: torch.Tensor, tasks: Tasks, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Map contiguous hidden states `[rows, hidden]` in bfloat16 to a new tensor of the same shape.

        `tasks`: of `TokenAttention.task` and of `SessionAttention.task`, for different rows, or None. `cos`, `sin`:
        `[rows, head_dim]`.
        """
        count, hidden = rows.shape
        out = torch.empty_like(rows)
        self._widths[2] = hidden
        more_bytes = 2 * count * sum(self._widths) + 64 * len(self._widths)
        work = self._workspace(count, self._most_inputs, more_bytes)
        self._place(count, work)
        task = self._task
        qkv, attended = self._results[:2]
        for number, (place, attention_task) in enumerate(zip(_PLACES, tasks, strict=True)):
            task[number] = 0
            if attention_task is not None:
                place(attention_task, self._index, qkv, cos.data_ptr(), sin.data_ptr(), attended)
                task[number] = ctypes.addressof(attention_task)
        task[_FIRST + X] = task[_FIRST + FIELDS + ADDED] = rows.data_ptr()
        task[_FIRST + 3 * FIELDS + OUT] = out.data_ptr()
        compiled.run(self._loops, task)
        return out

    def _place(self, count: int, work: amx_linear.Workspace) -> None:
        """Set the addresses that depend on the workspace only. Mostly it is that of the call before."""
        placed = (count, work.copied, work.scratch, work.configuration)
        if placed == self._placed:
            return
        at = work.more
        self._results = []
        for width in self._widths:
            self._results.append(at)
            at = -(-(at + 2 * count * width) // 64) * 64
        qkv, attended, middle, gated = self._results
        calls = ((0, 0, qkv), (attended, 0, middle), (middle, 0, gated), (gated, middle, 0))
        for number, (x, added, result) in enumerate(calls):
            amx_linear.place(self._task, _FIRST + number * FIELDS, x, added, result, work, number)
        self._placed = placed


@functools.cache
def _compile(attend_tokens: Any, attend_sessions: Any, product: Any) -> Any:
    """Compile a layer for one shape of attention and one kind of linears.

    Return a Numba C function that takes the address of a task.
    """

    with_sessions = attend_sessions is not None

    @numba.cfunc(types.void(types.CPointer(types.int64)))
    def layer(pointer):
        task = numba.carray(pointer, (_FIRST + 4 * FIELDS,))
        thread = compiled.thread_number()
        threads = compiled.thread_count()
        amx.configure(task[_FIRST + 13])
        for number in range(4):
            at = _FIRST + number * FIELDS
            product(task[at : at + FIELDS], thread, threads)
            compiled.wait_for_threads()
            if number == 0:
                if task[0]:
                    attend_tokens(task[0])
                if with_sessions and task[1]:
                    attend_sessions(task[1])
                    amx.configure(task[_FIRST + 13])
                compiled.wait_for_threads()
        amx.release()

    return layer
