"""Conversations as text, by the checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2

from ..errors import Refused, error_line
from .media_tokens import MediaTokens, no_place
from .tokenizer import placeholder


class PicturesPrecedeOpening(Refused):
    """The template writes the pictures of a question before the clip that the session was opened on."""


class TemplateError(Exception):
    """The checkpoint's chat template or tokenizer can't be used for chats about pictures. The message names why."""


@dataclass(frozen=True)
class OpenedOn:
    """The pictures with which a session was opened: `kind` "image" and their count, or "video" and 1."""

    kind: str
    pictures: int

    @property
    def kinds(self) -> list[str]:
        """The kinds of the pictures, or of the clip, as in `Prepared.kinds`."""
        return [self.kind] * self.pictures


@dataclass(frozen=True)
class Message:
    """One message of a conversation. Its `pictures` precede its `clips`, and these its text, which may be empty."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: int = 0
    clips: int = 0

    @property
    def kinds(self) -> list[str]:
        """The kinds of its pictures and clips, in order, as in `Prepared.kinds`."""
        return ["image"] * self.pictures + ["video"] * self.clips


# The question with which the places of a template are found.
TRIAL_QUESTION = Message("user", "question")


class Renderer:
    """Renders turns and whole conversations. Thread-safe.

    `media`: the tokens of each kind of media that the template has places for, "image" and perhaps "video".
    """

    def __init__(self, processor: Any, system_prompt: str, media: MediaTokens) -> None:
        """`system_prompt`: the operator's. `media`: of each kind that the processor takes.

        Raises `TemplateError` for an unsuitable template.
        """
        self._processor = processor
        self._system_prompt = system_prompt
        self.media = media
        if not getattr(processor, "chat_template", None):
            raise TemplateError("the processor has no chat template (chat_template.jinja)")
        if found := media.kinds(system_prompt):
            raise TemplateError(f"`system_prompt` must not contain {media[found[0]].place!r}")
        # Whether the template takes a message's content as one string, as templates for text alone do.
        self._joins_content = False
        self._choose_content()
        if "video" in media and not self._renders_clips():
            self.media = MediaTokens({"image": media["image"]})
        self._has_system_place = self._renders_in_order("system", "user")
        self._takes_greeting = self._renders_in_order("assistant", "user")

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
        _, after = self.first_turn(TRIAL_QUESTION, OpenedOn("image", 1))
        if "question" not in after or self.media.kinds(after):
            raise TemplateError("it does not put the picture before the question")
        later = self.later_turn(TRIAL_QUESTION)
        if "question" not in later:
            raise TemplateError("it does not render a second question")
        if self.media.kinds(later):
            place = self.media["image"].place
            raise TemplateError(f"it writes {place!r} for a question without a picture")

    def _renders_clips(self) -> bool:
        """Return whether the template has a place for a clip, before the question."""
        try:
            _, after = self.first_turn(TRIAL_QUESTION, OpenedOn("video", 1))
        except Exception:  # a template raises what Jinja or its own code raises
            return False
        return "question" in after and not self.media.kinds(after)

    def _renders_in_order(self, first: str, second: str) -> bool:
        """Return whether the template renders the texts of these two roles in order."""
        texts = placeholder(), placeholder()
        earlier = [] if first == "system" else [_message(first, texts[0])]
        try:
            rendered = self._render([*earlier, _message(second, texts[1])], texts[0] if first == "system" else "")
        except Exception:  # a template raises what Jinja or its own code raises
            return False
        return texts[0] in rendered and rendered.rfind(texts[0]) < rendered.find(texts[1])

    def turn(self, opened_on: OpenedOn | None, question: Message) -> str:
        """Render what follows the opening's pictures, or the last answer if `opened_on` is None.

        Raises `Refused` if the template has no place for the question's pictures and clips, and
        `PicturesPrecedeOpening` if it writes the pictures before the clip of the opening.
        """
        try:
            rendered = self.later_turn(question) if opened_on is None else self.first_turn(question, opened_on)[1]
        except (TemplateError, jinja2.TemplateError):
            if opened_on is not None and opened_on.kind == "video" and question.pictures:
                raise _precedes_opening(question.pictures) from None
            raise no_place(question.kinds, []) from None
        if (places := self.media.kinds(rendered)) != question.kinds:
            raise no_place(question.kinds, places)
        return rendered

    def first_turn(self, question: Message, opened_on: OpenedOn) -> tuple[str, str]:
        """Render the first turn; return the parts before and after the end of the opening's last place.

        The question also shows the opening, before its own pictures and clips. Raises `TemplateError` if the template
        does not write the opening first.
        """
        rendered = self._render([_message("user", question.text, [*opened_on.kinds, *question.kinds])])
        if self.media.kinds(rendered)[: opened_on.pictures] != opened_on.kinds:
            token = self.media[opened_on.kind].place
            raise TemplateError(f"the chat template writes no {token!r} where a user shows {opened_on.kind} content")
        return self.media.split(rendered, opened_on.pictures)

    def later_turn(self, question: Message) -> str:
        """Render the text between an earlier answer and the next one. It is the same for every turn but the first."""
        answer = placeholder()
        rendered = self._render(
            [
                _message("user", TRIAL_QUESTION.text, ["image"]),
                _message("assistant", answer),
                _message("user", question.text, question.kinds),
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
            conversation = [{**one, "content": _joined(one["content"], self.media)} for one in conversation]
        rendered: str = self._processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return rendered

    def conversation(self, messages: Sequence[Message], opened_on: OpenedOn | None) -> str:
        """Render a conversation up to the start of the next answer, or up to the end of its last answer.

        Raises `Refused` if the template rejects it.
        """
        system, turns = self._placed(messages)
        try:
            if messages[-1].role == "user":
                return self._render(_contents(turns, opened_on), system)
            following = placeholder()
            rendered = self._render(_contents([*turns, Message("user", following)], opened_on), system)
            end = self.later_turn(Message("user", following))
        except Exception:  # a template raises what Jinja or its own code raises
            message = "The messages must fit the model's chat template, got a conversation that it rejects."
            raise Refused("invalid_request", message) from None
        if not rendered.endswith(end):
            raise Refused("invalid_request", "The last answer must fit the model's chat template, got another end.")
        return rendered.removesuffix(end)

    def _placed(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
        """Return the system message, and the other messages in a form that the template takes.

        A system message without a place precedes the first question. If a question must come first, it may be empty.
        """
        system = messages[0].text if messages[0].role == "system" else ""
        turns = [message for message in messages if message.role != "system"]
        if turns[0].role == "assistant" and not self._takes_greeting:
            turns.insert(0, Message("user", ""))
        if not system or self._has_system_place:
            return system, turns
        first = next(index for index, message in enumerate(turns) if message.role == "user")
        question = turns[first]
        turns[first] = replace(question, text="\n\n".join(filter(None, (system, question.text))))
        return "", turns


def _contents(turns: Sequence[Message], opened_on: OpenedOn | None) -> list[dict[str, Any]]:
    """Return messages as templates take them. The first question also shows the opening, before its own media."""
    opened = opened_on.kinds if opened_on is not None else []
    contents = []
    for message in turns:
        kinds = message.kinds
        if message.role == "user":
            kinds = [*opened, *kinds]
            opened = []
        contents.append(_message(message.role, message.text, kinds))
    return contents


def _message(role: str, text: str, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """Return a message as templates take it. One that shows pictures or clips has no empty text."""
    texts = [{"type": "text", "text": text}] if text or not kinds else []
    return {"role": role, "content": [*({"type": kind} for kind in kinds), *texts]}


def _joined(parts: list[dict[str, str]], media: MediaTokens) -> str:
    """Return the content of a message as LLaVA-1.5 was trained: each place on a line before the text."""
    return "".join(part["text"] if part["type"] == "text" else media[part["type"]].place + "\n" for part in parts)


def _precedes_opening(pictures: int) -> PicturesPrecedeOpening:
    """Return the error for a template that writes the pictures of a message before its clips, as LLaVA's do."""
    message = f"The first question about a clip must show no picture after it for this model, got {pictures}."
    return PicturesPrecedeOpening("invalid_request", message)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, TemplateError) else error_line(error)
