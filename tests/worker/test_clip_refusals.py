"""Requests with clips that are rejected: each in the native form and in OpenAI's, and the session stays usable."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_sessions.config import MediaLimits
from llava_sessions.torchserve.batch import Row
from tests.support.clips import clip
from tests.support.family import Family, make_family
from tests.support.pump_frontend import QUESTIONS, Frontend, png

CHAT = {"url_path": "v1/chat/completions"}
FORMS = ("open", "question", "history", "messages", "messages of a session")


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url_of(data: bytes) -> str:
    return f"data:video/mp4;base64,{in_base64(data)}"


def front_of(name: str, folder: Path) -> Frontend:
    family: Family = make_family(name, folder)
    return Frontend(family.model, family.tokens)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model only loses by more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures_only(tmp_path_factory: pytest.TempPathFactory) -> Frontend:
    return front_of("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def with_clips(tmp_path_factory: pytest.TempPathFactory) -> Frontend:
    return front_of("next-video", tmp_path_factory.mktemp("next-video"))


def row(front: Frontend, form: str, session: str, video: str | list[str]) -> Row:
    """Return a request that shows a clip."""
    if form == "open":
        return front.row({"type": "start_session", "video": video})
    if form == "question":
        return front.ask_row(session, video=video)
    if form == "history":
        turns = [{"prompt_text": QUESTIONS[0], "video": video, "response_text": "A dog."}]
        return front.row({"type": "start_session", "history": turns})
    url = video if isinstance(video, str) else f"data:video/jpeg;base64,{','.join(video)}"
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTIONS[0]}]
    body = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 3}
    return front.row(json.dumps(body).encode(), session if form == "messages of a session" else None, CHAT)


def rejected(front: Frontend, form: str, video: str | list[str]) -> tuple[int, str, str]:
    """Return status, code and message of a rejected request. Another open session must answer afterwards."""
    session = front.open()
    reply = front.answer(row(front, form, session, video))
    error: dict[str, Any] = json.loads(reply.body)["error"]
    expected = {"code", "message", "type", "param"} if form.startswith("messages") else {"code", "message"}
    assert set(error) == expected
    assert front.ask(session)["finish_reason"] in ("stop", "length")
    front.answer(front.close_row(session))
    return reply.status, error["code"], error["message"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("video", ["https://127.0.0.1/a.mp4", ["no base64!"]], ids=["file", "frames"])
def test_a_model_for_pictures_rejects_clips_unread(pictures_only: Frontend, form: str, video: str | list[str]) -> None:
    status, code, message = rejected(pictures_only, form, video)
    assert (status, code) == (415, "unsupported_media")
    assert "got a clip" in message


WHOLE = clip(frames=3, width=48, height=32)
TOO_LONG_S = 2 * int(MediaLimits().max_clip_s)
FAULTS = {
    "truncated": (url_of(WHOLE[: len(WHOLE) // 2]), 400, "invalid_request"),
    "bytes behind a signature": (url_of(WHOLE[:32] + bytes(200)), 400, "invalid_request"),
    "no base64": ("data:video/mp4;base64,!!", 400, "invalid_request"),
    "empty": ("data:video/mp4;base64,", 400, "invalid_request"),
    "forbidden address": ("https://127.0.0.1/a.mp4", 400, "invalid_request"),
    "forbidden path": ("/etc/passwd", 400, "invalid_request"),
    "a picture": (f"data:video/mp4;base64,{png()}", 415, "unsupported_media"),
    "text": (url_of(b"no clip at all, but text"), 415, "unsupported_media"),
    "too long": (url_of(clip(frames=2, width=48, height=32, rate=1, times=(0, TOO_LONG_S))), 413, "too_large"),
    "a damaged frame": ([png(), png()[:40]], 400, "invalid_request"),
    "a clip among frames": ([png(), in_base64(WHOLE)], 415, "unsupported_media"),
    "too many frames": ([png()] * 33, 413, "too_large"),
}


@pytest.mark.parametrize("form", ["open", "question", "messages"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_clip_that_cannot_be_shown_has_its_own_error(with_clips: Frontend, form: str, fault: str) -> None:
    video, status, code = FAULTS[fault]
    assert rejected(with_clips, form, video)[:2] == (status, code)


def test_a_clip_above_the_limit_of_bytes_is_rejected(with_clips: Frontend) -> None:
    large = "data:video/mp4;base64," + "A" * (MediaLimits().max_clip_bytes * 4 // 3 + 8)
    status, code, message = rejected(with_clips, "question", large)
    assert (status, code) == (413, "too_large")
    assert f"{MediaLimits().max_clip_bytes} bytes" in message


def test_questions_about_an_opening_clip_show_pictures_and_clips(with_clips: Frontend) -> None:
    opened = json.loads(with_clips.answer(with_clips.row({"type": "start_session", "video": url_of(WHOLE)})).body)
    for fields in ({"image": png()}, {"video": [png()]}, {"image": png()}):
        assert with_clips.ask(opened["session_id"], **fields)["finish_reason"] in ("stop", "length")
    with_clips.answer(with_clips.close_row(opened["session_id"]))
