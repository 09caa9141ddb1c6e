"""A CUDA device without a GPU: tensors on the CPU that are labelled as the device's. Everything is computed.

An operation that mixes tensors of both worlds is an error, as on a GPU. Tensors without dimensions are excepted, and
copies. Triton's interpreter runs the kernels, whose tensors must all be on the device.

What a GPU would launch is counted: each operation that computes or copies is one launch. (Torch's attention is two with
few rows; a product with few rows may be two.) So are the waits of the host for the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
_CPU = torch.device("cpu")
# Operations without a launch, besides views.
_NO_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view"}
# Operations for whose result the host waits.
_WAITS = {"_local_scalar_dense", "equal", "nonzero", "unique", "_unique2", "masked_select"}
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
_QUESTIONS = (torch.ops.aten._has_compatible_shallow_copy_type.default,)


class MixedDevices(RuntimeError):
    """An operation on tensors of host and device, which a GPU would refuse."""


class Labels:
    """The storages on the device, and the numbers of launches and of waits for the device."""

    def __init__(self) -> None:
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.launches = 0
        self.waits = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Label a tensor, and all that share its memory."""
        self._storages.add(tensor.untyped_storage())

    def has(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor is on the device."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return tensor.untyped_storage() in self._storages


class _Operations(TorchDispatchMode):
    """Refuses operations on both worlds, and labels the results of those on the device."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self._labels = labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        on_device = [one for one in given if self._labels.has(one)]
        on_host = [one for one in given if one.ndim and not self._labels.has(one)]
        if on_device and on_host and func not in _COPIES + _QUESTIONS:
            shapes = [(tuple(one.shape), self._labels.has(one)) for one in given]
            raise MixedDevices(f"{func}: shapes, and whether on the device: {shapes}")
        out = func(*args, **(kwargs or {}))
        if on_device and not _is_view(func) and func.overloadpacket.__name__ not in _NO_LAUNCH:
            self._labels.launches += 1
        if on_device and func.overloadpacket.__name__ in _WAITS:
            self._labels.waits += 1
        if on_device and func is not torch.ops.aten.copy_.default:
            for part in tree_leaves(out):
                if isinstance(part, torch.Tensor):
                    self._labels.add(part)
        return out


def _is_view(func: Any) -> bool:
    """Return whether the result of an operation shares the memory of an argument, which is not changed."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


class _Calls(TorchFunctionMode):
    """Replaces CUDA devices by the CPU in torch's calls, and labels what they make."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self._labels = labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return CUDA if self._labels.has(args[0]) else _CPU
        if func == torch.Tensor.is_cuda.__get__:
            return self._labels.has(args[0])
        if func is torch.Tensor.numpy and self._labels.has(args[0]):
            raise TypeError("can't convert a tensor on the device to NumPy")
        if func is torch.Tensor.tolist and self._labels.has(args[0]):
            self._labels.waits += 1
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cpu:
            return self._moved(args[0], _CPU)
        if func in (torch.rms_norm, torch.nn.functional.rms_norm) and self._labels.has(args[0]):
            # One kernel on CUDA (torch: aten/src/ATen/native/layer_norm.cpp); on a CPU it is composed of several.
            before = self._labels.launches
            out = func(*args, **options)
            self._labels.launches = before + 1
            return out
        mask = options.get("attn_mask")
        if isinstance(mask, CausalBias):  # outside this mode it would become a tensor of the host
            sizes = (mask.seq_len_q, mask.seq_len_kv)
            options["attn_mask"] = torch.ones(sizes, dtype=torch.bool).tril(sizes[1] - sizes[0])
            self._labels.add(options["attn_mask"])
        options.pop("pin_memory", None)
        devices = [one for one in (*args, *options.values()) if isinstance(one, torch.device | str) and _is_device(one)]
        if func is torch._C._nn._parse_to:  # the arguments of a module's `to`
            return func(*args, **options)
        if func is torch.Tensor.to and devices:
            dtypes = [one for one in (*args, *options.values()) if isinstance(one, torch.dtype)]
            return self._moved(func(args[0], *dtypes) if dtypes else args[0], torch.device(devices[0]))
        out = func(*map(_replaced, args), **{name: _replaced(one) for name, one in options.items()})
        if devices and torch.device(devices[0]).type == "cuda" and isinstance(out, torch.Tensor):
            self._labels.add(out)
        return out

    def _moved(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the tensor, or a copy if it is on the other side."""
        if self._labels.has(tensor) == (device.type == "cuda"):
            return tensor
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            copy = tensor.clone()
        self._labels.launches += 1
        if device.type == "cuda":
            self._labels.add(copy)
        else:
            self._labels.waits += 1
        return copy


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or value.partition(":")[0] in ("cuda", "cpu")


def _replaced(value: Any) -> Any:
    return _CPU if isinstance(value, torch.device | str) and _is_device(value) else value


class Worlds:
    """Host and device of one test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        """Make the kernels check their tensors."""
        from triton.runtime import interpreter

        self.labels = Labels()
        self.run_kernels = True
        run = interpreter.GridExecutor.__call__

        def checked(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.labels.launches += 1
            on_host = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            on_host = [one for one in on_host if not self.labels.has(one)]
            if on_host:
                raise MixedDevices(f"a kernel got tensors of the host: {[tuple(one.shape) for one in on_host]}")
            if not self.run_kernels:
                return None
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return run(executor, *args, **kwargs)

        patch.setattr(interpreter.GridExecutor, "__call__", checked)

    def move(self, module: torch.nn.Module) -> None:
        """Move a module to the device."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.labels.add(tensor)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run torch's calls with the two worlds."""
        with _Calls(self.labels), _Operations(self.labels):
            yield
