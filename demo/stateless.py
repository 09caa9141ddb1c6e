"""The demo's baseline: transformers' own `generate` on the whole conversation, in this process."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers
from PIL import Image

from .turn import TurnResult

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class FirstToken(transformers.generation.streamers.BaseStreamer):
    """Record the time of the first token that `generate` emits. It emits the prompt before."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Count a call of `generate`."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Do nothing at the end of the answer."""


class Stateless:
    """A server without sessions: each turn encodes the picture and prefills the whole conversation again."""

    def __init__(self, model: Path, max_new_tokens: int) -> None:
        self._processor = transformers.AutoProcessor.from_pretrained(model)
        self._model = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        self._max_new_tokens = max_new_tokens
        self._messages: list[dict] = []

    def ask(self, picture: Image.Image, text: str) -> TurnResult:
        """Answer a question with `generate`, from the picture and the whole conversation."""
        began = time.perf_counter()
        image = [] if self._messages else [{"type": "image"}]
        self._messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
        prompt = self._processor.apply_chat_template(self._messages, add_generation_prompt=True)
        inputs = self._processor(text=prompt, images=picture, return_tensors="pt")
        first = FirstToken()
        out = self._model.generate(**inputs, do_sample=False, max_new_tokens=self._max_new_tokens, streamer=first)
        new_ids = out[0, inputs["input_ids"].shape[1] :]
        answer = self._processor.tokenizer.decode(new_ids, skip_special_tokens=True).strip()
        self._messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return TurnResult(answer, (first.at - began) * 1e3, (time.perf_counter() - began) * 1e3)
