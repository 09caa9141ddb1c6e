"""Kill or drain one of two instances repeatedly while sessions chat; the other instance adopts its sessions.

The instances share a journal: a directory, or S3 (moto). Clients reach them through HAProxy (haproxy.cfg with
SESSIONS_SHARED), or through the local endpoint, which sends a lost instance's sessions to the other one. A client
repeats a request that received 503, and does nothing else: it never resumes a session.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
from botocore.config import Config
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

from deploy.local_endpoint.contract import Corners
from deploy.local_endpoint.pins import Instance
from deploy.serve.haproxy import find_haproxy
from tests.support.chats import Script, scene_scripts
from tests.support.commands import REPO, eventually, free_row, kill_tree
from tests.support.local_endpoint import NAME, Endpoint
from tests.support.serving import START_S, pack
from tests.support.wire import SESSION_HEADER

from .report import Record, options

BUCKET = "moves"
PATIENCE_S = 300.0
CONFIGS = [REPO / "deploy" / "serve" / name for name in ("sessions.cfg", "haproxy.cfg")]
Send = Callable[[dict[str, Any], str | None], tuple[int, dict[str, Any], float]]


class Host:
    """One instance, as `make serve` starts it, always on the same port."""

    def __init__(self, store: Path, port: int, log: Path, env: dict[str, str]) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._store = store
        self._log = log
        self._env = env
        self.start()

    def start(self) -> None:
        """Start the instance."""
        command = [sys.executable, "-m", "deploy.serve", "--model-store", str(self._store), "--port", str(self.port)]
        with self._log.open("ab") as log:
            env = {**os.environ, **self._env}
            self.process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, env=env)

    def wait_ready(self) -> None:
        """Wait until the instance answers /ping with 200."""
        assert eventually(self._is_ready, START_S), self._log.read_text()[-2000:]

    def kill(self) -> None:
        """Kill all its processes at once."""
        kill_tree(self.process)
        self.process.wait()

    def drain(self) -> None:
        """Stop the instance as a platform does, and wait for its end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            self.start()  # a port of the killed instance was still in use
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ping", trust_env=False, timeout=5).status_code == 200
        return False


@dataclass
class Crowd:
    """What all clients together went through. `allowed`: how many turns they may have begun; the others wait."""

    turns: int = 0
    begun: int = 0
    allowed: float = math.inf
    repeated: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    rebuilds: int = 0
    lock: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def begin(self) -> None:
        """Wait until one more turn may begin."""
        with self.lock:
            self.lock.wait_for(lambda: self.begun < self.allowed)
            self.begun += 1

    def allow(self, turns: float) -> None:
        """Let so many turns begin, those included that have begun."""
        with self.lock:
            self.allowed = turns
            self.lock.notify_all()


class Failed(Exception):
    """A reply that a client does not repeat its request after."""


def persist(send: Send, body: dict[str, Any], session: str | None, crowd: Crowd) -> dict[str, Any]:
    """Send a request until its reply is not 503. A close that is repeated may find that the first one was effective."""
    was_repeated = False
    until_s = time.monotonic() + PATIENCE_S
    began_s = time.monotonic()
    while True:
        status, reply, after_s = send(body, session)
        if status == 200:
            with crowd.lock:
                crowd.longest_s = max(crowd.longest_s, time.monotonic() - began_s)
            return reply
        code = reply.get("error", {}).get("code", str(reply)[:200])
        if was_repeated and body["type"] == "close_session" and (status, code) == (404, "session_not_found"):
            return reply
        if status != 503 or time.monotonic() > until_s:
            raise Failed(f"{body['type']}: {status} {code}")
        was_repeated = True
        with crowd.lock:
            crowd.repeated[code] += 1
        time.sleep(after_s)


def http_client(http: httpx.Client) -> Send:
    """Send requests through HAProxy."""

    def send(body: dict[str, Any], session: str | None) -> tuple[int, dict[str, Any], float]:
        reply = http.post("/invocations", json=body, headers={SESSION_HEADER: session} if session else {})
        return reply.status_code, reply.json(), float(reply.headers.get("Retry-After", 1))

    return send


