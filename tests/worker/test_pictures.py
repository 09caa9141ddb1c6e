"""Preparation of pictures: what is rejected before a decode, how many decoded pictures exist, who waits for whom."""

from __future__ import annotations

import base64
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sessions.chat.media import MessageMedia, StoredClip
from llava_sessions.chat.transcript import OpenRecord, Transcript, TurnRecord
from llava_sessions.config import MediaLimits, RequestLimits
from llava_sessions.errors import Refused
from llava_sessions.journal.journal import Journal
from llava_sessions.media.budget import PixelBudget
from llava_sessions.media.limits import MediaError
from llava_sessions.protocol.parsing import parse
from llava_sessions.protocol.requests import Ask, Open
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.pictures import PicturePreparer, Prepared
from llava_sessions.text.processors import load_processor
from llava_sessions.worker.preparation import Preparer
from llava_sessions.worker.prompts import QuestionedSession
from tests.support.manual import ManualExecutor
from tests.support.pictures import encode, png_of

PATIENCE_S = 60.0
NOW = 1_800_000_000.0
SIDE = 200
SESSION_ID = "session-1"


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor("models/shapes")


@pytest.fixture
def template(processor: Any) -> ChatTemplate:
    return ChatTemplate(processor)


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(number: int, side: int = SIDE) -> bytes:
    return encode(Image.new("RGB", (side, side), (number, 0, 0)), "PNG")


def an_open(**fields: Any) -> Open:
    made = parse({"type": "start_session", **fields}, {}, RequestLimits())
    assert isinstance(made, Open)
    return made


def session_of(transcript: Transcript | None, in_engine: bool) -> QuestionedSession:
    return QuestionedSession(SESSION_ID, transcript, None, in_engine, ())


def an_ask(**fields: Any) -> Ask:
    made = parse({"type": "send_text_prompt", "session_id": "ls-1", **fields}, {}, RequestLimits())
    assert isinstance(made, Ask)
    return made


def preparer(template: ChatTemplate, journal: Journal | None = None, **limits: Any) -> tuple[Preparer, ManualExecutor]:
    executor = ManualExecutor()
    return Preparer(template, MediaLimits(**limits), journal or Journal(), lambda: NOW, executor), executor


# --- one decoded picture at a time ---


class Watched(PicturePreparer):
    """Counts the decoded pictures in memory whenever it prepares one."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self._arrays: list[weakref.ref[np.ndarray]] = []
        self.alive: list[int] = []

    def picture(self, key: str, picture: Any, of: int = 1) -> Prepared:
        self._count(picture)
        return super().picture(key, picture, of)

    def frame(self, picture: Any) -> np.ndarray:
        self._count(picture)
        return np.zeros((1, 1, 3, 2, 2), np.float32)  # the model takes no clips

    def clip(self, key: str, frames: Any) -> Prepared:
        return Prepared()

    def _count(self, picture: np.ndarray) -> None:
        assert picture.shape == (SIDE, SIDE, 3)
        images = sum(issubclass(type(one), Image.Image) and one.size == (SIDE, SIDE) for one in gc.get_objects())
        self._arrays.append(weakref.ref(picture))
        self.alive.append(images + sum(array() is not None for array in self._arrays))


@pytest.fixture
def new_objects_only() -> Iterator[None]:
    """Hide the objects of other tests from `gc.get_objects`. There are a million, and each search takes 0.2 s."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_objects_only")
