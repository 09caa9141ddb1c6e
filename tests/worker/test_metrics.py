"""Counters, gauges and histograms of a pump, over turns and over engines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import Cancelled, Closed, Memory, Report, Timings, Usage
from llava_sessions.metrics import HISTOGRAMS, MetricValues
from llava_sessions.text.chat_template import ChatTemplate
from tests.support.pump_frontend import QUESTIONS, TTL, Frontend, model, png, tokens

__all__ = ["model", "tokens"]


@pytest.fixture
def front(model: Model, tokens: ChatTemplate) -> Frontend:
    return Frontend(model, tokens)


def values(front: Frontend) -> MetricValues:
    return front.pump.metric_values()


def counted(front: Frontend) -> dict[str, float]:
    """Return the number of observations of each histogram."""
    registry = front.histograms.registry
    return {metric.name: registry.get_sample_value(f"{metric.name}_count") or 0.0 for metric in HISTOGRAMS}


def summed(front: Frontend, name: str) -> float:
    return front.histograms.registry.get_sample_value(f"{name}_sum") or 0.0


def test_tokens_and_times_are_those_of_the_replies(front: Frontend) -> None:
    session = front.open()
    replies = [front.ask(session, question) for question in QUESTIONS[:2]]
    now = values(front)
    usages = [reply["usage"] for reply in replies]
    assert (now.opens_total, now.turns_total) == (1, 2)
    assert now.prompt_tokens_total == sum(usage["prompt_tokens"] for usage in usages)
    assert now.cached_tokens_total == sum(usage["cached_tokens"] for usage in usages)
    assert now.generation_tokens_total == sum(usage["completion_tokens"] for usage in usages)
    assert now.session_ttl_seconds == TTL
    assert set(counted(front).values()) == {2}
    ttft_s = sum(reply["timings"]["ttft_ms"] for reply in replies) / 1e3
    total_s = sum(reply["timings"]["total_ms"] for reply in replies) / 1e3
    # The reply rounds each time to a tenth of a millisecond. The preparation comes before the engine's times.
    assert summed(front, "llava_time_to_first_token_seconds") >= ttft_s - 0.0002
    assert summed(front, "llava_e2e_request_latency_seconds") >= total_s - 0.0002


def test_a_cancelled_turn_has_tokens_and_no_times(model: Model, tokens: ChatTemplate) -> None:
    front = Frontend(model, tokens, deaf=True)
    opening = front.row({"type": "start_session", "image": png()})
    front.answer(opening)
    row = front.start(opening.sequence_id)
    assert (values(front).running_turns, values(front).num_requests_waiting) == (1, 0)
    stop = front.cancel_row(opening.sequence_id)
    front.exchange(row, stop)
    front.tell(Cancelled(row.request_id, "cancelled", Usage(30, 20, 4), Timings(1.0, 2.0, 3.0)))
    front.settle(row, stop)
    now = values(front)
    assert (now.running_turns, now.turns_total) == (0, 0)
    assert (now.prompt_tokens_total, now.cached_tokens_total, now.generation_tokens_total) == (30, 20, 4)
    assert set(counted(front).values()) == {0}


def test_the_engines_counts_go_on_over_engines(front: Frontend) -> None:
    """A report reaches the manager with the event of a session that is not known any more."""
    first = Memory(resident=1, offloads=4, drops=2, restores=3, pictures_encoded=5, picture_hits=6, waiting_turns=7)
    first = replace(first, allocated_bytes=8, reserved_bytes=9)
    front.put(Report([Closed("gone")], first))
    front.exchange()
    before = values(front)
    assert (dict(before.evictions_total), before.restores_total) == ({"offload": 4, "drop": 2}, 3)
    assert (before.pictures_encoded_total, before.picture_hits_total) == (5, 6)
    assert (before.resident_sessions, before.num_requests_waiting) == (1, 7)
    assert (before.device_bytes, before.device_reserved_bytes) == (8, 9)
    front.lose_engine()
    front.exchange()
    lost = values(front)
    assert lost.evictions_total == before.evictions_total
    assert (lost.resident_sessions, lost.num_requests_waiting, lost.engine_restarts_total) == (0, 0, 1)
    front.bring_engine()
    front.put(Report([Closed("gone")], Memory(offloads=1, picture_hits=1)))
    front.exchange()
    after = values(front)
    assert (dict(after.evictions_total), after.restores_total) == ({"offload": 5, "drop": 2}, 3)
    assert (after.pictures_encoded_total, after.picture_hits_total) == (5, 7)
