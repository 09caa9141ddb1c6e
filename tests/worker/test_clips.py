"""Clips in every message, as frames and as files: answers as by `generate`, rebuilds, journals, limits and memory."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from llava_sessions.chat.media import ClipSpan
from llava_sessions.chat.transcript import BlobPool, OpenRecord, Transcript, TurnRecord
from llava_sessions.config import MediaLimits, RequestLimits
from llava_sessions.errors import Refused
from llava_sessions.journal.journal import Journal
from llava_sessions.journal.stores import DirectoryStore
from llava_sessions.media.clips import clip_frames
from llava_sessions.media.limits import MediaError
from llava_sessions.protocol.parsing import parse
from llava_sessions.text.chat_template import ChatTemplate, Message
from llava_sessions.text.pictures import Prepared, joined
from llava_sessions.text.processors import load_processor
from llava_sessions.worker import pictures as loading
from llava_sessions.worker.preparation import Preparer
from tests.support.family import Family, flat, make_family
from tests.support.manual import ManualExecutor
from tests.support.pump_frontend import NOW, QUESTIONS, Frontend, code, png
from tests.support.tiny_families import make_next_video
from tests.worker.test_conversation_lives import agree

FRAMES = 3
PATIENCE_S = 60.0
CHAT = {"url_path": "v1/chat/completions"}


def file_of(seed: int, frames: int = 6, side: int = 48, container: str = "mp4") -> bytes:
    """Return a short clip of noise, each frame another one."""
    held = io.BytesIO()
    pixels = np.random.default_rng(seed)
    with av.open(held, "w", format=container) as output:
        stream = output.add_stream("libx264" if container == "mp4" else "libvpx", rate=4)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for _ in range(frames):
            coarse = pixels.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(coarse, format="rgb24")):
                output.mux(packet)
        for packet in stream.encode():
            output.mux(packet)
    return held.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


FILE = file_of(1)
OTHER = file_of(2, frames=4, container="webm")
COLOURS = ("red", "green", "blue")
Plain = list[tuple[str, str, list[Prepared]]]  # role, text and media of each message


@pytest.fixture(scope="module", params=["next-video", "internvl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model only loses by more
    yield make_family(request.param, tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(threads)


@pytest.fixture
def front(family: Family) -> Frontend:
    return Frontend(family.model, family.tokens)


def clip_of(family: Family, data: bytes, frames: int = FRAMES) -> Prepared:
    """Return the clip of a file, decoded and prepared without the worker."""
    shown = [family.tokens.pictures.frame(pixels) for pixels in clip_frames(data, MediaLimits(), frames)]
    return family.tokens.pictures.clip("", shown)


def clip_of_frames(family: Family, colours: tuple[str, ...] = COLOURS) -> Prepared:
    frames = [Image.new("RGB", (60, 40), colour) for colour in colours]
    return family.tokens.pictures.clip("", [family.tokens.pictures.frame(frame) for frame in frames])


def picture_of(family: Family, colour: str, of: int = 1) -> Prepared:
    return family.tokens.pictures.picture("", Image.new("RGB", (60, 40), colour), of)


def generated(family: Family, prompt: list[int], shown: list[Prepared], tokens: int) -> list[int]:
    """Return `generate`'s greedy answer to a conversation that shows these messages' media."""
    requests = [one.pictures for one in shown]
    if not family.name.startswith("internvl"):
        return family.generate(prompt, requests, tokens)
    inputs = {name: torch.from_numpy(array) for name, array in flat(requests).items()}
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = family.reference.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, **inputs
    )
    return list(out[0, ids.shape[1] :].tolist())


def check(family: Family, front: Frontend, session: str, *shown: Prepared) -> None:
    """Assert that a session's last answer is that of `generate`. `shown`: the media of its messages."""
    transcript = front.table.get(session, front.now_s, None).known_transcript
    start, end = transcript.answer_spans[-1]
    assert end > start
    assert generated(family, transcript.token_ids[:start], list(shown), end - start) == transcript.token_ids[start:end]


def open_on_file(front: Frontend, data: bytes = FILE, **fields: Any) -> str:
    return open_with(front, video=in_base64(data), video_frames=FRAMES, **fields)


