"""The table of metrics, and their values at one moment.

The frontend's metrics.yaml declares the same metrics; tests/unit/test_metrics.py compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric: its name on the wire, its unit ("count" or "bytes"), its kind and its meaning."""

    name: str
    unit: str
    kind: Literal["gauge", "counter"]
    help: str


METRICS = (
    Metric("llava_open_sessions", "count", "gauge", "Open sessions."),
    Metric("llava_running_turns", "count", "gauge", "Turns that have no complete answer yet."),
    Metric("llava_resident_sessions", "count", "gauge", "Sessions whose KV cache is on the device."),
    Metric("llava_parked_sessions", "count", "gauge", "Sessions whose KV cache is offloaded to the host."),
    Metric("llava_cold_sessions", "count", "gauge", "Sessions without a KV cache."),
    Metric("llava_features_bytes", "bytes", "gauge", "Vision features on the device."),
    Metric("llava_kv_bytes", "bytes", "gauge", "KV caches on the device."),
    Metric("llava_parked_bytes", "bytes", "gauge", "KV caches that are offloaded to the host."),
    Metric(
        "llava_device_bytes",
        "bytes",
        "gauge",
        "CPU: features and KV caches. CUDA: memory that torch's allocator holds, with the weights.",
    ),
    Metric("llava_media_held_bytes", "bytes", "gauge", "Encoded pictures of all sessions in the worker's memory."),
    Metric("llava_turns_total", "count", "counter", "Turns that ended with an answer."),
    Metric("llava_refusals_total", "count", "counter", "Requests that were rejected with an error."),
    Metric("llava_rebuilds_total", "count", "counter", "Sessions that were rebuilt after the engine had lost them."),
    Metric("llava_engine_restarts_total", "count", "counter", "Restarts of the engine process."),
    Metric("llava_journal_failures_total", "count", "counter", "Journal writes and removals that failed."),
)
# Units by metric name.
GAUGES = {metric.name: metric.unit for metric in METRICS if metric.kind == "gauge"}
COUNTERS = {metric.name: metric.unit for metric in METRICS if metric.kind == "counter"}


@dataclass
class MetricValues:
    """The values of all metrics at one moment. A field is a metric's name without `llava_`."""

    open_sessions: int = 0
    running_turns: int = 0
    resident_sessions: int = 0
    parked_sessions: int = 0
    cold_sessions: int = 0
    features_bytes: int = 0
    kv_bytes: int = 0
    parked_bytes: int = 0
    device_bytes: int = 0
    media_held_bytes: int = 0
    turns_total: int = 0
    refusals_total: int = 0
    rebuilds_total: int = 0
    engine_restarts_total: int = 0
    journal_failures_total: int = 0

    def value(self, metric: str) -> int:
        """Return the value of the metric with this name."""
        return int(getattr(self, metric.removeprefix("llava_")))
