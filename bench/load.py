"""Load of many chats on the served /v1, made by AIPerf: latencies, and goodput by objectives.

Starts the whole service (`python -m deploy.serve`) with a model, or uses the server at --url. AIPerf holds the
conversations: each has a picture of its own, a pause before each further question, and answers of a fixed length. The
requests are OpenAI's, so each sends its whole conversation.

`make load` installs AIPerf first. `bench.sessions` has users who leave, return or let their session expire.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.options import decimal_number, error_prefix, typed, whole_number

from . import harness, talk
from .chat_options import chat_options, chat_parser
from .harness import Options, Result, Run, percentile
from .route import ROOT, ServiceError, root_of, served_model, service

PROG = "python -m bench.load"
AIPERF = ROOT / ".venv-clients" / "aiperf" / "bin" / "aiperf"
TOKENIZER = harness.DEMO_MODEL  # AIPerf loads one; the server counts the tokens
GROUPS = ("all turns", "first turns", "follow-ups")
TIMES = {  # metric of AIPerf -> name in the table
    "time_to_first_token": "TTFT",
    "inter_token_latency": "ITL",
    "request_latency": "e2e",
}
SHARES = (0.5, 0.9, 0.99)
RATE_TOLERANCE = 0.1


class LoadError(Exception):
    """The load cannot run. The message is for the person at the terminal."""


@dataclass(frozen=True)
class Request:
    """One request as AIPerf measured it; times in ms. `error` is empty for an answer."""

    turn: int
    times_ms: dict[str, float]
    is_good: bool
    prompt_tokens: float
    cached_tokens: float
    error: str


def parse(argv: list[str] | None) -> Options:
    """Parse the command line."""
    parser = chat_parser(PROG, __doc__)
    add = parser.add_argument
    add("--conversations", type=whole_number(1), default=30, metavar="N", help="conversations (%(default)s)")
    add("--turns", type=whole_number(1), default=4, metavar="N", help="questions of each (%(default)s)")
    at_once = "conversations that run at the same time (%(default)s)"
    add("--concurrency", type=whole_number(1), default=8, metavar="N", help=at_once)
    rate = "requests per second on average, at random times (default: as fast as the concurrency allows)"
    add("--rate", type=decimal_number(0.001), metavar="R", help=rate)
    add("--tokens", type=whole_number(2), default=24, metavar="N", help="tokens of each answer (%(default)s)")
    pictures = "turns that show a new picture (%(default)s)"
    add("--pictures", choices=["first", "every"], default="first", help=pictures)
    objective = "objective of a good request (%(default)s)"
    add("--ttft-ms", type=decimal_number(0), default=500.0, metavar="MS", help=f"time to first token, {objective}")
    add("--itl-ms", type=decimal_number(0), default=50.0, metavar="MS", help=f"time between tokens, {objective}")
    add("--e2e-ms", type=decimal_number(0), default=3000.0, metavar="MS", help=f"time to the last token, {objective}")
    add("--timeout-s", type=whole_number(1), default=3600, metavar="S", help="of the whole load (%(default)s)")
    add("--smoke", action="store_true", help="two short conversations: shows that it runs")
    given = parser.parse_args(argv)
    if given.smoke:
        given.conversations, given.turns, given.concurrency, given.think_s, given.tokens = 2, 2, 2, 0.01, 4
    return chat_options("load", given)


def objectives(options: Options) -> dict[str, float]:
    """Return the objective of each of AIPerf's metrics, in ms."""
    given = options.extra
    return dict(zip(TIMES, (given.ttft_ms, given.itl_ms, given.e2e_ms), strict=True))


@contextlib.contextmanager
def server(options: Options) -> Iterator[str]:
    """Yield the address of the server to load: the one at --url, or a new one. Raise `ServiceError`."""
    given = options.extra
    if given.url is None:
        with service(model=Path(given.model)) as (_, url):
            yield url
        return
    yield root_of(given.url)