def open_with(front: Frontend, **fields: Any) -> str:
    reply = front.answer(front.row({"type": "start_session", **fields}))
    assert reply.status == 200, reply.body
    session: str = json.loads(reply.body)["session_id"]
    return session


def ask(front: Frontend, session: str, **fields: Any) -> dict[str, Any]:
    reply = front.answer(front.ask_row(session, **fields))
    assert reply.status == 200, reply.body
    body: dict[str, Any] = json.loads(reply.body)
    return body


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of frames that were asked of files, in order."""
    counts: list[int] = []

    def counted(data: bytes, limits: MediaLimits, count: int) -> Iterator[np.ndarray]:
        counts.append(count)
        return clip_frames(data, limits, count)

    monkeypatch.setattr(loading, "clip_frames", counted)
    return counts


# --- sessions with a name ---


def test_a_life_with_clips_equals_generate(family: Family, tmp_path: Path) -> None:
    """Clips as files and as frames, then a crash, a restart, another instance and a resume."""
    store = DirectoryStore(str(tmp_path))
    front = Frontend(family.model, family.tokens, journal=Journal([store]))
    session = open_on_file(front)
    ask(front, session)
    shown = [clip_of(family, FILE)]
    check(family, front, session, *shown)
    ask(front, session, prompt_text=QUESTIONS[1], image=png("red"), video=[png(colour) for colour in COLOURS])
    shown.append(joined([picture_of(family, "red"), clip_of_frames(family)]))
    check(family, front, session, *shown)

    front.lose_engine()
    front.bring_engine()
    retried = {"prompt_text": QUESTIONS[2], "video": in_base64(OTHER), "video_frames": FRAMES, "request_id": "r" * 16}
    answer = ask(front, session, **retried)
    shown.append(clip_of(family, OTHER))
    check(family, front, session, *shown)
    assert ask(front, session, **retried)["response_text"] == answer["response_text"]
    assert len(front.table.get(session, front.now_s, None).known_transcript.turns) == 3

    second = Frontend(family.model, family.tokens, journal=Journal([store]), first_row=100)
    ask(second, session)  # adopted
    check(family, second, session, *shown)
    restarted = Frontend(family.model, family.tokens, journal=Journal([store]), first_row=200)
    resumed = open_with(restarted, resume=session)
    ask(restarted, resumed)
    check(family, restarted, resumed, *shown)
    assert len(restarted.table.get(resumed, restarted.now_s, None).known_transcript.turns) == 5


@pytest.mark.parametrize("family", ["internvl"], indirect=True)
def test_a_history_shows_clips(family: Family, tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path))
    front = Frontend(family.model, family.tokens, journal=Journal([store]))
    turns = [
        {"prompt_text": QUESTIONS[0], "response_text": "red"},
        {"prompt_text": QUESTIONS[1], "video": in_base64(OTHER), "video_frames": FRAMES, "response_text": "blue"},
    ]
    session = open_on_file(front, history=turns)
    ask(front, session)
    shown = [clip_of(family, FILE), clip_of(family, OTHER)]
    check(family, front, session, *shown)
    front.lose_engine()
    front.bring_engine()
    ask(front, session, prompt_text=QUESTIONS[2])
    check(family, front, session, *shown)


@pytest.mark.parametrize("family", ["internvl"], indirect=True)
def test_a_clip_of_fewer_frames_is_shown_whole(family: Family, front: Frontend) -> None:
    session = open_on_file(front, file_of(7, frames=2, container="webm"))
    ask(front, session)
    clip = clip_of(family, file_of(7, frames=2, container="webm"))
    assert next(iter(clip.pictures[0].inputs.values())).shape[1] == 2
    check(family, front, session, clip)


# --- conversations that clients send whole ---


def shows(text: str, *media: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def file_part(data: bytes) -> dict[str, Any]:
    url = f"data:video/mp4;base64,{in_base64(data)}"
    return {"type": "video_url", "video_url": {"url": url, "video_frames": FRAMES}}


def frames_part(*colours: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(map(png, colours))}}


def picture_part(colour: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(colour)}"}}


def chat(front: Frontend, messages: list[dict[str, Any]], session: str | None = None) -> dict[str, Any]:
    body = {"model": "m", "messages": messages, "max_tokens": 6}
    reply = front.answer(front.row(json.dumps(body).encode(), session, CHAT))
    assert reply.status == 200, reply.body
    completion: dict[str, Any] = json.loads(reply.body)
    return completion


def said(completion: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": completion["choices"][0]["message"]["content"]}


def cached(completion: dict[str, Any]) -> int:
    count: int = completion["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def check_chat(family: Family, completion: dict[str, Any], messages: Plain) -> None:
    """Assert that a completion is `generate`'s. `messages`: role, text and media of each message."""
    shown = [joined(media) for _, _, media in messages if media]
    rendered = [
        Message(role, text, joined(media).kinds.count("image"), joined(media).kinds.count("video"))
        for role, text, media in messages
    ]
    prompt = family.tokens.conversation(rendered, shown)
    tokens = completion["usage"]["completion_tokens"]
    assert completion["usage"]["prompt_tokens"] == len(prompt)
    ids = generated(family, prompt, shown, tokens)
    text = family.tokens.tokenizer.decode(ids, skip_special_tokens=True)
    assert said(completion)["content"].strip() == text.strip()  # white space before an answer is not sent


