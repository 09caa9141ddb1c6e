"""Shows the main job on the real server: open a session, ask, stream, close, and see its memory freed."""

from __future__ import annotations

import base64
import json
import random
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import pytest

from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import HELD_OUT_SEEDS, dialogue, make_scene
from tests.support.encoding import to_png
from tests.support.server_metrics import wait_for_metrics
from tests.support.wire import CLOSED_HEADER, SESSION_HEADER, ApiError, ChatSession

from .conftest import MAX_SESSIONS

# botocore's pattern of the header that announces a session (sagemaker-runtime 2017-05-13, NewSessionResponseHeader).
ANNOUNCED = r"[a-zA-Z0-9](-*[a-zA-Z0-9])*;\sExpires=[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"
FIRST = HELD_OUT_SEEDS[0]


def script(seed: int, turns: int) -> list[str]:
    """The questions of a random conversation about a held-out scene."""
    return [question.text for question in dialogue(make_scene(seed), seed, turns)]


def answers(http: httpx.Client, seed: int, questions: list[str]) -> list[str]:
    """What the server says to these questions, one after another, in a session of their own."""
    chat = ChatSession.open(http, make_scene(seed).draw())
    try:
        return [chat.ask(question)["response_text"] for question in questions]
    finally:
        chat.close()


def test_open_ask_ask_close(http: httpx.Client) -> None:
    opened = http.post("/invocations", json={"type": "start_session", "image": _data_url(FIRST)})
    assert opened.status_code == 200
    announced = opened.headers[SESSION_HEADER]
    assert re.fullmatch(ANNOUNCED, announced)
    assert opened.headers["X-Amzn-SageMaker-New-Session-Id"] == announced
    session_id, _, expires = announced.partition("; Expires=")
    assert opened.json()["session_id"] == session_id
    left_s = (datetime.fromisoformat(expires) - datetime.now(UTC)).total_seconds()
    assert 1190 < left_s <= 1201
    chat = ChatSession(http, session_id, expires)
    first = chat.ask("How many shapes are there?")
    second = chat.ask("Which shapes are there?")
    assert first["finish_reason"] == second["finish_reason"] == "stop"
    assert first["response_text"] != second["response_text"]
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    # All of the first turn but its end-of-sequence token, which the template writes again, was in the cache.
    assert second["usage"]["cached_tokens"] == first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
    closed = chat.close()
    assert closed.json() == {"success": True, "session_id": session_id}
    assert closed.headers[CLOSED_HEADER] == session_id
    with pytest.raises(ApiError, match="404 session_not_found"):
        chat.ask("Still there?")


def test_a_streamed_answer_is_the_whole_answer_in_pieces(http: httpx.Client) -> None:
    scene = make_scene(FIRST)
    plain, streamed = ChatSession.open(http, scene.draw()), ChatSession.open(http, scene.draw())
    for question in script(FIRST, 4):
        whole = plain.ask(question, return_token_ids=True)
        lines = list(streamed.stream(question, return_token_ids=True))
        assert "".join(line["delta"] for line in lines) == whole["response_text"]
        assert all(set(line) == {"delta"} for line in lines[:-1])
        same = ("finish_reason", "usage", "token_ids")
        assert {key: lines[-1][key] for key in same} == {key: whole[key] for key in same}
        assert len(lines) > 2
        assert 0 <= lines[-1]["timings"]["ttft_ms"] <= lines[-1]["timings"]["total_ms"]
    plain.close()
    streamed.close()


def test_the_demo_model_tells_the_truth_through_the_server(http: httpx.Client) -> None:
    asked = right = 0
    for seed in HELD_OUT_SEEDS[500:540]:
        questions = dialogue(make_scene(seed), seed, 3)
        said = answers(http, seed, [question.text for question in questions])
        asked += len(questions)
        right += sum(answer == question.answer for answer, question in zip(said, questions, strict=True))
    assert right / asked >= 0.9


