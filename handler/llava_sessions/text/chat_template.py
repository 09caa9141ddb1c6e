"""The checkpoint's chat template: pictures and text to token IDs, part by part of a growing conversation.

Uses the checkpoint's own `transformers` processor. A conversation grows by token IDs only. An answer is never tokenized
again, because BPE may merge its text differently.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from ..errors import Refused, error_line
from ..ipc.messages import PreparedPicture
from .answer_text import AnswerText
from .pictures import NOTHING, Picture, PicturePreparer, Prepared, joined
from .tokenizer import ANSWER_END, PromptTokenizer, placeholder


class TemplateError(Exception):
    """The checkpoint's chat template or tokenizer can't be used for chats about pictures. The message names why."""


@dataclass(frozen=True)
class OpenedOn:
    """The pictures with which a session was opened: `kind` "image" and their count, or "video" and 1."""

    kind: str
    pictures: int


@dataclass(frozen=True)
class Opening:
    """The start of a session: the prompt up to and including its last image token, and its pictures.

    `image_tokens`: number of image tokens in `token_ids`. `kind`: the pictures' content type in the chat template,
    "image", or "video" for one clip.
    """

    token_ids: list[int]
    pictures: tuple[PreparedPicture, ...]
    image_tokens: int
    kind: str = "image"

    @property
    def opened_on(self) -> OpenedOn:
        """The argument of `ChatTemplate.prompt` for the first turn."""
        return OpenedOn(self.kind, len(self.pictures))

    def without_arrays(self) -> Opening:
        """Return a copy without the pictures' arrays. They take megabytes, and only the engine uses them, once."""
        return replace(self, pictures=tuple(PreparedPicture(picture.key, {}) for picture in self.pictures))