def test_a_conversation_with_clips_is_continued_forked_and_edited(
    family: Family, front: Frontend, decodings: list[int]
) -> None:
    clip, frames, red = clip_of(family, FILE), clip_of_frames(family), picture_of(family, "red")
    messages = [shows(QUESTIONS[0], file_part(FILE))]
    plain: Plain = [("user", QUESTIONS[0], [clip])]
    first = chat(front, messages)
    check_chat(family, first, plain)

    messages += [said(first), shows(QUESTIONS[1], picture_part("red"), frames_part(*COLOURS))]
    plain += [("assistant", said(first)["content"], []), ("user", QUESTIONS[1], [red, frames])]
    second = chat(front, messages)
    check_chat(family, second, plain)
    assert cached(second) >= first["usage"]["prompt_tokens"] - 1

    messages += [said(second), shows(QUESTIONS[2], file_part(FILE))]  # the same clip again
    plain += [("assistant", said(second)["content"], []), ("user", QUESTIONS[2], [clip])]
    third = chat(front, messages)
    check_chat(family, third, plain)
    assert cached(third) >= second["usage"]["prompt_tokens"] - 1
    assert decodings == [FRAMES]

    edited = [messages[0], said(first), shows(QUESTIONS[1], picture_part("red"), frames_part("blue", "red", "green"))]
    fork = chat(front, edited)
    other = clip_of_frames(family, ("blue", "red", "green"))
    check_chat(family, fork, [*plain[:2], ("user", QUESTIONS[1], [red, other])])
    assert first["usage"]["prompt_tokens"] - 1 <= cached(fork) < second["usage"]["prompt_tokens"]

    changed = chat(front, [shows(QUESTIONS[0], file_part(OTHER)), *messages[1:3]])
    check_chat(family, changed, [("user", QUESTIONS[0], [clip_of(family, OTHER)]), *plain[1:3]])
    front.lose_engine()
    front.bring_engine()
    check_chat(family, chat(front, messages), plain)


@pytest.mark.parametrize("family", ["internvl"], indirect=True)
def test_a_conversation_rewrites_a_session_that_shows_clips(
    family: Family, tmp_path: Path, decodings: list[int]
) -> None:
    """With a session header: the crop in front of a clip, and the journal of the rewritten session."""
    store = DirectoryStore(str(tmp_path))
    front = Frontend(family.model, family.tokens, journal=Journal([store]))
    session = open_on_file(front)
    clip, other = clip_of(family, FILE), clip_of(family, OTHER)
    first = chat(front, [shows(QUESTIONS[0])], session)
    check(family, front, session, clip)
    messages = [shows(QUESTIONS[0]), said(first), shows(QUESTIONS[1], file_part(OTHER))]
    chat(front, messages, session)
    check(family, front, session, clip, other)

    edited = [*messages[:2], shows(QUESTIONS[1], frames_part(*COLOURS))]
    again = chat(front, edited, session)
    check(family, front, session, clip, clip_of_frames(family))
    assert cached(again) >= first["usage"]["prompt_tokens"] - 1

    moved = [shows(QUESTIONS[0], file_part(OTHER)), said(first), shows(QUESTIONS[1], file_part(OTHER))]
    last = chat(front, moved, session)
    check(family, front, session, other, other)
    restarted = Frontend(family.model, family.tokens, journal=Journal([store]), first_row=100)
    decodings.clear()
    chat(restarted, [*moved, said(last), shows(QUESTIONS[2])], session)
    check(family, restarted, session, other, other)
    assert decodings == [FRAMES]


