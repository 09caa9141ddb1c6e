"""Check that the ports of a server are free, and name the process that uses one."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

from deploy.options import typed
from deploy.serve.ports import PORTS, first_unprivileged, fixed_ports, free_ports, is_free, needs_privilege
from deploy.serve.processes import ServeError

from .findings import Finding, Subject, error, ok

_INNER = 5  # ports that a server chooses itself


def check_ports(subject: Subject) -> Iterator[Finding]:
    """Check the fixed ports of a server, and that there are free ones for the rest."""
    unusable = 0
    for use, number in fixed_ports(subject.port, "front").items():
        if is_free(number):
            continue
        unusable += 1
        option = typed("--port")
        if needs_privilege(number):
            remedy = f"choose {option} from {first_unprivileged()} on"
            yield error("ports", f"port {number} ({use}) is privileged, and this user may not listen there", remedy)
            continue
        remedy = f"stop that process, or choose another {option} (N takes N, N+1 and N+2)"
        yield error("ports", f"port {number} ({use}) is used by {holder(number)}", remedy)
    try:
        free_ports(_INNER)
    except ServeError:
        yield error("ports", f"no free ports from {PORTS.start} to {PORTS.stop - 1}", "stop programs that listen there")
        return
    if not unusable:
        numbers = ", ".join(map(str, fixed_ports(subject.port, "front").values()))
        yield ok("ports", f"ports {numbers} are free" if numbers else "a server would choose free ports")


def holder(port: int) -> str:
    """Return the name and ID of the process that listens on a port, as far as the system shows it."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:  # macOS shows them to root only
        return "a process that this user cannot see"
    for connection in connections:
        is_listener = connection.status == psutil.CONN_LISTEN
        if is_listener and connection.laddr and connection.laddr.port == port and connection.pid:
            try:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
            except psutil.Error:
                return f"process {connection.pid}"
    return "a process of another user or container"
