"""Latency that HAProxy adds to a request, and that the OpenAI route adds to a follow-up turn.

Starts the whole service (`python -m deploy.serve`) with the demo model, which takes little of a request's time. Each
request is sent on both routes, over one persistent connection each, in alternating order: a streamed ask (until its
first line), an ask with a whole answer, and an ask of an unknown session, whose rejection runs no model.

Then the same conversations in the native protocol and on the OpenAI route (`bench.conversations`).
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from deploy.options import typed

from . import conversations, harness
from .conversations import Samples
from .harness import Options, Result, Run, median, percentile

ROOT = Path(__file__).parents[1]
SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
QUESTION = {"type": "send_text_prompt", "prompt_text": "How many shapes are there?"}
TURNS_PER_SESSION = 8  # the demo model's context holds no more of both sides' turns
SIDES = ("direct", "through HAProxy")


class ServiceError(RuntimeError):
    """The service does not start, or a server does not answer. The message is for the person at the terminal."""


class Way:
    """One route to the server: a persistent connection, and the times of requests on it."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def open(self) -> str:
        """Open a session on a new picture; return its ID."""
        pixels = np.random.default_rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        body = {"type": "start_session", "image": base64.b64encode(buffer.getvalue()).decode()}
        return self.http.post("/invocations", json=body).raise_for_status().json()["session_id"]

    def close(self, session: str) -> None:
        """Close a session."""
        self._post(session, {"type": "close_session"}).raise_for_status()

    def streamed(self, session: str) -> float:
        """Return the ms from an ask to its first line."""
        began = time.perf_counter()
        headers = {SESSION_HEADER: session}
        with self.http.stream("POST", "/invocations", json={**QUESTION, "stream": True}, headers=headers) as reply:
            lines = reply.raise_for_status().iter_lines()
            next(lines)
            taken = (time.perf_counter() - began) * 1e3
            for _ in lines:
                pass
        return taken

    def whole(self, session: str) -> float:
        """Return the ms from an ask to its whole answer."""
        began = time.perf_counter()
        self._post(session, QUESTION).raise_for_status()
        return (time.perf_counter() - began) * 1e3

    def refused(self, _session: str) -> float:
        """Return the ms from an ask of an unknown session to its rejection.

        The server closes the connection after a status 4xx, so the time includes a new connection.
        """
        began = time.perf_counter()
        assert self._post("no-such-session", QUESTION).status_code == 404
        return (time.perf_counter() - began) * 1e3

    def _post(self, session: str, body: dict) -> httpx.Response:
        return self.http.post("/invocations", json=body, headers={SESSION_HEADER: session})


KINDS: dict[str, Callable[[Way, str], float]] = {
    "streamed ask, first line": Way.streamed,
    "ask, whole answer": Way.whole,
    "refusal": Way.refused,
}


@contextlib.contextmanager
def service(
    root: Path = ROOT, model: Path = harness.DEMO_MODEL, dtype: str = "float32", config: Path | None = None
) -> Iterator[tuple[str, str]]:
    """Start the service of the checkout `root` with a model; yield the addresses of TorchServe and of HAProxy.

    `config` replaces handler/model-config.yaml. Raise `ServiceError` if the model is not served.
    """
    with tempfile.TemporaryDirectory() as store:
        pack = [root / "build_mar.sh", "--model", model, "--dtype", dtype, "--device", "cpu", "--output", store]
        pack += ["--config", config] if config else []
        packed = subprocess.run([*pack, "--weights", "beside"], cwd=root, capture_output=True, text=True)
        if packed.returncode:
            raise ServiceError(packed.stderr.strip().partition("error: ")[2] or packed.stderr.strip())
        command = [sys.executable, "-m", "deploy.serve", "--model-store", store, "--port", "0"]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            text = ""
            for line in process.stdout:
                text += line
                if "Ctrl-C here stops" in line:
                    break
            urls = [re.search(pattern, text) for pattern in (r"TorchServe (http://\S+)", r"ready in \S+ s on (\S+)")]
            threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stall the server
            if None in urls:
                raise ServiceError(f"the service with HAProxy does not run:\n{text}")
            yield urls[0][1], urls[1][1]
        finally:
            process.terminate()
            process.wait()


def root_of(url: str) -> str:
    """Return the address of a server without a slash at its end and without /v1."""
    return url.rstrip("/").removesuffix("/v1")


