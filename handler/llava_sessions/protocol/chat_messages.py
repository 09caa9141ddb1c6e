"""Read OpenAI's `messages` as a conversation of questions and answers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import RequestLimits
from ..errors import describe
from .bodies import shown
from .fields import is_unicode
from .openai import ChatMessage, RefusedChat
from .requests import ClipSource, PictureSource

Role = Literal["system", "user", "assistant"]
Part = str | PictureSource | ClipSource

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# The beginning of a data URL with the frames of a clip, separated by commas.
_FRAMES_HEAD = "data:video/jpeg;base64,"
# What joins the texts of one message, and those of successive messages of one role.
_BETWEEN_TEXTS = "\n"
# Parts of all messages, for each message, picture and clip that the limits allow.
_PARTS_PER_ITEM = 8
# Fields of a message that call for what this server does not do, unless they are empty.
UNSUPPORTED_FIELDS = ("tool_calls", "function_call", "audio")


@dataclass
class _Growing:
    """A message of the conversation while further ones of the same role may follow."""

    role: Role
    texts: list[str] = field(default_factory=list)
    pictures: list[PictureSource] = field(default_factory=list)
    clips: list[ClipSource] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Append a part of one of the messages."""
        if isinstance(part, str):
            self.texts.append(part)
        elif isinstance(part, PictureSource):
            self.pictures.append(part)
        else:
            self.clips.append(part)


def read_messages(value: object, limits: RequestLimits, allow_system: bool) -> tuple[ChatMessage, ...]:
    """Return the conversation. Raise `RefusedChat` for its first problem.

    Successive messages of one role become one. System messages at the start become the system message; a later one
    becomes text of the user's at its place. An assistant's message may come first. The last one is a user's, with text
    or a picture or a clip.
    """
    if not isinstance(value, list) or not value:
        raise _refused("messages", "`messages` must be an array of 1 or more objects", value)
    if len(value) > limits.max_history_messages:
        expected = f"`messages` must be an array of at most {limits.max_history_messages:,} objects"
        raise _refused("messages", expected, value, "too_large")
    conversation: list[_Growing] = []
    left = _Left(limits)
    for index, message in enumerate(value):
        role = _role(message, f"messages[{index}]", allow_system)
        if role == "system" and conversation and conversation[-1].role != "system":
            role = "user"
        if not conversation or conversation[-1].role != role:
            conversation.append(_Growing(role))
        for part in _parts(message, role, f"messages[{index}]", limits):
            left.take(part)
            conversation[-1].add(part)
    result = tuple(
        ChatMessage(one.role, _BETWEEN_TEXTS.join(filter(None, one.texts)), tuple(one.pictures), tuple(one.clips))
        for one in conversation
        if one.role != "system" or any(one.texts)
    )
    _check_last(result, limits)
    return result


