"""An engine on any device with its conversations, and transformers on the same device as the reference."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import (
    AskSession,
    CloseSession,
    Event,
    Finished,
    OpenSession,
    OutOfCapacity,
    PreparedPicture,
    Sampling,
)
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.processors import load_processor
from tests.support.family import flat, joined, noise

AMPLE = DeviceBudget(2**30, 2**30)
# How far below the best one the logit of a chosen token may be, as a part of the range of all logits. On a CPU
# roundings to 16 bits gave up to 0.0015 and 0.0037.
ALLOWED = {"float32": 0.0, "float16": 0.01, "bfloat16": 0.02}
ALLOWED_IN_INT8 = 0.05  # on a CPU with KV in int8: up to 0.011


class DeviceChats:
    """An engine on `device` in `dtype`, and its conversations with the pictures of each request."""

    def __init__(
        self,
        checkpoint: Path,
        device: str,
        dtype: str = "float32",
        budget: DeviceBudget = AMPLE,
        chunk: int = 48,
        **int8: str,
    ) -> None:
        """`int8`: `weights` and `kv_dtype` of `Model.load`. The reference has neither."""
        self.allowed = ALLOWED_IN_INT8 if int8 else ALLOWED[dtype]
        self.device = device
        self.tokens = ChatTemplate(load_processor(checkpoint))
        self.model = Model.load(checkpoint, dtype, device, **int8)
        self.engine = Engine(self.model, self.tokens.answer_text, budget, chunk)
        kept = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), device_map={"": device}
        )
        self.reference = kept.float()  # the same weights, computed in float32
        self.conversations: dict[str, Conversation] = {}
        self.shown: dict[str, list[tuple[PreparedPicture, ...]]] = {}
        self.events: list[Event] = []
        self._asked: dict[str, tuple[list[int], list[int]]] = {}  # conversation before the prompt, and prompt

    def open(self, name: str, *seeds: int) -> None:
        """Open a session on random pictures."""
        opening = self.tokens.opening([noise(seed) for seed in seeds])
        self.conversations[name] = Conversation(opening)
        self.shown[name] = [opening.pictures]
        self.engine.apply(OpenSession(name, opening.token_ids, opening.pictures))

    def ask(self, name: str, text: str, sampling: Sampling, *seeds: int) -> None:
        """Start a turn, with further pictures."""
        conversation = self.conversations[name]
        prepared = self.tokens.prepare([noise(seed) for seed in seeds])
        prompt = self.tokens.prompt(conversation.opened_on, text, prepared)
        self.shown[name].append(prepared.pictures)
        self._asked[name] = (list(conversation.token_ids), prompt)
        self.engine.apply(AskSession(name, name, prompt, sampling, prepared.pictures))

    def close(self, name: str) -> None:
        """Close a session."""
        self.engine.apply(CloseSession(name))

    def run(self, steps: int | None = None) -> dict[str, list[int]]:
        """Step until the engine has no work, or `steps` times; commit and return the finished answers."""
        answers = {}
        while self.engine.has_work and steps != 0:
            steps = None if steps is None else steps - 1
            for event in self.engine.step():
                self.events.append(event)
                if isinstance(event, Finished):
                    answers[event.turn_id] = event.answer_ids
                    self.conversations[event.turn_id].commit(self._asked[event.turn_id][1], event.kept_ids)
        return answers

    def refused(self) -> list[OutOfCapacity]:
        """Return the requests that were rejected for lack of memory."""
        return [event for event in self.events if isinstance(event, OutOfCapacity)]

    @torch.inference_mode()
    def worst_choice(self, name: str, answer: list[int]) -> float:
        """Return how far below the best one the worst token of a finished turn's answer is.

        0.0: each token is the one that transformers finds most likely after those before it, so the answer is that of
        `generate`. The unit is the range of the logits.
        """
        before, prompt = self._asked[name]
        ids = torch.tensor([before + prompt + answer], device=self.device)
        is_flat = self.reference.config.model_type == "internvl"
        arrays = flat(self.shown[name]) if is_flat else joined(self.shown[name])
        inputs = {key: torch.from_numpy(array).to(self.device) for key, array in arrays.items()}
        logits = self.reference(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0].float()
        logits = logits[-len(answer) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer, device=self.device)[:, None])[:, 0]
        return float(((logits.amax(1) - chosen) / (logits.amax(1) - logits.amin(1))).max())

    def check(self, name: str, answer: list[int]) -> None:
        """Raise AssertionError if transformers would answer otherwise, up to the rounding of the precision."""
        assert answer
        worst = self.worst_choice(name, answer)
        assert worst <= self.allowed, f"{name}: a token is {worst:.4f} of the range below the best one"
