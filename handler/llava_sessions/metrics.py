"""Owns the names of the metrics and the figures behind them. Pure: how they are emitted is the TorchServe edge's
business.
"""

from __future__ import annotations

from dataclasses import dataclass

# Gauges: name -> unit. Declared once more for TorchServe's frontend in deploy/metrics.yaml.
GAUGES = {
    "llava_open_sessions": "count",
    "llava_running_turns": "count",
    "llava_resident_sessions": "count",
    "llava_parked_sessions": "count",
    "llava_cold_sessions": "count",
    "llava_features_bytes": "bytes",
    "llava_kv_bytes": "bytes",
    "llava_parked_bytes": "bytes",
    "llava_device_bytes": "bytes",
}
COUNTERS = {
    "llava_turns_total": "count",
    "llava_refusals_total": "count",
    "llava_rebuilds_total": "count",
    "llava_engine_restarts_total": "count",
    "llava_journal_failures_total": "count",
}


@dataclass
class MetricValues:
    """What the handler tells about itself at one moment.

    Sessions are resident, parked or cold by where their KV cache is; `kv_bytes` is on the device, `parked_bytes` on the
    host. `device_bytes`: features and KV, or on CUDA what torch's allocator holds, weights included. Rebuilds are of
    sessions that the engine had lost.
    """

    open_sessions: int = 0
    running_turns: int = 0
    resident_sessions: int = 0
    parked_sessions: int = 0
    cold_sessions: int = 0
    features_bytes: int = 0
    kv_bytes: int = 0
    parked_bytes: int = 0
    device_bytes: int = 0
    turns_total: int = 0
    refusals_total: int = 0
    rebuilds_total: int = 0
    engine_restarts_total: int = 0
    journal_failures_total: int = 0

    def value(self, metric: str) -> int:
        """The figure of a metric by its name."""
        return getattr(self, metric.removeprefix("llava_"))