class Life:
    """A conversation with and without a session header, whose messages show random media."""

    def __init__(self, family: Family, front: Frontend, draw: random.Random) -> None:
        self.family = family
        self.front = front
        self.draw = draw
        self.session = open_on_file(front)
        self.messages = [shows(QUESTIONS[0], file_part(FILE))]
        self.plain: Plain = [("user", QUESTIONS[0], [clip_of(family, FILE)])]

    def question(self) -> None:
        """Add a question with random media. A first one without media would show the clip of the named session."""
        picture = (picture_part("red"), picture_of(self.family, "red"))
        colours = tuple(self.draw.sample(COLOURS, FRAMES))
        frames = (frames_part(*colours), clip_of_frames(self.family, colours))
        file = (file_part(OTHER), clip_of(self.family, OTHER))
        choices = [[picture], [frames], [file], [picture, frames], [picture, file, frames]]
        media = self.draw.choice([[], [], *choices] if self.messages else choices)
        text = self.draw.choice(QUESTIONS)
        self.messages.append(shows(text, *(part for part, _ in media)))
        self.plain.append(("user", text, [prepared for _, prepared in media]))

    def send(self, session: str | None = None) -> None:
        completion = chat(self.front, self.messages, session)
        check_chat(self.family, completion, self.plain)
        self.messages.append(said(completion))
        self.plain.append(("assistant", said(completion)["content"], []))
        self.question()

    def send_by_name(self) -> None:
        self.send(self.session)

    def edit(self) -> None:
        """Replace an earlier question, and all that follows."""
        at = self.draw.randrange(0, len(self.messages), 2)
        del self.messages[at:], self.plain[at:]
        self.question()
        self.send(self.draw.choice([self.session, None]))

    def lose_the_engine(self) -> None:
        self.front.lose_engine()
        self.front.bring_engine()

    def resume(self) -> None:
        self.session = open_with(self.front, resume=self.session)


def test_random_conversations_with_clips_equal_generate(family: Family, tmp_path: Path) -> None:
    draw = random.Random(1)
    front = Frontend(family.model, family.tokens, journal=Journal([DirectoryStore(str(tmp_path))]))
    front.table.max_implicit = 2  # so that sessions are evicted too
    life = Life(family, front, draw)
    for _ in range(9):
        draw.choice([life.send, life.send_by_name, life.send_by_name, life.edit, life.lose_the_engine, life.resume])()
        front.exchange()
        while front.engine.has_work:
            front.step()
            front.exchange()
        agree(front)


# --- a file that is decoded again ---


