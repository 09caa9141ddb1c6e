"""The weights of a checkpoint's folder, from the headers of its files, and whether a GPU has the memory for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..text.checkpoint import WEIGHTS, WEIGHTS_INDEX, read_json
from .budget import InsufficientMemory

_SCALE_BYTES = 4  # of an output of a linear in int8


def tensors_on_meta(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder's weights by name, without their data."""
    shards = {WEIGHTS}
    if not (folder / WEIGHTS).is_file():
        shards = set(read_json(folder / WEIGHTS_INDEX).get("weight_map", {}).values())
    tensors = {}
    for shard in sorted(shards):
        with (folder / shard).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        tensors.update({name: torch.empty(entry["shape"], device="meta") for name, entry in header.items()})
    return tensors


def weight_bytes(folder: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of all weights in `dtype`, and those with the language model's linears in int8."""
    tensors = tensors_on_meta(folder)
    whole = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    linears = [tensor for name, tensor in tensors.items() if _is_language_linear(name, tensor)]
    in_int8 = whole + sum(_int8_bytes(tensor) - tensor.numel() * dtype.itemsize for tensor in linears)
    if not any("lm_head" in name for name in tensors):  # the head is the table of embeddings, which stays
        in_int8 += sum(_int8_bytes(tensor) for name, tensor in tensors.items() if "embed_tokens" in name)
    return whole, in_int8


def _int8_bytes(weight: torch.Tensor) -> int:
    return weight.numel() + len(weight) * _SCALE_BYTES


def _is_language_linear(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor of a file is the weight of a linear that `weights: int8` stores in int8."""
    is_language = "language_model" in name or name.startswith("lm_head")
    return is_language and tensor.ndim == 2 and "embed_tokens" not in name


def check_memory(folder: Path, dtype: torch.dtype, device: torch.device, weights: str) -> None:
    """Raise `InsufficientMemory` if the weights of a folder do not fit the free memory of a CUDA device.

    `weights`: as `llava.weights`. The message has what would serve the model.
    """
    whole, in_int8 = weight_bytes(folder, dtype)
    needed = in_int8 if weights == "int8" else whole
    if not needed:
        return  # there are no files: the error of the load has their names
    free, total = torch.cuda.mem_get_info(device)
    if needed <= free:
        return
    raise InsufficientMemory(
        f"{device} has {gib(free)} of {gib(total)} free, but the weights take {gib(needed)}: "
        + remedy(needed - free, 0 if weights == "int8" else whole - in_int8, total)
    )


def remedy(missing: int, int8_frees: int, total: int) -> str:
    """Return what serves a model that lacks `missing` bytes on a device of `total` bytes.

    `int8_frees`: the bytes that `weights: int8` frees there.
    """
    if missing <= int8_frees:
        return f"set `llava.weights` to int8, which frees {gib(int8_frees)}, or use a larger device"
    return f"use a larger device, of at least {gib(total + missing)} (see `llava-deploy capacity`), or a smaller model"


def gib(count: int) -> str:
    """Return a number of bytes as text, rounded up to a tenth of a GiB."""
    return f"{-(-count * 10 // 2**30) / 10:.1f} GiB"
