"""Read the body of an OpenAI chat completion request as a `Chat`. Pure.

Many programs send each option that they know, with the value that changes nothing. Such an option is ignored, and so is
one that this module does not know. An option that would change the answer is rejected by the client's name of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..config import RequestLimits
from ..errors import Refused, describe
from .chat_messages import read_messages
from .constants import FORWARDED_API_HEADER, NEW_SESSION, SESSION_HEADER, STREAMING_API
from .fields import is_unicode
from .openai import Chat, ChatMessage, RefusedChat
from .requests import session_in_header
from .validation import Problem, add_retry_key, refusal, validated

MODEL_MAX_CHARS = 256
# Option -> its values that change nothing. Null counts as absent.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    # OpenAI's
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"], []),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's, SGLang's and llama.cpp's
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": ("",),
    "chat_template": ("",),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "echo": (False,),
    "enable_thinking": (False,),
    "grammar": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "min_p": (0,),
    "mm_processor_kwargs": ({},),
    "mirostat": (0,),
    "prompt_logprobs": (),
    "reasoning": ({}, {"effort": "none"}, {"enabled": False}),
    "regex": ("",),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "thinking": ({"type": "disabled"},),
    "top_k": (0, -1),
    "truncate_prompt_tokens": (-1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    # this server's native words, and those of its relatives, in a request that has none of their meaning
    "history": ([],),
    "image": (),
    "images": ([],),
    "inputs": (),
    "max_new_tokens": (),
    "path": (),
    "prompt_text": (),
    "requestType": (),
    "resume": (),
    "session_id": (),
    "type": (),
    "video": ([],),
    "video_frames": (),
}
# Field of `Chat` -> the client's names of it; the first one that is present counts.
OPTION_NAMES: dict[str, tuple[str, ...]] = {
    "max_new_tokens": ("max_completion_tokens", "max_tokens"),
    **{
        name: (name,)
        for name in (
            *("stream", "min_tokens", "temperature", "top_p", "seed", "stop", "ignore_eos"),
            *("request_id", "deadline_ms", "session_token"),
        )
    },
}
# Fields of `Chat` that change the form of an answer only, and the deadline, whose default depends on the form.
_FORM_FIELDS = ("stream", "include_usage", "is_sse", "model", "deadline_ms")
_MINUS_ONE_IS_ABSENT = ("max_new_tokens", "seed")


def parse_chat(
    payload: dict[str, Any], headers: Mapping[str, object], limits: RequestLimits, is_sse: bool, allow_system: bool
) -> Chat:
    """Return the request of a body in OpenAI's words. Raise `RefusedChat`, which names every malformed option.

    `is_sse`: a stream is sent as server-sent events.
    """
    try:
        problems = [*_unsupported(payload), *_malformed(payload), *_session_problems(headers)]
        fields: dict[str, Any] = {
            **_options(payload),
            "session_id": session_in_header(headers),
            "messages": read_messages(payload.get("messages"), limits, allow_system),
            "include_usage": _includes_usage(payload),
            "model": payload.get("model") or "",
            "label": _label(payload),
            "is_sse": is_sse,
        }
        names = {field: found for field in OPTION_NAMES if (found := _sent_name(payload, field)) is not None}
        _add_defaults(fields, headers, limits)
        known = {field: value for field, value in fields.items() if field != "model" or isinstance(value, str)}
        chat, malformed = validated(Chat, known, limits, names)
        problems += malformed
        if problems or chat is None:
            raise refusal(problems, Chat)
    except RefusedChat:
        raise
    except Refused as error:
        raise RefusedChat(error.code, error.message, param=error.param) from None
    add_retry_key(chat, headers, lambda: _content(chat))
    return chat


def _content(chat: Chat) -> dict[str, Any]:
    """Return what decides the answer, with the pictures as digests: their text takes megabytes."""
    content: dict[str, Any] = {name: getattr(chat, name) for name in Chat.model_fields if name not in _FORM_FIELDS}
    content["messages"] = [
        (message.role, message.text, [_digest(picture.path or "") for picture in message.pictures], _clips(message))
        for message in chat.messages
    ]
    return content


def _clips(message: ChatMessage) -> list[tuple[int | None, list[str]]]:
    """Return the number of sampled frames of each clip, and the digests of its frames or of its file."""
    return [(clip.count, [_digest(one.image or one.path or "") for one in clip.sources]) for clip in message.clips]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _unsupported(payload: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each option that would change the answer, and that this server does not have."""
    for name, neutral in NEUTRAL_VALUES.items():
        value = payload.get(name)
        if value is None or any(_equal(value, one) for one in neutral):
            continue
        expected = " or ".join(["absent", *map(json.dumps, neutral)])
        yield Problem("", "invalid_request", f"`{name}` must be {expected}, got {describe(value)}", name)


