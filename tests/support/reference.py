"""The answers of transformers' `generate` on the conversations that clients sent, with the demo model in float32."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support.serving import SHAPES

# Two tokens whose logits differ by less may change places on a machine that adds in another order.
TIE = 1e-3


@dataclass(frozen=True)
class Generated:
    """An answer, the number of tokens of its prompt, and for each of its tokens how far the next best one was."""

    text: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    margins: tuple[float, ...]
    prefixes: tuple[str, ...]

    def matches(self, text: str) -> bool:
        """Return whether an answer is this one. It may differ from a token on that was chosen by a tie."""
        if text == self.text:
            return True
        known = max(index for index, prefix in enumerate(self.prefixes) if text.startswith(prefix))
        return any(margin < TIE for margin in self.margins[max(known - 1, 0) : known + 2])


class Reference:
    """The demo model in transformers. Answers are kept, because several clients have the same conversation."""

    def __init__(self, pictures: Mapping[str, Image.Image]) -> None:
        self._pictures = pictures
        self._processor = AutoProcessor.from_pretrained(SHAPES)
        self._model = AutoModelForImageTextToText.from_pretrained(SHAPES, dtype=torch.float32)
        self._answers: dict[tuple[str, int], Generated] = {}
        self._lock = threading.Lock()

    def answer(self, sent: Sequence[Mapping[str, Any]], max_new_tokens: int) -> Generated:
        """Return the answer to a conversation of `role`, `text` and `pictures` (names)."""
        messages = list(merged(sent))
        key = (repr(messages), max_new_tokens)
        with self._lock:
            if key not in self._answers:
                self._answers[key] = self._generate(messages, max_new_tokens)
            return self._answers[key]

    def _generate(self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int) -> Generated:
        names = [name for message in messages for name in message["pictures"]]
        chat = [{"role": message["role"], "content": _content(message)} for message in messages]
        text = self._processor.apply_chat_template(chat, add_generation_prompt=True)
        pictures = [self._pictures[name] for name in names] or None
        inputs = self._processor(text=text, images=pictures, return_tensors="pt")
        prompt_tokens = inputs["input_ids"].shape[1]
        options = {"do_sample": False, "max_new_tokens": max_new_tokens}
        out = self._model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        ids = out.sequences[0, prompt_tokens:].tolist()
        best = [step[0].topk(2).values.tolist() for step in out.logits]
        decode = self._processor.tokenizer.decode
        prefixes = tuple(decode(ids[:count], skip_special_tokens=True).strip() for count in range(len(ids) + 1))
        return Generated(prefixes[-1], prompt_tokens, tuple(ids), tuple(a - b for a, b in best), prefixes)


def merged(sent: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield the conversation with successive messages of one role as one (docs/protocol.md)."""
    last: dict[str, Any] | None = None
    for message in sent:
        if last is not None and last["role"] == message["role"]:
            texts = [text for text in (last["text"], message["text"]) if text]
            last = {**last, "text": "\n".join(texts), "pictures": [*last["pictures"], *message["pictures"]]}
            continue
        if last is not None:
            yield last
        last = {"role": message["role"], "text": message["text"], "pictures": list(message["pictures"])}
    if last is not None:
        yield last


def _content(message: Mapping[str, Any]) -> list[dict[str, str]]:
    pictures = [{"type": "image"} for _ in message["pictures"]]
    return [*pictures, {"type": "text", "text": message["text"]}]
