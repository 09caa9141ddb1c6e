"""All decoder layers of a model as one call of compiled loops.

Neither the parts of a layer nor the layers return to Python between each other.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from ..fused.head_norms import HeadNorms
from ..fused.operations import RowNorm
from . import amx, amx_linear, amx_sessions, compiled, token_attention
from .amx_linear import ADDED, COUNTER, FIELDS, OUT, X
from .linears import TileLinear

# Fields of a task: the number of layers, the addresses of the tasks of both kinds of attention or 0, then the fields of
# the four linears of each layer.
_FIRST = 3
_LAYER = 4 * FIELDS
_PLACES = (token_attention.place, amx_sessions.place)
# Number of a layer's linear that adds the layer's input, and of the one that gives its output.
_ATTENTION_OUTPUT = 1
_MLP_OUTPUT = 3

Tasks = tuple[ctypes.Array[ctypes.c_int64] | None, ctypes.Array[ctypes.c_int64] | None]


class CompiledLayers:
    """The linears, norms and attention of successive layers. Not thread-safe."""

    def __init__(
        self,
        parts: Sequence[Sequence[TileLinear]],
        norms: Sequence[tuple[RowNorm, RowNorm]],
        head_norms: Sequence[HeadNorms | None],
        tokens: token_attention.TokenAttention,
        sessions: amx_sessions.SessionAttention | None,
    ) -> None:
        """`parts`: of each layer qkv, output, gate and up, down; all of one class, and of equal sizes in all layers.

        `norms`: of each layer the one before attention and the one before the MLP. `head_norms`: of each layer, or None
        of all layers. The layers are the first ones of the KV caches. `tokens`, `sessions`: the attention of single new
        tokens, and that of several tokens of a session.
        """
        first = parts[0]
        # Of the results between the parts: qkv, attention, hidden states, MLP.
        self._widths = [first[0].result_features, first[1].in_features, 0, first[2].result_features]
        self._results: list[int] = []  # their addresses
        self._placed: tuple[int, ...] = ()
        self._most_inputs = max(part.in_features for part in first)
        given = [layer.numbers for layer in head_norms if layer is not None]
        numbers = torch.stack(given) if given else torch.empty(0)
        # Address and bytes of the head norms of a layer, see `token_attention.place`.
        self._head_norms = (numbers.data_ptr(), numbers[0].nbytes) if given else (0, 0)
        self._owners = parts, norms, numbers  # the task has their addresses
        self._task = (ctypes.c_int64 * (_FIRST + len(parts) * _LAYER))()
        # The same memory by layer, linear and field.
        self._fields: np.ndarray = np.ctypeslib.as_array(self._task)[_FIRST:].reshape(len(parts), 4, FIELDS)
        self._task[0] = len(parts)
        for fields, linears, (first_norm, second_norm) in zip(self._fields, parts, norms, strict=True):
            before = (first_norm, None, second_norm, None)
            for number, (linear, norm) in enumerate(zip(linears, before, strict=True)):
                fields[number] = linear.fields(norm)
        self._workspace = first[0].loops.workspace
        attends = [each and each.attend_all(bool(given)) for each in (tokens, sessions)]
        self._loops = _compile(*attends, first[0].loops.product)

    def __call__(self, rows: torch.Tensor, tasks: Tasks, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Map contiguous hidden states `[rows, hidden]` in bfloat16 to a new tensor of the same shape.

        `tasks`: of `TokenAttention.task` and of `SessionAttention.task`, for different rows, or None. `cos`, `sin`:
        `[rows, head_dim]`.
        """
        count, hidden = rows.shape
        out = rows.clone()  # each layer reads its input there, and writes its output when it is read no more
        self._widths[2] = hidden
        more_bytes = 2 * count * sum(self._widths) + 64 * len(self._widths)
        work = self._workspace(count, self._most_inputs, more_bytes)
        self._place(count, work)
        qkv, attended = self._results[:2]
        for number, (place, attention_task) in enumerate(zip(_PLACES, tasks, strict=True)):
            self._task[1 + number] = 0
            if attention_task is not None:
                place(attention_task, 0, qkv, cos.data_ptr(), sin.data_ptr(), attended, *self._head_norms)
                self._task[1 + number] = ctypes.addressof(attention_task)
        self._fields[:, 0, X] = self._fields[:, _ATTENTION_OUTPUT, ADDED] = out.data_ptr()
        self._fields[:, _MLP_OUTPUT, OUT] = out.data_ptr()
        compiled.run(self._loops, self._task)
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
        for at in amx_linear.PLACED:
            self._fields[1:, :, at] = self._fields[0, :, at]
        self._placed = placed


@functools.cache
def _compile(attend_tokens: Any, attend_sessions: Any, product: Any) -> Any:
    """Compile layers for one shape of attention and one kind of linears.

    Return a Numba C function that takes the address of a task.
    """

    with_sessions = attend_sessions is not None
    integer_at = compiled.pointer(types.int64)

    @numba.njit
    def attend(task):
        if task[1]:
            attend_tokens(task[1])
        if with_sessions and task[2]:
            attend_sessions(task[2])
            amx.configure(task[_FIRST + 13])

    @numba.njit
    def prepare_attention(task, layer):
        if task[1]:
            token_attention.enter_layer(integer_at(task[1]), layer)
        if with_sessions and task[2]:
            amx_sessions.enter_layer(integer_at(task[2]), layer)

    @numba.cfunc(types.void(types.CPointer(types.int64)))
    def run_layers(pointer):
        count = pointer[0]
        task = numba.carray(pointer, (_FIRST + count * _LAYER,))
        thread = compiled.thread_number()
        threads = compiled.thread_count()
        amx.configure(task[_FIRST + 13])
        for number in range(4 * count):
            at = _FIRST + number * FIELDS
            product(task[at : at + FIELDS], thread, threads)
            compiled.wait_for_threads()
            # All threads have read a counter for the last time. The next layer uses it after further barriers.
            if thread == 0:
                integer_at(task[at + COUNTER])[0] = 0
            if number % 4 == 0:
                attend(task)
                compiled.wait_for_threads()
                if thread == 0:
                    prepare_attention(task, number // 4 + 1)
        amx.release()

    return run_layers
