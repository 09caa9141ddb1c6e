"""Random conversations whose clients continue, edit, regenerate, trim and fork: every answer equals `generate`.

A client sends the token IDs of its whole conversation. The session keeps the longest common prefix, or a new session
copies it.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from dataclasses import dataclass, field, replace

import pytest

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.engine import Engine
from llava_sessions.ipc.messages import (
    AskSession,
    CloseSession,
    Event,
    Finished,
    OpenSession,
    PreparedPicture,
    Sampling,
    TurnFailed,
)
from tests.support.family import Family, make_family, noise

STEPS = 8
PICTURES = 6
CLIPS = 3
QUESTIONS = ["what is the red circle?", "and the blue square near it?", "two green stars?", "what", "what is near?"]
# Device bytes in tokens of KV, host bytes in tokens of KV.
BUDGETS = {"ample": (2**20, 2**20), "offloading": (768, 2**20), "dropping": (768, 64)}


@dataclass
class Request:
    """A question with its pictures and clips, and the answer as far as the client keeps it."""

    token_ids: list[int]
    pictures: tuple[PreparedPicture, ...]
    counts: list[int]  # feature tokens of each picture and clip
    answer_ids: list[int] = field(default_factory=list)


@dataclass
class Content:
    """What a session has, or what a client sends: tokens, pictures and the (start, end) of each picture."""

    token_ids: list[int] = field(default_factory=list)
    pictures: list[PreparedPicture] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, request: Request, media_tokens: frozenset[int]) -> None:
        start = len(self.token_ids)
        places = [start + at for at, token in enumerate(request.token_ids) if token in media_tokens]
        for count in request.counts:
            self.spans.append((places[0], places[count - 1] + 1))
            places = places[count:]
        assert not places
        self.pictures += request.pictures
        self.token_ids += request.token_ids + request.answer_ids

    def common(self, other: Content) -> int:
        """Return the length of the common prefix."""
        pairs = zip(self.token_ids, other.token_ids, strict=False)
        ends = (at for at, (one, two) in enumerate(pairs) if one != two)
        length = next(ends, min(len(self.token_ids), len(other.token_ids)))
        shown = zip(self.pictures, other.pictures, self.spans, other.spans, strict=False)
        for mine, theirs, span, other_span in shown:
            if mine.key != theirs.key or span != other_span:
                length = min(length, span[0], other_span[0])
        return self.outside_pictures(length)

    def outside_pictures(self, length: int) -> int:
        """Return the length, or the start of the picture inside which it is."""
        return next((start for start, end in self.spans if start < length < end), length)

    def cut(self, start: int, end: int | None = None) -> Content:
        """Return a part; the spans stay positions of the whole."""
        first = bisect_left(self.spans, (start, 0))
        last = None if end is None else bisect_left(self.spans, (end, 0))
        return Content(self.token_ids[start:end], self.pictures[first:last], self.spans[first:last])


@dataclass
class Conversation:
    """A client's conversation and the session that has it now."""

    requests: list[Request] = field(default_factory=list)
    session: str = ""


