"""Counts and times of one worker. All methods run on the pump's thread, under its lock."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import STATUS_OF_CODE
from ..ipc.messages import Memory, Timings, Usage
from .exporter import Histograms

_ENGINE_COUNTS = ("offloads", "drops", "restores", "pictures_encoded", "picture_hits")


@dataclass
class Counters:
    """Counts since the worker started, and histograms of the turns that ended with an answer."""

    opens: int = 0
    turns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    rebuilds: int = 0
    engine_restarts: int = 0
    refusals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUS_OF_CODE, 0))
    histograms: Histograms = field(default_factory=Histograms)

    def add_tokens(self, usage: Usage) -> None:
        """Count the tokens of a turn that has ended."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generation_tokens += usage.completion_tokens

    def add_times(self, usage: Usage, timings: Timings, prepared_s: float) -> None:
        """Observe the times of a turn in the engine. `prepared_s`: time from its arrival to its submission."""
        observe = self.histograms.observe
        observe("llava_time_to_first_token_seconds", prepared_s + timings.ttft_ms / 1e3)
        observe("llava_request_queue_time_seconds", timings.queue_ms / 1e3)
        if usage.completion_tokens > 1:
            decode_s = (timings.total_ms - timings.ttft_ms) / 1e3
            observe("llava_inter_token_latency_seconds", decode_s / (usage.completion_tokens - 1))

    def add_duration(self, duration_s: float) -> None:
        """Observe the time of a turn from its arrival to its answer."""
        self.histograms.observe("llava_e2e_request_latency_seconds", duration_s)


class EngineMemory:
    """The latest report of the engine's memory, with counts that continue when the engine is replaced."""

    def __init__(self) -> None:
        self.now = Memory()
        self._past = dict.fromkeys(_ENGINE_COUNTS, 0)

    def report(self, memory: Memory) -> None:
        """Replace the report."""
        self.now = memory

    def lost(self) -> None:
        """Keep the counts of an engine that is lost. The next one counts from 0."""
        self._past = {name: self.count(name) for name in _ENGINE_COUNTS}
        self.now = Memory()

    def count(self, name: str) -> int:
        """Return a count of `Memory` over all engines of this worker."""
        return int(self._past[name] + getattr(self.now, name))


def kv_usage(memory: Memory) -> float:
    """Return the KV caches on the device, as a part (0 to 1) of the budget that features leave."""
    room = memory.device_budget_bytes - memory.features_bytes
    return min(memory.kv_bytes / room, 1.0) if room > 0 else 0.0
