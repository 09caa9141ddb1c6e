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
import numpy as np

from ..errors import Refused
from ..ipc.messages import PreparedPicture
from .answer_text import AnswerText
from .media_tokens import MediaToken, MediaTokens, no_place
from .pictures import NOTHING, Picture, PicturePreparer, Prepared, joined
from .rendering import TRIAL_QUESTION, Renderer
from .rendering import Message as Message
from .rendering import OpenedOn as OpenedOn
from .rendering import PicturesPrecedeOpening as PicturesPrecedeOpening
from .rendering import TemplateError as TemplateError
from .tokenizer import ANSWER_END, PromptTokenizer


@dataclass(frozen=True)
class Opening:
    """The start of a session: the prompt up to and including its last feature token, and its pictures or clip.

    `image_tokens`: number of feature tokens in `token_ids`. `kind`: "image", or "video" for one clip.
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
    """Converts pictures, clips and text to token IDs by the checkpoint's processor, and makes detokenizers of answers.

    Thread-safe: fast tokenizers keep settings of a call in shared state, so tokenizing holds a lock.
    """

    def __init__(self, processor: Any, system_prompt: str = "") -> None:
        """`processor`: of any family that the engine serves. `system_prompt`: the operator's.

        Raises `TemplateError` for an unsuitable template.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.pictures = PicturePreparer(processor)
        self._renderer = Renderer(processor, system_prompt, _media_tokens(processor, self.pictures))
        self._media = self._renderer.media
        self.takes_clips: bool = "video" in self._media
        # IDs of the feature tokens of pictures and of clips.
        self.media_token_ids: frozenset[int] = self._media.feature_ids
        self.image_token_id: int = processor.image_token_id
        self._encoder = PromptTokenizer(self.tokenizer, processor.image_token, self._media.places)
        self.lock = threading.Lock()  # held while text is tokenized
        # Of whole conversations: a long one must not hold up a short prompt.
        self._whole_encoder: PromptTokenizer | None = None
        self._whole_lock = threading.Lock()

    def check_opening(self, kind: str, pictures: int) -> None:
        """Raise `Refused` if no session can be opened on this many pictures, or on a clip if `kind` is "video".

        `pictures`: for a clip, any number. Needs no decoded picture.
        """
        self._media.check([kind])
        opened_on = OpenedOn(kind, 1 if kind == "video" else pictures)
        with self.lock:
            try:
                before, after = self._renderer.first_turn(TRIAL_QUESTION, opened_on)
            except (TemplateError, jinja2.TemplateError):
                raise no_place(opened_on.kinds, []) from None
        if found := self._media.kinds(after):
            raise no_place(opened_on.kinds, [*self._media.kinds(before), *found])

    def check_question(self, opened_on: OpenedOn | None, pictures: int, clips: int = 0) -> None:
        """Raise `Refused` if the next turn cannot show this many pictures and clips. `opened_on`: as in `prompt`.

        Needs no picture. The code is "unsupported_media" if the model takes no clips,
        and "invalid_request" if the template has no place for them. Raises `PicturesPrecedeOpening` for pictures that
        the template writes before the clip of the opening: `conversation` has them in one message with that clip.
        """
        question = replace(TRIAL_QUESTION, pictures=pictures, clips=clips)
        self._media.check(question.kinds)
        with self.lock:
            self._renderer.turn(opened_on, question)

    def opening(self, pictures: Sequence[tuple[str, Picture]]) -> Opening:
        """Prepare the pictures of a session and the prompt before its first question.

        `pictures`: (key that identifies the content, RGB picture). The token IDs end with the last image token, so they
        can be prefilled before the question is known.
        """
        return self.opening_on(self.prepare(pictures))

    def clip_opening(self, key: str, frames: Sequence[Picture]) -> Opening:
        """As `opening`, with one clip of RGB frames. Raises `Refused` (unsupported_media) if the model has no video."""
        self.check_opening("video", len(frames))
        return self.opening_on(self.prepare_clip(key, frames), "video")

    def opening_on(self, prepared: Prepared, kind: str = "image") -> Opening:
        """Return the start of a session on prepared pictures, or on a prepared clip if `kind` is "video".

        The token IDs end with the last feature token. What the expansion has after it belongs to the first prompt.
        """
        feature_ids = self.media_token_ids
        opened_on = OpenedOn(kind, len(prepared.pictures))
        with self.lock:
            before, _ = self._renderer.first_turn(TRIAL_QUESTION, opened_on)
            ids = self._encoder.encode_start(self._media.expand(before, prepared))
        while ids and ids[-1] not in feature_ids:
            ids.pop()  # the expansion's tail, and the end token that some tokenizers append to their input
        return Opening(ids, prepared.pictures, sum(token in feature_ids for token in ids), kind)

    def prepare(self, pictures: Sequence[tuple[str, Picture]]) -> Prepared:
        """Prepare the pictures of one request, each a (key that identifies the content, RGB picture)."""
        return joined(self.pictures.picture(key, picture, len(pictures)) for key, picture in pictures)

    def prepare_clip(self, key: str, frames: Sequence[Picture]) -> Prepared:
        """Prepare one clip of RGB frames. `key` identifies its content."""
        return self.pictures.clip(key, [self.pictures.frame(frame) for frame in frames])

    def prompt(self, opened_on: OpenedOn | None, text: str, prepared: Prepared = NOTHING) -> list[int]:
        """Return the token IDs of the next turn, from the end of the last answer to the start of the next one.

        `opened_on`: `Opening.opened_on` in the first turn, None in any later turn. `prepared`: pictures, then clips, of
        this turn; the token IDs include their tokens. A special token in `text`, such as `<image>`, is encoded as text.
        In a session that was opened on no picture, the first prompt is the conversation from its very start.
        Raises `Refused` (invalid_request) if the template has no place for the pictures or clips.
        """
        question = Message("user", text, prepared.kinds.count("image"), prepared.kinds.count("video"))
        if opened_on is not None and not opened_on.pictures:
            return self.conversation([question], [prepared] if prepared.pictures else [])
        with self.lock:
            hidden_text, literals = self._encoder.hide_specials(text)
            rendered = self._renderer.turn(opened_on, replace(question, text=hidden_text))
            expanded = self._media.expand(rendered, prepared)
            if opened_on is None:
                return self._encoder.encode_after(ANSWER_END, expanded, literals)
            opened = self._media[opened_on.kind]
            return self._encoder.encode_after(opened.feature, opened.tail + expanded, literals)

    def conversation(
        self, messages: Sequence[Message], prepared: Sequence[Prepared] = (), opened_on: OpenedOn | None = None
    ) -> list[int]:
        """Return the token IDs of a whole conversation, up to the start of the next answer.

        The conversation is rendered and tokenized as a whole, as by the checkpoint's processor. Special tokens in a
        text are encoded as text. `messages`: at most one system message, the first. Questions and answers alternate; an
        answer may come first. If the last message is an answer, the token IDs end with it. `prepared`: the pictures,
        then the clips, of each message that has some. `opened_on`: the first question also shows the pictures or clip
        of an opening, before its own; the token IDs after that opening are returned.

        A system message follows the operator's system prompt, or precedes the first question if the template has no
        place for it. Before an answer that comes first, an empty question is rendered if the template requires one.
        Raises `Refused` (invalid_request) if the template has no place for a message, a picture or a clip.
        """
        shown = joined(prepared)
        if _kinds(messages) != list(shown.kinds):
            raise ValueError("the prepared pictures and clips are not those of the messages")
        literals: dict[str, str] = {}
        hidden = []
        for message in messages:
            text, found = self._encoder.hide_specials(message.text)
            literals.update(found)
            hidden.append(replace(message, text=text))
        rendered = self._renderer.conversation(hidden, opened_on)
        if opened_on is None or not opened_on.pictures:
            expanded = self._media.expand(rendered, shown)
            with self._whole_lock:
                return self._encoder_of_wholes().encode_whole(expanded, literals)
        _, after = self._media.split(rendered, opened_on.pictures)
        opened = self._media[opened_on.kind]
        expanded = opened.tail + self._media.expand(after, shown)
        with self._whole_lock:
            return self._encoder_of_wholes().encode_after(opened.feature, expanded, literals)

    def check_conversation(self, messages: Sequence[Message], opened_on: OpenedOn | None = None) -> None:
        """Raise `Refused` if the template has no place for a message, a picture or a clip. Needs no picture.

        An opening has no place for a message before its pictures. The code is "unsupported_media" if the model takes no
        clips, else "invalid_request".
        """
        kinds = _kinds(messages)
        self._media.check(kinds)
        short = [replace(message, text=message.text and "text") for message in messages]
        rendered = self._renderer.conversation(short, opened_on)
        if opened_on is not None and opened_on.pictures:
            before, _ = self._renderer.first_turn(TRIAL_QUESTION, opened_on)
            if not rendered.startswith(before):
                raise _precedes_opening()
            kinds = [*opened_on.kinds, *kinds]
        if (found := self._media.kinds(rendered)) != kinds:
            raise no_place(kinds, found)

    def spans(
        self, token_ids: Sequence[int], prepared: Sequence[Prepared], start: int = 0
    ) -> tuple[tuple[int, int], ...]:
        """Return the positions of the first feature token, and one after the last one, of each picture and clip.

        `token_ids`: a conversation that shows `prepared`, in order, from token `start` on. The text between the frames
        of a clip belongs to its span.
        """
        return self._media.spans(token_ids, prepared, start)

    def _encoder_of_wholes(self) -> PromptTokenizer:
        """Return the tokenizer of whole conversations: a copy, made when it is first used."""
        if self._whole_encoder is None:
            with self.lock:
                self._whole_encoder = self._encoder.copy()
        return self._whole_encoder

    def answer_text(self, stop: tuple[str, ...] = ()) -> AnswerText:
        """Return a detokenizer for one answer. `stop`: strings that end the answer."""
        return AnswerText(self.tokenizer, stop)


