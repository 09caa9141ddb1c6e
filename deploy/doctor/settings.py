"""The settings that count for a server: the configuration as packing would render it, and options of the command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.pack import PackError, checkpoint_problems, render_config

from . import machine
from .findings import Subject
from .sizes import Sizes, SizesError


@dataclass(frozen=True)
class Settings:
    """Values of the rendered model-config.yaml. None stands for `auto`.

    `devices`: the list of the configuration, or `device` alone. `has_budget` is False if `llava.device_bytes` is
    malformed. The check of the configuration reports that.
    """

    content: dict[str, Any]
    sessions: int
    rows: int
    dtype: str
    device: str
    devices: tuple[str, ...]
    device_bytes: int | None
    weights: str
    kv_dtype: str
    has_budget: bool


def read(subject: Subject) -> Settings | None:
    """Return the settings, or None if the configuration cannot be read or rendered."""
    try:
        text = rendered(subject)
        content = yaml.safe_load(text)
    except (OSError, PackError, yaml.YAMLError, UnicodeDecodeError):
        return None
    llava = content["llava"]
    device_bytes = llava.get("device_bytes")
    is_auto = device_bytes in (None, "auto")
    is_number = type(device_bytes) is int and device_bytes >= 0
    device = str(llava.get("device") or "auto")
    listed = llava.get("devices")
    return Settings(
        content=content,
        sessions=llava["max_sessions"],
        rows=content["batchSize"],
        dtype=llava.get("dtype") or "auto",
        device=device,
        devices=tuple(map(str, listed)) if isinstance(listed, list) and listed else (device,),
        device_bytes=device_bytes if is_number else None,
        weights=llava.get("weights") or "auto",
        kv_dtype=llava.get("kv_dtype") or "auto",
        has_budget=is_auto or is_number,
    )


def rendered(subject: Subject) -> str:
    """Return the configuration as `build_mar.sh` would pack it. Raise `PackError` or `OSError`."""
    template = subject.config.read_text(encoding="utf-8")
    given = {key: value for key, value in (("dtype", subject.dtype), ("device", subject.device)) if value}
    return render_config(template, given, subject.sessions)[0]


def sizes(subject: Subject) -> Sizes | None:
    """Return the sizes of the checkpoint, or None if it is not a complete local one with the numbers for them."""
    folder: Path | None = subject.folder
    if folder is None or not os.path.isdir(folder) or checkpoint_problems(folder):
        return None
    try:
        return Sizes.read(folder)
    except SizesError:
        return None


def gpus(subject: Subject) -> list[machine.Gpu] | None:
    """Return the GPUs of this machine, or None if there is no driver."""
    return machine.gpus(subject.environment.get("PATH", os.defpath))


def cards(subject: Subject, chosen: Settings) -> list[machine.Gpu]:
    """Return the GPUs that the server would use; none if it would use the CPU."""
    if chosen.devices[0].partition(":")[0] == "cpu" or machine.torch_cuda() is None:
        return []
    found = gpus(subject) or []
    if chosen.devices == ("auto",):
        return found
    numbers = [device.partition(":")[2] for device in chosen.devices]
    return [gpu for number in numbers for gpu in found[int(number) if number.isdecimal() else 0 :][:1]]


def dtype(chosen: Settings, sizes: Sizes, on_cuda: bool) -> str:
    """Return the dtype of the weights, as the engine chooses it."""
    if chosen.dtype in ("float32", "bfloat16", "float16"):
        return chosen.dtype
    if on_cuda:
        return "float16" if sizes.stored_dtype == "float16" else "bfloat16"
    return "bfloat16" if machine.has_bfloat16() else "float32"
