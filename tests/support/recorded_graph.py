"""`torch.cuda.CUDAGraph` on a CPU: a graph that records launches with their arguments, and repeats exactly these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

# Operations by which the host reads from the device. A capture on CUDA fails with each of them.
READS = tuple(getattr(torch.ops.aten, name).default for name in ("item", "_local_scalar_dense", "nonzero", "equal"))


class RecordedGraph:
    """A graph as `cuda.graphs.Graph`, of torch's operations and of kernels in Triton's interpreter.

    A repeated operation gets the tensors and numbers of the capture, and writes where it wrote in the capture: the
    Python code around it does not run. A capture runs the operations too; on CUDA it only records them.
    """

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []

    def capture(self, work: Callable[[], None]) -> None:
        """Record the launches of `work`."""
        run = InterpretedFunction.run

        def launch(kernel: Any, *args: Any, **options: Any) -> None:
            self.launches.append(lambda: run(kernel, *args, **options))
            run(kernel, *args, **options)

        with _Recorder(self.launches), patch.object(InterpretedFunction, "run", launch):
            work()

    def replay(self) -> None:
        """Repeat the launches."""
        for launch in self.launches:
            launch()


class _Recorder(TorchDispatchMode):
    """Adds a launch for each operation that computes something."""

    def __init__(self, launches: list[Callable[[], None]]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} reads from the device"
        options = kwargs or {}
        out = func(*args, **options)
        if any(result.alias_info is not None and result.alias_info.is_write for result in func._schema.returns):
            self._launches.append(lambda: func(*args, **options))
        elif "empty" not in func.__name__ and not _storages(out) & _storages([*args, *options.values()]):
            self._launches.append(lambda: _write(out, func(*args, **options)))
        return out


def _storages(values: Any) -> set[int]:
    """Return the addresses of all storages of tensors. Views share the storage of another tensor."""
    if isinstance(values, torch.Tensor):
        return {values.untyped_storage().data_ptr()}
    return {one for value in values for one in _storages(value)} if isinstance(values, tuple | list) else set()


def _write(memory: Any, values: Any) -> None:
    if isinstance(memory, torch.Tensor):
        memory.copy_(values)
        return
    for part, value in zip(memory, values, strict=True):
        _write(part, value)
