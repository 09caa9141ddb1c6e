"""Send 500 malformed requests beside chats; `python -m tests.soak.fuzz` sends 20,000."""

from __future__ import annotations

from pathlib import Path

from tests.support.fuzz import CONTROLS, fuzz, serving

THREADS = 4
IDLE_S = 4


def test_five_hundred_requests_that_nobody_sane_would_send(tmp_path: Path) -> None:
    with serving(tmp_path, CONTROLS + THREADS, IDLE_S) as (server, url):
        run = fuzz(server, url, 500, seed=7, threads=THREADS)
    assert run.wrong == []
    assert run.counts["control: compared"] > 0
    assert sum(count for what, count in run.counts.items() if not what.startswith(("control", "leave"))) >= 500