def _malformed(payload: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problems of the options that no field of `Chat` has under the client's name."""
    model = payload.get("model")
    if model is not None and not (isinstance(model, str) and len(model) <= MODEL_MAX_CHARS and is_unicode(model)):
        expected = f"Unicode text of at most {MODEL_MAX_CHARS} characters"
        yield Problem("model", "invalid_request", f"`model` must be {expected}, got {describe(model)}")
    for name in ("user", "prompt_cache_key"):
        if not isinstance(payload.get(name), str | None):
            message = f"`{name}` must be a string, got {describe(payload[name])}"
            yield Problem("label", "invalid_request", message, name)
    options = payload.get("stream_options")
    if options is not None and not isinstance(options, dict):
        message = f"`stream_options` must be an object, got {describe(options)}"
        yield Problem("include_usage", "invalid_request", message, "stream_options")


def _session_problems(headers: Mapping[str, object]) -> Iterator[Problem]:
    value = headers.get(SESSION_HEADER.lower())
    if isinstance(value, str) and value.strip() == NEW_SESSION:
        message = (
            f"the {SESSION_HEADER} header must be absent or a session's ID in a request with `messages`, got "
            f"{NEW_SESSION}"
        )
        yield Problem("session_id", "invalid_request", message)


def _options(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the client's options by the names of `Chat`'s fields."""
    options: dict[str, Any] = {}
    for field in OPTION_NAMES:
        name = _sent_name(payload, field)
        if name is None:
            continue
        value = payload[name]
        if not (field in _MINUS_ONE_IS_ABSENT and _equal(value, -1)):
            options[field] = value
    return options


def _sent_name(payload: Mapping[str, Any], field: str) -> str | None:
    """Return the client's name of a field of `Chat`; None if the client has not sent it."""
    return next((name for name in OPTION_NAMES[field] if payload.get(name) is not None), None)


def _add_defaults(fields: dict[str, Any], headers: Mapping[str, object], limits: RequestLimits) -> None:
    """Set what the configuration and the headers decide, and lower the number of tokens to the limit.

    SageMaker's streaming operation asks for a stream by its name alone. `stream` in the body has precedence.
    """
    fields.setdefault("stream", headers.get(FORWARDED_API_HEADER.lower()) == STREAMING_API)
    fields.setdefault("max_new_tokens", limits.default_new_tokens)
    fields.setdefault("deadline_ms", None if fields["stream"] is True else limits.default_deadline_ms)
    most = fields["max_new_tokens"]
    least = fields.get("min_tokens")
    if type(most) is int and most > limits.max_new_tokens:
        fields["max_new_tokens"] = limits.max_new_tokens
        if type(least) is int and limits.max_new_tokens < least <= most:
            fields["min_tokens"] = limits.max_new_tokens


def _includes_usage(payload: Mapping[str, Any]) -> bool:
    options = payload.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _label(payload: Mapping[str, Any]) -> str | None:
    """Return a digest of what the client says about whose conversation it is; None if it says nothing."""
    label = [payload.get("user"), payload.get("prompt_cache_key")]
    if label == [None, None] or not all(isinstance(value, str | None) for value in label):
        return None
    return _digest(json.dumps(label))


def _equal(value: object, other: object) -> bool:
    """Compare JSON values: true is not 1, and 1.0 is."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return value == other
