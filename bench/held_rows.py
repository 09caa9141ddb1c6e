"""Gaps of a stream next to requests with large bodies, which TorchServe sends to the worker again in every step.

Starts TorchServe with the demo model. With `--old CHECKOUT` both checkouts are measured, in alternating order. A round:

- a stream alone; next to a question with a small picture; next to the same question with a picture of 10 MiB. The gaps
  count from the moment at which the question is sent to the end of its answer.
- one stream, and 40 opens of 10 MiB at the same moment.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from deploy.options import Parser, whole_number

from . import harness
from .harness import Options, Result, Run, median, percentile

ROOT = Path(__file__).parents[1]
SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
SIDE_PX = 1866  # noise of this size is a PNG just below 10 MiB
OPENS = 40
ALONE, SMALL, LARGE = "alone", "next to a question with a small picture", "next to a question with 10 MiB"
BURST_S = 0.001
KINDS = (ALONE, SMALL, LARGE)
LONG = {"max_new_tokens": 1000, "temperature": 9.0, "seed": 3, "ignore_eos": True}


def noise(side_px: int, seed: int) -> str:
    """Return a PNG of noise in base64, to which more base64 can be appended."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    held = buffer.getvalue()
    return base64.b64encode(held + b"\0" * (-len(held) % 3)).decode()


class Picture:
    """One encoded picture; each body has other bytes behind its end, so that no two pictures are the same."""

    def __init__(self, side_px: int) -> None:
        self._base64 = noise(side_px, 0).encode()
        self._number = 0
        self._lock = threading.Lock()

    def parts(self, fields: dict) -> list[bytes]:
        """Return the parts of a request body with `fields` and a new picture."""
        with self._lock:
            self._number += 1
            tail = base64.b64encode(self._number.to_bytes(12, "big"))
        return [json.dumps(fields)[:-1].encode() + b', "image": "', self._base64, tail, b'"}']


