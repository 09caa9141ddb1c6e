"""The table of metrics, and their values at one moment.

The worker's page (worker/exporter.py) has every metric. TorchServe's page has those with `in_torchserve`; the
frontend's metrics.yaml declares these. `scripts/metrics_table.py` makes the table in docs/operations.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# The loopback port of the worker's page; without it there is no page. The launcher sets the same variable.
PORT_VARIABLE = "LLAVA_METRICS_PORT"


@dataclass(frozen=True)
class Metric:
    """One metric: its name on the wire, its kind, its unit and its meaning.

    `buckets`: upper bounds of a histogram's buckets. `label`: the name of the label that divides the values, or "".
    `in_torchserve`: whether TorchServe's page has the metric too, there without a label.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: Literal["count", "bytes", "seconds", "tokens", "ratio"]
    help: str
    buckets: tuple[float, ...] = ()
    label: str = ""
    in_torchserve: bool = False


_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0)
_QUEUE_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)

_DEVICE = "device"

METRICS = (
    Metric(
        "llava_time_to_first_token_seconds",
        "histogram",
        "seconds",
        "Time from the arrival of a question to the first token of its answer.",
        buckets=_TTFT_S,
    ),
    Metric(
        "llava_inter_token_latency_seconds",
        "histogram",
        "seconds",
        "Time between two tokens of an answer: the mean of each turn with at least two tokens.",
        buckets=_TOKEN_S,
    ),
    Metric(
        "llava_e2e_request_latency_seconds",
        "histogram",
        "seconds",
        "Time from the arrival of a question to the end of its answer, with the time to store it.",
        buckets=_REQUEST_S,
    ),
    Metric(
        "llava_request_queue_time_seconds",
        "histogram",
        "seconds",
        "Time from the arrival of a turn at the engine to its first step.",
        buckets=_QUEUE_S,
    ),
    Metric("llava_open_sessions", "gauge", "count", "Open sessions that clients opened by name.", in_torchserve=True),
    Metric("llava_implicit_sessions", "gauge", "count", "Sessions of conversations without a session header."),
    Metric(
        "llava_running_turns",
        "gauge",
        "count",
        "Turns that have no complete answer yet.",
        in_torchserve=True,
    ),
    Metric("llava_num_requests_running", "gauge", "count", "Turns in the engine for which memory is reserved."),
    Metric(
        "llava_num_requests_waiting",
        "gauge",
        "count",
        "Turns that are being prepared, or wait for device memory.",
    ),
    Metric(
        "llava_resident_sessions", "gauge", "count", "Sessions whose KV cache is on the device.", in_torchserve=True
    ),
    Metric(
        "llava_offloaded_sessions",
        "gauge",
        "count",
        "Sessions whose KV cache is offloaded to the host.",
        in_torchserve=True,
    ),
    Metric("llava_cold_sessions", "gauge", "count", "Sessions without a KV cache.", in_torchserve=True),
    Metric("llava_session_ttl_seconds", "gauge", "seconds", "Time from the open of a session to its expiry."),
    Metric("llava_features_bytes", "gauge", "bytes", "Vision features on the device.", in_torchserve=True),
    Metric("llava_kv_bytes", "gauge", "bytes", "KV caches on the device.", in_torchserve=True),
    Metric(
        "llava_kv_cache_usage_ratio",
        "gauge",
        "ratio",
        "KV caches on the device, as a part (0 to 1) of the budget that features leave.",
    ),
    Metric(
        "llava_kv_pool_bytes",
        "gauge",
        "bytes",
        "Free memory that the engine keeps for the next KV caches on a CPU. It is a part of the budget.",
    ),
    Metric(
        "llava_huge_page_ratio",
        "gauge",
        "ratio",
        "Part (0 to 1) of the engine's anonymous memory, such as weights and KV caches, that is in huge pages.",
    ),
    Metric("llava_offloaded_bytes", "gauge", "bytes", "KV caches that are offloaded to the host.", in_torchserve=True),
    Metric(
        "llava_device_bytes",
        "gauge",
        "bytes",
        "CPU: features and KV caches. CUDA: memory that torch's allocator holds, with the weights.",
        in_torchserve=True,
    ),
    Metric(
        "llava_device_reserved_bytes",
        "gauge",
        "bytes",
        "CUDA: memory that torch's allocator has taken from the device, in use or kept for reuse. CPU: 0.",
    ),
    Metric("llava_engine_up", "gauge", "count", "1 if the device's engine works, 0 while it restarts.", label=_DEVICE),
    Metric("llava_engine_sessions", "gauge", "count", "Open sessions that the device's engine holds.", label=_DEVICE),
    Metric(
        "llava_engine_running_turns",
        "gauge",
        "count",
        "Turns in the device's engine for which memory is reserved.",
        label=_DEVICE,
    ),
    Metric("llava_engine_kv_bytes", "gauge", "bytes", "As `llava_kv_bytes`, of one device.", label=_DEVICE),
    Metric("llava_engine_device_bytes", "gauge", "bytes", "As `llava_device_bytes`, of one device.", label=_DEVICE),
    Metric(
        "llava_engine_kv_cache_usage_ratio",
        "gauge",
        "ratio",
        "As `llava_kv_cache_usage_ratio`, of one device.",
        label=_DEVICE,
    ),
    Metric(
        "llava_media_held_bytes",
        "gauge",
        "bytes",
        "Encoded pictures and clips of all sessions in the worker's memory.",
        in_torchserve=True,
    ),
    Metric("llava_opens_total", "counter", "count", "Sessions that were opened by name, resumed ones included."),
    Metric("llava_turns_total", "counter", "count", "Turns that ended with an answer.", in_torchserve=True),
    Metric("llava_prompt_tokens_total", "counter", "tokens", "Tokens of the conversations before each answer."),
    Metric("llava_cached_tokens_total", "counter", "tokens", "Prompt tokens whose KV existed when their turn began."),
    Metric("llava_generation_tokens_total", "counter", "tokens", "Tokens of answers, cancelled ones included."),
    Metric(
        "llava_refusals_total",
        "counter",
        "count",
        "Requests that the worker rejected with an error, by its code.",
        label="code",
        in_torchserve=True,
    ),
    Metric(
        "llava_evictions_total",
        "counter",
        "count",
        "KV caches that left the device or the host to free memory. `offload`: moved to the host. `drop`: freed.",
        label="kind",
    ),
    Metric("llava_restores_total", "counter", "count", "KV caches that were moved from the host to the device."),
    Metric(
        "llava_rebuilds_total",
        "counter",
        "count",
        "Sessions that were rebuilt after the engine had lost them.",
        in_torchserve=True,
    ),
    Metric("llava_pictures_encoded_total", "counter", "count", "Pictures and clips that the vision tower has encoded."),
    Metric(
        "llava_picture_hits_total", "counter", "count", "Pictures and clips of requests whose features existed already."
    ),
    Metric("llava_engine_restarts_total", "counter", "count", "Restarts of the engine process.", in_torchserve=True),
    Metric(
        "llava_journal_failures_total",
        "counter",
        "count",
        "Journal writes and removals that failed.",
        in_torchserve=True,
    ),
)
HISTOGRAMS = tuple(metric for metric in METRICS if metric.kind == "histogram")
# The gauges and counters of TorchServe's page: units by metric name.
GAUGES = {metric.name: metric.unit for metric in METRICS if metric.kind == "gauge" and metric.in_torchserve}
COUNTERS = {metric.name: metric.unit for metric in METRICS if metric.kind == "counter" and metric.in_torchserve}
# The metrics of vLLM that SageMaker's dashboards read, and those of ours with the same meaning (`compat_metrics`).
VLLM_NAMES = {
    "vllm:time_to_first_token_seconds": "llava_time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "llava_inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds": "llava_e2e_request_latency_seconds",
    "vllm:prompt_tokens_total": "llava_prompt_tokens_total",
    "vllm:generation_tokens_total": "llava_generation_tokens_total",
    "vllm:num_requests_running": "llava_num_requests_running",
    "vllm:num_requests_waiting": "llava_num_requests_waiting",
    "vllm:gpu_cache_usage_perc": "llava_kv_cache_usage_ratio",
}


