"""haproxy.cfg: sessions stay with their host, and with SESSIONS_SHARED move when it is down.

The real HAProxy in front of two services with the stand-in model, once for each of the two settings.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from deploy.serve.haproxy import find_haproxy
from deploy.serve.ports import free_ports
from tests.support.commands import REPO, Command, eventually
from tests.support.stand_in import NAME, make_store

CONFIGS = [REPO / "deploy" / "serve" / name for name in ("sessions.cfg", "haproxy.cfg")]


@dataclass
class Fleet:
    """Two hosts behind a balancer."""

    store: Path
    ports: list[int]
    hosts: list[Command]
    socket: Path
    http: httpx.Client
    moving: httpx.Client  # through the balancer with SESSIONS_SHARED
    opened: int = 0

    def start_host(self, number: int) -> None:
        self.hosts[number].end()
        self.hosts[number] = Command(self.store, NAME, self.ports[number])
        self.hosts[number].wait_ready()

    def open(self, through: httpx.Client | None = None) -> tuple[str, int]:
        """A new session's id, and the worker that opened it."""
        self.opened += 1
        reply = (through or self.http).post("/invocations", json={"open": f"session-{self.opened}"})
        assert reply.status_code == 200, reply.text
        session, _, expires = reply.headers["X-Amzn-SageMaker-New-Session-Id"].partition("; ")
        assert expires.startswith("Expires=")
        return session, reply.json()["pid"]

    def ask(self, session: str, body: dict | None = None, through: httpx.Client | None = None) -> httpx.Response:
        headers = {"x-amzn-sagemaker-session-id": session}
        return (through or self.http).post("/invocations", json=body or {}, headers=headers)

    def worker_of(self, session: str) -> int | None:
        """The worker that a session's request reaches through the balancer with SESSIONS_SHARED, if it is answered."""
        reply = self.ask(session, through=self.moving)
        return reply.json()["pid"] if reply.status_code == 200 else None

    def tell_balancer(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            connection.sendall(f"{line}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def state(self, number: int) -> str:
        """What the balancer thinks of a host: UP, NOLB (keeps its sessions, gets no new ones), DRAIN, DOWN."""
        rows = [row.split(",") for row in self.tell_balancer("show stat").splitlines() if row]
        column = rows[0].index("status")
        return next(row[column] for row in rows if row[1] == f"host_{number + 1}")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    store = make_store(tmp_path_factory.mktemp("store"))
    folder = tmp_path_factory.mktemp("b")
    first, port, other = free_ports(3)
    # Each host takes its port and the two after it.
    second = free_ports(1, taken=set(range(first - 2, first + 3)) | {port, other})[0]
    ports = [first, second]
    environment = {f"HOST_{number}": f"127.0.0.1:{at}" for number, at in enumerate(ports, 1)}
    (folder / "moving").mkdir()
    balancers = {port: {"SESSIONS_RUN": str(folder)}}
    balancers[other] = {"SESSIONS_RUN": str(folder / "moving"), "SESSIONS_SHARED": "1"}
    arguments = [part for config in CONFIGS for part in ("-f", str(config))]
    hosts: list[Command] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [host.end() for host in hosts])
        hosts += [Command(store, NAME, number) for number in ports]
        for host in hosts:
            host.wait_ready()
        clients = []
        for bound, variables in balancers.items():
            env = {**os.environ, **environment, **variables, "BALANCER_BIND": f"127.0.0.1:{bound}"}
            balancer = subprocess.Popen([find_haproxy(), "-db", "-q", *arguments], env=env)
            stack.callback(balancer.wait)
            stack.callback(balancer.terminate)
            http = httpx.Client(base_url=f"http://127.0.0.1:{bound}", timeout=60, trust_env=False)
            clients.append(stack.enter_context(http))
            assert eventually(Path(variables["SESSIONS_RUN"], "admin.sock").exists)
        fleet = Fleet(store, ports, hosts, folder / "admin.sock", *clients)
        assert eventually(lambda: [fleet.state(0), fleet.state(1)] == ["UP", "UP"])
        yield fleet


def test_sessions_spread_and_stay(fleet: Fleet) -> None:
    sessions = [fleet.open() for _ in range(20)]
    workers = [pid for _, pid in sessions]
    assert len(set(workers)) == 2
    assert min(workers.count(pid) for pid in workers) >= 5
    for _ in range(5):
        assert [fleet.ask(session).json()["pid"] for session, _ in sessions] == workers


def test_a_host_that_an_operator_drains_keeps_its_sessions_and_gets_no_new_ones(fleet: Fleet) -> None:
    sessions = [fleet.open() for _ in range(10)]
    fleet.tell_balancer("set server torchserve/host_1 state drain")
    fresh = {fleet.open()[1] for _ in range(10)}
    assert [fleet.ask(session).json()["pid"] for session, _ in sessions] == [pid for _, pid in sessions]
    fleet.tell_balancer("set server torchserve/host_1 state ready")
    assert len(fresh) == 1
    assert eventually(lambda: len({fleet.open()[1] for _ in range(4)}) == 2)


def test_a_host_that_stops_finishes_its_answers_and_then_its_sessions_wait_for_it(fleet: Fleet) -> None:
    sessions = dict(fleet.open() for _ in range(10))
    stopping = fleet.hosts[0].find("model_service_worker")
    here = next(session for session, pid in sessions.items() if pid == stopping)
    there = next(session for session, pid in sessions.items() if pid != stopping)
    moving = dict(fleet.open(fleet.moving) for _ in range(4))
    mover = next(session for session, pid in moving.items() if pid == stopping)
    header = {"X-Amzn-SageMaker-Session-Id": here}
    with fleet.http.stream("POST", "/invocations", json={"steps": 3, "gate": True}, headers=header) as reply:
        lines = reply.iter_lines()
        first = [next(lines) for _ in range(2)]
        fleet.hosts[0].process.send_signal(signal.SIGTERM)
        assert eventually(lambda: fleet.state(0).startswith("NOLB"))
        assert stopping not in {fleet.open()[1] for _ in range(4)}
        # Its sessions still go to it: the word that lets the answer end is heard there. The worker learns of the end
        # later than the balancer.
        assert eventually(lambda: fleet.ask(here).status_code != 200)
        refused = fleet.ask(here, {"release": True})
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "I stop soon.")
        refused = fleet.ask(mover, through=fleet.moving)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "I stop soon."), "it is not down yet"
        assert [*first, *lines] == ["chunk"] * 3
    assert fleet.hosts[0].finish()[0] == 0

    gone = fleet.ask(here)
    assert (gone.status_code, gone.json()["error"]["code"]) == (503, "engine_restarting")
    assert gone.headers["Retry-After"]
    assert fleet.ask(there).json()["pid"] == sessions[there]
    assert fleet.http.get("/ping").status_code == 200
    assert fleet.worker_of(mover) == sessions[there], "a session moves with its next request"
    fleet.start_host(0)
    assert eventually(lambda: fleet.ask(here).status_code == 200)
    assert fleet.ask(here).json()["pid"] == fleet.hosts[0].find("model_service_worker")
    assert eventually(lambda: fleet.state(0) == "UP")
    assert fleet.worker_of(mover) == sessions[there], "and stays where it has moved to"


