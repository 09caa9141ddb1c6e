"""The rows and panels of Grafana's board, with their queries. `scripts/dashboard.py` makes the JSON of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "handler"))

from llava_sessions.errors import STATUS_OF_CODE

JOB = "llava"  # the job of deploy/prometheus/prometheus.yml
# The limits of the alerts in deploy/prometheus/alerts.yml, in seconds.
FIRST_TOKEN_LIMIT_S = 5.0
QUEUE_LIMIT_S = 2.0
ANSWER_LIMIT_S = 50.0

_CHOSEN = 'instance=~"$instance"'
_WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Query:
    """A query in PromQL, and the name of its lines. `{{label}}` in `legend` is the value of a label."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A panel. `limit` draws a line at this value, `highest` is the end of the axis."""

    title: str
    description: str
    unit: Literal["s", "bytes", "short", "reqps", "percentunit"]
    queries: tuple[Query, ...]
    width: int
    kind: Literal["timeseries", "stat"] = "timeseries"
    is_stacked: bool = False
    limit: float | None = None
    highest: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of panels under a title."""

    title: str
    panels: tuple[Panel, ...]


def _quantiles(metric: str) -> tuple[Query, ...]:
    """Return the median, the 95th and the 99th percentile of a histogram over the chosen instances."""
    rate = f"sum by (le) (rate({metric}_bucket{{{_CHOSEN}}}[{_WINDOW}]))"
    return tuple(Query(f"histogram_quantile({part}, {rate})", name) for part, name in _PARTS)


_PARTS = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))


def _rate(metric: str, matcher: str = "") -> str:
    """Return the increase of a counter in a second, over the chosen instances."""
    return f"sum(rate({metric}{{{_CHOSEN}{matcher}}}[{_WINDOW}]))"


def _sum(metric: str) -> str:
    """Return the sum of a gauge over the chosen instances."""
    return f"sum({metric}{{{_CHOSEN}}})"


def _by_instance(metric: str) -> tuple[Query, ...]:
    """Return a gauge with one line for each chosen instance."""
    return (Query(f"max by (instance) ({metric}{{{_CHOSEN}}})", "{{instance}}"),)


def _by_device(metric: str, name: str = "") -> Query:
    """Return a gauge with one line for each device of the chosen instances."""
    legend = "{{device}}, {{instance}}"
    return Query(f"max by (device, instance) ({metric}{{{_CHOSEN}}})", f"{name}, {legend}" if name else legend)


def _refusals(is_server_error: bool) -> tuple[Query, ...]:
    """Return the rejected requests a second by code: those with a status of 500 and more, or the others."""
    codes = "|".join(code for code, status in STATUS_OF_CODE.items() if (status >= 500) == is_server_error)
    return (Query(f'sum by (code) (rate(llava_refusals_total{{{_CHOSEN}, code=~"{codes}"}}[{_WINDOW}]))', "{{code}}"),)


_LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token",
            "From the arrival of a question to the first token of its answer. The line is the limit of the alert.",
            "s",
            _quantiles("llava_time_to_first_token_seconds"),
            width=6,
            limit=FIRST_TOKEN_LIMIT_S,
        ),
        Panel(
            "Time between tokens",
            "Mean of each turn with at least two tokens. It grows with the number of answers that run together.",
            "s",
            _quantiles("llava_inter_token_latency_seconds"),
            width=6,
        ),
        Panel(
            "Whole answer",
            "From the arrival of a question to the end of its answer. SageMaker ends an invocation after 60 s.",
            "s",
            _quantiles("llava_e2e_request_latency_seconds"),
            width=6,
            limit=ANSWER_LIMIT_S,
        ),
        Panel(
            "Wait in the engine",
            "From the arrival of a turn at the engine to its first step. It grows when device memory is full.",
            "s",
            _quantiles("llava_request_queue_time_seconds"),
            width=6,
            limit=QUEUE_LIMIT_S,
        ),
    ),
)

_THROUGHPUT = Row(
    "Throughput",
    (
        Panel(
            "Turns and opens",
            "Turns that ended with an answer, and sessions that were opened by name.",
            "reqps",
            (Query(_rate("llava_turns_total"), "turns"), Query(_rate("llava_opens_total"), "opens")),
            width=8,
        ),
        Panel(
            "Tokens a second",
            "Tokens of the prompts whose KV existed, tokens of the prompts that were computed, tokens of the answers.",
            "short",
            (
                Query(_rate("llava_cached_tokens_total"), "prompt, cached"),
                Query(
                    f"{_rate('llava_prompt_tokens_total')} - {_rate('llava_cached_tokens_total')}", "prompt, computed"
                ),
                Query(_rate("llava_generation_tokens_total"), "answer"),
            ),
            width=8,
        ),
        Panel(
            "Cached part of the prompts",
            "Part of the prompt tokens whose KV existed when their turn began. Low values mean rebuilt sessions.",
            "percentunit",
            (Query(f"{_rate('llava_cached_tokens_total')} / {_rate('llava_prompt_tokens_total')}", "cached"),),
            width=8,
            highest=1.0,
        ),
        Panel(
            "Turns in progress",
            "Turns without a complete answer: all, those in the engine, and those that wait for it.",
            "short",
            (
                Query(_sum("llava_running_turns"), "all"),
                Query(_sum("llava_num_requests_running"), "in the engine"),
                Query(_sum("llava_num_requests_waiting"), "waiting"),
            ),
            width=12,
        ),
        Panel(
            "Pictures a second",
            "Pictures that the vision tower encoded, and pictures whose features existed already.",
            "short",
            (
                Query(_rate("llava_pictures_encoded_total"), "encoded"),
                Query(_rate("llava_picture_hits_total"), "found"),
            ),
            width=12,
        ),
    ),
)

_SESSIONS = Row(
    "Sessions and memory by tier",
    (
        Panel(
            "Open sessions",
            "Sessions that clients opened by name, and those of conversations without a session header.",
            "short",
            (Query(_sum("llava_open_sessions"), "by name"), Query(_sum("llava_implicit_sessions"), "implicit")),
            width=6,
            is_stacked=True,
        ),
        Panel(
            "Sessions by tier",
            "Resident: KV cache on the device. Offloaded: on the host. Cold: no KV cache, the next turn prefills.",
            "short",
            (
                Query(_sum("llava_resident_sessions"), "resident"),
                Query(_sum("llava_offloaded_sessions"), "offloaded"),
                Query(_sum("llava_cold_sessions"), "cold"),
            ),
            width=6,
            is_stacked=True,
        ),
        Panel(
            "Memory by tier",
            "Vision features and KV caches on the device, offloaded KV caches on the host.",
            "bytes",
            (
                Query(_sum("llava_features_bytes"), "features"),
                Query(_sum("llava_kv_bytes"), "KV, device"),
                Query(_sum("llava_kv_pool_bytes"), "KV, free in the pool"),
                Query(_sum("llava_offloaded_bytes"), "KV, host"),
            ),
            width=6,
            is_stacked=True,
        ),
        Panel(
            "Used part of the KV budget",
            "KV caches on the device, as a part of the budget that features leave. A full budget is normal: "
            "idle caches move to the host. On a CPU: the part of the engine's memory that is in huge pages.",
            "percentunit",
            (
                *_by_instance("llava_kv_cache_usage_ratio"),
                Query(f"max by (instance) (llava_huge_page_ratio{{{_CHOSEN}}})", "huge pages, {{instance}}"),
            ),
            width=6,
            highest=1.0,
        ),
        Panel(
            "Moved KV caches a second",
            "Offload: from the device to the host. Restore: back. Drop: freed on the host, rebuilt by a prefill.",
            "short",
            (
                Query(f"sum by (kind) (rate(llava_evictions_total{{{_CHOSEN}}}[{_WINDOW}]))", "{{kind}}"),
                Query(_rate("llava_restores_total"), "restore"),
            ),
            width=6,
        ),
        Panel(
            "Device memory",
            "On a CPU: features and KV caches. On CUDA: torch's tensors, with the weights, and what torch has taken.",
            "bytes",
            (
                *_by_instance("llava_device_bytes"),
                Query(f"max by (instance) (llava_device_reserved_bytes{{{_CHOSEN}}}) > 0", "{{instance}}, taken"),
            ),
            width=6,
        ),
        Panel(
            "Encoded pictures",
            "Pictures of all sessions in the worker's memory, as sent. They count against `media.held_bytes`.",
            "bytes",
            _by_instance("llava_media_held_bytes"),
            width=6,
        ),
        Panel(
            "Life of a session",
            "Time from the open of a session to its expiry (`session_ttl_s`).",
            "s",
            _by_instance("llava_session_ttl_seconds"),
            width=6,
            kind="stat",
        ),
    ),
)

_DEVICES = Row(
    "Devices",
    (
        Panel(
            "Engines that work",
            "1: the engine of the device takes sessions. 0: it is being replaced.",
            "short",
            (_by_device("llava_engine_up"),),
            width=6,
            highest=1.0,
        ),
        Panel(
            "Sessions and turns by device",
            "Open sessions that the engine of a device holds, and turns for which it has reserved memory.",
            "short",
            (
                _by_device("llava_engine_sessions", "sessions"),
                _by_device("llava_engine_running_turns", "turns"),
            ),
            width=6,
        ),
        Panel(
            "Memory by device",
            "KV caches, and all memory as in the panel on device memory.",
            "bytes",
            (_by_device("llava_engine_kv_bytes", "KV"), _by_device("llava_engine_device_bytes", "all")),
            width=6,
        ),
        Panel(
            "Used part of the KV budget by device",
            "New sessions go to the engine with the most free memory.",
            "percentunit",
            (_by_device("llava_engine_kv_cache_usage_ratio"),),
            width=6,
            highest=1.0,
        ),
    ),
)

_ALL_REFUSALS = _rate("llava_refusals_total")
_ENDED = f"{_rate('llava_turns_total')} + {_rate('llava_opens_total')}"

_ERRORS = Row(
    "Errors",
    (
        Panel(
            "Rejected with 4xx",
            "Requests that the worker rejected with a status below 500, by code. `capacity`: a limit is full.",
            "reqps",
            _refusals(is_server_error=False),
            width=8,
        ),
        Panel(
            "Rejected with 5xx",
            "Requests that the worker rejected with a status of 500 and more, by code.",
            "reqps",
            _refusals(is_server_error=True),
            width=8,
        ),
        Panel(
            "Rejected part",
            "Rejected requests, as a part of opens, turns and rejected requests.",
            "percentunit",
            (Query(f"{_ALL_REFUSALS} / ({_ALL_REFUSALS} + {_ENDED})", "rejected"),),
            width=8,
            highest=1.0,
        ),
        Panel(
            "Engine restarts and rebuilt sessions",
            "Restarts of the engine process, and sessions that were rebuilt after it. Both in the window of a point.",
            "short",
            (
                Query(f"sum(increase(llava_engine_restarts_total{{{_CHOSEN}}}[{_WINDOW}]))", "restarts"),
                Query(f"sum(increase(llava_rebuilds_total{{{_CHOSEN}}}[{_WINDOW}]))", "rebuilt sessions"),
            ),
            width=8,
        ),
        Panel(
            "Failed journal writes",
            "Journal writes and removals that failed, in the window of a point. Answers then have `durable: false`.",
            "short",
            (
                Query(
                    f"sum by (instance) (increase(llava_journal_failures_total{{{_CHOSEN}}}[{_WINDOW}]))",
                    "{{instance}}",
                ),
            ),
            width=8,
        ),
        Panel(
            "Instances that answer",
            "1: Prometheus could read the instance's metrics. 0: no worker serves there.",
            "short",
            (Query(f'up{{job="{JOB}", {_CHOSEN}}}', "{{instance}}"),),
            width=8,
            highest=1.0,
        ),
    ),
)

ROWS = (_LATENCY, _THROUGHPUT, _SESSIONS, _DEVICES, _ERRORS)
