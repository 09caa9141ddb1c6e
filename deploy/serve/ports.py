"""Choose ports for the listeners of a server."""

from __future__ import annotations

import errno
import random
import socket
import sys
import time
from collections import deque
from pathlib import Path

from deploy.options import typed

from .processes import LOOPBACK, ServeError

# Below the range that the kernel gives to outgoing connections, so that no connection takes a chosen port during the
# seconds until java binds it.
PORTS = range(20_000, 32_000)
# On loopback. "metrics" is TorchServe's page of metrics, "worker_metrics" the worker's.
INNER = ("inference", "management", "metrics", "grpc_inference", "grpc_management", "worker", "worker_metrics")
# Java binds its ports within this time of their choice, on a busy machine too.
RESERVED_S = 120.0
_UNPRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_reserved: deque[tuple[float, socket.socket]] = deque()
# Ports that the user chose, by number. They are reserved apart from the others, until this process ends.
_reserved_fixed: dict[int, socket.socket] = {}


def choose_ports(port: int = 0, public: str = "inference", within: range | None = None) -> dict[str, int]:
    """Return a port for each listener.

    `port` is for the `public` listener, and the next two for management and metrics. The other listeners get free
    ports; with `port` 0, all of them do. With `within`, all except the public one are from this range. Raise
    `ServeError` if a fixed port is in use, or if a server that starts now has chosen it.
    """
    fixed = fixed_ports(port, public, within)
    for use, number in fixed.items():
        if needs_privilege(number):
            least = f"choose {typed('--port')} from {first_unprivileged()} on"
            raise ServeError(f"port {number} ({use}) is privileged, and this user may not listen there; {least}")
        if not is_free(number):
            option = typed("--port")
            raise ServeError(f"port {number} ({use}) is in use; choose another {option}: N takes N, N+1 and N+2")
        if not _reserve_fixed(number):
            raise ServeError(f"port {number} ({use}) is taken by another server that is starting; choose another")
        _reserve(number)
    others = [use for use in dict.fromkeys((public, *INNER)) if use not in fixed]
    return {**fixed, **dict(zip(others, free_ports(len(others), set(fixed.values())), strict=True))}


def fixed_ports(port: int, public: str, within: range | None = None) -> dict[str, int]:
    """Return the listeners whose ports follow from these arguments. Raise `ServeError` if the range is too small."""
    if within is None:
        return {public: port, "management": port + 1, "metrics": port + 2} if port else {}
    inner = [use for use in INNER if use != public]
    numbers = [number for number in within if number != port]
    if len(numbers) < len(inner):
        limits = f"{within.start}-{within.stop - 1}"
        raise ServeError(f"the range must have {len(inner)} ports besides the public one, got {limits}")
    return {**({public: port} if port else {}), **dict(zip(inner, numbers, strict=False))}


def free_ports(count: int, taken: set[int] | None = None) -> list[int]:
    """Return ports without a listener, none of them in `taken`, and reserve them for `RESERVED_S`.

    Raise `ServeError` if there are too few.
    """
    ports: list[int] = []
    if not count:
        return ports
    for number in random.SystemRandom().sample(PORTS, 1000):
        if number not in (taken or set()) and is_free(number) and _reserve(number):
            ports.append(number)
        if len(ports) == count:
            return ports
    raise ServeError("no free ports on this machine")


def _reserve(number: int) -> bool:
    """Reserve a port among the processes of this machine. Return False if another choice has reserved it.

    Two servers that start at once would otherwise find the same port free. A reservation is a name in the abstract
    namespace of unix sockets, which ends with the process. Other systems than Linux have none: there it is skipped.
    """
    while _reserved and time.monotonic() - _reserved[0][0] > RESERVED_S:
        _reserved.popleft()[1].close()
    if sys.platform != "linux":
        return True
    reservation = _bind_name(f"llava-sessions-port-{number}")
    if reservation is not None:
        _reserved.append((time.monotonic(), reservation))
    return reservation is not None


def _reserve_fixed(number: int) -> bool:
    """Reserve a port that the user chose. Return False if another launcher has reserved it."""
    if sys.platform != "linux" or number in _reserved_fixed:
        return True
    reservation = _bind_name(f"llava-sessions-fixed-port-{number}")
    if reservation is not None:
        _reserved_fixed[number] = reservation
    return reservation is not None


def _bind_name(name: str) -> socket.socket | None:
    """Return a socket with this name in the abstract namespace, or None if another socket has it."""
    reservation = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        reservation.bind(f"\0{name}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reservation.close()
            return None
    return reservation


def is_free(port: int) -> bool:
    """Return whether a server could listen on this port of loopback now."""
    return _bind_error(port) is None


def needs_privilege(port: int) -> bool:
    """Return whether the system lets only privileged users listen on this port, and this user is none."""
    return _bind_error(port) == errno.EACCES


def first_unprivileged() -> int:
    """Return the first port on which any user may listen."""
    try:
        return int(_UNPRIVILEGED.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not Linux
        return 1024


def _bind_error(port: int) -> int | None:
    """Return the error number of an attempt to listen on a port of loopback, or None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return error.errno
    return None
