"""Chats about pictures and clips through the real server: answers equal `generate` on the whole conversation.

One tiny checkpoint for each way in which a family makes a clip's tokens, in float32.
"""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import pytest

from deploy.serve.torchserve import TorchServe
from llava_sessions.chat.transcript import Conversation
from llava_sessions.config import MediaLimits
from llava_sessions.media.clips import clip_frames
from llava_sessions.text.chat_template import Message, OpenedOn
from llava_sessions.text.pictures import Prepared, joined
from llava_sessions_client import Answer, Endpoint, InvalidRequest, load_clip
from tests.support.chats import PatientChat, client
from tests.support.clips import clip
from tests.support.encoding import to_png
from tests.support.family import Family, make_family, noise
from tests.support.serving import Processes, pack, running

FAMILIES = ("next-video", "internvl3.5")
TOKENS = 8
FRAMES = 20
FILE = clip(frames=FRAMES, codec="libvpx", container="webm")
OTHER = clip(frames=FRAMES, width=48, height=64, rotation=90)
CHAT_PATH = "/predictions/llava/1.0/v1/chat/completions"


@dataclass
class Served:
    """A family's checkpoint in a server, and in transformers."""

    family: Family
    server: TorchServe
    shown: list[Prepared] = field(default_factory=list)

    def picture(self, seed: int) -> Prepared:
        return self.family.tokens.prepare([noise(seed)])

    def clip(self, file: bytes, count: int) -> Prepared:
        """Return a clip. tests/unit/test_media_clips.py holds its frames equal to those of FFmpeg."""
        return self.family.tokens.prepare_clip("clip", list(clip_frames(file, MediaLimits(), count)))

    def generate(self, token_ids: list[int], shown: list[Prepared]) -> list[int]:
        return self.family.generate(token_ids, [one.pictures for one in shown], TOKENS)


@pytest.fixture(scope="module")
def all_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """Both servers, started side by side."""
    families, servers = {}, []
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        families[name] = make_family(name, folder / "checkpoint")
        store = pack(folder, sessions=8, model=folder / "checkpoint", device_bytes=2**20, host_bytes=2**20)
        servers.append(TorchServe(store))
    with running(*servers):
        yield {name: Served(families[name], server) for name, server in zip(FAMILIES, servers, strict=True)}


@pytest.fixture(params=FAMILIES)
def served(request: pytest.FixtureRequest, all_served: dict[str, Served]) -> Served:
    return all_served[request.param]


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with client(served.server.url) as http:
        yield http


def text_of(file: bytes) -> str:
    return base64.b64encode(file).decode()


class Checked:
    """A session whose answers are compared with those of `generate`."""

    def __init__(self, served: Served, http: httpx.Client, seed: int) -> None:
        self.served = served
        self.chat = PatientChat(http).open(to_png(noise(seed)[1]))
        opening = served.family.tokens.opening([noise(seed)])
        self.conversation = Conversation(opening)
        self.shown = [Prepared(opening.pictures)]

    def ask(self, text: str, prepared: Prepared | None = None, **fields: object) -> list[int]:
        """Ask, with the media of `fields`, which are those of `prepared`."""
        tokens = self.served.family.tokens
        media = prepared or Prepared()
        prompt = tokens.prompt(self.conversation.opened_on, text, media)
        self.shown.append(media)
        expected = self.served.generate(self.conversation.token_ids + prompt, self.shown)
        said = self.chat.ask(text, max_new_tokens=TOKENS, **fields)
        assert list(said.token_ids) == expected
        ends = self.served.family.model.eos_token_ids
        self.conversation.commit(prompt, [token for token in said.token_ids if token not in ends])
        return expected


def test_clips_in_later_turns_after_kills_and_beside_other_chats(served: Served, http: httpx.Client) -> None:
    file, other = text_of(FILE), text_of(OTHER)
    chats = [Checked(served, http, seed) for seed in range(3)]
    answers = [chats[0].ask("what is the red circle?")]
    with ThreadPoolExecutor(3) as pool:  # so that sessions share their batches
        turns = pool.map(lambda one: one.ask("and now?", served.clip(FILE, 4), video=file, video_frames=4), chats)
        answers += list(turns)
    answers.append(chats[1].ask("two green stars?", served.picture(5), image=text_of(to_png(noise(5)[1]))))
    if served.family.takes_flat_tiles:  # once is enough: a new engine takes seconds
        # Every session is cold then: pictures and clips are read and encoded again.
        os.kill(Processes.of(served.server).engine.pid, signal.SIGKILL)
    answers += [one.ask("is it still there?") for one in chats]
    media = joined([served.picture(6), served.clip(OTHER, 4)])
    picture = text_of(to_png(noise(6)[1]))
    answers.append(chats[2].ask("both?", media, image=picture, video=other, video_frames=4))
    assert len({tuple(ids) for ids in answers}) > 3, "the answers are all the same: the test is void"
    for one in chats:
        one.chat.close()


