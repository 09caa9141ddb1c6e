"""The gauges and counters of the engines: totals of the worker, and values of each device."""

from __future__ import annotations

from collections.abc import Sequence

from ..ipc.messages import Memory
from ..metrics import MetricValues
from .counters import kv_usage
from .engine_set import DeviceEngine


def engine_values(engines: Sequence[DeviceEngine], preparing: int) -> MetricValues:
    """Return the values that the engines' latest reports give. `preparing`: turns that no engine has yet.

    A total is the sum over the engines. The usage of KV is that of all budgets together; the part of memory in huge
    pages is the mean.
    """
    reports = {engine.label: engine.memory.now for engine in engines}
    total = _sum(list(reports.values()))

    def count(name: str) -> int:
        return sum(engine.memory.count(name) for engine in engines)

    return MetricValues(
        num_requests_running=total.running_turns,
        num_requests_waiting=total.waiting_turns + preparing,
        resident_sessions=total.resident,
        offloaded_sessions=total.offloaded,
        cold_sessions=total.cold,
        features_bytes=total.features_bytes,
        kv_bytes=total.kv_bytes,
        kv_cache_usage_ratio=kv_usage(total),
        kv_pool_bytes=total.pool_bytes,
        huge_page_ratio=sum(engine.huge_page_ratio for engine in engines) / len(engines),
        offloaded_bytes=total.offloaded_bytes,
        device_bytes=sum(_device_bytes(memory) for memory in reports.values()),
        device_reserved_bytes=total.reserved_bytes,
        engine_up={engine.label: int(engine.client is not None) for engine in engines},
        engine_sessions={label: memory.sessions for label, memory in reports.items()},
        engine_running_turns={label: memory.running_turns for label, memory in reports.items()},
        engine_kv_bytes={label: memory.kv_bytes for label, memory in reports.items()},
        engine_device_bytes={label: _device_bytes(memory) for label, memory in reports.items()},
        engine_kv_cache_usage_ratio={label: kv_usage(memory) for label, memory in reports.items()},
        evictions_total={"offload": count("offloads"), "drop": count("drops")},
        restores_total=count("restores"),
        pictures_encoded_total=count("pictures_encoded"),
        picture_hits_total=count("picture_hits"),
    )


def _sum(reports: Sequence[Memory]) -> Memory:
    names = Memory.__dataclass_fields__
    return Memory(**{name: sum(getattr(report, name) for report in reports) for name in names})


def _device_bytes(memory: Memory) -> int:
    """Return the bytes on the device: of torch's allocator, or of features and KV on a CPU."""
    return memory.allocated_bytes or memory.features_bytes + memory.kv_bytes
