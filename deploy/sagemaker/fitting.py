"""Compare an uploaded model with the table of `llava-deploy capacity`, before an instance costs money."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import yaml

from deploy.pack.families import families, texts

from . import capacity, models
from .account import Account
from .instances import InstanceType
from .output import format_size
from .shapes import Shape

CONFIG = "checkpoint/config.json"
WEIGHTS = ".safetensors"
TEXT_TOKENS = 1024  # the default of `capacity`
RESERVE_GIB = 2.0  # of a model that is not in the table: more than the engine's reserve for any that is


@dataclass(frozen=True)
class Verdict:
    """Whether a model fits. `fits` is None if `capacity` does not know the model or the instance type."""

    fits: bool | None
    reason: str


def verdict(account: Account, address: models.ModelAddress, instance_type: str) -> Verdict:
    """Return whether the model at the address fits an instance of this type."""
    instance = next((item for item in capacity.INSTANCES if item.name == instance_type), None)
    if instance is None:
        return Verdict(None, f"`capacity` does not list {instance_type}: whether the model fits is unknown")
    text = None if address.is_tarball else models.read_file(account, address, CONFIG)
    if text is None:
        return Verdict(None, f"{address} has no readable {CONFIG}: whether it fits {instance_type} is unknown")
    gpu = f"{instance.gpu} with {instance.gpu_mib / 1024:.1f} GiB"
    config = json.loads(text)
    shape = known_shape(config)
    if shape is not None:
        shape = replace(shape, **_precisions(account, address))
        fit = capacity.fit(shape, instance, TEXT_TOKENS)
        reason = f"{shape.name} does not fit {instance_type} ({gpu}) by `llava-deploy capacity`"
        return Verdict(fit.on_gpu > 0, f"{reason}: {_remedy(shape, instance)}")
    weights = models.size_of(account, address, WEIGHTS) * capacity.BYTES_PER_NUMBER // _stored_bytes(config)
    reason = f"weights of {format_size(weights)} do not fit {instance_type} ({gpu})"
    return Verdict(weights + RESERVE_GIB * capacity.GIB < instance.gpu_mib * capacity.MIB, reason)


def _precisions(account: Account, address: models.ModelAddress) -> dict[str, capacity.Precision]:
    """Return `weights` and `kv` of a model's configuration, for a shape of the table."""
    text = models.read_file(account, address, models.CONFIG)
    section = (yaml.safe_load(text) or {}).get("llava") or {} if text else {}
    values = {"weights": section.get("weights"), "kv": section.get("kv_dtype")}
    return {name: "int8" if value == "int8" else "auto" for name, value in values.items()}


def _remedy(shape: Shape, instance: InstanceType) -> str:
    """Return what serves a model that does not fit an instance."""
    found = capacity.smallest(shape, TEXT_TOKENS)
    smallest = f"the smallest type that it fits is {found.name}" if found else "it fits no type of the table"
    int8 = replace(shape, weights="int8", kv="int8")
    if int8 != shape and capacity.fit(int8, instance, TEXT_TOKENS).on_gpu:
        return f"pack it with `weights: int8` and `kv_dtype: int8`, with which it fits; without, {smallest}"
    return smallest


def known_shape(config: dict[str, Any]) -> Shape | None:
    """Return the row of the table with the sizes of this config.json, or None."""
    family = families().get(str(config.get("model_type")))
    section = config.get("text_config") or {}
    kind = section.get("model_type", family.text if family else None)
    if family is None or kind not in texts():
        return None
    text = texts()[kind].with_values_of(section)
    sizes = (kind, text.hidden, text.layers, text.kv_heads)
    for shape in capacity.SHAPES:
        row = shape.checkpoint
        if shape.family == family and (row.text, row.hidden, row.layers, row.kv_heads) == sizes:
            return shape
    return None


def _stored_bytes(config: dict[str, Any]) -> int:
    dtype = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return 4 if dtype == "float32" else 2