def test_one_decoded_picture_is_in_memory_at_a_time(template: ChatTemplate, processor: Any) -> None:
    pictures = [picture(number) for number in range(8)]
    texts = [text_of(data) for data in pictures]
    watched = template.pictures = Watched(processor)
    journal = Journal()
    prepare, executor = preparer(template, journal)
    opened = prepare.open(an_open(images=texts), SESSION_ID, None)
    executor.run_all()
    opening = opened.result()
    blobs = opening.media.pictures
    record = OpenRecord(
        "ls-1", NOW, NOW + 9, None, "image", blobs, opening.opening.token_ids, opening.opening.image_tokens
    )
    turns = [TurnRecord([1], [2], (blob,), None, "", {}) for blob in blobs]
    transcript = Transcript(record, turns)
    asked = prepare.question(an_ask(prompt_text="and these?", images=texts), session_of(transcript, in_engine=True))
    rebuilt = prepare.resume("ls-1", None, transcript)
    executor.run_all()
    assert len(asked.result().pictures) == 8
    assert len(rebuilt.result().pictures) == 16
    assert watched.alive == [1] * (8 + 8 + 16)
    watched.alive.clear()
    prepare.prompts._loader.prepare(MessageMedia(clips=(StoredClip(blobs[:1] * 3 + blobs),)), None)
    assert watched.alive == [1] * 11


def test_all_threads_together_decode_no_more_than_the_budget() -> None:
    budget = PixelBudget(10)
    inside: list[int] = []
    most = []
    lock = threading.Lock()

    def use(pixels: int) -> None:
        with budget.reserve(pixels):
            with lock:
                inside.append(pixels)
                most.append(sum(inside))
            with lock:
                inside.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [10, 1, 3, 6, 5, 10, 2] * 20))
    assert max(most) <= 10
    with budget.reserve(10_000):  # alone: larger than the whole budget
        pass


def test_pictures_are_admitted_in_the_order_of_arrival() -> None:
    budget = PixelBudget(10)
    order: list[int] = []

    def use(pixels: int) -> None:
        with budget.reserve(pixels):
            order.append(pixels)

    threads = []
    with budget.reserve(5):
        for pixels in (10, 1, 2):  # 1 and 2 fit, and must not overtake 10
            threads.append(threading.Thread(target=use, args=(pixels,)))
            threads[-1].start()
            while len(budget._arrivals) < len(threads):
                threads[-1].join(0.001)
        assert order == []
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order[0] == 10
    assert sorted(order) == [1, 2, 10]


# --- rejected before a decode ---


def rejected(template: ChatTemplate, request: Open | Ask, transcript: Transcript | None = None, **limits: Any) -> Any:
    """Return the error of a request whose pictures cannot be decoded: a decode would be another error."""
    prepare, executor = preparer(template, **limits)
    if isinstance(request, Open):
        future: Any = prepare.open(request, SESSION_ID, None)
    else:
        future = prepare.question(request, session_of(transcript, in_engine=True))
    executor.run_all()
    with pytest.raises((Refused, MediaError)) as caught:
        future.result()
    return caught.value


def test_the_pixels_of_a_request_are_limited_by_its_headers(template: ChatTemplate) -> None:
    headers_only = [text_of(png_of(5000, 8000 - number)) for number in range(8)]
    error = rejected(template, an_open(images=headers_only))
    assert error.code == "too_large"
    assert "at most 200000000 pixels together, got 319860000" in error.message
    small = [text_of(png_of(10, 10)), text_of(png_of(10, 11))]
    record = OpenRecord("ls-1", NOW, NOW + 9, None, "image", (), [1], 1)
    ask = an_ask(prompt_text="what?", images=small)
    assert rejected(template, ask, Transcript(record), max_request_pixels=209).code == "too_large"
    assert rejected(template, ask, Transcript(record), max_request_pixels=210).code == "invalid_request"


def test_a_clip_for_a_model_without_video_is_rejected_unread(template: ChatTemplate) -> None:
    error = rejected(template, an_open(video=["no base64!"] * 32))
    assert (error.code, "got a clip" in error.message) == ("unsupported_media", True)


ONE_PLACE = (
    "{% for message in messages %}{% if loop.first %}<image>{% endif %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{% endif %} {% endfor %}"
)
RAISES = (
    "{% for message in messages %}{% set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list"
    " %}{% if pictures | length > 1 %}{{ raise_exception('one picture only') }}{% endif %}{% for part in pictures %}"
    "<image>{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    " {% endfor %}"
)


