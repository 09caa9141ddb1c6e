"""Owns the words of a chat: its chat template, the token ids of the growing conversation, and answers turned back into
text.

Builds on the checkpoint's own `transformers` processor. Must not know torch, TorchServe, sessions or payloads. A
conversation only ever grows by token ids; an answer is never re-tokenised, since BPE may merge it differently the
second time.
"""

from __future__ import annotations

import copy
import re
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from tokenizers.decoders import DecodeStream

from .engine.messages import Picture

# What a processor gives a vision tower, by its own names; one row a picture.
_PICTURE_INPUTS = ("pixel_values",)


class TemplateError(Exception):
    """The checkpoint's chat template or tokenizer can't carry a chat about a picture; the message says why."""


@dataclass(frozen=True)
class Opening:
    """What a session starts from: the prompt up to and with its last image token, and the pictures behind those."""

    token_ids: list[int]
    pictures: tuple[Picture, ...]
    image_tokens: int


@dataclass
class Conversation:
    """The committed token ids of one chat: prompts and answers of every finished turn."""

    opening: Opening
    token_ids: list[int] = field(init=False)
    turns: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.opening.token_ids)

    def commit(self, prompt_ids: list[int], answer_ids: list[int]) -> None:
        """Add a finished turn; `answer_ids` without the end-of-sequence token."""
        self.token_ids += prompt_ids
        self.token_ids += answer_ids
        self.turns += 1


class ChatTokens:
    """Turns pictures and text into token ids by the checkpoint's processor, and token ids into text.

    Thread-safe: fast tokenizers keep per-call settings in shared state, so every call holds one lock.
    """

    def __init__(self, processor: Any, system_prompt: str = "") -> None:
        """`processor`: a `LlavaProcessor`; `system_prompt` is the operator's. Raises `TemplateError` on an unfit
        template.
        """
        self._processor = processor
        self._system = (
            [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}] if system_prompt else []
        )
        self._tokenizer = processor.tokenizer
        # Reads special tokens as the text they are; a copy, because the switch is state of the tokenizer.
        self._literal = copy.deepcopy(self._tokenizer)
        self._literal.split_special_tokens = True
        self._specials = _any_of(self._tokenizer)
        self._image_token = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self._anchor = self._tokenizer.eos_token or self._image_token
        self._lock = threading.Lock()
        self._check()

    def _check(self) -> None:
        if not getattr(self._processor, "chat_template", None):
            raise TemplateError("the processor has no chat template (chat_template.jinja)")
        before, after = self._first_turn("question")
        if "question" not in after or self._image_token in after or self._image_token not in before:
            raise TemplateError("the chat template does not put the picture before the question")
        if "question" not in self._later_turn("question"):
            raise TemplateError("the chat template does not render a second question")

    def opening(self, pictures: Sequence[tuple[str, Image.Image]]) -> Opening:
        """Prepare the pictures (a key that names the content, and RGB) and the prompt before the first question.

        Returns the ids up to and with the last image token, so that they can be prefilled at once.
        """
        with self._lock:
            before, _ = self._first_turn("question", len(pictures))
            # As `ProcessorMixin.apply_chat_template`: the tokenizer adds its own start unless the template wrote it.
            bos = self._tokenizer.bos_token
            add = not (bos and before.startswith(bos))
            images = [image for _, image in pictures]
            inputs = self._processor(images=images, text=before, add_special_tokens=add, return_tensors="np")
        ids = [int(token) for token in np.asarray(inputs["input_ids"]).reshape(-1)]
        while ids and ids[-1] != self.image_token_id:
            ids.pop()  # a tokenizer that closes its input by itself
        arrays = {name: np.asarray(inputs[name]) for name in _PICTURE_INPUTS if name in inputs}
        prepared = tuple(
            Picture(key, {name: array[index : index + 1] for name, array in arrays.items()})
            for index, (key, _) in enumerate(pictures)
        )
        return Opening(ids, prepared, ids.count(self.image_token_id))

    def prompt(self, conversation: Conversation, text: str) -> list[int]:
        """New token ids of the next turn: from the end of the last answer up to where the next answer starts.

        A special token inside `text`, such as `<image>`, stays text.
        """
        with self._lock:
            plain, literals = self._hide_specials(text)
            if conversation.turns == 0:
                _, after = self._first_turn(plain)
                return self._encode(after, literals, anchor=self._image_token)
            return self._encode(self._later_turn(plain), literals, anchor=self._anchor)

    def answer_text(self, stop: tuple[str, ...] = ()) -> AnswerText:
        """A reader for one answer's tokens."""
        return AnswerText(self._tokenizer, stop)

    def _first_turn(self, text: str, pictures: int = 1) -> tuple[str, str]:
        """The rendered first turn, cut behind its last image token."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
        rendered = self._render([{"role": "user", "content": content}])
        before, token, after = rendered.rpartition(self._image_token)
        if not token:
            raise TemplateError("the chat template renders no image token for a picture")
        return before + token, after

    def _later_turn(self, text: str) -> str:
        """What the template writes between an earlier answer and the next one. Holds for any turn but the first."""
        answer = _sentinel()
        earlier = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "question"}]}
        turns = [
            earlier,
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ]
        rendered = self._render(turns)
        if rendered.count(answer) != 1:
            raise TemplateError("the chat template does not render an earlier answer once")
        return rendered.split(answer)[1]

    def _render(self, messages: list[dict]) -> str:
        return self._processor.apply_chat_template(self._system + messages, add_generation_prompt=True, tokenize=False)

    def _hide_specials(self, text: str) -> tuple[str, dict[str, str]]:
        """Swap special tokens in a user's text for sentinels, so that the template's own ones stay the only ones."""
        literals: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            sentinel = _sentinel()
            literals[sentinel] = match.group()
            return sentinel

        return self._specials.sub(hide, text), literals

    def _encode(self, rendered: str, literals: dict[str, str], anchor: str) -> list[int]:
        """Token ids of `rendered` as they would be in mid-conversation, right behind the token `anchor`.

        Cutting at a special token is where the tokenizer cuts anyway, so the ids are those of the whole text.
        """
        pieces = re.split("(" + "|".join(map(re.escape, literals)) + ")", rendered) if literals else [rendered]
        ids = self._tokenizer(anchor + pieces[0], add_special_tokens=False)["input_ids"][1:]
        for piece in pieces[1:]:
            if piece in literals:
                ids += self._literal(literals[piece], add_special_tokens=False)["input_ids"]
            elif piece:
                ids += self._tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids


class AnswerText:
    """Turns one answer's tokens into text as they come, and watches for stop strings.

    Text that may still turn into a stop string, or into a character whose bytes are not all there, is held back. White
    space before the first word is dropped.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._token_ids: list[int] = []
        self._told = 0
        self._held = ""
        self._started = False
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that became certain with this token. `stopped` turns true when a stop string is complete."""
        self._token_ids.append(token_id)
        text = self._stream.step(self._backend, token_id) or ""
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        self._held += text
        cut = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            return self._held[:cut]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._told += len(text)
        return text

    def finish(self) -> str:
        """What is still held back once no more tokens come; bytes that never made a character are shown as U+FFFD."""
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=True).lstrip()
        return whole[self._told :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _any_of(tokenizer: Any) -> re.Pattern[str]:
    """Matches every token that the tokenizer would cut out of plain text before it applies its merges."""
    specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    longest_first = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _sentinel() -> str:
    """A string that no text holds by chance and no template changes."""
    return f"\ue000{secrets.token_hex(8)}\ue001"
