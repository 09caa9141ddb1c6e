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

from ..errors import Refused
from ..ipc.messages import PreparedPicture
from .answer_text import AnswerText
from .pictures import NOTHING, Picture, PicturePreparer, Prepared, joined
from .rendering import Message as Message
from .rendering import OpenedOn as OpenedOn
from .rendering import Renderer
from .rendering import TemplateError as TemplateError
from .tokenizer import ANSWER_END, PromptTokenizer


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
        self._renderer = Renderer(processor, system_prompt)
        self._image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self.pictures = PicturePreparer(processor)
        self._encoder = PromptTokenizer(self.tokenizer, self._image_token)
        self.lock = threading.Lock()  # held while text is tokenized
        # Of whole conversations: a long one must not hold up a short prompt.
        self._whole_encoder: PromptTokenizer | None = None
        self._whole_lock = threading.Lock()

    def check_opening(self, kind: str, pictures: int) -> None:
        """Raise `Refused` if no session can be opened on this many pictures, or on a clip if `kind` is "video".

        Needs no picture, so it comes before any is decoded.
        """
        if kind not in self._renderer.media_tokens:
            message = f"The media must be pictures for this model, got a clip of {pictures} frames."
            raise Refused("unsupported_media", message)
        with self.lock:
            try:
                before, after = self._renderer.first_turn("question", kind, 1 if kind == "video" else pictures)
            except (TemplateError, jinja2.TemplateError):
                raise _no_place(pictures, 0) from None
        token = self._renderer.media_tokens[kind]
        if token in after:
            raise _no_place(pictures, before.count(token) + after.count(token))

    def check_question(self, opened_on: OpenedOn | None, pictures: int) -> None:
        """Raise `Refused` if the next turn cannot show this many pictures. `opened_on`: as in `prompt`."""
        with self.lock:
            try:
                rendered = self._renderer.turn(opened_on, "question", pictures)
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
        media_token = self._renderer.media_tokens[kind]
        with self.lock:
            before, _ = self._renderer.first_turn("question", kind, len(prepared.pictures))
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
        the token IDs include their image tokens. A special token in `text`, such as `<image>`, is encoded as text. In a
        session that was opened on no picture, the first prompt is the conversation from its very start.
        Raises `Refused` (invalid_request) if the template has no place for the pictures.
        """
        if opened_on is not None and not opened_on.pictures:
            question = Message("user", text, len(prepared.pictures))
            return self.conversation([question], [prepared] if prepared.pictures else [])
        with self.lock:
            hidden_text, literals = self._encoder.hide_specials(text)
            rendered = self._renderer.turn(opened_on, hidden_text, len(prepared.pictures))
            anchor = ANSWER_END if opened_on is None else self._renderer.media_tokens[opened_on.kind]
            return self._encoder.encode_after(anchor, _expand(rendered, prepared, self._image_token), literals)

    def conversation(
        self, messages: Sequence[Message], prepared: Sequence[Prepared] = (), opened_on: OpenedOn | None = None
    ) -> list[int]:
        """Return the token IDs of a whole conversation, up to the start of the next answer.

        The conversation is rendered and tokenized as a whole, as by the checkpoint's processor. Special tokens in a
        text are encoded as text. `messages`: at most one system message, the first. Questions and answers alternate; an
        answer may come first. If the last message is an answer, the token IDs end with it. `prepared`: the pictures of
        each message that has some. `opened_on`: the first question also shows the pictures of an opening, before its
        own; the token IDs after that opening are returned.

        A system message follows the operator's system prompt, or precedes the first question if the template has no
        place for it. Before an answer that comes first, an empty question is rendered if the template requires one.
        Raises `Refused` (invalid_request) if the template has no place for a message or a picture.
        """
        shown = joined(prepared)
        if sum(message.pictures for message in messages) != len(shown.pictures):
            raise ValueError("the prepared pictures are not those of the messages")
        literals: dict[str, str] = {}
        hidden = []
        for message in messages:
            text, found = self._encoder.hide_specials(message.text)
            literals.update(found)
            hidden.append(replace(message, text=text))
        rendered = self._renderer.conversation(hidden, opened_on)
        if opened_on is None or not opened_on.pictures:
            expanded = _expand(rendered, shown, self._image_token)
            with self._whole_lock:
                return self._encoder_of_wholes().encode_whole(expanded, literals)
        token = self._renderer.media_tokens[opened_on.kind]
        after = token.join(rendered.split(token)[opened_on.pictures :])
        with self._whole_lock:
            expanded = _expand(after, shown, self._image_token)
            return self._encoder_of_wholes().encode_after(token, expanded, literals)

    def check_conversation(self, messages: Sequence[Message], opened_on: OpenedOn | None = None) -> None:
        """Raise `Refused` if the template has no place for a message or for a picture. Needs no picture.

        An opening has no place for a message before its pictures.
        """
        short = [replace(message, text=message.text and "text") for message in messages]
        rendered = self._renderer.conversation(short, opened_on)
        if opened_on is not None and opened_on.pictures:
            before, _ = self._renderer.first_turn("question", opened_on.kind, opened_on.pictures)
            if not rendered.startswith(before):
                raise _precedes_opening()
        pictures = sum(message.pictures for message in messages)
        if opened_on is not None and opened_on.kind == "image":
            pictures += opened_on.pictures
        if (places := rendered.count(self._image_token)) != pictures:
            raise _no_place(pictures, places)

    def _encoder_of_wholes(self) -> PromptTokenizer:
        """Return the tokenizer of whole conversations: a copy, made when it is first used."""
        if self._whole_encoder is None:
            with self.lock:
                self._whole_encoder = self._encoder.copy()
        return self._whole_encoder

    def answer_text(self, stop: tuple[str, ...] = ()) -> AnswerText:
        """Return a detokenizer for one answer. `stop`: strings that end the answer."""
        return AnswerText(self.tokenizer, stop)


def _expand(rendered: str, prepared: Prepared, token: str) -> str:
    """Replace each picture's single media token by all of its tokens, as the processor does."""
    parts = rendered.split(token)
    places = len(parts) - 1
    pictures = len(prepared.tokens)
    if places != pictures:
        raise _no_place(pictures, places)
    return "".join(part + tokens for part, tokens in zip(parts, [*prepared.tokens, ""], strict=True))


def _precedes_opening() -> Refused:
    message = (
        "`messages` must begin with a question about the pictures that the session was opened on, or show pictures "
        "with the first question, got an earlier message."
    )
    return Refused("invalid_request", message, param="messages")


def _no_place(pictures: int, places: int) -> Refused:
    message = f"The pictures must fit the model's chat template: it has {places} places here, got {pictures}."
    return Refused("invalid_request", message)
