"""Choose ports for the listeners of a server."""

from __future__ import annotations

import os
import random
import socket

from .processes import LOOPBACK, ServeError

# Below the range that the kernel gives to outgoing connections, so that no connection takes a chosen port during the
# seconds until java binds it. The variable gives another range as FIRST-LAST: programs that start servers at the same
# time choose from different ranges.
PORTS_VARIABLE = "LLAVA_FREE_PORTS"
DEFAULT_PORTS = "20000-31999"


def choose_ports(port: int = 0, public: str = "inference") -> dict[str, int]:
    """Return a port for each listener.

    `port` is for the `public` listener, and the next two for management and metrics. The other listeners get free
    ports; with `port` 0, all of them do. Raise `ServeError` if a fixed port is in use.
    """
    fixed = {}
    if port:
        fixed = {public: port, "management": port + 1, "metrics": port + 2}
        for use, number in fixed.items():
            if not is_free(number):
                raise ServeError(f"port {number} ({use}) is in use; choose another: --port N takes N, N+1 and N+2")
    uses = [public, "inference", "management", "metrics", "grpc_inference", "grpc_management", "worker"]
    others = [use for use in dict.fromkeys(uses) if use not in fixed]
    return {**fixed, **dict(zip(others, free_ports(len(others), set(fixed.values())), strict=True))}


def free_ports(count: int, taken: set[int] | None = None) -> list[int]:
    """Return ports of the range without a listener, none of them in `taken`. Raise `ServeError` if it has too few."""
    first, _, last = os.environ.get(PORTS_VARIABLE, DEFAULT_PORTS).partition("-")
    numbers = range(int(first), int(last) + 1)
    ports: list[int] = []
    for number in random.SystemRandom().sample(numbers, min(len(numbers), 1000)):
        if number not in (taken or set()) and is_free(number):
            ports.append(number)
        if len(ports) == count:
            return ports
    raise ServeError("no free ports on this machine")


def is_free(port: int) -> bool:
    """Return whether a server could listen on this port of loopback now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
