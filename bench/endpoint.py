"""Latency that the local endpoint adds to a call: the same turns sent directly to TorchServe and through the endpoint.

Runs the whole server in its own processes with the tiny model: the latency of routing does not depend on the model, and
a small model adds less noise. Both sides use the same HTTP client, each with its own session on one instance, and
alternate. Uses the wire protocol only.
"""

from __future__ import annotations

import base64
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from . import harness
from .driver import Pictures, Prompts
from .harness import Options, Result, Run, median, spread

ROOT = Path(__file__).parents[1]
DIRECT = "direct"
ENDPOINT = "endpoint"
FIRST = "first part of a streamed answer"
WHOLE = "whole answer"
SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
TURNS = 8
TOKENS = 4


@dataclass
class Side:
    """One route to the instance: the paths for streamed and for whole answers, and the measured times."""

    name: str
    http: httpx.Client
    paths: dict[str, str]
    taken: dict[str, list[float]] = field(default_factory=lambda: {FIRST: [], WHOLE: []})
    session: str = ""

    def open(self, image: str) -> None:
        """Open a session."""
        body = {"type": "start_session", "image": image}
        headers = {SESSION_HEADER: "NEW_SESSION"} if self.name == ENDPOINT else {}
        reply = self.http.post(self.paths[WHOLE], json=body, headers=headers).raise_for_status()
        self.session = reply.json()["session_id"]

    def ask(self, text: str, how: str) -> None:
        """Run one turn and record the time to the first byte of the answer."""
        body = {"type": "send_text_prompt", "prompt_text": text, "max_new_tokens": TOKENS, "stream": how == FIRST}
        headers = {SESSION_HEADER: self.session}
        began = time.perf_counter()
        with self.http.stream("POST", self.paths[how], json=body, headers=headers) as reply:
            reply.raise_for_status()
            parts = reply.iter_raw()
            next(parts)
            self.taken[how].append((time.perf_counter() - began) * 1e3)
            for _ in parts:
                pass

    def close(self) -> None:
        """Close the session."""
        body = {"type": "close_session"}
        headers = {SESSION_HEADER: self.session}
        self.http.post(self.paths[WHOLE], json=body, headers=headers).raise_for_status()


@contextlib.contextmanager
def sides(options: Options) -> Iterator[tuple[list[Side], psutil.Process]]:
    """Start an instance; yield both routes to it and the endpoint's process."""
    with tempfile.TemporaryDirectory() as store:
        dtype = str(options.dtype).removeprefix("torch.")
        words = ["--model", options.checkpoint, "--dtype", dtype, "--device", options.device.type, "--output", store]
        subprocess.run([ROOT / "build_mar.sh", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
        words = ["--instances", "1", "--port", "0", "--model-store", store]
        command = [sys.executable, "-m", "deploy.local_endpoint", *words]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                output = ""
                for line in process.stdout:
                    output += line
                    if "Ctrl-C" in line:
                        break
                instance = re.search(r"instance 1: (http://[\d.:]+)", output)[1]
                endpoint = re.search(r"SageMaker Runtime on (http://[\d.:]+)", output)[1]
                name = re.search(r"endpoint '(\w+)'", output)[1]
                with client(instance) as straight, client(f"{endpoint}/endpoints/{name}") as routed:
                    both = [
                        Side(DIRECT, straight, dict.fromkeys((FIRST, WHOLE), "/invocations")),
                        Side(ENDPOINT, routed, {FIRST: "/invocations-response-stream", WHOLE: "/invocations"}),
                    ]
                    yield both, psutil.Process(process.pid)
            finally:
                process.terminate()
                for _ in process.stdout:
                    pass  # read the rest, so that the process can exit


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, trust_env=False)


def measure(options: Options, run: Run) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Return `{call: {side: [ms, ...]}}`, and the CPU time in ms that the endpoint takes per turn.

    Each round is one session of `TURNS` turns on each side; the sides alternate turn by turn.
    """
    pictures = Pictures(options.seed)
    prompts = Prompts(options.seed)
    with sides(options) as (both, process):
        for number in range(options.rounds + 1):
            if number == 1:  # the first round warms up
                before = sum(process.cpu_times()[:2])
                for side in both:
                    side.taken = {FIRST: [], WHOLE: []}
            image = base64.b64encode(pictures.jpeg()).decode()
            for side in both:
                side.open(image)
            for turn in range(TURNS):
                text = prompts.words(8)
                how = (FIRST, WHOLE)[turn % 2]
                for side in harness.alternate(both, number + turn // 2):
                    side.ask(text, how)
            for side in both:
                side.close()
        turns = options.rounds * TURNS
        cpu_ms = (sum(process.cpu_times()[:2]) - before) * 1e3 / turns
        run.say(f"{turns} turns on each side")
        taken = {how: {side.name: side.taken[how] for side in both} for how in (FIRST, WHOLE)}
    return taken, cpu_ms


def report(taken: dict[str, dict[str, list[float]]], cpu_ms: float) -> Result:
    """Return the table and the added latencies."""
    result = Result(["call", "direct ms", "endpoint ms", "added ms", "added, of the best ms"], samples=taken)
    for how, times in taken.items():
        added = [after - before for before, after in zip(times[DIRECT], times[ENDPOINT], strict=True)]
        result.rows.append(
            {
                "call": how,
                "direct ms": spread(times[DIRECT]),
                "endpoint ms": spread(times[ENDPOINT]),
                "added ms": median(added),
                "added, of the best ms": min(times[ENDPOINT]) - min(times[DIRECT]),
            }
        )
        result.ratios[f"{how}: ms added by the endpoint"] = median(added)
        result.ratios[f"{how}: ms added to the best"] = min(times[ENDPOINT]) - min(times[DIRECT])
    result.ratios["ms of a CPU that the endpoint takes for a turn"] = cpu_ms
    result.notes = ["Times to the first byte of the answer, medians [best]; `added` compares turn by turn."]
    return result


def paint(axes, result: Result) -> None:
    """Draw both sides' times, sorted."""
    for (how, times), style in zip(result.samples.items(), ("-", "--"), strict=True):
        for (side, values), colour in zip(times.items(), ("tab:gray", "black"), strict=True):
            shares = [100 * (index + 0.5) / len(values) for index in range(len(values))]
            axes.plot(shares, sorted(values), style, color=colour, label=f"{how}, {side}")
    axes.set(xlabel="% of the turns", ylabel="ms", title="Straight to TorchServe, and through the local endpoint")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    given = sys.argv[1:] if argv is None else argv
    options = harness.at_preset(harness.parse("endpoint", __doc__, ["--preset", "tiny", *given], rounds=40), "tiny")
    run = Run(options)
    return run.finish(report(*measure(options, run)), paint)


if __name__ == "__main__":
    main()
