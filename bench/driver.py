"""Drive an `Engine` in this process, as the pump does, and measure the times that a client would see.

Times are taken when `step` returns an event, not from the engine's own clocks.
"""

from __future__ import annotations

import hashlib
import io
import random
import time
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from transformers import AutoProcessor

from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine.budget import DeviceBudget, choose_budget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.engine.process import warm_up
from llava_sessions.ipc.messages import (
    AskSession,
    CloseSession,
    Delta,
    Event,
    Finished,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    Sampling,
    TurnFailed,
)
from llava_sessions.text.chat_template import ChatTemplate, Opening

from .harness import Options
from .make_checkpoint import WORDS


@dataclass
class TurnTimes:
    """Times of one turn at its client, in seconds of `time.perf_counter`."""

    asked_at: float
    token_times: list[float] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return (self.token_times[0] - self.asked_at) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        return (self.token_times[-1] - self.token_times[0]) * 1e3 / max(len(self.token_times) - 1, 1)

    @property
    def total_ms(self) -> float:
        """Time from the question to the last token."""
        return (self.token_times[-1] - self.asked_at) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        """Times between one token and the next."""
        return [(b - a) * 1e3 for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


class Pictures:
    """Different random JPEG pictures of a camera's proportions."""

    def __init__(self, seed: int, size: tuple[int, int] = (640, 480)) -> None:
        self._random = np.random.default_rng(seed)
        self._size = size

    def jpeg(self) -> bytes:
        """Return a new picture with large soft areas, so that its decoding takes as long as a photograph's."""
        coarse = self._random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize(self._size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


class Prompts:
    """Random questions. Each word is one token."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def words(self, count: int) -> str:
        """Return a new question of `count` words."""
        return " ".join(self._random.choices(WORDS, k=count))


def prepare(tokens: ChatTemplate, jpeg: bytes) -> Opening:
    """Do the handler's part of an open: decode the picture and prepare it for the model."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return tokens.opening([(hashlib.sha256(jpeg).hexdigest(), image)])


def load_engine(options: Options, budget: DeviceBudget | None = None, chunk_tokens: int = 256) -> EngineChats:
    """Return a warmed-up engine on the run's checkpoint. `budget` None: the handler's default."""
    tokens = ChatTemplate(AutoProcessor.from_pretrained(options.checkpoint))
    dtype = str(options.dtype).removeprefix("torch.")
    model = Model.load(options.checkpoint, dtype, str(options.device))
    engine = Engine(model, tokens.answer_text, budget or choose_budget(model.device), chunk_tokens)
    warm_up(engine, tokens)
    return EngineChats(engine, tokens)


class EngineChats:
    """The open chats of an engine: their conversations, as the pump keeps them, and the times of their events."""

    def __init__(self, engine: Engine, tokens: ChatTemplate) -> None:
        self.engine = engine
        self.tokens = tokens
        self.conversations: dict[str, Conversation] = {}
        self.opened_ms: dict[str, float] = {}
        self.turns: dict[str, list[TurnTimes]] = {}
        self._opening: dict[str, float] = {}
        self._prompts: dict[str, list[int]] = {}

    def open(self, name: str, opening: Opening) -> None:
        """Make the engine open a session. The next steps encode and prefill it."""
        self.conversations[name] = Conversation(opening)
        self.turns[name] = []
        self._opening[name] = time.perf_counter()
        self.engine.apply(OpenSession(name, opening.token_ids, opening.pictures))

    def ask(self, name: str, text: str, answer_tokens: int) -> None:
        """Make the engine start a turn. The measured time includes tokenizing the question."""
        self.turns[name].append(TurnTimes(time.perf_counter()))
        self._prompts[name] = self.tokens.prompt(self.conversations[name].opened_on, text)
        turn_id = f"{name}/{len(self.turns[name])}"
        self.engine.apply(AskSession(name, turn_id, self._prompts[name], Sampling(answer_tokens)))

    def close(self, name: str) -> None:
        """Free a session."""
        self.engine.apply(CloseSession(name))
        for table in (self.conversations, self.opened_ms, self.turns):
            table.pop(name, None)

    def close_all(self) -> None:
        """Free every session."""
        for name in list(self.conversations):
            self.close(name)
        self.run()

    def step(self) -> list[str]:
        """Run one step of the engine; return the sessions whose turn it finished."""
        events = self.engine.step()
        now = time.perf_counter()
        finished = []
        for event in events:
            name = self._note(event, now)
            if name is not None:
                finished.append(name)
        return finished

    def run(self) -> None:
        """Step until the engine has no work."""
        while self.engine.has_work:
            self.step()

    def answer(self, name: str, text: str, answer_tokens: int) -> TurnTimes:
        """Run one whole turn with no other work."""
        self.ask(name, text, answer_tokens)
        self.run()
        return self.turns[name][-1]

    def _note(self, event: Event, now: float) -> str | None:
        match event:
            case Prefilled():
                self.opened_ms[event.session_id] = (now - self._opening.pop(event.session_id, now)) * 1e3
            case Delta():
                self.turns[event.turn_id.split("/")[0]][-1].token_times.append(now)
            case Finished():
                return self._finish(event)
            case OpenFailed() | TurnFailed() | OutOfCapacity():
                raise RuntimeError(f"the benchmark failed: {event}")
        return None

    def _finish(self, event: Finished) -> str:
        name = event.turn_id.split("/")[0]
        turn = self.turns[name][-1]
        turn.answer_ids = event.answer_ids
        turn.cached_tokens = event.usage.cached_tokens
        if len(turn.token_times) != len(turn.answer_ids):
            found = f"{len(turn.token_times)} pieces of text for {len(turn.answer_ids)} tokens"
            raise RuntimeError(f"{found}: some tokens of this tokenizer have no text, so they can't be timed")
        self.conversations[name].commit(self._prompts.pop(name), event.kept_ids)
        return name