class _Left:
    """What the texts, pictures and clips of the rest of a conversation may still have."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._parts = _PARTS_PER_ITEM * (limits.max_history_messages + limits.max_history_pictures)
        self._chars = limits.max_history_chars
        self._pictures = limits.max_history_pictures

    def take(self, part: Part) -> None:
        """Count a part. Raise `RefusedChat` if there are too many, or too much text."""
        self._parts -= 1
        if isinstance(part, str):
            self._chars -= len(part)
        else:
            self._pictures -= 1
        limits = self._limits
        if self._chars < 0:
            message = f"`messages` must have at most {limits.max_history_chars:,} characters together, got more"
        elif self._pictures < 0:
            message = (
                f"`messages` must have at most {limits.max_history_pictures:,} pictures and clips together, got more"
            )
        elif self._parts < 0:
            message = "`messages` must have fewer parts, got too many"
        else:
            return
        raise RefusedChat("too_large", message, param="messages")


def _role(message: object, name: str, allow_system: bool) -> Role:
    if not isinstance(message, dict):
        raise _refused(name, f"`{name}` must be an object", message)
    sent = message.get("role")
    role = ROLES.get(sent) if isinstance(sent, str) else None
    if role is None:
        expected = "'system', 'developer', 'user' or 'assistant'"
        got = shown(sent) if isinstance(sent, str) else describe(sent)
        raise RefusedChat("invalid_request", f"`{name}.role` must be {expected}, got {got}", param=f"{name}.role")
    if role == "system" and not allow_system:
        text = "A system message is not supported: the operator sets the system prompt (model-config.yaml)."
        raise RefusedChat("invalid_request", text, param=name)
    for unsupported in UNSUPPORTED_FIELDS:
        if message.get(unsupported) not in (None, []):
            raise _refused(f"{name}.{unsupported}", f"`{name}.{unsupported}` must be absent", message[unsupported])
    return role


def _parts(message: dict[str, Any], role: Role, name: str, limits: RequestLimits) -> Iterator[Part]:
    """Yield the texts, pictures and clips of a message."""
    content = message.get("content")
    where = f"{name}.content"
    if content is None:  # an answer that was stopped before its first token
        content = ""
    if not isinstance(content, str | list):
        raise _refused(where, f"`{where}` must be a string or an array of parts", content)
    items: Iterable[object] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for index, item in enumerate(items):
        yield _part(item, role, where if isinstance(content, str) else f"{where}[{index}]", limits)


def _part(item: Any, role: Role, name: str, limits: RequestLimits) -> Part:
    match item:
        case {"type": "text", "text": str(text)}:
            if not is_unicode(text):
                raise _refused(name, f"`{name}` must be Unicode text", text)
            return text
        case {"type": "image_url" | "video_url" as kind} if role != "user" and _url(item[kind]) is not None:
            raise _refused(name, f"`{name}` must be text in a message of role {role}", item)
        case {"type": "image_url", "image_url": value} if (url := _url(value)) is not None:
            return PictureSource(path=url)
        case {"type": "video_url", "video_url": value} if (url := _url(value)) is not None:
            return _clip(url, value.get("video_frames") if isinstance(value, dict) else None, name, limits)
        case {"type": "text"}:
            raise _refused(name, f"`{name}` must have `text` as a string", item.get("text"))
        case {"type": "image_url" | "video_url" as kind}:
            expected = f"`{name}` must have `{kind}` as a string, or as an object with `url`"
            raise _refused(name, expected, item.get(kind))
        case {"type": str(kind)}:
            message = f"`{name}.type` must be 'text', 'image_url' or 'video_url', got {shown(kind)}"
            raise RefusedChat("invalid_request", message, param=f"{name}.type")
    raise _refused(name, f"`{name}` must be an object with `type` 'text', 'image_url' or 'video_url'", item)


def _url(value: object) -> str | None:
    """Return the URL of a picture or clip: a string, or the `url` of an object. None for anything else."""
    url = value.get("url") if isinstance(value, dict) else value
    return url if isinstance(url, str) else None


def _clip(url: str, count: object, name: str, limits: RequestLimits) -> ClipSource:
    """Return the clip at the URL of a file, or of the frames of a data URL: `data:video/jpeg;base64,FRAME,FRAME`.

    `count`: how many frames of a file are sampled; None for the default.
    """
    is_file = url[: len(_FRAMES_HEAD)].lower() != _FRAMES_HEAD
    if count is not None and not (is_file and type(count) is int and 1 <= count <= limits.max_frames):
        expected = f"an integer from 1 to {limits.max_frames}, with the URL of a file"
        param = f"{name}.video_url.video_frames"
        raise _refused(param, f"`{param}` must be {expected}", count)
    if is_file:
        file = PictureSource(path=url)
        return ClipSource(file=file, count=count if isinstance(count, int) else limits.default_frames)
    payload = url[len(_FRAMES_HEAD) :]
    frames = payload.count(",") + 1
    if frames > limits.max_frames:
        message = f"`{name}` must have at most {limits.max_frames} frames, got {frames:,}"
        raise RefusedChat("too_large", message, param=name)
    return ClipSource(frames=tuple(PictureSource(image=frame) for frame in payload.split(",")))


def _check_last(conversation: tuple[ChatMessage, ...], limits: RequestLimits) -> None:
    """Raise `RefusedChat` unless the last message is a question within the limits of one request."""
    if not conversation or conversation[-1].role != "user":
        role = conversation[-1].role if conversation else "system"
        message = f"`messages` must end with a user's message, got one of role {role}"
        raise RefusedChat("invalid_request", message, param="messages")
    question = conversation[-1]
    count = len(question.pictures) + len(question.clips)
    if not count and not question.text.strip():
        message = "`messages` must end with text that is not only white space, a picture or a clip, got none of them"
        raise RefusedChat("invalid_request", message, param="messages")
    if len(question.text) > limits.max_prompt_chars:
        expected = f"the last of `messages` must have at most {limits.max_prompt_chars:,} characters"
        raise _refused("messages", expected, question.text, "too_large")
    if count > limits.max_pictures:
        message = f"the last of `messages` must have at most {limits.max_pictures} pictures and clips, got {count}"
        raise RefusedChat("too_large", message, param="messages")


def _refused(param: str, expected: str, actual: object, code: str = "invalid_request") -> RefusedChat:
    return RefusedChat(code, f"{expected}, got {describe(actual)}", param=param)
