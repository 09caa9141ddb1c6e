"""Section "machine": what the device is, the versions, copy bandwidth and matrix products."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from typing import Any

import torch

from ..machine import Bandwidth
from .day import Day, Findings

# Packages whose versions are noted. The last three are not needed.
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "PIL",
    "jinja2",
    "psutil",
    "accelerate",
    "pytest",
    "numba",
)
_SMI = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,pstate"


def run(day: Day, found: Findings) -> None:
    """Note the machine and the versions, and measure a copy of 2 GiB and a product of 8,192 x 8,192 matrices."""
    found.results["python"] = f"{platform.python_version()} {sys.platform} {platform.machine()}"
    found.results["versions"] = {name: _version(name) for name in PACKAGES}
    if day.on_cuda:
        found.results["nvidia_smi"] = _smi()
        found.results["device"] = _device(day.device)
    found.results["bandwidth_gb_s"] = bandwidth(day)
    found.results["product_tflops"] = _product_tflops(day)
    day.say(f"copy {found.results['bandwidth_gb_s']['copy']} GB/s, product {found.results['product_tflops']} TFLOP/s")


def _version(package: str) -> str | None:
    """Return the version of a package, or None if it can't be imported."""
    try:
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))
    except Exception:  # such as an incompatible library
        return None


def _smi() -> str:
    try:
        asked = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def _device(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def bandwidth(day: Day) -> dict[str, float]:
    """Return the read and copy bandwidth of the device in GB/s."""
    measured = Bandwidth(day.device, mebibytes=4 if day.smoke else None)
    measured.measure(day.pick(5, 1))
    facts = measured.facts()
    del measured
    day.release()
    return facts


def _product_tflops(day: Day) -> float:
    side = day.pick(8192, 64)
    one = torch.randn(side, side, device=day.device).to(torch.bfloat16)
    other = torch.randn(side, side, device=day.device).to(torch.bfloat16)
    taken_ms = day.median_ms(lambda: one @ other, 10)
    return round(2 * side**3 / taken_ms / 1e9, 1)