def served_model(url: str) -> str:
    """Return the name of the model at /v1. Raise `ServiceError`."""
    try:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            models = http.get("/v1/models").raise_for_status().json()["data"]
        return models[0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        option = typed("--url")
        raise ServiceError(f"{option} must be a server with /v1/models, got {url}: {type(error).__name__}") from error


def measure(options: Options, run: Run, urls: tuple[str, str]) -> dict[str, dict[str, list[float]]]:
    """`{kind: {side: [ms, ...]}}` for TorchServe's address and HAProxy's; samples at one place in both are a pair."""
    taken = {kind: {side: [] for side in SIDES} for kind in KINDS}
    ways = dict(zip(SIDES, map(Way, urls), strict=True))
    for number in range(-1, options.rounds):  # the first round warms up
        run.say(f"round {number + 1} of {options.rounds}")
        session = ways[SIDES[0]].open()
        for turn in range(options.pick(TURNS_PER_SESSION, 2)):
            for kind, ask in KINDS.items():
                for side in harness.alternate(list(SIDES), turn + number):
                    ms = ask(ways[side], session)
                    if number >= 0:
                        taken[kind][side].append(ms)
        ways[SIDES[0]].close(session)
    return taken


def report(taken: dict[str, dict[str, list[float]]], follow_ups: dict[str, Samples]) -> Result:
    """The table, and what the front adds: the median over pairs, and the difference of the 99th percentiles."""
    result = Result(["request", "side", "p50 ms", "p99 ms", "requests"])
    for kind, sides in taken.items():
        for side, ms in sides.items():
            figures = {"p50 ms": median(ms), "p99 ms": percentile(ms, 0.99), "requests": len(ms)}
            result.rows.append({"request": kind, "side": side, **figures})
        direct, through = (sides[side] for side in SIDES)
        added = [b - a for a, b in zip(direct, through, strict=True)]
        result.ratios[f"{kind}: HAProxy adds, ms (median of pairs)"] = median(added)
        result.ratios[f"{kind}: HAProxy adds, ms (p99 less p99)"] = percentile(through, 0.99) - percentile(direct, 0.99)
    for name, samples in follow_ups.items():
        _report_follow_ups(result, name, samples)
    result.samples = taken | {f"follow-up, {name}": vars(samples) for name, samples in follow_ups.items()}
    return result


def _report_follow_ups(result: Result, name: str, samples: Samples) -> None:
    """Add one picture's rows, and what the OpenAI route adds to the time to first token."""
    columns = {**samples.ttft, "/v1, rejected for an option": samples.body, "SHA-256 of the picture": samples.sha256}
    for side, ms in columns.items():
        figures = {"p50 ms": median(ms), "p99 ms": percentile(ms, 0.99), "requests": len(ms)}
        result.rows.append({"request": f"follow-up TTFT, {name}", "side": side, **figures})
    added = median(b - a for a, b in zip(samples.ttft["native"], samples.ttft["/v1"], strict=True))
    result.ratios[f"{name}: /v1 adds to the follow-up TTFT, ms (median of pairs)"] = added
    result.ratios[f"{name}: of that, beyond the SHA-256 of the picture, ms"] = added - median(samples.sha256)


def paint(axes, result: Result) -> None:
    """Draw each kind's two distributions."""
    boxes = [result.samples[kind][side] for kind in KINDS for side in SIDES]
    labels = [f"{kind}\n{side}" for kind in KINDS for side in SIDES]
    axes.boxplot(boxes, whis=(1, 99), showfliers=False)
    axes.set_xticks(range(1, len(labels) + 1), labels, fontsize=6)
    axes.set(
        ylabel="ms (box: quartiles, whiskers: 1st and 99th percentile)", title="The way through HAProxy and past it"
    )
    axes.set_ylim(bottom=0)


def parse(argv: list[str] | None) -> Options:
    """Parse the command line."""
    return harness.served_options("route", __doc__, argv, rounds=20, rounds_help="sessions of 20 turns each (20)")


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = parse(argv)
    run = Run(options)
    with service() as urls:
        taken = measure(options, run, urls)
        follow_ups = conversations.measure(run, urls[1])
        return run.finish(report(taken, follow_ups), paint)


if __name__ == "__main__":
    main()