@dataclass
class Server:
    """A running server: its port, and the launcher's process."""

    port: int
    pid: int

    def post(self, parts: list[bytes], session: str | None = None) -> tuple[int, dict]:
        """Send a request. Return the status and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json", "Content-Length": str(sum(map(len, parts)))}
        if session is not None:
            headers[SESSION_HEADER] = session
        try:
            connection.request("POST", "/invocations", iter(parts), headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read() or b"{}")
        finally:
            connection.close()

    def call(self, fields: dict, session: str | None = None) -> dict:
        """Send a small request that must succeed."""
        status, body = self.post([json.dumps(fields).encode()], session)
        if status != http.client.OK or "error" in body:
            raise RuntimeError(f"{status} {body}")
        return body

    def open(self, picture: Picture) -> str:
        """Open a session."""
        status, body = self.post(picture.parts({"type": "start_session"}))
        if status != http.client.OK:
            raise RuntimeError(f"{status} {body}")
        return str(body["session_id"])

    def close(self, session: str) -> None:
        """Close a session."""
        self.call({"type": "close_session"}, session)

    def rss_mib(self) -> float:
        """Return the memory of all processes of the server."""
        processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        return sum(process.memory_info().rss for process in processes) / 2**20


@dataclass
class Stream:
    """A streamed answer that runs in a thread: the times of its chunks, and its last line."""

    server: Server
    session: str
    times: list[float] = field(default_factory=list)
    last: dict = field(default_factory=dict)

    def __enter__(self) -> Stream:
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        while len(self.times) < 20 and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def gaps_ms(self, began: float, ended: float) -> list[float]:
        """Return the gaps between two chunks of which the later one arrived between two times.

        Chunks that this client reads in one burst count once.
        """
        pairs = zip(self.times, self.times[1:], strict=False)
        return [round((b - a) * 1e3, 2) for a, b in pairs if began < b <= ended and b - a > BURST_S]

    def _read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=300)
        fields = {"type": "send_text_prompt", "prompt_text": "Which shapes are there?", "stream": True, **LONG}
        headers = {"Content-Type": "application/json", SESSION_HEADER: self.session}
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", "/invocations", json.dumps(fields), headers)
            reply = connection.getresponse()
            text = b""
            while chunk := reply.read1():  # lines that arrive together count once
                self.times.append(time.perf_counter())
                text += chunk
            self.last = json.loads(text.splitlines()[-1])
        connection.close()


@contextlib.contextmanager
def service(checkout: Path) -> Iterator[Server]:
    """Serve the demo model with the code of a checkout."""
    with tempfile.TemporaryDirectory() as store:
        words = ["--model", "models/shapes", "--dtype", "float32", "--device", "cpu", "--output", store]
        subprocess.run([checkout / "build_mar.sh", *words], cwd=checkout, check=True, capture_output=True)
        command = [sys.executable, "-m", "deploy.serve", "--model-store", store, "--port", "0"]
        process = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        text = ""
        try:
            assert process.stdout is not None
            for line in process.stdout:
                text += line
                if "Ctrl-C here stops" in line:
                    break
            found = re.search(r"on http://[^:]+:(\d+)", text)
            if found is None:
                raise RuntimeError(f"the service does not run:\n{text}")
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield Server(int(found[1]), process.pid)
        finally:
            process.terminate()
            process.wait()


def gaps(server: Server, kind: str, pictures: dict[str, Picture], tokens: int) -> list[float]:
    """Return the gaps of one stream, alone or next to one question."""
    sessions = [server.open(pictures[SMALL]) for _ in range(2)]
    asked = {"type": "send_text_prompt", "prompt_text": "How many?", **LONG, "max_new_tokens": tokens}
    with Stream(server, sessions[0]) as stream:
        began = time.perf_counter()
        if kind == ALONE:
            time.sleep(tokens * 0.01)
        else:
            status, body = server.post(pictures[kind].parts(asked), sessions[1])
            if status != http.client.OK or "error" in body:
                raise RuntimeError(f"{status} {body}")
        ended = time.perf_counter()
    if stream.last.get("finish_reason") != "length":
        raise RuntimeError(f"the stream was cut: {stream.last}")
    for session in sessions:
        server.close(session)
    return stream.gaps_ms(began, ended)


def opens(server: Server, pictures: dict[str, Picture], count: int) -> dict[str, float]:
    """Open sessions at once next to one stream. Return what was answered, and what became of the stream."""
    session = server.open(pictures[SMALL])
    with Stream(server, session) as stream:
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            parts = [pictures[LARGE].parts({"type": "start_session"}) for _ in range(count)]
            replies = list(pool.map(lambda body: _outcome(server, body), parts))
        ended = time.perf_counter()
    answered = [body["session_id"] for status, body in replies if status == http.client.OK]
    refused = sorted({f"{status} {body}" for status, body in replies if status != http.client.OK})
    for each in refused:
        print(f"  refused: {each}", flush=True)
    memory = server.rss_mib()
    with contextlib.suppress(RuntimeError, OSError):
        for each in [*answered, session]:
            server.close(each)
    return {
        "answered": len(answered),
        "stream cut": float(stream.last.get("finish_reason") != "length"),
        "seconds": ended - began,
        "longest gap ms": max(stream.gaps_ms(began, ended), default=0.0),
        "RSS MiB": memory,
    }


def _outcome(server: Server, body: list[bytes]) -> tuple[int, dict]:
    try:
        return server.post(body)
    except (OSError, http.client.HTTPException) as error:
        return 0, {"error": type(error).__name__}


def measure(options: Options, run: Run, checkouts: dict[str, Path]) -> dict:
    """Return `{side: {"gaps": {kind: [ms]}, "opens": [figures]}}`."""
    pictures = {SMALL: Picture(32), LARGE: Picture(SIDE_PX)}
    taken: dict = {side: {"gaps": {kind: [] for kind in KINDS}, "opens": []} for side in checkouts}
    for number in range(options.rounds):
        for side in harness.alternate(list(checkouts), number):
            with service(checkouts[side]) as server:
                gaps(server, SMALL, pictures, 50)  # warms up
                for kind in harness.alternate(list(KINDS), number):
                    taken[side]["gaps"][kind] += gaps(server, kind, pictures, options.pick(600, 100))
                taken[side]["opens"].append(opens(server, pictures, options.pick(OPENS, 4)))
            medians = {kind: round(median(taken[side]["gaps"][kind]), 1) for kind in KINDS}
            run.say(f"round {number + 1} of {options.rounds}, {side}: {medians} {taken[side]['opens'][-1]}")
    return taken


def report(taken: dict, opened: int) -> Result:
    """Return the table and the growth of the gaps."""
    result = Result(["side", "stream", "p50 ms", "p99 ms", "longest ms", "gaps"], samples=taken)
    for side, found in taken.items():
        for kind, ms in found["gaps"].items():
            figures = {"p50 ms": median(ms), "p99 ms": percentile(ms, 0.99), "longest ms": max(ms), "gaps": len(ms)}
            result.rows.append({"side": side, "stream": kind, **figures})
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            large, small, alone = (percentile(found["gaps"][kind], share) for kind in (LARGE, SMALL, ALONE))
            result.ratios[f"{side}: {name} next to 10 MiB / next to a small picture"] = large / small
            result.ratios[f"{side}: {name} next to 10 MiB / alone"] = large / alone
        for name in ("answered", "stream cut", "seconds", "longest gap ms", "RSS MiB"):
            values = [figures[name] for figures in found["opens"]]
            result.ratios[f"{side}: {opened} opens of 10 MiB at once: {name}"] = median(values)
    return result


def paint(axes, result: Result) -> None:
    """Draw the share of gaps that are longer than x."""
    for side, style in zip(result.samples, ("-", "--"), strict=False):
        for kind, colour in zip(KINDS, ("tab:gray", "tab:blue", "black"), strict=True):
            ms = sorted(result.samples[side]["gaps"][kind])
            shares = [1 - index / len(ms) for index in range(len(ms))]
            axes.step(ms, shares, style, where="post", color=colour, label=f"{side}: {kind}")
    axes.set(xscale="log", yscale="log", xlabel="gap, ms", ylabel="share of gaps that are longer", title="Held rows")
    axes.legend(fontsize=6)


def parse(argv: list[str] | None) -> tuple[Options, dict[str, Path]]:
    """Parse the command line. The model is always the demo's."""
    parser = Parser(
        prog="python -m bench.held_rows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="another checkout to measure in the same run")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="starts of each server (3)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the JSON and the plot")
    parser.add_argument("--smoke", action="store_true", help="one short round: shows that it runs")
    given = parser.parse_args(argv)
    sides = {} if given.old is None else {"old": given.old.resolve()}
    options = Options(
        name="held_rows",
        checkpoint=ROOT / "models" / "shapes",
        preset="shapes",
        dtype=torch.float32,
        device=torch.device("cpu"),
        rounds=1 if given.smoke else given.rounds,
        smoke=given.smoke,
        out=given.out,
        seed=0,
        extra=given,
    )
    return options, {**sides, "new": ROOT}


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options, checkouts = parse(argv)
    run = Run(options)
    return run.finish(report(measure(options, run, checkouts), options.pick(OPENS, 4)), paint)


if __name__ == "__main__":
    main()