class Clients:
    """Clients of one engine, and the worker that compares what they send with what the sessions have."""

    def __init__(self, family: Family, budget: str, draw: random.Random) -> None:
        self.family = family
        self.draw = draw
        model = family.model
        device, host = (tokens * model.kv_shape.token_bytes for tokens in BUDGETS[budget])
        counts = [count for of in (1, 2) for count in self.image_tokens(of)]
        if family.takes_clips:
            counts += family.image_tokens(family.prepare([], range(CLIPS)))
        features = sum(counts) * model.feature_bytes
        self.engine = Engine(model, family.tokens.answer_text, DeviceBudget(device + features, host), 48)
        self.held: dict[str, Content] = {}  # by session
        self.running: dict[str, tuple[Request, list[int]]] = {}  # the question of a turn, and the expected answer
        self.sent: dict[str, AskSession] = {}
        self.opens: dict[str, OpenSession] = {}
        self.cached = 0
        self.resent = 0
        self.count = 0

    def image_tokens(self, of: int) -> list[int]:
        """Return the image tokens of each picture if a question shows `of` pictures."""
        prepared = [self.family.tokens.pictures.picture(*noise(seed), of) for seed in range(PICTURES)]
        return [count for one in prepared for count in self.family.image_tokens(one)]

    def question(self) -> Request:
        seeds = self.draw.sample(range(PICTURES), self.draw.choice([0, 0, 1, 1, 2]))
        clips = self.draw.sample(range(CLIPS), self.draw.choice([0, 0, 0, 1, 2])) if self.family.takes_clips else []
        prepared = self.family.prepare(seeds, clips)
        prompt = self.family.tokens.prompt(None, self.draw.choice(QUESTIONS), prepared)
        return Request(prompt, prepared.pictures, self.family.image_tokens(prepared))

    def step(self, chat: Conversation) -> None:
        """Change the conversation in one of the ways of a client, and send all of it."""
        way = self.draw.choice(["continue", "edit", "regenerate", "trim", "fork", "branch"])
        busy = way == "branch" and chat.session
        if busy:
            chat.requests.append(self.question())
            self.send(chat)
            self.run(self.draw.randrange(4))  # the donor is waiting, prefilling or answering
            chat = replace(chat, requests=chat.requests[:-1])
        if way == "continue" or not chat.requests:
            chat.requests.append(self.question())
        elif way == "trim":
            last = chat.requests.pop()
            kept = last.answer_ids[: self.draw.randrange(len(last.answer_ids) + 1)]
            chat.requests += [replace(last, answer_ids=kept), self.question()]
        elif way == "regenerate":
            chat.requests[-1] = replace(chat.requests[-1], answer_ids=[])
        else:
            del chat.requests[self.draw.randrange(len(chat.requests)) :]
            chat.requests.append(self.question())
        self.send(chat, forks=way in ("fork", "branch"))

    def send(self, chat: Conversation, forks: bool = False) -> None:
        """Send the whole conversation as the next turn of its session, or of a new session that copies a prefix."""
        whole = Content()
        for request in chat.requests:
            whole.add(request, self.family.tokens.media_token_ids)
        donor = chat.session
        if not donor or forks:
            self.count += 1
            chat.session = f"session {self.count}"
            # The opening has nothing, all but the last question, or a part of the history.
            opened = self.draw.choice([0, len(whole.token_ids) - len(chat.requests[-1].token_ids), 40])
            opened = whole.outside_pictures(min(opened, len(whole.token_ids) - 1))
            self.held[chat.session] = whole.cut(0, opened)
            part = self.held[chat.session]
            command = OpenSession(chat.session, part.token_ids, tuple(part.pictures), fork_from=donor or None)
            self.opens[chat.session] = command
            self.engine.apply(replace(command, pictures=self.stripped(command.pictures)))
        kept = self.held[chat.session].common(whole)
        kept = whole.outside_pictures(min(kept, len(whole.token_ids) - 1))
        rest = whole.cut(kept)
        limit = self.draw.randrange(3, 8)
        ask = AskSession(chat.session, chat.session, rest.token_ids, Sampling(limit), tuple(rest.pictures), kept)
        self.sent[chat.session] = ask
        self.held[chat.session] = whole
        shown = [request.pictures for request in chat.requests]
        self.running[chat.session] = (chat.requests[-1], self.family.generate(whole.token_ids, shown, limit))
        self.engine.apply(replace(ask, pictures=self.stripped(ask.pictures)))

    def stripped(self, pictures: tuple[PreparedPicture, ...]) -> tuple[PreparedPicture, ...]:
        """Return the pictures without arrays: the engine may have their features or not."""
        return tuple(replace(picture, inputs={}) for picture in pictures)

    def run(self, steps: int | None = None) -> None:
        """Step until the engine has no work, or `steps` times; compare the answers."""
        while self.engine.has_work and steps != 0:
            steps = None if steps is None else steps - 1
            for event in self.engine.step():
                self.on(event)

    def on(self, event: Event) -> None:
        match event:
            case Finished():
                request, expected = self.running.pop(event.turn_id)
                assert event.answer_ids == expected
                request.answer_ids = event.kept_ids
                self.held[event.turn_id].token_ids += event.kept_ids
                self.cached += event.usage.cached_tokens
                assert event.usage.cached_tokens <= event.usage.prompt_tokens
            case _ if getattr(event, "lacks_pictures", False):
                self.resent += 1
                if not isinstance(event, TurnFailed):
                    self.engine.apply(self.opens[event.session_id])
                elif event.turn_id in self.engine.sessions:
                    self.engine.apply(self.sent[event.turn_id])
            case TurnFailed() if event.error == "the session is not open in the engine":
                self.engine.apply(self.sent[event.turn_id])  # its opening lacked pictures
            case _:
                assert "Failed" not in type(event).__name__, event
                assert "Capacity" not in type(event).__name__, event


@pytest.fixture(scope="module", params=["llava", "next-mistral", "onevision", "next-video", "internvl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("budget", BUDGETS)
def test_random_conversations_equal_generate(family: Family, budget: str) -> None:
    draw = random.Random(f"{family.name} {budget}")
    clients = Clients(family, budget, draw)
    chats = [Conversation() for _ in range(4)]
    for _ in range(STEPS):
        draw.shuffle(chats)
        for chat in chats:
            clients.step(chat)
            clients.run(draw.randrange(3))  # others answer while the next one is changed
        clients.run()
        assert not clients.running
    memory = clients.engine.memory()
    assert clients.resent
    assert clients.cached
    assert (budget != "ample") == (memory.offloads > 0)
    assert (budget == "dropping") == (memory.drops > 0)
    for name in list(clients.engine.sessions):
        clients.engine.apply(CloseSession(name))
    assert clients.engine.memory().sessions == clients.engine.memory().features_bytes == 0