class ChatTemplate:
    """Converts pictures and text to token IDs by the checkpoint's processor, and makes detokenizers of answers.

    Thread-safe: fast tokenizers keep settings of a call in shared state, so tokenizing holds a lock.
    """

    def __init__(self, processor: Any, system_prompt: str = "") -> None:
        """`processor`: of any family that the engine serves. `system_prompt`: the operator's.

        Raises `TemplateError` for an unsuitable template.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._system = (
            [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}] if system_prompt else []
        )
        self._image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self._media_tokens = {"image": self._image_token}
        if hasattr(processor, "video_processor"):
            self._media_tokens["video"] = processor.video_token
        self.pictures = PicturePreparer(processor)
        self._encoder = PromptTokenizer(self.tokenizer, self._image_token)
        self.lock = threading.Lock()  # held while text is tokenized
        if not getattr(processor, "chat_template", None):
            raise TemplateError("the processor has no chat template (chat_template.jinja)")
        # Whether the template takes a message's content as one string, as templates for text alone do.
        self._joins_content = False
        self._choose_content()

    def _choose_content(self) -> None:
        """Find out which form of `content` the template takes: a list of parts, else a string."""
        try:
            self._check()
        except Exception as error:  # a template raises what Jinja or its own code raises
            self._joins_content = True
            try:
                self._check()
            except Exception as second:
                refused = f"as a list: {_in_words(error)}; as a string: {_in_words(second)}"
                raise TemplateError(f"the chat template takes `content` in neither form ({refused})") from error

    def _check(self) -> None:
        """Raise `TemplateError` unless the template renders pictures, a question, an answer and a second question."""
        before, after = self._render_first_turn("question")
        if "question" not in after or self._image_token in after or self._image_token not in before:
            raise TemplateError("it does not put the picture before the question")
        later = self._render_later_turn("question")
        if "question" not in later:
            raise TemplateError("it does not render a second question")
        if self._image_token in later:
            raise TemplateError(f"it writes {self._image_token!r} for a question without a picture")

    def check_opening(self, kind: str, pictures: int) -> None:
        """Raise `Refused` if no session can be opened on this many pictures, or on a clip if `kind` is "video".

        Needs no picture, so it comes before any is decoded.
        """
        if kind not in self._media_tokens:
            message = f"The media must be pictures for this model, got a clip of {pictures} frames."
            raise Refused("unsupported_media", message)
        with self.lock:
            try:
                before, after = self._render_first_turn("question", kind, 1 if kind == "video" else pictures)
            except (TemplateError, jinja2.TemplateError):
                raise _no_place(pictures, 0) from None
        token = self._media_tokens[kind]
        if token in after:
            raise _no_place(pictures, before.count(token) + after.count(token))

    def check_question(self, opened_on: OpenedOn | None, pictures: int) -> None:
        """Raise `Refused` if the next turn cannot show this many pictures. `opened_on`: as in `prompt`."""
        with self.lock:
            try:
                rendered = self._render_turn(opened_on, "question", pictures)
            except (TemplateError, jinja2.TemplateError):
                raise _no_place(pictures, 0) from None
        if (places := rendered.count(self._image_token)) != pictures:
            raise _no_place(pictures, places)

    def opening(self, pictures: Sequence[tuple[str, Picture]]) -> Opening:
        """Prepare the pictures of a session and the prompt before its first question.

        `pictures`: (key that identifies the content, RGB picture). The token IDs end with the last image token, so they
        can be prefilled before the question is known.
        """
        return self.opening_on(self.prepare(pictures))

    def clip_opening(self, key: str, frames: Sequence[Picture]) -> Opening:
        """As `opening`, with one clip of RGB frames. Raises `Refused` (unsupported_media) if the model has no video."""
        self.check_opening("video", len(frames))
        return self.opening_on(self.pictures.clip(key, [self.pictures.frame(frame) for frame in frames]), "video")

    def opening_on(self, prepared: Prepared, kind: str = "image") -> Opening:
        """Return the start of a session on prepared pictures, or on a prepared clip if `kind` is "video"."""
        media_token = self._media_tokens[kind]
        with self.lock:
            before, _ = self._render_first_turn("question", kind, len(prepared.pictures))
            ids = self._encoder.encode_start(_expand(before, prepared, media_token))
            media_id = self._encoder.token_id(media_token)
        while ids and ids[-1] != media_id:
            ids.pop()  # some tokenizers append an end token to their input
        return Opening(ids, prepared.pictures, ids.count(media_id), kind)

    def prepare(self, pictures: Sequence[tuple[str, Picture]]) -> Prepared:
        """Prepare the pictures of one request, each a (key that identifies the content, RGB picture)."""
        return joined(self.pictures.picture(key, picture, len(pictures)) for key, picture in pictures)

    def prompt(self, opened_on: OpenedOn | None, text: str, prepared: Prepared = NOTHING) -> list[int]:
        """Return the token IDs of the next turn, from the end of the last answer to the start of the next one.

        `opened_on`: `Opening.opened_on` in the first turn, None in any later turn. `prepared`: pictures of this turn;
        the token IDs include their image tokens. A special token in `text`, such as `<image>`, is encoded as text.
        Raises `Refused` (invalid_request) if the template has no place for the pictures.
        """
        with self.lock:
            hidden_text, literals = self._encoder.hide_specials(text)
            rendered = self._render_turn(opened_on, hidden_text, len(prepared.pictures))
            anchor = ANSWER_END if opened_on is None else self._media_tokens[opened_on.kind]
            return self._encoder.encode_after(anchor, _expand(rendered, prepared, self._image_token), literals)

    def answer_text(self, stop: tuple[str, ...] = ()) -> AnswerText:
        """Return a detokenizer for one answer. `stop`: strings that end the answer."""
        return AnswerText(self.tokenizer, stop)

    def _render_turn(self, opened_on: OpenedOn | None, text: str, pictures: int) -> str:
        """Render what follows the opening's pictures, or the last answer if `opened_on` is None."""
        if opened_on is None:
            return self._render_later_turn(text, pictures)
        return self._render_first_turn(text, opened_on.kind, opened_on.pictures, pictures)[1]

    def _render_first_turn(
        self, text: str, kind: str = "image", opened_pictures: int = 1, more_pictures: int = 0
    ) -> tuple[str, str]:
        """Render the first turn; return the parts before and after the end of the opening's last media token.

        `opened_pictures`: pictures of the opening, of content type `kind`. `more_pictures`: pictures of the question.
        """
        content = [{"type": kind}] * opened_pictures + [{"type": "image"}] * more_pictures
        rendered = self._render([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
        token = self._media_tokens[kind]
        parts = rendered.split(token)
        if len(parts) <= opened_pictures:
            raise TemplateError(f"the chat template renders no {kind} token for a user's {kind}")
        return token.join(parts[:opened_pictures]) + token, token.join(parts[opened_pictures:])

    def _render_later_turn(self, text: str, pictures: int = 0) -> str:
        """Render the text between an earlier answer and the next one. It is the same for every turn but the first."""
        answer = placeholder()
        rendered = self._render(
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "question"}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]},
            ]
        )
        if rendered.count(answer) != 1:
            raise TemplateError("the chat template does not render an earlier answer once")
        return rendered.split(answer)[1]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        conversation = self._system + messages
        if self._joins_content:
            conversation = [{**one, "content": _joined(one["content"], self._media_tokens)} for one in conversation]
        rendered: str = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return rendered


def _joined(parts: list[dict[str, str]], media_tokens: dict[str, str]) -> str:
    """Return the content of a message as LLaVA-1.5 was trained: each media token on a line before the text."""
    return "".join(part["text"] if part["type"] == "text" else media_tokens[part["type"]] + "\n" for part in parts)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, TemplateError) else error_line(error)


def _expand(rendered: str, prepared: Prepared, token: str) -> str:
    """Replace each picture's single media token by all of its tokens, as the processor does."""
    parts = rendered.split(token)
    places = len(parts) - 1
    pictures = len(prepared.tokens)
    if places != pictures:
        raise _no_place(pictures, places)
    return "".join(part + tokens for part, tokens in zip(parts, [*prepared.tokens, ""], strict=True))


def _no_place(pictures: int, places: int) -> Refused:
    message = f"The pictures must fit the model's chat template: it has {places} places here, got {pictures}."
    return Refused("invalid_request", message)