@pytest.mark.parametrize("chat_template", [ONE_PLACE, RAISES])
def test_several_pictures_are_rejected_unread_where_the_template_has_one_place(chat_template: str) -> None:
    processor = load_processor("models/shapes")
    processor.chat_template = chat_template
    template = ChatTemplate(processor)
    error = rejected(template, an_open(images=["no base64!"] * 2))
    assert (error.code, "must fit the model's chat template" in error.message) == ("invalid_request", True)
    record = OpenRecord("ls-1", NOW, NOW + 9, None, "image", (), [1], 1)
    later = Transcript(record, [TurnRecord([1], [2], (), None, "", {})])
    error = rejected(template, an_ask(prompt_text="what?", images=["no base64!"] * 2), later)
    assert (error.code, "must fit the model's chat template" in error.message) == ("invalid_request", True)


# --- the encoded pictures' budget ---


def test_encoded_pictures_beyond_the_budget_are_rejected_with_429(template: ChatTemplate) -> None:
    data = [picture(number) for number in range(3)]
    journal = Journal(held_bytes=len(data[0]) + len(data[1]))
    prepare, executor = preparer(template, journal)
    held = [prepare.open(an_open(image=text_of(one)), SESSION_ID, None) for one in (data[0], data[1], data[0])]
    executor.run_all()
    sessions = [one.result() for one in held]
    del held
    assert journal.blobs.held_bytes == len(data[0]) + len(data[1])  # equal pictures count once

    refused = prepare.open(an_open(image=text_of(data[2])), SESSION_ID, None)
    executor.run_all()
    with pytest.raises(Refused) as caught:
        refused.result()
    assert caught.value.code == "capacity"
    assert caught.value.retry_after_s
    assert "no base64" not in caught.value.message

    restored = journal.blobs.restore(data[2])  # the picture of a session that was acknowledged
    assert journal.blobs.held_bytes == sum(map(len, data))
    del restored, sessions
    gc.collect()
    again = prepare.open(an_open(image=text_of(data[2])), SESSION_ID, None)
    executor.run_all()
    assert again.result().media.pictures[0].data == data[2]
    assert journal.blobs.held_bytes == len(data[2])


# --- pools of their own ---


def test_slow_hosts_delay_neither_journals_nor_rebuilds_nor_questions(template: ChatTemplate) -> None:
    released = threading.Event()

    def fetch(url: str, limits: MediaLimits) -> bytes:
        assert released.wait(PATIENCE_S)
        return picture(1)

    prepare = Preparer(template, MediaLimits(), Journal(), lambda: NOW, fetch=fetch)
    path = "https://slow.example/picture.png"
    blocked = [prepare.open(an_open(path=path), SESSION_ID, None) for _ in range(40)]
    opened = prepare.open(an_open(image=text_of(picture(2))), SESSION_ID, None).result(PATIENCE_S)
    record = OpenRecord("ls-1", NOW, NOW + 9, None, "image", opened.media.pictures, opened.opening.token_ids, 1)
    transcript = Transcript(record)
    blocked += [
        prepare.question(an_ask(prompt_text="and?", path=path), session_of(transcript, in_engine=False))
        for _ in range(40)
    ]
    assert len(prepare.resume("ls-1", None, transcript).result(PATIENCE_S).pictures) == 1
    assert (
        prepare.question(an_ask(prompt_text="what?"), session_of(transcript, in_engine=False))
        .result(PATIENCE_S)
        .rebuild
    )
    assert (
        prepare.question(an_ask(prompt_text="x" * 9_000), session_of(transcript, in_engine=True))
        .result(PATIENCE_S)
        .prompt_ids
    )
    with pytest.raises(Exception, match="not in the journal"):
        prepare.claim("ls-1", None).result(PATIENCE_S)
    assert prepare.recover().result(PATIENCE_S).complete
    assert not any(future.done() for future in blocked)
    released.set()
    for future in blocked:
        future.result(PATIENCE_S)
