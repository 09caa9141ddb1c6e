"""Shows on real servers that sessions outlive what production does to them: an engine or a worker that dies or hangs,
memory that runs out, journals that are damaged, and an instance that another one follows. Long runs of the same are in
tests/soak.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
import httpx
import psutil
import pytest
from moto.server import ThreadedMotoServer

from deploy.versions import VERSIONS
from llava_sessions.chat.transcript import BlobPool
from llava_sessions.journal import encoding
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.chats import LONG, Crowd, PatientChat, Said, Tally, client, scene_scripts, undisturbed
from tests.support.commands import eventually
from tests.support.encoding import to_png
from tests.support.serving import Served, pack
from tests.support.variants import COLOURS, make_variant, says
from tests.support.wire import ApiError, ChatSession

FIRST, SECOND, THIRD = QUESTIONS = ("Which shapes are there?", "What is in the middle?", "How many shapes are there?")
PICTURES = [to_png(make_scene(seed).draw()) for seed in HELD_OUT_SEEDS[700:704]]
BUCKET = "journals"
TOKEN = "a token that nobody else knows".replace(" ", "-")


@pytest.fixture(scope="module")
def aws() -> Iterator[dict[str, str]]:
    """The environment of a worker whose S3 is moto's server."""
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    env = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-1"}
    env |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    made = boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"], region_name="eu-west-1", **keys)
    made.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    yield env
    s3.stop()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps its journal, besides S3."""
    return tmp_path_factory.mktemp("journal")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, journal: Path, aws: dict[str, str]) -> Iterator[Served]:
    """A server that takes an engine for hung after three seconds, and whose sessions outlive it.

    Once it runs, another model is packed under its name, as `make serve` in another terminal does: each engine and
    worker that is started again must serve the model of the first ones.
    """
    where = {"journal_dir": journal, "journal_s3_prefix": f"s3://{BUCKET}/faults"}
    folder = tmp_path_factory.mktemp("faults")
    store = pack(folder, sessions=16, engine_hang_s=3, **where)
    first = (store / "llava").resolve()
    with Served(store, env=aws) as served:
        other = make_variant(folder / "other", says({f" {colour}": f" dark-{colour}" for colour in COLOURS}))
        for _ in range(2):
            pack(folder, sessions=16, model=other)
        kept = {path.parent.name for path in (store / VERSIONS / "llava").glob("*/llava")}
        assert kept == {first.parent.name, (store / "llava").resolve().parent.name}
        yield served


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with client(served.url) as http:
        yield http


@pytest.fixture(scope="module")
def calm(served: Served) -> list[list[Said]]:
    """Of each picture what is said to the three questions when nothing fails."""
    told = []
    with client(served.url) as http:
        for picture in PICTURES:
            chat = PatientChat(http).open(picture)
            told.append([chat.ask(question) for question in QUESTIONS])
            chat.close()
    assert len({tuple(said.text for said in chat) for chat in told}) == len(PICTURES), "the pictures are too alike"
    return told


def refused(call, *arguments, **options) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        call(*arguments, **options)
    return refusal.value


def test_memory_that_runs_out_refuses_one_turn_and_harms_none(
    served: Served, http: httpx.Client, calm: list[list[Said]]
) -> None:
    """First of all, while the engine has little memory of its own that it could use again."""
    chats = [PatientChat(http).open(picture) for picture in PICTURES[:2]]
    assert [chat.ask(FIRST) for chat in chats] == [calm[0][0], calm[1][0]]
    engine = psutil.Process(served.engine_pid)
    unlimited = engine.rlimit(psutil.RLIMIT_DATA)
    # RLIMIT_AS would not do: torch's allocator reserves a gibibyte of addresses and gets its memory out of that.
    engine.rlimit(psutil.RLIMIT_DATA, (engine.memory_info().data + 2 * 2**20, resource.RLIM_INFINITY))
    try:
        error = refused(ChatSession(http, chats[0].session_id, "").ask, "the red circle " * 400)  # 7.5 MiB of KV cache
    finally:
        engine.rlimit(psutil.RLIMIT_DATA, unlimited)
    assert (error.status, error.code) == (429, "capacity")
    assert "out_of_memory offloading=all_idle" in served.log()
    assert [[chat.ask(SECOND), chat.ask(THIRD)] for chat in chats] == [calm[0][1:], calm[1][1:]]
    assert served.engine_pid == engine.pid
    for chat in chats:
        chat.close()


def test_no_new_sessions_are_invited_while_the_engine_is_replaced(served: Served, http: httpx.Client) -> None:
    """/ping is 503 from the loss to the next engine. The next one is stopped while it loads, to take a while."""
    chat = PatientChat(http).open(PICTURES[0])
    answer = chat.ask(FIRST)
    assert http.get("/ping").status_code == 200
    killed = served.signal_engine(signal.SIGKILL)
    assert eventually(lambda: served.engine_pid not in (None, killed))
    stopped = served.signal_engine(signal.SIGSTOP)
    try:
        assert eventually(lambda: http.get("/ping").status_code == httpx.codes.SERVICE_UNAVAILABLE)
        reply = http.get("/ping")
        assert reply.json()["error"]["code"] == "engine_restarting"
        assert int(reply.headers["Retry-After"]) >= 1
        ask = {"type": "send_text_prompt", "prompt_text": SECOND}
        assert http.post("/invocations", json=ask, headers=chat.headers).json()["error"]["code"] == "engine_restarting"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was taken for hung
            os.kill(stopped, signal.SIGCONT)
    assert chat.ask(FIRST).prompt_tokens > answer.prompt_tokens
    assert eventually(lambda: http.get("/ping").is_success)
    chat.close()


def test_an_engine_killed_in_mid_stream(served: Served, http: httpx.Client, calm: list[list[Said]]) -> None:
    chat = PatientChat(http).open(PICTURES[0])
    lines = ChatSession(http, chat.session_id, "").stream("Say something long", **LONG)
    begun = [next(lines) for _ in range(3)]
    served.signal_engine(signal.SIGKILL)
    *more, last = lines
    assert all(set(line) == {"delta"} for line in begun + more)
    assert last["error"]["code"] == "engine_restarting"
    again = ChatSession(http, chat.session_id, "")
    refusal = http.post("/invocations", json={"type": "send_text_prompt", "prompt_text": SECOND}, headers=again.headers)
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "engine_restarting")
    assert int(refusal.headers["Retry-After"]) >= 1
    assert [chat.ask(FIRST), chat.ask(SECOND, stream=True), chat.ask(THIRD)] == calm[0]
    chat.close()


def test_an_engine_killed_after_a_large_question_has_its_status(served: Served, http: httpx.Client) -> None:
    chat = PatientChat(http).open(PICTURES[0])
    ask = {"type": "send_text_prompt", "prompt_text": "Say something long", "request_id": str(uuid.uuid4()), **LONG}
    large = {
        "content": json.dumps(ask) + " " * 100_000,
        "headers": {**chat.headers, "Content-Type": "application/json"},
    }
    with http.stream("POST", "/invocations", **large) as reply:
        assert (reply.status_code, reply.headers["Transfer-Encoding"]) == (200, "chunked")
        served.signal_engine(signal.SIGKILL)
        assert json.loads(reply.read())["error"]["code"] == "engine_restarting"
    assert chat.ask(FIRST).finish_reason == "stop"  # by the next engine
    with http.stream("POST", "/invocations", json={**ask, "stream": True}, headers=chat.headers) as retry:
        assert set(json.loads(next(retry.iter_lines()))) == {"delta"}  # a stored answer would be one line
    chat.close()


def test_an_engine_killed_while_nobody_asks(served: Served, http: httpx.Client, calm: list[list[Said]]) -> None:
    chats = [PatientChat(http).open(picture) for picture in PICTURES]
    said = [[chat.ask(FIRST)] for chat in chats]
    before = served.gauges(llava_open_sessions=4)
    worker = served.worker_pid
    served.signal_engine(signal.SIGKILL)
    after = served.gauges(
        llava_engine_restarts_total=before.get("llava_engine_restarts_total", 0) + 1, llava_kv_bytes=0
    )
    assert after["llava_open_sessions"] == 4
    assert after["llava_device_bytes"] == after["llava_features_bytes"] == 0
    for question in (SECOND, THIRD):
        with ThreadPoolExecutor(4) as pool:
            for told, answer in zip(said, pool.map(lambda chat, q=question: chat.ask(q), chats), strict=True):
                told.append(answer)
    assert said == calm
    assert served.worker_pid == worker
    for chat in chats:
        chat.close()
    rebuilt = served.gauges(llava_open_sessions=0, llava_device_bytes=0)
    assert rebuilt["llava_device_bytes"] == 0
    assert rebuilt["llava_rebuilds_total"] == before.get("llava_rebuilds_total", 0) + 4


def test_an_engine_killed_while_a_session_opens(served: Served, http: httpx.Client, calm: list[list[Said]]) -> None:
    stopped = served.signal_engine(signal.SIGSTOP)
    chat, tally = None, Tally()
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(PatientChat(http, tally).open, PICTURES[1])
        with pytest.raises(TimeoutError):
            opening.result(0.5)  # nobody accepts it
        os.kill(stopped, signal.SIGKILL)
        chat = opening.result()
    assert set(tally.repeated) == {"engine_restarting"}
    assert served.gauges(llava_open_sessions=1)["llava_open_sessions"] == 1
    assert [chat.ask(question) for question in QUESTIONS] == calm[1]
    chat.close()


def test_an_engine_that_hangs_is_replaced(served: Served, http: httpx.Client, calm: list[list[Said]]) -> None:
    chat = PatientChat(http).open(PICTURES[2])
    lines = ChatSession(http, chat.session_id, "").stream("Say something long", **LONG)
    next(lines)
    stopped = served.signal_engine(signal.SIGSTOP)
    assert list(lines)[-1]["error"]["code"] == "engine_restarting"
    assert [chat.ask(question) for question in QUESTIONS] == calm[2]
    assert served.engine_pid != stopped
    assert not psutil.pid_exists(stopped)
    chat.close()


def test_many_sessions_when_their_engine_is_killed(served: Served, http: httpx.Client) -> None:
    scripts = scene_scripts(12, turns=4, first=710)
    crowd = Crowd(http, scripts, undisturbed(http, scripts), sessions=8, seed=1, pause_s=0.1).start()
    crowd.wait_turns(8)
    served.signal_engine(signal.SIGKILL)
    crowd.wait_turns(8)
    crowd.finish()
    assert not crowd.failures
    assert not crowd.wrong
    assert crowd.tally.repeated["engine_restarting"] > 0
    assert crowd.chats >= 8
    assert served.gauges(llava_open_sessions=0)["llava_open_sessions"] == 0


def test_a_token_ties_a_session_to_its_caller(http: httpx.Client) -> None:
    chat = PatientChat(http).open(PICTURES[0], session_token=TOKEN)
    unknown = refused(ChatSession(http, "ls-unknown", "").ask, FIRST)
    assert unknown.status == 404
    for options in ({}, {"session_token": TOKEN[:-1] + "x"}):
        assert str(refused(chat.ask, FIRST, **options)) == str(unknown)
        assert str(refused(PatientChat(http).resume, chat.session_id, **options)) == str(unknown)
    assert str(refused(chat.close)) == str(unknown)
    assert chat.ask(FIRST, session_token=TOKEN).finish_reason == "stop"
    body = {"type": "close_session", "session_token": TOKEN}
    assert http.post("/invocations", json=body, headers=chat.headers).status_code == 200


def test_a_session_goes_on_under_a_new_id(http: httpx.Client, calm: list[list[Said]]) -> None:
    old = PatientChat(http).open(PICTURES[3])
    assert old.ask(FIRST) == calm[3][0]
    new = PatientChat(http).resume(old.session_id)
    assert new.session_id != old.session_id
    assert refused(old.ask, SECOND).code == "session_not_found"
    assert [new.ask(SECOND), new.ask(THIRD)] == calm[3][1:]
    new.close()
    assert refused(PatientChat(http).resume, new.session_id).code == "session_not_found"


def test_a_killed_worker_finds_its_sessions_again(
    served: Served, http: httpx.Client, journal: Path, calm: list[list[Said]]
) -> None:
    plain, damaged, expired, closed = (PatientChat(http).open(PICTURES[0]) for _ in range(4))
    bound = PatientChat(http).open(PICTURES[1], session_token=TOKEN)
    assert plain.ask(FIRST) == calm[0][0]
    assert bound.ask(FIRST, session_token=TOKEN) == calm[1][0]
    once = {"request_id": str(uuid.uuid4())}
    assert plain.ask(SECOND, **once) == calm[0][1]
    damaged.ask(FIRST)
    assert files_of(journal, closed) == ["000000.rec"]
    assert files_of(journal, plain) == ["000000.rec", "000001.rec", "000002.rec"]
    closed.close()
    assert files_of(journal, closed) == []
    spoil(journal, damaged)
    expire(journal, expired)
    page = served.server.worker_metrics_url
    assert has_page(page)
    served.lose_server(lambda: os.kill(served.worker_pid, signal.SIGKILL))
    # What was answered before is told again, and not run again; what was not is run once.
    assert plain.ask(SECOND, **once) == calm[0][1]
    assert eventually(lambda: has_page(page)), "the page of the next worker has the same address"
    assert served.gauges(llava_open_sessions=2, llava_turns_total=0).get("llava_turns_total", 0) == 0
    assert plain.ask(THIRD) == calm[0][2]
    assert refused(bound.ask, SECOND).code == "session_not_found"
    assert bound.ask(SECOND, session_token=TOKEN) == calm[1][1]
    assert damaged.ask(SECOND) == calm[0][1], "the copy in S3 is whole"
    assert refused(expired.ask, FIRST).code == "session_expired"
    assert refused(closed.ask, FIRST).code == "session_not_found"
    assert "journal_damaged" in served.log()
    plain.close()
    damaged.close()
    http.post("/invocations", json={"type": "close_session", "session_token": TOKEN}, headers=bound.headers)
    assert files_of(journal, plain) == files_of(journal, bound) == []


def test_another_instance_carries_on_and_ends_in_order(
    served: Served, http: httpx.Client, aws: dict[str, str], tmp_path: Path, calm: list[list[Said]]
) -> None:
    """The second server shares nothing with the first one but the bucket; then it is told to stop."""
    old = PatientChat(http).open(PICTURES[2], session_token=TOKEN)
    assert old.ask(FIRST, session_token=TOKEN) == calm[2][0]
    store = pack(tmp_path, sessions=8, journal_s3_prefix=f"s3://{BUCKET}/faults")
    with Served(store, env=aws) as second, client(second.url) as there:
        assert refused(PatientChat(there).resume, old.session_id, session_token=TOKEN[::-1]).status == 404
        new = PatientChat(there).resume(old.session_id, session_token=TOKEN)
        assert [new.ask(question, session_token=TOKEN) for question in (SECOND, THIRD)] == calm[2][1:]
        assert refused(PatientChat(there).resume, old.session_id, session_token=TOKEN).status == 404

        idle = PatientChat(there).open(PICTURES[0])
        lines = ChatSession(there, idle.session_id, "").stream("Say something long", **LONG)
        next(lines)
        worker = second.worker_pid
        os.kill(worker, signal.SIGUSR1)
        body = {"type": "start_session", "resume": new.session_id, "session_token": TOKEN}
        ask = {"type": "send_text_prompt", "prompt_text": FIRST, "session_token": TOKEN}
        for reply in (there.post("/invocations", json=body), there.post("/invocations", json=ask, headers=new.headers)):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
            assert int(reply.headers["Retry-After"]) >= 1
        told = second.server.home / "tmp" / f"drained-{worker}"
        assert not told.exists()
        assert list(lines)[-1]["finish_reason"] in ("stop", "length")
        until = time.monotonic() + 20
        while not told.exists():
            assert time.monotonic() < until, second.log()
            time.sleep(0.03)


# --- journals on disk -------------------------------------------------------------------------------------------------


def has_page(url: str) -> bool:
    """Return whether a worker's page of metrics is there."""
    with contextlib.suppress(httpx.HTTPError):
        return "llava_open_sessions " in httpx.get(url, trust_env=False).text
    return False


def files_of(journal: Path, chat: PatientChat) -> list[str]:
    folder = journal / encoding.key_of(chat.session_id)
    return sorted(path.name for path in folder.glob("*.rec"))


def spoil(journal: Path, chat: PatientChat) -> None:
    """Flip one bit in the middle of the session's turn."""
    path = journal / encoding.key_of(chat.session_id) / "000001.rec"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def expire(journal: Path, chat: PatientChat) -> None:
    """Rewrite the session's first record as if the session had expired, in the epoch of its owner."""
    key = encoding.key_of(chat.session_id)
    path = journal / key / "000000.rec"
    stored = path.read_bytes()
    transcript, _ = encoding.read_transcript(key, [stored], BlobPool().get)
    expired = replace(transcript.opening, expires_at_s=time.time() - 1)
    data, _ = encoding.encode(expired, chat.session_id, 0, "", encoding.epoch_of(stored))
    path.write_bytes(data)
