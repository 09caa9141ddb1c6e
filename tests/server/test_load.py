"""`bench.load`, users of `bench.sessions` and `doctor --live` on the shared server.

AIPerf itself runs in tests/deploy/test_aiperf.py.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench import harness, load, sessions, users
from deploy.doctor import live
from deploy.doctor.findings import Finding, Subject
from deploy.doctor.headers import SESSION_HEADER
from deploy.serve.haproxy import HAProxy, find_haproxy
from deploy.serve.ports import free_ports
from deploy.serve.torchserve import TorchServe
from tests.support.server_metrics import wait_for_metrics
from tests.support.serving import SHAPES

EXPORT = Path(__file__).parent / "aiperf_export.json"  # records of a run of AIPerf 0.13.0, with the metrics that count


def found(port: int) -> list[Finding]:
    return list(live.check_live(Subject(port=port, is_live=True)))


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def wait_until_it_listens(port: int) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.02)


# --- bench.load -------------------------------------------------------------------------------------------------------


def test_conversations_have_a_picture_each_and_pauses_and_depend_on_the_seed_only(tmp_path: Path) -> None:
    def written(*arguments: str) -> list[dict]:
        options = load.parse(["--conversations", "3", "--turns", "3", "--picture-px", "72", *arguments])
        load.write_conversations(options, tmp_path / "file")
        return [json.loads(line) for line in (tmp_path / "file").read_text().splitlines()]

    chats = written()
    assert chats == written()
    assert chats != written("--seed", "2")
    assert len({chat["turns"][0]["image"] for chat in chats}) == 3
    for chat in chats:
        assert ["image" in turn for turn in chat["turns"]] == [True, False, False]
        assert ["delay" in turn for turn in chat["turns"]] == [False, True, True]
    for chat in written("--pictures", "every"):
        assert len({turn["image"] for turn in chat["turns"]}) == 3


def test_the_report_has_percentiles_goodput_and_errors(tmp_path: Path) -> None:
    export = json.loads(EXPORT.read_text())
    failed = {"metadata": {"turn_index": 1}, "metrics": {}, "error": {"type": "Conflict", "code": 409, "message": "m"}}
    requests = [load.request_of(record) for record in [*export["records"], failed]]
    options = load.parse(["--out", str(tmp_path), "--smoke"])
    run = harness.Run(options)
    run.finish(load.report(options, requests, export["summary"]), load.paint)
    document = json.loads((tmp_path / "load.json").read_text())
    rows = {row["turns"]: row for row in document["rows"]}
    assert {name: (row["requests"], row["failed"]) for name, row in rows.items()} == {
        "all turns": (7, 1),
        "first turns": (2, 0),
        "follow-ups": (5, 1),
    }
    ttft = sorted(record["metrics"]["time_to_first_token"]["value"] for record in export["records"])
    assert rows["all turns"]["TTFT p50 ms"] == ttft[2]
    assert rows["all turns"]["TTFT p99 ms"] == ttft[-1]
    assert document["ratios"]["failed requests"] == 1
    assert document["ratios"]["share of requests within all objectives"] == 0
    assert document["notes"] == ["error Conflict 409: 1 requests"]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_an_answer_or_below_its_rate_is_reported() -> None:
    export = json.loads(EXPORT.read_text())
    answered = [load.request_of(record) for record in export["records"]]
    options = load.parse(["--rate", "1000"])
    [note] = load.report(options, answered, export["summary"]).notes
    assert re.fullmatch(r"1000 requests/s were requested and [\d.]+ reached: .*", note)
    failed = {"metadata": {"turn_index": 0}, "metrics": {}, "error": {"type": "Conflict", "code": 409}}
    with pytest.raises(load.LoadError, match=r"no request was answered: {'Conflict 409': 2}"):
        load.report(options, [load.request_of(failed)] * 2, {})


def test_a_time_out_ends_all_processes_of_the_program(tmp_path: Path) -> None:
    seconds = f"600.{os.getpid()}"
    with pytest.raises(load.LoadError, match=r"AIPerf has not ended within --timeout-s 0.5"):
        load.run_whole(["bash", "-c", f"sleep {seconds} & wait"], tmp_path / "log", 0.5)
    until = time.monotonic() + 60
    while any(seconds in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_without_aiperf_or_a_server_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "AIPERF", Path("/no/such/folder/bin/aiperf"))
    with pytest.raises(SystemExit, match=r"AIPerf is not in /no/such/folder: run `make load`"):
        load.main([])
    monkeypatch.setattr(load, "AIPERF", Path(sys.executable))
    [port] = free_ports(1)
    with pytest.raises(SystemExit, match=r"/no/such/model is not a checkpoint that can be served"):
        load.main(["--model", "/no/such/model"])
    with pytest.raises(SystemExit, match=r"--url must be a server with /v1/models, got http://127.0.0.1:\d+: Connect"):
        load.main(["--url", f"http://127.0.0.1:{port}/v1"])


def test_the_model_is_asked_from_the_server(front: HAProxy) -> None:
    assert load.served_model(front.url) == "llava"


# --- bench.sessions ---------------------------------------------------------------------------------------------------


def test_the_users_of_sessions_need_a_server(tmp_path: Path) -> None:
    [port] = free_ports(1)
    with pytest.raises(SystemExit, match=r"--url must be a server with /v1/models, got http://127.0.0.1:\d+: Connect"):
        sessions.main(["--url", f"http://127.0.0.1:{port}", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [users.STAYS, users.LEAVES])
def test_a_user_closes_its_session_when_the_run_stops(front: HAProxy, server: TorchServe, kind: str) -> None:
    log = users.Log()
    plan = users.Plan(turns=2, think_s=1e9, return_s=0, expire_s=0, tokens=4, picture_px=64)
    thread = threading.Thread(target=users.User(kind, 1, front.url, plan, log).run, daemon=True)
    thread.start()
    until = time.monotonic() + 120
    while not log.turns:
        assert time.monotonic() < until
        time.sleep(0.02)
    log.stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert (len(log.opens), log.count("closed"), log.open_sessions, log.errors.total()) == (1, 1, 0, 0)
    assert wait_for_metrics(server.metrics_url, llava_open_sessions=0)["llava_open_sessions"] == 0


def test_a_user_closes_its_session_after_an_error(front: HAProxy, server: TorchServe) -> None:
    log = users.Log()
    plan = users.Plan(turns=2, think_s=0, return_s=0, expire_s=0, tokens=100_000, picture_px=64)
    users.User(users.STAYS, 1, front.url, plan, log).run()
    assert log.errors == {(users.STAYS, "invalid_request"): 1}
    assert (log.count("closed"), log.open_sessions) == (1, 0)
    assert wait_for_metrics(server.metrics_url, llava_open_sessions=0)["llava_open_sessions"] == 0


def test_the_report_of_sessions_has_opens_and_what_is_left() -> None:
    log = users.Log()
    for number in (1, 2, 3):
        log.add_open(users.STAYS, number / 10)
        log.add_turn(users.Turn(users.STAYS, number, 0.01, 0.05, 0.002, 40, 30))
        log.add_turn(users.Turn(users.STATELESS, number, 0.04, 0.08, 0.002, 40, 0))
    options = sessions.parse(["--users", "3", "--idle-s", "30"])
    result = sessions.report(options, log, {}, {"llava_kv_bytes": 1.0})
    rows = {row["users"]: row for row in result.rows}
    assert rows[users.STAYS]["open p50 ms"] == pytest.approx(200)
    assert rows[users.STATELESS]["open p50 ms"] is None
    assert result.ratios["follow-up TTFT p50: stateless /v1 / stays"] == pytest.approx(4)
    assert (result.settings["return_s"], result.settings["resident"]) == (10, 4)
    assert result.notes == ["the memory of the sessions has not returned to zero"]
    assert users.AFTER_PAUSE in rows


def test_the_server_of_sessions_has_room_for_a_part_of_the_caches() -> None:
    options = sessions.parse(["--users", "40", "--resident", "2"])
    config = sessions.configuration(options)["llava"]
    features, cache = sessions.session_bytes(SHAPES, 4 * (24 + sessions.QUESTION_TOKENS))
    assert config["device_bytes"] == 160 * features + 2 * cache
    assert (config["max_sessions"], config["share_pictures"], config["session_idle_s"]) == (200, False, 60)


# --- doctor --live ----------------------------------------------------------------------------------------------------


def test_a_session_makes_the_round_trip(front: HAProxy) -> None:
    assert [(finding.level, finding.check) for finding in found(port_of(front.url))] == [
        ("ok", "server"),
        ("ok", "live session"),
    ]


def test_a_proxy_that_removes_the_header_is_found(front: HAProxy, server: TorchServe, tmp_path: Path) -> None:
    [port] = free_ports(1)
    (tmp_path / "proxy.cfg").write_text(
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n"
        f"listen proxy\n    bind 127.0.0.1:{port}\n    http-request del-header {SESSION_HEADER}\n"
        f"    server front 127.0.0.1:{port_of(front.url)}\n"
    )
    proxy = subprocess.Popen([find_haproxy(), "-db", "-f", tmp_path / "proxy.cfg"])
    try:
        wait_until_it_listens(port)
        _, *rest = found(port)
    finally:
        proxy.kill()
        proxy.wait()
    assert [finding.level for finding in rest] == ["error"] * len(rest) != []
    assert "a question in the session answers" in rest[0].found
    left = wait_for_metrics(server.metrics_url, llava_open_sessions=0)
    assert left["llava_open_sessions"] == 0, "the session is closed by the ID in the body"


def test_a_server_that_does_not_run_is_an_error() -> None:
    [port] = free_ports(1)
    (finding,) = found(port)
    assert (finding.level, finding.remedy) == ("error", "start it: make serve")


class _NoHeaders(http.server.BaseHTTPRequestHandler):
    """Another server: it answers everything with 200, without a header of a session."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoHeaders)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_reply_without_the_header_is_an_error(other_server: int) -> None:
    _, finding = found(other_server)
    assert finding.level == "error"
    assert "the reply to an open has no header X-Amzn-SageMaker-Session-Id" in finding.found