def test_an_edited_conversation_with_clips_in_openais_words(served: Served, http: httpx.Client) -> None:
    tokens = served.family.tokens
    picture, file, other = (to_png(noise(7)[1]), "image"), (FILE, "video"), (OTHER, "video")
    prepared = {FILE: served.clip(FILE, 8), OTHER: served.clip(OTHER, 8), picture[0]: served.picture(7)}

    def check(*messages: tuple[str, str, tuple[tuple[bytes, str], ...]]) -> str:
        sent = [{"role": role, "content": content(text, media)} for role, text, media in messages]
        reply = http.post(CHAT_PATH, json={"messages": sent, "max_tokens": TOKENS})
        assert reply.status_code == httpx.codes.OK, reply.text
        shown = [joined([prepared[data] for data, _ in media]) for _, _, media in messages if media]
        kinds = [[kind for _, kind in media] for _, _, media in messages]
        rendered = [
            Message(role, text, of.count("image"), of.count("video"))
            for (role, text, _), of in zip(messages, kinds, strict=True)
        ]
        ids = tokens.conversation(rendered, shown)
        assert reply.json()["usage"]["prompt_tokens"] == len(ids)
        answer = tokens.answer_text()
        ends = served.family.model.eos_token_ids
        said = [answer.push(token) for token in served.generate(ids, shown) if token not in ends]
        text: str = reply.json()["choices"][0]["message"]["content"]
        assert text == ("".join(said) + answer.finish()).strip()
        return text

    first = ("user", "what is it?", (picture, file))
    answer = check(first)
    check(first, ("assistant", answer, ()), ("user", "and the other one?", (other,)))
    check(first, ("assistant", answer, ()), ("user", "which star?", ()))  # the question is another one
    check(("user", "what was it?", (picture, other)), ("assistant", answer, ()), ("user", "which star?", ()))


def test_the_python_client_opens_asks_and_edits_with_clips(served: Served) -> None:
    tokens = served.family.tokens
    opened, shown = served.clip(FILE, 4), served.clip(OTHER, 4)

    def check(answer: Answer, prompt: list[int], *media: Prepared) -> None:
        assert answer.usage.prompt_tokens == len(prompt)
        found = tokens.answer_text()
        said = [found.push(token) for token in served.generate(prompt, list(media)) if token not in ends]
        assert answer.text == ("".join(said) + found.finish()).strip()

    ends = served.family.model.eos_token_ids
    opening = tokens.opening_on(opened, "video")
    with Endpoint(served.server.url, timeout_s=60).open(video=FILE, video_frames=4) as chat:
        answer = chat.ask("what is it?", video=OTHER, video_frames=4, max_new_tokens=TOKENS)
        check(answer, opening.token_ids + tokens.prompt(OpenedOn("video", 1), "what is it?", shown), opened, shown)
        edited = chat.edit(0, "what was it?", max_new_tokens=TOKENS)
        whole = [Message("user", "what was it?", clips=2)]
        check(edited, tokens.conversation(whole, [joined([opened, shown])]), joined([opened, shown]))
        history = chat.turns
    with Endpoint(served.server.url, timeout_s=60).open(video=load_clip(FILE, frames=4), history=history) as chat:
        again = chat.ask("and now?", max_new_tokens=TOKENS)
        assert again.usage.prompt_tokens > edited.usage.prompt_tokens + edited.usage.completion_tokens
        with pytest.raises(InvalidRequest, match="clip"):
            chat.ask("and this?", video=to_png(noise(7)[1]))
        assert chat.ask("and then?", max_new_tokens=1).usage.completion_tokens == 1


def content(text: str, media: tuple[tuple[bytes, str], ...]) -> list[dict]:
    """Return a message's parts."""
    parts = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/any;base64,{text_of(data)}"}}
        for data, kind in media
    ]
    return [*parts, {"type": "text", "text": text}]