def test_twenty_sessions_at_once_never_mix(http: httpx.Client) -> None:
    seeds = HELD_OUT_SEEDS[100:120]
    questions = ["Which shapes are there?", "How many shapes are there?", "What is in the middle?"]
    alone = {seed: answers(http, seed, questions) for seed in seeds}
    assert len({tuple(said) for said in alone.values()}) > 10, "the pictures are too alike to tell sessions apart"
    chats = {seed: ChatSession.open(http, make_scene(seed).draw()) for seed in seeds}
    start = threading.Barrier(len(seeds))

    def talk(seed: int) -> list[str]:
        wait = random.Random(seed)
        said = []
        start.wait()
        for question in questions:
            time.sleep(wait.random() * 0.05)
            if wait.random() < 0.5:
                said.append(chats[seed].ask(question)["response_text"])
            else:
                said.append("".join(line["delta"] for line in chats[seed].stream(question)))
        return said

    with ThreadPoolExecutor(len(seeds)) as pool:
        together = dict(zip(seeds, pool.map(talk, seeds), strict=True))
    for chat in chats.values():
        chat.close()
    assert together == alone


def test_closing_frees_the_memory(http: httpx.Client, server: TorchServe) -> None:
    before = wait_for_metrics(server.metrics_url, llava_open_sessions=0, llava_device_bytes=0)
    assert before["llava_device_bytes"] == 0
    chats = [ChatSession.open(http, make_scene(FIRST + index).draw()) for index in range(3)]
    for chat in chats:
        chat.ask("Which shapes are there?")
    held = wait_for_metrics(server.metrics_url, llava_open_sessions=3, llava_running_turns=0)
    assert held["llava_features_bytes"] > 0
    assert held["llava_kv_bytes"] > 0
    chats.pop().close()
    two = wait_for_metrics(server.metrics_url, llava_open_sessions=2)
    assert two["llava_device_bytes"] == held["llava_device_bytes"] * 2 / 3
    for chat in chats:
        chat.close()
    after = wait_for_metrics(server.metrics_url, llava_open_sessions=0, llava_device_bytes=0)
    assert after["llava_device_bytes"] == after["llava_features_bytes"] == after["llava_kv_bytes"] == 0


def test_all_sessions_of_the_config_answer_and_one_more_is_refused(http: httpx.Client) -> None:
    scenes = {seed: make_scene(seed) for seed in HELD_OUT_SEEDS[200 : 200 + MAX_SESSIONS]}
    chats = {seed: ChatSession.open(http, scene.draw()) for seed, scene in scenes.items()}
    try:
        for _ in range(3):
            with pytest.raises(ApiError, match="429 capacity"):
                ChatSession.open(http, scenes[HELD_OUT_SEEDS[200]].draw())
        with ThreadPoolExecutor(16) as pool:
            said = dict(
                zip(chats, pool.map(lambda chat: chat.ask("Which shapes are there?"), chats.values()), strict=True)
            )
    finally:
        for chat in chats.values():
            chat.close()
    alone = {seed: answers(http, seed, ["Which shapes are there?"])[0] for seed in list(scenes)[:8]}
    assert {seed: said[seed]["response_text"] for seed in alone} == alone
    assert all(reply["finish_reason"] == "stop" for reply in said.values())


def test_the_samples_own_fields_open_a_session_too(http: httpx.Client) -> None:
    """The AWS LLaVA sample sends the picture in `path` and the session id in the body as well as in the header."""
    reply = http.post("/invocations", json={"type": "start_session", "path": _data_url(FIRST)})
    session_id = reply.json()["session_id"]
    ask = {"type": "send_text_prompt", "session_id": session_id, "prompt_text": "How many shapes are there?"}
    answer = http.post("/invocations", json=ask, headers={SESSION_HEADER: session_id})
    assert answer.json()["response_text"] == answers(http, FIRST, ["How many shapes are there?"])[0]
    closed = http.post("/invocations", json={"type": "close_session", "session_id": session_id})
    assert closed.json()["success"] is True