@pytest.mark.parametrize("family", ["next-video"], indirect=True)
def test_a_clip_that_gives_other_frames_ends_its_session(
    family: Family, front: Frontend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another version of FFmpeg may decode other pixels, or as many frames of other content."""
    session = open_on_file(front)
    ask(front, session)
    front.lose_engine()
    front.bring_engine()
    monkeypatch.setattr(loading, "clip_frames", lambda *given: (pixels ^ np.uint8(1) for pixels in clip_frames(*given)))
    reply = front.answer(front.ask_row(session))
    assert (reply.status, code(reply)) == (404, "session_not_found")
    assert "journal_unfit reason=a clip's file" in caplog.text
    assert front.table.find(session) is None


@pytest.mark.parametrize("family", ["next-video"], indirect=True)
@pytest.mark.parametrize(("error", "is_kept"), [("invalid_request", False), ("too_large", True)])
def test_a_clip_that_cannot_be_decoded_again_ends_its_session_unless_a_limit_did_it(
    family: Family, front: Frontend, monkeypatch: pytest.MonkeyPatch, error: str, is_kept: bool
) -> None:
    session = open_with(front, image=png("red"))
    ask(front, session, video=in_base64(FILE), video_frames=FRAMES)
    front.lose_engine()
    front.bring_engine()

    def fail(*_: Any) -> Iterator[np.ndarray]:
        raise MediaError(error, "the clip is damaged, or too slow to decode")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(loading, "clip_frames", fail)
        assert code(front.answer(front.ask_row(session))) == (error if is_kept else "session_not_found")
    assert front.answer(front.ask_row(session)).status == (200 if is_kept else 404)


# --- limits, threads and memory ---


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processor(make_next_video(tmp_path_factory.mktemp("next-video")))


def preparer(template: ChatTemplate, **limits: Any) -> tuple[Preparer, ManualExecutor]:
    executor = ManualExecutor()
    return Preparer(template, MediaLimits(**limits), Journal(), lambda: NOW, executor), executor


def parsed(**fields: Any) -> Any:
    return parse({"type": "start_session", **fields}, {}, RequestLimits())


def test_all_headers_are_checked_before_a_clip_is_decoded(processor: Any, decodings: list[int]) -> None:
    """A question with a good clip and a bad picture costs no decoding, and neither does one with too many pixels."""
    template = ChatTemplate(processor)
    turns = [
        {"prompt_text": "what?", "video": in_base64(FILE), "response_text": "a circle"},
        {"prompt_text": "and?", "video": in_base64(FILE[: len(FILE) // 4]), "response_text": "a star"},
    ]
    for fields, limits, error in [
        ({"history": turns}, {}, "invalid_request"),
        ({"video": in_base64(FILE), "video_frames": 4}, {"max_request_pixels": 4 * 48 * 48 - 1}, "too_large"),
        ({"video": in_base64(FILE), "video_frames": 32}, {"max_request_pixels": 6 * 48 * 48 - 1}, "too_large"),
        ({"video": in_base64(FILE)}, {"max_clip_bytes": len(FILE) - 1}, "too_large"),
        ({"video": png("red")}, {}, "unsupported_media"),
        ({"video": [in_base64(FILE)]}, {}, "unsupported_media"),
    ]:
        prepare, executor = preparer(template, **limits)
        opened = prepare.open(parsed(**fields), "session-1", None)
        executor.run_all()
        with pytest.raises(MediaError) as caught:
            opened.result()
        assert caught.value.code == error, caught.value.message
    assert decodings == []
    prepare, executor = preparer(template, max_request_pixels=6 * 48 * 48, max_bytes=len(FILE) - 1)
    opened = prepare.open(parsed(video=in_base64(FILE), video_frames=32), "session-1", None)
    executor.run_all()
    assert opened.result().opening.pictures
    assert decodings == [32]


def test_a_clip_is_decoded_once_in_a_request_and_never_again_while_it_is_known(
    processor: Any, decodings: list[int]
) -> None:
    prepare, executor = preparer(ChatTemplate(processor))
    messages = [shows("what?", file_part(FILE)), {"role": "assistant", "content": "a"}, shows("and?", file_part(FILE))]
    chat = parse({"model": "m", "messages": messages}, CHAT, RequestLimits())
    first = prepare.chat(chat, "scope", with_arrays=False)
    executor.run_all()
    assert decodings == [FRAMES]
    assert [bool(picture.inputs) for picture in first.result().pictures] == [True, True]
    second = prepare.chat(chat, "scope", with_arrays=False)
    third = prepare.chat(chat, "another scope", with_arrays=False)
    executor.run_all()
    assert [bool(picture.inputs) for picture in second.result().pictures] == [False, False]
    assert second.result().prompt.spans == first.result().prompt.spans
    assert decodings == [FRAMES, FRAMES]  # of another scope: the time must not show that the clip was known
    assert {one.key for one in third.result().pictures}.isdisjoint(one.key for one in first.result().pictures)


def test_one_decoded_frame_is_in_memory_at_a_time(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(processor)
    frames: list[weakref.ref[np.ndarray]] = []
    alive = []

    def watched(*given: Any) -> Iterator[np.ndarray]:
        for pixels in clip_frames(*given):
            alive.append(1 + sum(frame() is not None for frame in frames))
            frames.append(weakref.ref(pixels))
            yield pixels
            del pixels

    monkeypatch.setattr(loading, "clip_frames", watched)
    prepare, executor = preparer(template)
    opened = prepare.open(parsed(video=in_base64(FILE), video_frames=6), "session-1", None)
    executor.run_all()
    assert opened.result().opening.pictures
    assert alive == [1] * 6


def test_a_long_clip_delays_no_picture_and_no_host_delays_a_clip(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def slow(*given: Any) -> Iterator[np.ndarray]:
        assert released.wait(PATIENCE_S)
        yield from clip_frames(*given)

    def fetch(url: str, limits: MediaLimits) -> bytes:
        if url.endswith(".png"):
            return base64.b64decode(png("red"))
        assert limits.max_bytes == MediaLimits().max_clip_bytes
        assert released.wait(PATIENCE_S)
        return FILE

    prepare = Preparer(ChatTemplate(processor), MediaLimits(), Journal(), lambda: NOW, fetch=fetch)
    remote = [prepare.open(parsed(video="https://slow.example/a.mp4"), "session-1", None) for _ in range(17)]
    opened = prepare.open(parsed(video=in_base64(FILE)), "session-1", None).result(PATIENCE_S)
    monkeypatch.setattr(loading, "clip_frames", slow)
    waiting: list[Future[Any]] = [prepare.open(parsed(video=in_base64(FILE)), "session-1", None) for _ in range(5)]
    media = opened.media
    shown = Transcript(
        OpenRecord(
            "session-1",
            NOW,
            NOW + 9,
            None,
            "video",
            media.pictures,
            opened.opening.token_ids,
            1,
            None,
            0,
            (),
            media.clips,
        )
    )
    waiting += [prepare.resume("session-1", None, shown) for _ in range(9)]
    plain = Transcript(OpenRecord("session-1", NOW, NOW + 9, None, "image", (), [], 0))
    for fields in ({"image": png("red")}, {"path": "https://quick.example/a.png"}):
        assert prepare.open(parsed(**fields), "session-1", None).result(PATIENCE_S).opening.pictures
    assert prepare.resume("session-1", None, plain).result(PATIENCE_S).transcript is plain
    assert not any(one.done() for one in (*remote, *waiting))
    released.set()
    for one in (*remote, *waiting):
        assert one.result(PATIENCE_S)


def test_a_stored_clip_is_rejected_by_a_model_without_video(processor: Any) -> None:
    """The operator may have changed the checkpoint."""
    blob = BlobPool().get(FILE)
    opened = OpenRecord("session-1", NOW, NOW + 9, None, "image", (), [], 0)
    turn = TurnRecord([1], [2], (blob,), None, "", {}, clips=(ClipSpan(0, 1, FRAMES, "digest"),))
    prepare, executor = preparer(ChatTemplate(load_processor("models/shapes")))
    resumed = prepare.resume("session-1", None, Transcript(opened, [turn]))
    executor.run_all()
    with pytest.raises(Refused) as caught:
        resumed.result()
    assert caught.value.code == "unsupported_media"


def test_the_frames_of_an_opening_are_stored_as_before(processor: Any) -> None:
    """Earlier versions read such a session."""
    prepare, executor = preparer(ChatTemplate(processor))
    frames = prepare.open(parsed(video=[png(colour) for colour in COLOURS]), "session-1", None)
    file = prepare.open(parsed(video=in_base64(FILE), video_frames=FRAMES), "session-1", None)
    executor.run_all()
    media = frames.result().media
    assert (len(media.pictures), media.groups, media.clips) == (3, (), ())
    media = file.result().media
    (clip,) = media.clips
    assert (len(media.pictures), media.groups, clip.first, clip.blobs, clip.frames) == (1, (), 0, 1, FRAMES)
    assert len(clip.digest) == 64
