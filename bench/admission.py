"""Time of a lone open at its client: this checkout and an older one, in alternating order.

Starts the whole service of both checkouts with the same model. Each round opens one session with a new picture on each
of them, through HAProxy, while nothing else runs. An open is answered when its picture is admitted; the column `ready`
is the time until the session has answered a first question with one token.
"""

from __future__ import annotations

import argparse
import base64
import time
from pathlib import Path

import httpx

from . import harness
from .driver import Pictures
from .harness import Options, Result, Run, median, spread
from .route import ROOT, SESSION_HEADER, service

BEFORE = "before"
AFTER = "after"
KINDS = ("open ms", "ready ms")


def open_once(http: httpx.Client, jpeg: bytes) -> dict[str, float]:
    """Open a session, ask one question and close it; return the times in ms from the beginning of the open."""
    body = {"type": "start_session", "image": base64.b64encode(jpeg).decode()}
    began = time.perf_counter()
    session = http.post("/invocations", json=body).raise_for_status().json()["session_id"]
    opened = time.perf_counter()
    headers = {SESSION_HEADER: session}
    question = {"type": "send_text_prompt", "prompt_text": "What is this?", "max_new_tokens": 1}
    http.post("/invocations", json=question, headers=headers).raise_for_status()
    ready = time.perf_counter()
    http.post("/invocations", json={"type": "close_session"}, headers=headers).raise_for_status()
    return {"open ms": (opened - began) * 1e3, "ready ms": (ready - began) * 1e3}


def measure(options: Options, run: Run) -> dict[str, dict[str, list[float]]]:
    """Return `{side: {kind: [ms, ...]}}`; samples at one place in both sides are of one round."""
    dtype = str(options.dtype).removeprefix("torch.")
    pictures = Pictures(options.seed)
    taken: dict[str, dict[str, list[float]]] = {side: {kind: [] for kind in KINDS} for side in (BEFORE, AFTER)}
    before = service(options.extra.before.resolve(), options.checkpoint, dtype)
    with before as (_, before_url), service(ROOT, options.checkpoint, dtype) as (_, after_url):
        urls = {BEFORE: before_url, AFTER: after_url}
        clients = {side: httpx.Client(base_url=url, timeout=120, trust_env=False) for side, url in urls.items()}
        for number in range(-1, options.rounds):  # the first round warms up
            run.say(f"round {number + 1} of {options.rounds}")
            for side in harness.alternate([BEFORE, AFTER], number):
                times = open_once(clients[side], pictures.jpeg())
                for kind in KINDS if number >= 0 else ():
                    taken[side][kind].append(times[kind])
    return taken


def report(options: Options, taken: dict[str, dict[str, list[float]]]) -> Result:
    """Return the table and the ratios of the medians."""
    result = Result(["side", *KINDS], samples=taken)
    result.rows = [{"side": side, **{kind: spread(ms) for kind, ms in kinds.items()}} for side, kinds in taken.items()]
    for kind in KINDS:
        pairs = zip(taken[AFTER][kind], taken[BEFORE][kind], strict=True)
        result.ratios[f"{kind}: after / before, median over rounds"] = median(after / before for after, before in pairs)
    result.settings = {"before": options.extra.commit}
    result.notes = ["Times are medians [best]."]
    return result


def paint(axes, result: Result) -> None:
    """Draw the time of each open."""
    for side, colour in ((BEFORE, "tab:gray"), (AFTER, "black")):
        axes.plot(result.samples[side]["open ms"], marker="o", color=colour, label=side)
    axes.set(xlabel="round", ylabel="ms", title="A lone open, until its reply")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, required=True, help="checkout with the code before the change")
    parser.add_argument("--commit", default="", help="its commit, for the record")


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.parse("admission", __doc__, argv, rounds=12, more=_arguments)
    run = Run(options)
    return run.finish(report(options, measure(options, run)), paint)


if __name__ == "__main__":
    main()
