"""The checkpoint's chat template: pictures and text to token IDs, part by part of a growing conversation.

Uses the checkpoint's own `transformers` processor. A conversation grows by token IDs only. An answer is never tokenized
again, because BPE may merge its text differently.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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
class Message:
    """One message of a conversation. Its `pictures` precede its text, which may be empty."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: int = 0


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
        self._system_prompt = system_prompt
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
        self._has_system_place = self._renders_in_order("system", "user")
        self._takes_greeting = self._renders_in_order("assistant", "user")
        self._whole_encoder: PromptTokenizer | None = None
        self._whole_lock = threading.Lock()

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

    def _renders_in_order(self, first: str, second: str) -> bool:
        """Return whether the template renders the texts of these two roles in order."""
        texts = placeholder(), placeholder()
        earlier = [] if first == "system" else [_message(first, texts[0])]
        try:
            rendered = self._render([*earlier, _message(second, texts[1])], texts[0] if first == "system" else "")
        except Exception:  # a template raises what Jinja or its own code raises
            return False
        return texts[0] in rendered and rendered.rfind(texts[0]) < rendered.find(texts[1])

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
        the token IDs include their image tokens. A special token in `text`, such as `<image>`, is encoded as text. In a
        session that was opened on no picture, the first prompt is the conversation from its very start.
        Raises `Refused` (invalid_request) if the template has no place for the pictures.
        """
        if opened_on is not None and not opened_on.pictures:
            question = Message("user", text, len(prepared.pictures))
            return self.conversation([question], [prepared] if prepared.pictures else [])
        with self.lock:
            hidden_text, literals = self._encoder.hide_specials(text)
            rendered = self._render_turn(opened_on, hidden_text, len(prepared.pictures))
            anchor = ANSWER_END if opened_on is None else self._media_tokens[opened_on.kind]
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
        rendered = self._render_conversation(hidden, opened_on)
        if opened_on is None or not opened_on.pictures:
            expanded = _expand(rendered, shown, self._image_token)
            with self._whole_lock:
                return self._encoder_of_wholes().encode_whole(expanded, literals)
        token = self._media_tokens[opened_on.kind]
        after = token.join(rendered.split(token)[opened_on.pictures :])
        with self._whole_lock:
            expanded = _expand(after, shown, self._image_token)
            return self._encoder_of_wholes().encode_after(token, expanded, literals)

    def check_conversation(self, messages: Sequence[Message], opened_on: OpenedOn | None = None) -> None:
        """Raise `Refused` if the template has no place for a message or for a picture. Needs no picture."""
        short = [replace(message, text=message.text and "text") for message in messages]
        rendered = self._render_conversation(short, opened_on)
        pictures = sum(message.pictures for message in messages)
        if opened_on is not None and opened_on.kind == "image":
            pictures += opened_on.pictures
        if (places := rendered.count(self._image_token)) != pictures:
            raise _no_place(pictures, places)

    def _encoder_of_wholes(self) -> PromptTokenizer:
        """Return the tokenizer of whole conversations, a copy: a long one must not hold up a short prompt."""
        if self._whole_encoder is None:
            with self.lock:
                self._whole_encoder = self._encoder.copy()
        return self._whole_encoder

    def _render_conversation(self, messages: Sequence[Message], opened_on: OpenedOn | None) -> str:
        """Render a conversation up to the start of the next answer, or up to the end of its last answer."""
        system = messages[0].text if messages and messages[0].role == "system" else ""
        turns = [message for message in messages if message.role != "system"]
        if turns[0].role == "assistant" and not self._takes_greeting:
            turns.insert(0, Message("user", ""))
        opened = [{"type": opened_on.kind}] * opened_on.pictures if opened_on is not None else []
        conversation = []
        for message in turns:
            text = message.text
            content: list[dict[str, str]] = []
            if message.role == "user":
                if system and not self._has_system_place:
                    text = f"{system}\n\n{text}" if text else system
                    system = ""
                content = [*opened, *[{"type": "image"}] * message.pictures]
                opened = []
            conversation.append(_message(message.role, text, content))
        following = placeholder()
        try:
            if turns[-1].role == "user":
                return self._render(conversation, system)
            rendered = self._render([*conversation, _message("user", following)], system)
            end = self._render_later_turn(following)
        except (TemplateError, jinja2.TemplateError) as error:
            message_ = f"The messages must fit the model's chat template, got one that it rejects: {_in_words(error)}"
            raise Refused("invalid_request", message_) from None
        if not rendered.endswith(end):
            raise Refused("invalid_request", "The last answer must fit the model's chat template, got another end.")
        return rendered.removesuffix(end)

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
        rendered = self._render([_message("user", text, content)])
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
                _message("user", "question", [{"type": "image"}]),
                _message("assistant", answer),
                _message("user", text, [{"type": "image"}] * pictures),
            ]
        )
        if rendered.count(answer) != 1:
            raise TemplateError("the chat template does not render an earlier answer once")
        return rendered.split(answer)[1]

    def _render(self, messages: list[dict[str, Any]], system: str = "") -> str:
        """Render messages after the operator's system prompt and a client's one."""
        prompts = "\n\n".join(filter(None, (self._system_prompt, system)))
        conversation = [_message("system", prompts), *messages] if prompts else messages
        if self._joins_content:
            conversation = [{**one, "content": _joined(one["content"], self._media_tokens)} for one in conversation]
        rendered: str = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return rendered


def _message(role: str, text: str, media: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """Return a message as templates take it. One that shows media has no empty text."""
    texts = [{"type": "text", "text": text}] if text or not media else []
    return {"role": role, "content": [*media, *texts]}


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