def test_a_host_that_dies_leaves_nobody_hanging_and_the_others_in_peace(fleet: Fleet) -> None:
    dying = fleet.hosts[1].find("model_service_worker")
    sessions = dict(fleet.open() for _ in range(10))
    here = next(session for session, pid in sessions.items() if pid == dying)
    there = next(session for session, pid in sessions.items() if pid != dying)
    moving = dict(fleet.open(fleet.moving) for _ in range(4))
    mover = next(session for session, pid in moving.items() if pid == dying)
    assert fleet.worker_of(mover) == dying
    started = fleet.hosts[1].children()
    log = fleet.hosts[1].home / "logs" / "model_log.log"
    with ThreadPoolExecutor() as pool:
        hanging = pool.submit(fleet.ask, here, {"hang": True})
        assert eventually(lambda: "hanging" in log.read_text())
        fleet.hosts[1].process.kill()
        for pid in started:
            os.kill(pid, signal.SIGKILL)
        cut = hanging.result(30)
    for reply in (cut, fleet.ask(here)):
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_restarting")
    assert fleet.ask(there).json()["pid"] == sessions[there]
    assert eventually(lambda: fleet.state(1) == "DOWN")
    assert dying not in {fleet.open()[1] for _ in range(4)}
    assert eventually(lambda: fleet.worker_of(mover) == sessions[there])