def _media_tokens(processor: Any, preparer: PicturePreparer) -> MediaTokens:
    """Find out how the processor expands a picture, and a clip if it takes one, from a small black one."""
    black = np.zeros((8, 8, 3), np.uint8)
    by_kind = {"image": _media_token(processor, processor.image_token, preparer.picture("", black).tokens[0])}
    if hasattr(processor, "video_processor"):
        clip = preparer.clip("", [preparer.frame(black)])
        by_kind["video"] = _media_token(processor, processor.video_token, clip.tokens[0])
    return MediaTokens(by_kind)


def _media_token(processor: Any, place: str, expansion: str) -> MediaToken:
    """Return the tokens of a kind of media. InternVL expands the place of a clip to the feature tokens of pictures."""
    feature = place if place in expansion else processor.image_token
    feature_id: int = processor.tokenizer.convert_tokens_to_ids(feature)
    return MediaToken(place, feature, feature_id, expansion.rpartition(feature)[2])


def _kinds(messages: Sequence[Message]) -> list[str]:
    """Return the kinds of all pictures and clips of a conversation, in order."""
    return [kind for message in messages for kind in message.kinds]


def _precedes_opening() -> Refused:
    message = (
        "`messages` must begin with a question about the pictures that the session was opened on, or show pictures "
        "with the first question, got an earlier message."
    )
    return Refused("invalid_request", message, param="messages")