def boto_client(url: str) -> Send:
    """Send requests through the local endpoint by boto3. Without an answer of the container the status is 0: as 503."""
    # boto3 opens a connection again that the endpoint has closed while it was idle: that needs a second attempt.
    config = Config(max_pool_connections=100, read_timeout=70)
    runtime = boto3.Session("any", "any", region_name="us-west-2").client(
        "sagemaker-runtime", endpoint_url=url, config=config
    )

    def send(body: dict[str, Any], session: str | None) -> tuple[int, dict[str, Any], float]:
        try:
            reply = runtime.invoke_endpoint(
                EndpointName=NAME,
                ContentType="application/json",
                Body=json.dumps(body),
                SessionId=session or "NEW_SESSION",
            )
        except ClientError as error:
            status = error.response.get("OriginalStatusCode") or 503
            text = error.response.get("OriginalMessage", "")
            with contextlib.suppress(ValueError):
                return status, json.loads(text), 1.0
            return status, {"error": {"code": error.response["Error"]["Code"]}}, 1.0
        return 200, json.loads(reply["Body"].read()), 0.0

    return send


def talk(send: Send, script: Script, crowd: Crowd, rng: random.Random, pause_s: float) -> list[tuple[int, ...]]:
    """One whole chat. Return the token IDs of its answers."""
    image = base64.b64encode(script.picture).decode()
    opened = persist(send, {"type": "start_session", "image": image, "request_id": str(uuid.uuid4())}, None, crowd)
    session = opened["session_id"]
    answers = []
    for question in script.questions:
        time.sleep(rng.uniform(0, 2 * pause_s))
        crowd.begin()
        ids = {"request_id": str(uuid.uuid4()), "return_token_ids": True}
        reply = persist(send, {"type": "send_text_prompt", "prompt_text": question, **ids}, session, crowd)
        if reply["session_id"] != session:
            raise Failed("the session has another ID")
        with crowd.lock:
            crowd.turns += 1
            crowd.rebuilds += bool(answers) and reply["usage"]["cached_tokens"] == 0
        answers.append(tuple(reply["token_ids"]))
    persist(send, {"type": "close_session"}, session, crowd)
    return answers