@dataclass
class MetricValues:
    """The values of all gauges and counters at one moment. A field is a metric's name without `llava_`.

    A metric with a label has a value for each value of the label.
    """

    open_sessions: int = 0
    implicit_sessions: int = 0
    running_turns: int = 0
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    resident_sessions: int = 0
    offloaded_sessions: int = 0
    cold_sessions: int = 0
    session_ttl_seconds: float = 0.0
    features_bytes: int = 0
    kv_bytes: int = 0
    kv_cache_usage_ratio: float = 0.0
    kv_pool_bytes: int = 0
    huge_page_ratio: float = 0.0
    offloaded_bytes: int = 0
    device_bytes: int = 0
    device_reserved_bytes: int = 0
    engine_up: Mapping[str, int] = field(default_factory=dict)
    engine_sessions: Mapping[str, int] = field(default_factory=dict)
    engine_running_turns: Mapping[str, int] = field(default_factory=dict)
    engine_kv_bytes: Mapping[str, int] = field(default_factory=dict)
    engine_device_bytes: Mapping[str, int] = field(default_factory=dict)
    engine_kv_cache_usage_ratio: Mapping[str, float] = field(default_factory=dict)
    media_held_bytes: int = 0
    opens_total: int = 0
    turns_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generation_tokens_total: int = 0
    refusals_total: Mapping[str, int] = field(default_factory=dict)
    evictions_total: Mapping[str, int] = field(default_factory=dict)
    restores_total: int = 0
    rebuilds_total: int = 0
    pictures_encoded_total: int = 0
    picture_hits_total: int = 0
    engine_restarts_total: int = 0
    journal_failures_total: int = 0

    def value(self, metric: str) -> float:
        """Return the value of the metric with this name: the sum over its label."""
        value = getattr(self, metric.removeprefix("llava_"))
        return sum(value.values()) if isinstance(value, Mapping) else value

    def by_label(self, metric: str) -> Mapping[str, float]:
        """Return the values of a metric with a label, by the label's value."""
        values: Mapping[str, float] = getattr(self, metric.removeprefix("llava_"))
        return values
