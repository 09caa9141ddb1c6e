"""The ports of a server, and the balancer's memory of sessions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.serve.ports import choose_ports, fixed_ports
from deploy.serve.processes import ServeError
from llava_sessions.config import FRONTEND_MARGIN_S, HandlerConfig

REPO = Path(__file__).resolve().parents[2]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def test_all_ports_but_the_public_one_are_from_the_range() -> None:
    within = range(23_000, 24_000)
    ports = fixed_ports(8080, "front", within)
    assert ports.pop("front") == 8080
    assert len(ports) == 7
    assert len(set(ports.values())) == 7
    assert set(ports.values()) <= set(within)
    mixed = fixed_ports(23_001, "front", range(23_000, 23_008))
    assert sorted(mixed.values()) == list(range(23_000, 23_008))


def test_a_range_that_is_too_small_is_refused() -> None:
    with pytest.raises(ServeError, match=r"must have 7 ports besides the public one, got 23000-23006"):
        choose_ports(23_003, "front", range(23_000, 23_007))


def test_an_entry_of_the_balancer_outlives_the_longest_session() -> None:
    text = (REPO / "deploy" / "serve" / "haproxy.cfg").read_text(encoding="utf-8")
    number, unit = re.search(r"^ *stick-table .* expire (\d+)(\w)", text, re.MULTILINE).groups()
    limits = HandlerConfig.model_fields["session_ttl_s"].metadata
    (longest_s,) = [limit.le for limit in limits if hasattr(limit, "le")]
    assert int(number) * UNITS[unit] >= longest_s + FRONTEND_MARGIN_S
