"""Users of native sessions: who stay, leave in the middle of an answer, come back after long, or let a session expire.

Starts the whole service (`python -m deploy.serve`) with a model and with memory for a part of the sessions, so that
idle KV caches are offloaded. The baseline are users who ask the same questions at the same time without a session, at
/v1 with the whole conversation in each request. Nothing is shared between requests (`share_pictures: false`).

At the end the memory of all sessions must return to zero. `make load` loads /v1 with AIPerf.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from tqdm import tqdm

from deploy.doctor.sizes import Sizes
from deploy.options import decimal_number, error_prefix, whole_number

from . import users
from .chat_options import chat_options, chat_parser
from .harness import Options, Result, Run, median, percentile
from .route import ROOT, ServiceError, root_of, served_model, service
from .users import AFTER_PAUSE, EXPIRES, LEAVES, RECOVERED, RETURNS, STATELESS, STAYS, Log, Plan, StatelessUser, User

PROG = "python -m bench.sessions"
LABELS = (STAYS, LEAVES, RETURNS, AFTER_PAUSE, EXPIRES, RECOVERED, STATELESS)
MEMORY = ("llava_open_sessions", "llava_features_bytes", "llava_kv_bytes", "llava_offloaded_bytes")
COUNTERS = ("llava_evictions_total", "llava_restores_total", "llava_rebuilds_total")
QUESTION_TOKENS = 16  # of a question and its template
SAY_EVERY_S = 15.0
SHARES = (0.5, 0.9, 0.99)
OPEN, FIRST = "open p50 ms", "first TTFT p50 ms"
_METRIC = re.compile(r"^(llava_\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """A server: its address, OpenAI's base URL, and its page of metrics, which may be private."""

    url: str
    openai_url: str
    metrics_url: str


def parse(argv: list[str] | None) -> Options:
    """Parse the command line."""
    parser = chat_parser(PROG, __doc__)
    add = parser.add_argument
    each = "users of each kind, all at the same time (%(default)s)"
    add("--users", type=whole_number(1), default=6, metavar="N", help=each)
    add("--turns", type=whole_number(2), default=4, metavar="N", help="questions of each user (%(default)s)")
    idle = "seconds after the last answer at which a session expires (%(default)s); with --url the server's own"
    add("--idle-s", type=decimal_number(1), default=60.0, metavar="S", help=idle)
    back = "pause of users who come back (default: a third of --idle-s)"
    add("--return-s", type=decimal_number(0), metavar="S", help=back)
    resident = "sessions whose KV cache fits in the memory (default: a third of all)"
    add("--resident", type=whole_number(1), metavar="N", help=resident)
    add("--tokens", type=whole_number(4), default=24, metavar="N", help="tokens of each answer (%(default)s)")
    add("--smoke", action="store_true", help="one user of each kind, two short turns: shows that it runs")
    given = parser.parse_args(argv)
    if given.smoke:
        given.users, given.turns, given.think_s, given.tokens, given.idle_s = 1, 2, 0.01, 6, 2.0
    return chat_options("sessions", given)


def plan_of(options: Options) -> Plan:
    """Return what the users do."""
    given = options.extra
    return_s = given.idle_s / 3 if given.return_s is None else given.return_s
    return Plan(given.turns, given.think_s, return_s, given.idle_s + 1.5, given.tokens, given.picture_px)


# --- the server -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(options: Options) -> Iterator[Server]:
    """Yield the server: the one at --url, or a new one with small budgets."""
    given = options.extra
    if given.url is not None:
        url = root_of(given.url)
        served_model(url)
        yield Server(url, f"{url}/v1", f"{url}/metrics")
        return
    os.environ["PUBLIC_METRICS"] = "on"  # of the service, which inherits it
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "model-config.yaml"
        config.write_text(yaml.safe_dump(configuration(options)))
        with service(model=Path(given.model), config=config) as (_, url):
            yield Server(url, f"{url}/v1", f"{url}/metrics")


def configuration(options: Options) -> dict[str, Any]:
    """Return the server's configuration."""
    given = options.extra
    sessions = len(users.SCRIPTS) * given.users
    features, cache = session_bytes(Path(given.model), given.turns * (given.tokens + QUESTION_TOKENS))
    config = yaml.safe_load((ROOT / "handler" / "model-config.yaml").read_text())
    config["llava"] |= {
        "session_idle_s": given.idle_s,
        "share_pictures": False,
        "device_bytes": sessions * features + resident_of(options) * cache,
        "max_sessions": max(sessions + given.users, 64),
    }
    return config


