"""Check memory, shared memory, disk, and the number of processes, for the checkpoint and its sessions."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.sagemaker.capacity import CONTEXT_BYTES, FRAGMENTS_BYTES, graphs_bytes

from . import machine, settings
from .findings import GIB, MIB, Finding, Subject, error, ok, warning
from .settings import Settings
from .sizes import Sizes

# Java's first heap, the worker and the engine after their start, without weights (bench/results/soak_memory.json).
PROCESSES_BYTES = 1700 * MIB
CUDA_WORKING_BYTES = GIB  # temporary tensors of a forward: more than those of any model of the table, with their factor
DEVICE_SHARE, HOST_SHARE, HELD_SHARE = 0.3, 0.2, 0.1  # of the RAM, with `auto` on a CPU
SHARED_BYTES = 64 * MIB
DISK_RESERVE_BYTES = GIB
FRONTEND_THREADS = 150  # of Java without sequences, worker and engine


@dataclass(frozen=True)
class Demand:
    """What a server with this model needs, in bytes.

    `weights`: of all engines. `device`: the budget of one engine for sessions. `on_cuda`: on which device.
    """

    weights: int
    device: int
    session: int
    features: int
    on_cuda: bool
    dtype: str
    engines: int


def check_memory(subject: Subject) -> Iterator[Finding]:
    """Compare the free memory with what weights and sessions need."""
    chosen = settings.read(subject)
    sizes = settings.sizes(subject)
    if chosen is None or sizes is None:
        return  # the checks of the configuration and of the checkpoint report why
    memory = machine.Memory.read()
    demand = demand_of(chosen, sizes, memory, settings.cards(subject, chosen))
    yield from start_problems(demand, memory)
    if chosen.has_budget:
        yield from session_problems(demand, memory, chosen.sessions)


def demand_of(chosen: Settings, sizes: Sizes, memory: machine.Memory, cards: list[machine.Gpu]) -> Demand:
    """Return what a server needs on this machine, with one engine on each of the GPUs, or with those on the CPU."""
    on_cuda = bool(cards)
    engines = len(cards) or len(chosen.devices)
    dtype = settings.dtype(chosen, sizes, on_cuda)
    weights = sizes.weights_bytes(dtype, on_cuda, chosen.weights)
    if cards:
        reserve = CONTEXT_BYTES + CUDA_WORKING_BYTES + FRAGMENTS_BYTES
        auto = max(min(gpu.free - graphs_bytes(weights, gpu.total) for gpu in cards) - weights - reserve, 0)
    else:
        auto = int(DEVICE_SHARE * memory.total / engines)
    device = auto if chosen.device_bytes is None else chosen.device_bytes
    session = sizes.session_bytes(dtype, chosen.kv_dtype)
    stored = f"{dtype}, KV in int8" if chosen.kv_dtype == "int8" else dtype
    features = sizes.features_bytes(dtype)
    return Demand(engines * weights, device, session, features, on_cuda, stored, engines)


def start_problems(demand: Demand, memory: machine.Memory) -> Iterator[Finding]:
    """Report whether the server can start."""
    need = PROCESSES_BYTES + (0 if demand.on_cuda else demand.weights)
    words = f"{_size(memory.free)} of {_size(memory.total)} are free ({memory.limit})"
    if need > memory.free:
        remedy = "stop other programs, raise the limit, or choose a smaller model"
        yield error("memory", f"the server needs {_size(need)} to start, {words}", remedy)
    else:
        yield ok("memory", f"the server needs {_size(need)} to start, {words}")


def session_problems(demand: Demand, memory: machine.Memory, sessions: int) -> Iterator[Finding]:
    """Report how many sessions fit."""
    where = "on the GPU" if demand.on_cuda else "in memory"
    one = f"one session takes {_size(demand.session)} in {demand.dtype}"
    if demand.session > demand.device:
        remedy = (
            "raise `llava.device_bytes`, set `llava.weights` and `llava.kv_dtype` to int8, or choose a device with "
            "more memory or a smaller model"
        )
        yield error("sessions", f"{one}, the budget {where} is {_size(demand.device)}: opens would get 429", remedy)
        return
    by_features = demand.engines * (demand.device // max(demand.features, 1))
    if by_features < sessions:
        remedy = f"set `llava.max_sessions` (SESSIONS=, --sessions) to {by_features}, or raise `llava.device_bytes`"
        yield warning("sessions", f"features of {by_features} sessions fit {where}, of {sessions} configured", remedy)
        return
    growth = min(demand.engines * demand.device, sessions * demand.session)
    need = PROCESSES_BYTES + demand.weights + growth
    if not demand.on_cuda and need > memory.free:
        remedy = "set `llava.device_bytes` to less, or fewer sessions (SESSIONS=, --sessions), or stop other programs"
        all_of_them = f"{sessions} sessions and the server take {_size(need)}, {_size(memory.free)} are free"
        yield warning("sessions", all_of_them, remedy)
        return
    fit = min(demand.engines * (demand.device // demand.session), sessions)
    rest = "" if fit == sessions else ", the others are offloaded while idle"
    yield ok("sessions", f"{one}; {fit} of {sessions} fit {where} at once{rest}")


def check_shared_memory(_: Subject, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check the space for shared memory, which torch and Java use."""
    if not folder.is_dir():
        return  # not Linux
    free = shutil.disk_usage(folder).free
    if free < SHARED_BYTES:
        remedy = "start the container with a larger one (docker run --shm-size 1g)"
        yield warning("shared memory", f"{folder} has {_size(free)} free, less than {_size(SHARED_BYTES)}", remedy)
    else:
        yield ok("shared memory", f"{folder} has {_size(free)} free")


def check_disk(subject: Subject, temp: Path | None = None) -> Iterator[Finding]:
    """Check the space for the packed model, temporary files and logs."""
    sizes = settings.sizes(subject)
    packed = sizes.stored_bytes if sizes else 0
    output = subject.output
    while not os.path.exists(output):
        output = output.parent
    for use, folder, need in (
        ("the packed model", output, packed + DISK_RESERVE_BYTES),
        ("temporary files and logs", temp or Path(tempfile.gettempdir()), DISK_RESERVE_BYTES),
    ):
        free = shutil.disk_usage(folder).free
        words = f"{_size(free)} are free in {folder} for {use}"
        if free < need:
            yield error("disk", f"{words}, which need {_size(need)}", "free disk space, or use another disk (TMPDIR)")
        else:
            yield ok("disk", words)


def check_processes(subject: Subject, root: Path = Path("/")) -> Iterator[Finding]:
    """Check that the frontend may start a thread for each sequence."""
    chosen = settings.read(subject)
    left = machine.most_processes(root)
    if chosen is None or left is None:
        return
    need = chosen.rows + FRONTEND_THREADS
    words = f"{left} more processes and threads are allowed here, a server with {chosen.sessions} sessions needs {need}"
    if left < need:
        remedy = "raise the limit (docker run --pids-limit), or configure fewer sessions"
        yield error("processes", words, remedy)
    else:
        yield ok("processes", words)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
