"""An engine in this process with its conversations, driven as the pump does, and transformers as the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine.budget import DeviceBudget, choose_budget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import AskSession, Event, Finished, OpenSession, Sampling
from llava_sessions.text.chat_template import ChatTemplate

QUESTIONS = ["what is the red circle doing?", "and the blue square <image> near it?", "two green stars ☃?"]


class Reference:
    """The checkpoint loaded by transformers."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)

    def answer(
        self, token_ids: list[int], pixel_values: np.ndarray | None, max_new_tokens: int, **more: object
    ) -> list[int]:
        """Return the greedy token IDs of `generate` on the whole conversation, which may have no pictures."""
        ids = torch.tensor([token_ids])
        if pixel_values is not None:
            more["pixel_values"] = torch.from_numpy(pixel_values)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **more,
        )
        return out[0, ids.shape[1] :].tolist()


class Chats:
    """An engine and its conversations, as the pump keeps them."""

    def __init__(
        self,
        checkpoint: Path,
        chunk_tokens: int = 256,
        budget: DeviceBudget | None = None,
        kv_dtype: str = "auto",
    ) -> None:
        self.tokens = ChatTemplate(AutoProcessor.from_pretrained(checkpoint))
        model = Model.load(checkpoint, "float32", "cpu", kv_dtype=kv_dtype)
        self.engine = Engine(model, self.tokens.answer_text, budget or choose_budget(model.device), chunk_tokens)
        self.conversations: dict[str, Conversation] = {}
        self.prompts: dict[str, list[int]] = {}
        self.events: list[Event] = []

    def open(self, name: str, picture_seed: int) -> None:
        opening = self.tokens.opening([(f"noise {picture_seed}", noise(picture_seed))])
        self.conversations[name] = Conversation(opening)
        self.engine.apply(OpenSession(name, opening.token_ids, opening.pictures))

    def ask(self, name: str, text: str, sampling: Sampling) -> list[int]:
        """Start a turn; return the token IDs of the whole conversation before the answer."""
        conversation = self.conversations[name]
        self.prompts[name] = self.tokens.prompt(conversation.opened_on, text)
        self.engine.apply(AskSession(name, f"turn-{name}", self.prompts[name], sampling))
        return conversation.token_ids + self.prompts[name]

    def pixels(self, name: str) -> np.ndarray:
        """Return the pixels of the session's picture, for the reference."""
        return self.conversations[name].opening.pictures[0].inputs["pixel_values"]

    def run(self, steps: int | None = None) -> dict[str, Finished]:
        """Step until the engine has no work, or `steps` times; commit and return the finished turns by session."""
        finished = {}
        while self.engine.has_work and steps != 0:
            steps = None if steps is None else steps - 1
            for event in self.engine.step():
                self.events.append(event)
                if isinstance(event, Finished):
                    name = event.turn_id.removeprefix("turn-")
                    finished[name] = event
                    self.conversations[name].commit(self.prompts[name], event.kept_ids)
        return finished


def noise(seed: int) -> Image.Image:
    """Return a random picture."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))