def resident_of(options: Options) -> int:
    """Return the number of sessions whose KV cache fits in the memory of a new server."""
    return options.extra.resident or max(len(users.SCRIPTS) * options.extra.users // 3, 2)


def session_bytes(model: Path, text_tokens: int) -> tuple[int, int]:
    """Return the bytes in float32 of a picture's features and of a KV cache. Raise `ServiceError` without a model."""
    try:
        sizes = Sizes.read(model)
    except (OSError, KeyError, ValueError) as error:
        raise ServiceError(f"--model must be a folder with a checkpoint, got {model}") from error
    return sizes.features_bytes("float32"), sizes.kv_bytes(sizes.picture_tokens + text_tokens, "float32")


def read_metrics(url: str) -> dict[str, float]:
    """Return the sums of the server's metrics by name, or nothing if they cannot be read."""
    try:
        page = httpx.get(url, trust_env=False, timeout=60).raise_for_status().text
    except httpx.HTTPError:
        return {}
    found: dict[str, float] = {}
    for name, value in _METRIC.findall(page):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def wait_for_zero(url: str, timeout_s: float) -> dict[str, float]:
    """Return the memory of sessions once all is free, or what is left after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while True:
        metrics = read_metrics(url)
        left = {name: metrics[name] for name in MEMORY if name in metrics}
        if not any(left.values()) or time.monotonic() > until:
            return left
        time.sleep(0.2)


# --- the run ----------------------------------------------------------------------------------------------------------


def measure(run: Run, served: Server, plan: Plan) -> tuple[Log, dict[str, float], dict[str, float]]:
    """Run all users at once. Return their log, the counters' growth, and what memory is left at the end."""
    options, count = run.options, run.options.extra.users
    before = read_metrics(served.metrics_url)
    expected = count * plan.turns * (len(users.SCRIPTS) + 1)
    with tqdm(total=expected, unit="turn", desc="sessions", disable=None) as bar:
        log = Log(on_change=lambda log: _show(bar, log))
        crowd: list[User | StatelessUser] = []
        for number in range(count):
            seed = options.seed * 1_000_003 + number
            crowd += [User(kind, seed, served.url, plan, log) for kind in users.SCRIPTS]
            crowd.append(StatelessUser(seed, served.openai_url, plan, log))
        _run_all(run, crowd, log, bar)
    if not log.turns:
        codes = ", ".join(sorted({code for _, code in log.errors}))
        raise ServiceError(f"no question was answered: {codes}")
    run.say("all users have ended; their sessions expire")
    left = wait_for_zero(served.metrics_url, plan.expire_s + 60)
    after = read_metrics(served.metrics_url)
    return log, {name: after.get(name, 0.0) - before.get(name, 0.0) for name in COUNTERS if after}, left


def _run_all(run: Run, crowd: list[User | StatelessUser], log: Log, bar: tqdm) -> None:
    """Run each user in a thread. If one fails and at Ctrl-C, stop all: each closes its session."""
    with ThreadPoolExecutor(len(crowd)) as pool:
        try:
            running = {pool.submit(user.run) for user in crowd}
            while running:
                ended, running = wait(running, timeout=SAY_EVERY_S)
                for future in ended:
                    future.result()
                if bar.disable and running:
                    run.say(f"{len(log.turns)} of {bar.total} turns, {_state(log)}")
        except BaseException:
            log.stop.set()
            raise


def _show(bar: tqdm, log: Log) -> None:
    bar.n = len(log.turns)
    bar.set_postfix_str(_state(log), refresh=False)
    bar.update(0)


def _state(log: Log) -> str:
    return f"{log.open_sessions} sessions open, {log.errors.total()} errors, {log.count('lost')} lost"


# --- the report -------------------------------------------------------------------------------------------------------


def report(options: Options, log: Log, counted: dict[str, float], left: dict[str, float]) -> Result:
    """Return the table by kind of user, and the ratios to the baseline."""
    times = [f"{name} p{share * 100:.0f} ms" for name in ("TTFT", "ITL", "e2e") for share in SHARES]
    result = Result(["users", "turns", OPEN, FIRST, *times, "cached tokens", "errors", "lost"])
    for label in LABELS:
        result.rows.append(_row(label, log))
    usual = _follow_ups(log, STAYS)
    for label in (STATELESS, AFTER_PAUSE, RECOVERED):
        taken = _follow_ups(log, label)
        if usual and taken:
            result.ratios[f"follow-up TTFT p50: {label} / {STAYS}"] = median(taken) / median(usual)
    result.ratios |= {
        "sessions opened": len(log.opens),
        "sessions lost": log.count("lost"),
        "errors": log.errors.total(),
        "answers left in the middle": log.count("left"),
        "sessions left without a close": log.count("went away"),
        "expired sessions that were recovered": log.count("recovered"),
        "sessions that should have expired and did not": log.count("not expired"),
    }
    result.ratios |= {name: int(value) for name, value in counted.items()}
    result.ratios |= {f"{name} at the end": int(value) for name, value in left.items()}
    given = options.extra
    names = ("users", "turns", "think_s", "idle_s", "tokens", "picture_px", "url")
    result.settings = {name: getattr(given, name) for name in names} | {"return_s": plan_of(options).return_s}
    if given.url is None:
        result.settings |= {"resident": resident_of(options), "share_pictures": False}
    result.samples = {"turns": [vars(turn) for turn in log.turns], "opens": log.opens}
    for (kind, code), count in sorted(log.errors.items()):
        result.notes.append(f"error {code}: {count} times, of users of the kind '{kind}'")
    if not left:
        result.notes.append("the server's /metrics cannot be read: whether its memory returned to zero is unknown")
    elif any(left.values()):
        result.notes.append("the memory of the sessions has not returned to zero")
    return result


def _row(label: str, log: Log) -> dict:
    turns = [turn for turn in log.turns if turn.label == label]
    first = [turn.ttft_s for turn in turns if turn.number == 1]
    opened = [taken_s for kind, taken_s in log.opens if kind == label]
    row = {"users": label, "turns": len(turns)}
    row |= {name: median(found) * 1e3 if found else None for name, found in ((OPEN, opened), (FIRST, first))}
    followed = [turn for turn in turns if turn.number > 1]
    for name, values in (
        ("TTFT", [turn.ttft_s for turn in followed]),
        ("ITL", [turn.itl_s for turn in turns]),
        ("e2e", [turn.total_s for turn in followed]),
    ):
        for share in SHARES:
            row[f"{name} p{share * 100:.0f} ms"] = percentile(values, share) * 1e3 if values else None
    prompt = sum(turn.prompt_tokens for turn in followed)
    row["cached tokens"] = f"{sum(turn.cached_tokens for turn in followed) / prompt:.0%}" if prompt else None
    row["errors"] = sum(count for (kind, _), count in log.errors.items() if kind == label)
    row["lost"] = log.count("lost", label)
    return row


def _follow_ups(log: Log, label: str) -> list[float]:
    return [turn.ttft_s for turn in log.turns if turn.label == label and turn.number > 1]


def paint(axes, result: Result) -> None:
    """Draw the distribution of the follow-ups' TTFT by kind of user."""
    turns = [turn for turn in result.samples["turns"] if turn["number"] > 1]
    taken = {label: [turn["ttft_s"] * 1e3 for turn in turns if turn["label"] == label] for label in LABELS}
    shown = [label for label in LABELS if taken[label]]
    axes.boxplot([taken[label] for label in shown], whis=(1, 99), showfliers=False)
    axes.set_xticks(range(1, len(shown) + 1), [label.replace(": ", ":\n") for label in shown], fontsize=8)
    title = f"Follow-up questions of {result.settings['users']} users of each kind at once"
    axes.set(ylabel="TTFT in ms (box: quartiles, whiskers: p1, p99)", title=title, yscale="log")


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = parse(argv)
    try:
        return run_on(options)
    except (ServiceError, OSError) as error:
        sys.exit(f"{error_prefix(PROG)}error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run_on(options: Options) -> Result:
    """Start the server, run all users, and write the record."""
    with server(options) as served:
        run = Run(options)
        run.say(f"{options.extra.users} users of each of {len(users.SCRIPTS) + 1} kinds on {served.url}")
        log, counted, left = measure(run, served, plan_of(options))
        return run.finish(report(options, log, counted, left), paint)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as after Ctrl-C
    main()