@pytest.mark.parametrize("header", ["NEW_SESSION", ""])
def test_a_new_session_opens_whatever_the_header_says(http: httpx.Client, header: str) -> None:
    body = {"type": "start_session", "image": _data_url(FIRST)}
    replies = [http.post("/invocations", json=body, headers={SESSION_HEADER: header}) for _ in range(2)]
    ids = [reply.json()["session_id"] for reply in replies]
    assert len(set(ids)) == 2
    for session_id in ids:
        chat = ChatSession(http, session_id, "")
        assert chat.ask("How many shapes are there?")["finish_reason"] == "stop"
        chat.close()


def test_a_retry_gets_the_same_answer_and_runs_once(http: httpx.Client, server: TorchServe) -> None:
    """As boto3 repeats a request that timed out: the same body."""
    body = {"type": "start_session", "image": _data_url(FIRST), "request_id": str(uuid.uuid4())}
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: http.post("/invocations", json=body).json(), range(3)))
    assert len({reply["session_id"] for reply in opened}) == 1
    chat = ChatSession(http, opened[0]["session_id"], opened[0]["expires"])
    ask = {"type": "send_text_prompt", "prompt_text": "Which shapes are there?", "request_id": str(uuid.uuid4())}
    with ThreadPoolExecutor(3) as pool:
        asks = [pool.submit(http.post, "/invocations", json=ask, headers=chat.headers) for _ in range(3)]
        answers = [reply.result().json() for reply in asks]
    assert answers[0] == answers[1] == answers[2]
    after = chat.ask("How many shapes are there?")
    assert after["usage"]["cached_tokens"] == answers[0]["usage"]["prompt_tokens"] + _kept(answers[0])
    chat.close()


def test_a_large_question_has_status_200_before_its_answer_and_its_own_status_if_it_is_wrong(
    http: httpx.Client,
) -> None:
    """Only a body that the worker gets as bytes is large, so this also shows that TorchServe does not parse it.

    The answer is long: one that is known in the step in which the worker learns of the admission is sent as a whole.
    """
    chat = ChatSession.open(http, make_scene(FIRST).draw())
    small = {"type": "send_text_prompt", "prompt_text": "Which shapes are there?", "image": _data_url(FIRST + 1)}
    small |= {"max_new_tokens": 300, "ignore_eos": True}
    expected = http.post("/invocations", json=small, headers=chat.headers)
    chat.close()
    chat = ChatSession.open(http, make_scene(FIRST).draw())
    padded = json.dumps(small) + " " * 100_000
    typed = {**chat.headers, "Content-Type": "application/json"}
    wrong = http.post("/invocations", content=padded.replace(_data_url(FIRST + 1), "bm8gcGljdHVyZQ=="), headers=typed)
    large = http.post("/invocations", content=padded, headers=typed)
    chat.close()
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (415, "unsupported_media")
    assert large.json()["response_text"] == expected.json()["response_text"]
    assert "Content-Length" in expected.headers
    assert large.headers["Transfer-Encoding"] == "chunked"
    assert large.headers["Content-Type"] == "application/json"


def _kept(answer: dict) -> int:
    return answer["usage"]["completion_tokens"] - 1


def test_sampling_by_seed_and_stop_strings_reach_the_engine(http: httpx.Client) -> None:
    def fresh(**options) -> dict:
        chat = ChatSession.open(http, make_scene(FIRST).draw())
        reply = chat.ask("Which shapes are there?", **options)
        chat.close()
        return reply

    hot = [fresh(temperature=3.0, seed=seed)["response_text"] for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    whole = fresh()["response_text"]
    cut = fresh(stop=[whole[4:7]])
    assert (cut["response_text"], cut["finish_reason"]) == (whole[: whole.index(whole[4:7])], "stop")
    short = fresh(max_new_tokens=2)
    assert (short["usage"]["completion_tokens"], short["finish_reason"]) == (2, "length")


def _data_url(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(make_scene(seed).draw())).decode()
