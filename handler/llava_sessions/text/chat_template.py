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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..errors import Refused
from ..ipc.messages import PreparedPicture
from .answer_text import AnswerText

# What the processors of the families give a vision tower, by their own names; one row a picture.
_ROWS = ("pixel_values", "image_sizes", "pixel_values_videos")
# LLaVA-OneVision's count of the pictures that were given together. One alone is cut into tiles, several are not.
_TOGETHER = "batch_num_images"
# Stands for the end of an answer: text, and a place where no tokenizer joins what follows to it.
_MIDST = "\n"


class TemplateError(Exception):
    """The checkpoint's chat template or tokenizer can't carry a chat about a picture; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """What was shown in one request, for the vision tower and for the prompt.

    `tokens`: for each picture the text that the processor puts in place of its one image token.
    """

    pictures: tuple[PreparedPicture, ...] = ()
    tokens: tuple[str, ...] = ()


NOTHING = Prepared()


@dataclass(frozen=True)
class OpenedOn:
    """The pictures that a session was opened on: "image" and their count, or "video" and 1."""

    kind: str
    pictures: int


@dataclass(frozen=True)
class Opening:
    """What a session starts from: the prompt up to and with its last image token, and the pictures behind those.

    `kind` is the content type that the chat template knows them by: "image", or "video" for one clip.
    """

    token_ids: list[int]
    pictures: tuple[PreparedPicture, ...]
    image_tokens: int
    kind: str = "image"

    @property
    def opened_on(self) -> OpenedOn:
        """What the first prompt follows."""
        return OpenedOn(self.kind, len(self.pictures))

    def without_arrays(self) -> Opening:
        """The same for keeping: a picture's arrays are megabytes, and only the engine needs them, once."""
        return replace(self, pictures=tuple(PreparedPicture(picture.key, {}) for picture in self.pictures))


