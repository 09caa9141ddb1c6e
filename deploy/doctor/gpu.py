"""Check the GPU, its driver and torch's CUDA against the device that the configuration names."""

from __future__ import annotations

from collections.abc import Iterator

from . import machine, settings
from .findings import GIB, Finding, Subject, error, ok, warning

_LEAST_DRIVER = {"12": 525, "13": 580}  # CUDA's major version -> the oldest driver, by NVIDIA's table of compatibility


def check_gpu(subject: Subject) -> Iterator[Finding]:
    """Check that the chosen devices exist and that torch can use them."""
    chosen = settings.read(subject)
    cards = settings.gpus(subject)
    for device in dict.fromkeys(chosen.devices if chosen else ("auto",)):
        yield from _check(device, cards, machine.torch_cuda())


def _check(device: str, cards: list[machine.Gpu] | None, cuda: str | None) -> Iterator[Finding]:
    if device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        yield _unknown(device)
    elif device.startswith("cuda"):
        yield from _required(device, cards, cuda)
    elif device == "auto" and cards and cuda is None:
        found = f"{cards[0].name} is not used: the installed torch is built for the CPU"
        yield warning("gpu", found, "install a torch with CUDA (requirements.txt without requirements-cpu.txt)")
    elif device == "auto" and cards and cuda:
        for number in range(len(cards)):
            yield from _usable(cards[number:], cuda)
    else:
        yield ok("gpu", "none is used; the model runs on the CPU")


def _unknown(device: str) -> Finding:
    return error("gpu", f"`llava.device` must be auto, cpu, cuda or cuda:N, got {device!r}", "correct it")


def _required(device: str, cards: list[machine.Gpu] | None, cuda: str | None) -> Iterator[Finding]:
    suffix = device.partition(":")[2] or "0"
    if not suffix.isdecimal():
        yield _unknown(device)
        return
    number = int(suffix)
    if not cards:
        remedy = "install NVIDIA's driver, start the container with --gpus all, or choose --device cpu"
        yield error("gpu", f"device {device} is configured, and nvidia-smi finds no GPU", remedy)
    elif number >= len(cards):
        remedy = f"choose a number from 0 to {len(cards) - 1}"
        yield error("gpu", f"device {device} is configured, and this machine has {len(cards)} GPUs", remedy)
    elif cuda is None:
        remedy = "install a torch with CUDA (requirements.txt without requirements-cpu.txt)"
        yield error("gpu", f"device {device} is configured, and the installed torch is built for the CPU", remedy)
    else:
        yield from _usable(cards[number:], cuda)


def _usable(cards: list[machine.Gpu], cuda: str) -> Iterator[Finding]:
    card = cards[0]
    least = _LEAST_DRIVER.get(cuda.partition(".")[0], 0)
    if int(card.driver.partition(".")[0]) < least:
        found = f"torch's CUDA {cuda} needs driver {least} or later, got {card.driver}"
        yield error("gpu", found, "update NVIDIA's driver; on SageMaker choose a newer InferenceAmiVersion (--ami)")
        return
    free = f"{card.free / GIB:.1f} of {card.total / GIB:.1f} GiB free"
    yield ok("gpu", f"{card.name}, driver {card.driver}, CUDA {cuda}, {free}")