@contextlib.contextmanager
def moto() -> Iterator[dict[str, str]]:
    """Run moto's S3. Yield the environment of a worker that uses it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    env |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
    session = boto3.Session("testing", "testing", region_name="us-east-1")
    session.client("s3", endpoint_url=env["AWS_ENDPOINT_URL_S3"]).create_bucket(Bucket=BUCKET)
    try:
        yield env
    finally:
        server.stop()


@contextlib.contextmanager
def balanced(hosts: list[Host], folder: Path) -> Iterator[tuple[Send, Callable[[int], None]]]:
    """HAProxy in front of both hosts. It notices by itself that a host is back."""
    port = free_row()
    folder.mkdir()
    env = {f"HOST_{number}": f"127.0.0.1:{host.port}" for number, host in enumerate(hosts, 1)}
    env |= {"BALANCER_BIND": f"127.0.0.1:{port}", "SESSIONS_RUN": str(folder), "SESSIONS_SHARED": "1"}
    arguments = [part for config in CONFIGS for part in ("-f", str(config))]
    balancer = subprocess.Popen([find_haproxy(), "-db", "-q", *arguments], env={**os.environ, **env})
    limits = httpx.Limits(max_connections=200)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits, trust_env=False) as http:
            assert eventually(lambda: (folder / "admin.sock").exists())
            time.sleep(2)  # the first health checks
            yield http_client(http), lambda _: None
    finally:
        balancer.terminate()
        balancer.wait()


@contextlib.contextmanager
def endpoint(hosts: list[Host], _: Path) -> Iterator[tuple[Send, Callable[[int], None]]]:
    """The local endpoint in front of both hosts. A host that is back is a new instance, as on SageMaker."""

    class Server:
        def __init__(self, host: Host) -> None:
            self.url = host.url
            self.log_path = "-"

    with Endpoint([Server(host) for host in hosts], Corners(lost_instance="reroute")) as local:  # type: ignore[misc]
        instances = local.service.pins.instances

        def back(index: int) -> None:
            if instances[index].gone:
                instances[index] = Instance(instances[index].number, hosts[index].url, "-")

        yield boto_client(local.url), back


FRONTS = {"haproxy": balanced, "endpoint": endpoint}


def moves(argv: list[str]) -> int:
    """Kill or drain one of two instances repeatedly; the other one adopts its sessions."""
    words = {"fronts": list(FRONTS), "stores": ["directory", "s3"]}
    chosen = options("moves", __doc__, argv, words, sessions=40, turns=10, times=10, scripts=8, pause_ms=1500)
    record = Record("moves", chosen)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-soak-")))
        env = stack.enter_context(moto())
        expected: list[list[tuple[int, ...]]] = []
        for where in chosen.stores:
            setting = {"journal_dir": folder / "journal"}
            if where == "s3":
                setting = {"journal_s3_prefix": f"s3://{BUCKET}/moves"}
            store = pack(folder / where, sessions=2 * chosen.sessions, **setting)
            for front in chosen.fronts:
                _run(record, f"{front}, {where}", store, folder, env, expected)
    return record.finish()


def _run(
    record: Record, name: str, store: Path, folder: Path, env: dict[str, str], expected: list[list[tuple[int, ...]]]
) -> None:
    """Chats through one front over one journal. `expected` is filled by the first run, before any harm."""
    chosen = record.chosen
    rng = random.Random(f"{chosen.seed} {name}")
    scripts = scene_scripts(chosen.scripts, chosen.turns)
    crowd = Crowd()
    with ExitStack() as stack:
        hosts = []
        for number in (1, 2):
            hosts.append(Host(store, free_row(), folder / f"host-{number}.log", env))
            stack.callback(hosts[-1].kill)
        for host in hosts:
            host.wait_ready()
        front = FRONTS[name.split(",", maxsplit=1)[0]]
        send, back = stack.enter_context(front(hosts, folder / f"run-{uuid.uuid4().hex[:8]}"))
        if not expected:
            record.say("the answers of an undisturbed server")
            expected += [talk(send, script, Crowd(), rng, 0) for script in scripts]
        record.say(f"{name}: {chosen.sessions} sessions of {chosen.turns} turns")

        def chat(number: int) -> None:
            index = number % len(scripts)
            own = random.Random(f"{chosen.seed} {name} {number}")
            try:
                answers = talk(send, scripts[index], crowd, own, chosen.pause_ms / 1e3)
                if answers != expected[index]:
                    crowd.wrong.append(f"session {number}")
            except Exception as error:
                crowd.failures.append(f"session {number}: {type(error).__name__}: {error}")
                crowd.allow(math.inf)  # too few turns may be left for the losses that were planned

        share = chosen.sessions * chosen.turns / (chosen.times + 1)
        crowd.allow(1.5 * share)
        pool = stack.enter_context(ThreadPoolExecutor(chosen.sessions))
        chats = [pool.submit(chat, number) for number in range(chosen.sessions)]
        harms = _harm(record, name, hosts, back, crowd, share, lambda: all(one.done() for one in chats))
        crowd.allow(math.inf)
        for one in chats:
            one.result()
    _report(record, name, crowd, harms)


def _report(record: Record, name: str, crowd: Crowd, harms: list[str]) -> None:
    """Add the figures and the checks of one run."""
    chosen = record.chosen
    turns = chosen.sessions * chosen.turns
    record.figures[name] = {
        "turns": crowd.turns,
        "harms": harms,
        "repeated_requests": dict(crowd.repeated),
        "rebuilt_sessions": crowd.rebuilds,
        "longest_with_repetitions_s": round(crowd.longest_s, 1),
    }
    record.check(f"{name}: no conversation failed", not crowd.failures, crowd.failures[:3] or f"{crowd.turns} turns")
    record.check(f"{name}: every answer is the undisturbed one", not crowd.wrong, f"{len(crowd.wrong)} wrong")
    record.check(f"{name}: every turn was answered", crowd.turns == turns, f"{crowd.turns} of {turns}")
    record.check(f"{name}: instances were lost meanwhile", len(harms) == chosen.times, len(harms))
    record.check(f"{name}: sessions moved", crowd.rebuilds > 0, crowd.rebuilds)
    record.say(f"{name}: {record.figures[name]}")


def _harm(
    record: Record,
    name: str,
    hosts: list[Host],
    back: Callable[[int], None],
    crowd: Crowd,
    share: float,
    done: Callable[[], bool],
) -> list[str]:
    """Kill and drain the hosts in turn, each after a `share` of the turns. Return what was done.

    While a host is lost, the clients go on by half a share. The next host is lost while turns run.
    """
    chosen = record.chosen
    harms = []
    for number in range(chosen.times):
        while crowd.turns < share * (number + 1) and not done():
            time.sleep(0.05)
        if done():
            break
        index = number % 2
        kind = ("kill", "drain")[number // 2 % 2]
        record.say(f"{name}: {kind} host {index + 1} after {crowd.turns} turns")
        (hosts[index].kill if kind == "kill" else hosts[index].drain)()
        harms.append(f"{kind} host {index + 1}")
        hosts[index].start()
        hosts[index].wait_ready()
        back(index)
        crowd.allow(crowd.allowed + share)
    return harms