def write_conversations(options: Options, path: Path) -> None:
    """Write the conversations as AIPerf reads them: a line for each, with the delay of a turn in ms."""
    given = options.extra
    with path.open("w") as file:
        for number in range(given.conversations):
            seed = options.seed * 1_000_003 + number
            plan = talk.conversation(seed, given.turns, given.picture_px, given.think_s)
            turns = []
            for turn, (question, pause_s) in enumerate(zip(plan.questions, plan.pauses_s, strict=True)):
                words = {"text": question, "output_length": given.tokens}
                if turn == 0:
                    words["image"] = plan.data_url
                else:
                    words["delay"] = round(pause_s * 1e3)
                    if given.pictures == "every":
                        words["image"] = talk.conversation(seed + turn * 7_919, 1, given.picture_px, 0).data_url
                turns.append(words)
            file.write(json.dumps({"session_id": f"chat-{number}", "turns": turns}) + "\n")


def command(options: Options, url: str, model: str, folder: Path) -> list[str]:
    """Return AIPerf's command line."""
    given = options.extra
    limits = " ".join(f"{name}:{value:g}" for name, value in objectives(options).items())
    words = {
        "url": url,
        "model": model,
        "endpoint-type": "chat",
        "tokenizer": TOKENIZER,
        "input-file": folder / "conversations.jsonl",
        "custom-dataset-type": "multi_turn",
        "conversation-num": given.conversations,
        "concurrency": given.concurrency,
        "random-seed": options.seed,
        "goodput": limits,
        "extra-inputs": "ignore_eos:true",
        "ui": "simple" if sys.stderr.isatty() else "none",
        "artifact-dir": folder / "aiperf",
    }
    if given.rate is not None:
        words["request-rate"] = given.rate
    flags = ["--streaming", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics"]
    return [
        str(AIPERF),
        "profile",
        *flags,
        *(text for name, value in words.items() for text in (f"--{name}", str(value))),
    ]


def run_aiperf(options: Options, url: str, model: str, folder: Path) -> tuple[list[Request], dict]:
    """Run AIPerf on a server. Return the requests, and AIPerf's own report. Raise `LoadError`."""
    write_conversations(options, folder / "conversations.jsonl")
    log = folder / "aiperf.txt"
    code = run_whole(command(options, url, model, folder), log, options.extra.timeout_s)
    records, report = folder / "aiperf" / "profile_export.jsonl", folder / "aiperf" / "profile_export_aiperf.json"
    if code or not records.exists() or not report.exists():
        last = "\n".join(log.read_text().strip().splitlines()[-15:])
        raise LoadError(f"AIPerf has failed with code {code}:\n{last}")
    return [request_of(json.loads(line)) for line in records.read_text().splitlines()], json.loads(report.read_text())


def run_whole(words: list[str], log: Path, timeout_s: float) -> int:
    """Run AIPerf in the folder of its log. Return its exit code. Raise `LoadError` after `timeout_s`.

    AIPerf starts several processes. After a time-out and after Ctrl-C all of them are killed.
    """
    env = {**os.environ, "NO_PROXY": "*"}
    with log.open("w") as out:  # its progress bars are on stderr
        show = None if sys.stderr.isatty() else subprocess.STDOUT
        process = subprocess.Popen(words, stdout=out, stderr=show, env=env, cwd=log.parent, start_new_session=True)
        try:
            return process.wait(timeout_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise LoadError(f"AIPerf has not ended within {typed('--timeout-s')} {timeout_s}") from None
            raise


def request_of(record: dict) -> Request:
    """Return what counts of a line of AIPerf's export."""
    metrics = {name: metric["value"] for name, metric in record.get("metrics", {}).items()}
    error = record.get("error") or {}
    return Request(
        turn=record["metadata"]["turn_index"] + 1,
        times_ms={name: metrics[name] for name in TIMES if name in metrics},
        is_good=bool(metrics.get("good_request_count")),
        prompt_tokens=metrics.get("usage_prompt_tokens", 0),
        cached_tokens=metrics.get("usage_prompt_cache_read_tokens", 0),
        error=" ".join(str(error[key]) for key in ("type", "code") if error.get(key)) or str(error.get("message", "")),
    )


def report(options: Options, requests: list[Request], summary: dict) -> Result:
    """Return the table of latencies, the goodput and the errors. Raise `LoadError` if no request was answered."""
    answered = [one for one in requests if not one.error]
    errors = Counter(one.error for one in requests if one.error)
    if not answered:
        raise LoadError(f"no request was answered: {dict(errors)}")
    columns = [f"{name} p{share * 100:.0f} ms" for name in TIMES.values() for share in SHARES]
    result = Result(["turns", "requests", "failed", "within objectives", *columns])
    for group in GROUPS:
        members = [one for one in requests if _is_in(one, group)]
        if members:
            result.rows.append(_row(group, members))
    first, later = (_times(answered, group, "time_to_first_token") for group in GROUPS[1:])
    if first and later:
        result.ratios["TTFT p50: first turn / follow-up"] = percentile(first, 0.5) / percentile(later, 0.5)
    prompt = sum(one.prompt_tokens for one in answered)
    result.ratios["share of requests within all objectives"] = sum(one.is_good for one in requests) / len(requests)
    result.ratios["goodput, requests/s within all objectives"] = summary.get("goodput", {}).get("avg", 0.0)
    result.ratios["requests/s"] = summary["request_throughput"]["avg"]
    result.ratios["prompt tokens from the cache"] = (
        sum(one.cached_tokens for one in answered) / prompt if prompt else 0.0
    )
    result.ratios["failed requests"] = len(requests) - len(answered)
    given = options.extra
    names = ("conversations", "turns", "concurrency", "rate", "think_s", "tokens", "picture_px", "pictures", "url")
    result.settings = {name: getattr(given, name) for name in names} | {"objectives ms": objectives(options)}
    result.settings["aiperf"] = summary["aiperf_version"]
    result.samples = {"requests": [vars(one) for one in requests]}
    result.notes += [f"error {error}: {count} requests" for error, count in sorted(errors.items())]
    reached = result.ratios["requests/s"]
    if given.rate is not None and reached < (1 - RATE_TOLERANCE) * given.rate:
        words = f"{given.rate:g} requests/s were requested and {reached:.3g} reached"
        result.notes.append(f"{words}: the times do not include the wait of requests for a free place")
    return result


def _row(group: str, members: list[Request]) -> dict:
    answered = [one for one in members if not one.error]
    row = {"turns": group, "requests": len(members), "failed": len(members) - len(answered)}
    row["within objectives"] = f"{sum(one.is_good for one in members) / len(members):.0%}"
    for metric, name in TIMES.items():
        values = _times(answered, group, metric)
        for share in SHARES:
            row[f"{name} p{share * 100:.0f} ms"] = percentile(values, share) if values else None
    return row


def _is_in(request: Request, group: str) -> bool:
    return group == GROUPS[0] or (request.turn == 1) == (group == GROUPS[1])


def _times(requests: list[Request], group: str, metric: str) -> list[float]:
    return [one.times_ms[metric] for one in requests if _is_in(one, group) and metric in one.times_ms]


def paint(axes, result: Result) -> None:
    """Draw the percentiles of first turns and follow-ups, and the objectives."""
    rows = {row["turns"]: row for row in result.rows}
    labels = [(name, share) for name in TIMES.values() for share in SHARES]
    width = 0.38
    for offset, group in ((-width / 2, GROUPS[1]), (width / 2, GROUPS[2])):
        if group in rows:
            heights = [rows[group][f"{name} p{share * 100:.0f} ms"] or 0 for name, share in labels]
            axes.bar([place + offset for place in range(len(labels))], heights, width, label=group)
    limits = result.settings["objectives ms"].values()
    for number, limit in enumerate(limits):
        span = (number * len(SHARES) - 0.5, (number + 1) * len(SHARES) - 0.5)
        axes.hlines(limit, *span, colors="black", linestyles="dashed", label="objective" if not number else None)
    axes.set_xticks(range(len(labels)), [f"{name}\np{share * 100:.0f}" for name, share in labels], fontsize=8)
    given = result.settings
    title = f"{given['conversations']} chats of {given['turns']} turns, {given['concurrency']} at once"
    axes.set(ylabel="ms", title=title, yscale="log")
    axes.set_ylim(top=axes.get_ylim()[1] * 4)
    axes.legend(fontsize=8, ncols=3, loc="upper left")


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = parse(argv)
    try:
        if not AIPERF.exists():
            raise LoadError(f"AIPerf is not in {AIPERF.parents[1]}: run `make load`, or scripts/clients.sh aiperf")
        with tempfile.TemporaryDirectory() as folder, server(options) as url:
            model = served_model(url)
            run = Run(options)
            run.say(f"{options.extra.conversations} conversations of {options.extra.turns} turns on {url}")
            requests, summary = run_aiperf(options, url, model, Path(folder))
            return run.finish(report(options, requests, summary), paint)
    except (LoadError, ServiceError, OSError) as error:
        sys.exit(f"{error_prefix(PROG)}error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as after Ctrl-C
    main()