class ChatTemplate:
    """Turns pictures and text into token ids by the checkpoint's processor, and token ids into text.

    Thread-safe: fast tokenizers keep per-call settings in shared state, so every call that reads text holds one lock.
    """

    def __init__(self, processor: Any, system_prompt: str = "") -> None:
        """`processor`: of any family that the engine serves; `system_prompt` is the operator's.

        Raises `TemplateError` on an unfit template.
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
        self._image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self._media = {"image": self._image_token}
        if hasattr(processor, "video_processor"):
            self._media["video"] = processor.video_token
        # Whether text behind a special token is read as at the start of all text: sentence pieces, in their older form.
        alone, behind = (
            self._tokenizer(text + "a", add_special_tokens=False)["input_ids"] for text in ("", self._image_token)
        )
        self._starts_anew = behind[1:] == alone
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
        return self._opening(self.prepare(pictures), "image")

    def clip_opening(self, key: str, frames: Sequence[Image.Image]) -> Opening:
        """As `opening`, with one clip of RGB frames. Raises `Refused` (unsupported_media) where a model takes none."""
        if "video" not in self._media:
            raise Refused("unsupported_media", "This model takes pictures, no video.")
        shown = self._processor(videos=[list(frames)], return_tensors="np")
        return self._opening(_prepared([key], shown, self._processor.replace_video_token), "video")

    def _opening(self, prepared: Prepared, kind: str) -> Opening:
        with self._lock:
            before, _ = self._first_turn("question", kind, len(prepared.pictures))
            # As `ProcessorMixin.apply_chat_template`: the tokenizer adds its own start unless the template wrote it.
            bos = self._tokenizer.bos_token
            add = not (bos and before.startswith(bos))
            expanded = self._expand(before, prepared, self._media[kind])
            ids = list(self._tokenizer(expanded, add_special_tokens=add)["input_ids"])
        media_id = self._tokenizer.convert_tokens_to_ids(self._media[kind])
        while ids and ids[-1] != media_id:
            ids.pop()  # a tokenizer that closes its input by itself
        return Opening(ids, prepared.pictures, ids.count(media_id), kind)

    def prepare(self, pictures: Sequence[tuple[str, Image.Image]]) -> Prepared:
        """Prepare the pictures of one request (a key that names the content, and RGB), as they are shown together.

        What a family makes of several pictures depends on how they are given: LLaVA-OneVision cuts one picture into
        tiles, and gives each of several that are given together a single tile. A picture of a later turn is given
        alone, so it is tiled, and those before it stay what they were. That is `generate` on the whole conversation
        with `batch_num_images` counting each request's pictures (`[1, 1]` for one at open and one later, which is also
        what the processor makes of a flat list). `apply_chat_template` on the whole conversation would count all of it
        as one group, `[2]`: the first picture's tokens would shrink in the second turn, and nothing that was answered
        before would hold any more.
        """
        if not pictures:
            return NOTHING
        # Without the lock: no text is read, and many tiles take long enough to be felt by running answers.
        shown = self._processor(images=[[image for _, image in pictures]], return_tensors="np")
        return _prepared([key for key, _ in pictures], shown, self._processor.replace_image_token)

    def prompt(self, opened_on: OpenedOn | None, text: str, prepared: Prepared = NOTHING) -> list[int]:
        """New token ids of the next turn: from the end of the last answer up to where the next answer starts.

        `opened_on`: the pictures that the prompt follows in a session's first turn, None in any later turn. `prepared`
        are further pictures, shown with this turn: the ids hold their image tokens. A special token inside
        `text`, such as `<image>`, stays text. Raises `Refused` where the template has no place for the pictures.
        """
        with self._lock:
            plain, literals = self._hide_specials(text)
            more = len(prepared.pictures)
            if opened_on is not None:
                _, after = self._first_turn(plain, opened_on.kind, opened_on.pictures, more)
                anchor = self._media[opened_on.kind]
            else:
                after = self._later_turn(plain, more)
                anchor = _MIDST
            return self._encode(self._expand(after, prepared, self._image_token), literals, anchor)

    def answer_text(self, stop: tuple[str, ...] = ()) -> AnswerText:
        """A reader for one answer's tokens."""
        return AnswerText(self._tokenizer, stop)

    def _first_turn(self, text: str, kind: str = "image", shown: int = 1, more: int = 0) -> tuple[str, str]:
        """The rendered first turn, cut behind what the session was opened on: `shown` pictures, or a clip.

        `more` pictures come with the question itself.
        """
        content = [{"type": kind}] * shown + [{"type": "image"}] * more + [{"type": "text", "text": text}]
        rendered = self._render([{"role": "user", "content": content}])
        token = self._media[kind]
        parts = rendered.split(token)
        if len(parts) <= shown:
            raise TemplateError(f"the chat template renders no {kind} token for what is shown")
        return token.join(parts[:shown]) + token, token.join(parts[shown:])

    def _later_turn(self, text: str, more: int = 0) -> str:
        """What the template writes between an earlier answer and the next one. Holds for any turn but the first."""
        answer = _sentinel()
        earlier = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "question"}]}
        turns = [
            earlier,
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            {"role": "user", "content": [{"type": "image"}] * more + [{"type": "text", "text": text}]},
        ]
        rendered = self._render(turns)
        if rendered.count(answer) != 1:
            raise TemplateError("the chat template does not render an earlier answer once")
        return rendered.split(answer)[1]

    def _expand(self, rendered: str, prepared: Prepared, token: str) -> str:
        """Put each picture's tokens in place of its one, as the processor does."""
        parts = rendered.split(token)
        if len(parts) != len(prepared.tokens) + 1:
            places = f"it has {len(parts) - 1} places for {len(prepared.tokens)}"
            raise Refused("invalid_request", f"The model's chat template can't show these pictures here: {places}.")
        return "".join(part + tokens for part, tokens in zip(parts, [*prepared.tokens, ""], strict=True))

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
        """Token ids of `rendered` as they would be in mid-conversation, right behind `anchor`.

        A tokenizer cuts at its special tokens anyway, so text between two of them can be read by itself.
        """
        if not literals:
            return self._behind(self._tokenizer, anchor, rendered)
        ids: list[int] = []
        for part in filter(None, self._specials.split(rendered)):
            if self._specials.fullmatch(part):
                ids.append(self._tokenizer.convert_tokens_to_ids(part))
                continue
            for sentinel, text in literals.items():
                part = part.replace(sentinel, text)
            behind_text = not ids and anchor == _MIDST
            ids += self._behind(self._literal, _MIDST if behind_text or not self._starts_anew else "", part)
        return ids

    def _behind(self, tokenizer: Any, anchor: str, text: str) -> list[int]:
        """Token ids of `text` as they are behind `anchor`, where the two don't melt into one token."""
        before = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        ids = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def _prepared(keys: list[str], shown: Any, replace_token: Callable[[Any, int], str]) -> Prepared:
    """Split what the processor made of pictures that were given together, one by one.

    `replace_token`: the processor's own, of its arrays and an index: the text in place of that picture's one token.
    """
    rows = {name: np.asarray(shown[name]) for name in _ROWS if name in shown}
    together = np.asarray(shown[_TOGETHER]) if _TOGETHER in shown else None
    pictures = []
    for index, key in enumerate(keys):
        inputs = {name: array[index : index + 1] for name, array in rows.items()}
        if together is not None:
            inputs[_TOGETHER] = together
            # Other features than the same picture's alone, so another key.
            key = key if len(keys) == 1 else f"{key}:untiled"
        pictures.append(PreparedPicture(key, inputs))
    return Prepared(tuple(pictures), tuple(replace_token(shown, index) for index in range(len(keys))))


def _any_of(tokenizer: Any) -> re.Pattern[str]:
    """Matches every token that the tokenizer would cut out of plain text before it applies its merges."""
    specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    longest_first = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"(?!)") + ")")


def _sentinel() -> str:
    """A string that no text holds by chance and no template changes."""
    return f"\ue000{secrets.token_hex(8)}\ue001"
