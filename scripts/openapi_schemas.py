"""JSON Schemas of the requests and replies in docs/openapi.yaml. scripts/openapi_document.py prints that file.

The native requests are the pydantic models of handler/llava_sessions/protocol. The description of a field is taken from
its error message. The limits are the defaults of the configuration.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "handler"))

from llava_sessions.config import RequestLimits
from llava_sessions.ipc.messages import Timings, Usage
from llava_sessions.protocol.chat_messages import ROLES, UNSUPPORTED_FIELDS
from llava_sessions.protocol.chat_payload import MODEL_MAX_CHARS, NEUTRAL_VALUES, OPTION_NAMES
from llava_sessions.protocol.constants import SESSION_ID_MAX_CHARS, SESSION_ID_PATTERN
from llava_sessions.protocol.openai import Chat
from llava_sessions.protocol.requests import Ask, BaseRequest, Cancel, Close, Describe, Open, PastTurn

Schema = dict[str, Any]

_LIMITS = RequestLimits()
SESSION_ID: Schema = {
    "type": "string",
    "maxLength": SESSION_ID_MAX_CHARS,
    "pattern": f"^{SESSION_ID_PATTERN.pattern}$",
}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": _LIMITS.max_stop_chars}
_VIDEO: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "maxItems": _LIMITS.max_frames, "items": {"type": "string"}},
    ]
}
# What validators check, and what pydantic's own schemas therefore lack.
_CHECKED: dict[str, Schema] = {
    "prompt_text": {"minLength": 1, "maxLength": _LIMITS.max_prompt_chars, "pattern": r"\S"},
    "images": {"maxItems": _LIMITS.max_pictures},
    "video_frames": {"maximum": _LIMITS.max_frames},
    "history": {"maxItems": _LIMITS.max_history_messages // 2},
    "max_new_tokens": {"maximum": _LIMITS.max_new_tokens, "default": _LIMITS.default_new_tokens},
    "min_tokens": {"maximum": _LIMITS.max_new_tokens},
    "session_id": SESSION_ID,
    "resume": SESSION_ID,
}
# Options of chat completions whose range is wider than that of the field of `Chat`.
_WIDER: dict[str, Schema] = {
    "max_completion_tokens": {"type": "integer", "minimum": -1, "not": {"const": 0}},
    "max_tokens": {"type": "integer", "minimum": -1, "not": {"const": 0}},
    "min_tokens": {"type": "integer", "minimum": 0},
    "seed": {"type": "integer", "minimum": -1, "exclusiveMaximum": 2**63},
}
# What a field means, where its name and its error message do not say it.
_MEANINGS = {
    "image": "One picture.",
    "images": "Several pictures.",
    "path": "One picture.",
    "video": "One clip.",
    "video_frames": f"The most frames that are sampled from the file. The default is {_LIMITS.default_frames}.",
    "history": "Earlier turns, which are prefilled as they are.",
    "resume": "The ID of a session to continue under a new ID.",
    "stream": "Whether the answer is streamed.",
    "max_new_tokens": "The most tokens of the answer.",
    "min_tokens": "Nothing ends the answer before it has so many tokens.",
    "temperature": "0 is greedy.",
    "stop": "Texts that end the answer.",
    "ignore_eos": "Whether an end-of-sequence token does not end the answer.",
    "return_token_ids": "Whether the reply has the token IDs of the answer.",
    "deadline_ms": "Milliseconds after which the answer ends with the text so far.",
    "confirm_s": "Seconds after which the session expires unless another request names it.",
    "request_id": "Identifies a retry.",
    "session_token": "Binds the session to this token.",
}
_CHAT_DESCRIPTIONS = {
    "max_completion_tokens": "An integer above 0, or -1, which counts as absent. The configured limit caps it.",
    "max_tokens": "As `max_completion_tokens`, which has precedence.",
    "stream": "Whether the answer is streamed. Without it, SageMaker's streaming operation asks for a stream.",
    "request_id": "Not in OpenAI's API: 16 to 64 printable ASCII characters that identify a retry.",
    "deadline_ms": "Not in OpenAI's API: milliseconds after which the answer ends with the text so far.",
    "session_token": "Not in OpenAI's API: 16 to 256 printable ASCII characters, the token of the session.",
}


def schemas() -> dict[str, Schema]:
    """Return all schemas by their names."""
    return {**_native_requests(), **_chat_requests(), **_native_replies(), **_chat_replies()}


def ref(name: str) -> Schema:
    """Return a reference to a schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def error(codes: list[str], is_openai: bool) -> Schema:
    """Return the schema of an error with one of these codes."""
    codes_only = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    return {"allOf": [ref("OpenAIError" if is_openai else "Error"), codes_only]}


def _native_requests() -> dict[str, Schema]:
    return {
        "StartSession": _request(Open, type="start_session"),
        "SendTextPrompt": _request(Ask, type="send_text_prompt"),
        "Cancel": _request(Cancel, type="cancel"),
        "CloseSession": _request(Close, type="close_session"),
        "DescribeSession": _request(Describe, type="describe_session"),
        "NewSession": _request(Open, requestType="NEW_SESSION"),
        "Close": _request(Close, requestType="CLOSE"),
        "PastTurn": _request(PastTurn),
    }


def _request(model: type[BaseRequest], **action: str) -> Schema:
    """Return the schema of a payload. `action`: the field that selects the model, and its value."""
    generated = model.model_json_schema(ref_template="#/components/schemas/{model}")
    properties: dict[str, Schema] = {name: {"const": value} for name, value in action.items()}
    # The session header may replace `session_id`, and the configuration has defaults for the other two.
    required = (
        [name for name in generated["required"] if name not in ("session_id", "max_new_tokens", "deadline_ms")]
        if "required" in generated
        else []
    )
    for name, found in generated["properties"].items():
        is_checked = not (model is Open and name == "session_id")
        core = {**_core(found), **(_CHECKED.get(name, {}) if is_checked else {})}
        if name == "stop":
            core = {"anyOf": [_STOP, _strings(_LIMITS.max_stop_strings)]}
        if name == "video":
            core = _VIDEO
        described = {"description": _expected(model, name), **core}
        properties[name] = described if name in required else nullable(described)
    if "deadline_ms" in properties:
        properties["deadline_ms"]["description"] += f" The default is {_LIMITS.default_deadline_ms} without `stream`."
    return {
        "description": inspect.cleandoc(model.__doc__ or ""),
        "type": "object",
        "properties": properties,
        "required": [*action, *required],
        "additionalProperties": False,
    }


def _core(schema: Schema) -> Schema:
    """Return a field's schema without null, the title and an empty default."""
    core = next((one for one in schema.get("anyOf", []) if one != {"type": "null"}), schema)
    kept = {key: value for key, value in core.items() if key not in ("title", "default")}
    default = schema.get("default")
    return kept if default in (None, [], ()) else {**kept, "default": default}


def nullable(schema: Schema) -> Schema:
    """Return a schema that accepts null too: null counts as an absent field."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return {key: value for key, value in schema.items() if key != "type"} | {"enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def _strings(most: int) -> Schema:
    return {"type": "array", "maxItems": most, "items": _STOP}


def _expected(model: type[BaseRequest], name: str) -> str:
    """Return the description of a field: its meaning and the expected value of its error message."""
    message = model.expected[name].format(name=name, limits=_LIMITS, actual="")
    found = re.fullmatch(r".*? must be (.*), got ", message)
    if found is None:
        raise ValueError(f"the message of `{name}` must have an expected value, got {message!r}")
    expected = f"{found[1][:1].upper()}{found[1][1:]}."
    if expected == "True or false.":
        expected = ""
    return " ".join(filter(None, [_MEANINGS.get(name), expected]))


def _chat_requests() -> dict[str, Schema]:
    generated = Chat.model_json_schema()["properties"]
    properties: dict[str, Schema] = {
        "model": _described("Any text. The reply repeats it.", type="string", maxLength=MODEL_MAX_CHARS),
        "messages": {
            "description": "The whole conversation. The last message is a user's, with text, a picture or a clip.",
            "type": "array",
            "minItems": 1,
            "maxItems": _LIMITS.max_history_messages,
            "items": ref("ChatMessage"),
        },
    }
    properties["model"] = nullable(properties["model"])
    for field, names in OPTION_NAMES.items():
        for name in names:
            core = _WIDER.get(name) or _core(generated[field])
            if name == "stop":
                core = {"anyOf": [_STOP, _strings(_LIMITS.max_stop_strings)]}
            description = _CHAT_DESCRIPTIONS.get(name) or _expected(Chat, field)
            properties[name] = nullable({"description": description, **core})
    properties["stream_options"] = nullable(
        {
            "description": "`include_usage`: the last chunk of a stream has the usage.",
            "type": "object",
            "properties": {"include_usage": {"type": ["boolean", "null"]}},
        }
    )
    for name in ("user", "prompt_cache_key"):
        description = "Narrows the search for a conversation that begins alike. It never grants access."
        properties[name] = nullable(_described(description, type="string"))
    for name, neutral in NEUTRAL_VALUES.items():
        properties[name] = _described("Only values that change nothing are accepted.", enum=[*neutral, None])
    return {
        "ChatCompletionRequest": {
            "description": f"{inspect.cleandoc(Chat.__doc__ or '').splitlines()[0]} Other options are ignored.",
            "type": "object",
            "properties": properties,
            "required": ["messages"],
        },
        "ChatMessage": _chat_message(),
        "TextPart": _fixed({"type": {"const": "text"}, "text": {"type": "string"}}, is_open=True),
        "PicturePart": _url_part("image_url", "A data URL or an https URL."),
        "ClipPart": _url_part(
            "video_url", "A data URL or an https URL of a file. Or the frames: `data:video/jpeg;base64,FRAME,FRAME`."
        ),
    }


def _chat_message() -> Schema:
    parts = {"type": "array", "items": {"anyOf": [ref("TextPart"), ref("PicturePart"), ref("ClipPart")]}}
    content = {"anyOf": [{"type": "string"}, parts, {"type": "null"}]}
    unsupported = {name: _described("Must be empty.", enum=[None, []]) for name in UNSUPPORTED_FIELDS}
    return {
        "description": (
            "A message of the conversation. Other fields are ignored. Only a user's message has pictures and clips."
        ),
        "type": "object",
        "properties": {"role": {"enum": list(ROLES)}, "content": content, **unsupported},
        "required": ["role"],
    }


def _url_part(kind: str, meaning: str, **options: Schema) -> Schema:
    """Return the schema of a picture or a clip. `options`: further properties of the object with `url`."""
    url = _described(meaning, type="string")
    as_object = {"type": "object", "properties": {"url": url, **options}, "required": ["url"]}
    return _fixed({"type": {"const": kind}, kind: {"anyOf": [url, as_object]}}, is_open=True)


def _clip_part() -> Schema:
    frames: Schema = {"type": "integer", "minimum": 1, **_CHECKED["video_frames"]}
    meaning = f"Not in OpenAI's API. {_MEANINGS['video_frames']}"
    url = "A data URL or an https URL of a file, or the frames: `data:video/jpeg;base64,FRAME,FRAME`."
    return _url_part("video_url", url, video_frames=nullable({"description": meaning, **frames}))


def _native_replies() -> dict[str, Schema]:
    session_id = {"type": "string"}
    durable = _described("Whether the journal stores it. Only with a journal.", type="boolean")
    ended = {
        "session_id": session_id,
        "finish_reason": {"enum": ["stop", "length", "deadline", "cancelled", "shutdown"]},
        "usage": _fixed({field.name: _count() for field in fields(Usage)}),
        "timings": _timings(),
        "token_ids": {"type": "array", "items": _count()},
        "durable": durable,
    }
    optional = ("token_ids", "durable")
    opened = {
        "session_id": session_id,
        "expires": {"type": "string", "format": "date-time"},
        "usage": _fixed({"image_tokens": _count(), "prompt_tokens": _count()}),
        "turns": _described("Finished turns of a resumed session.", type="integer", minimum=1),
        "durable": durable,
    }
    form = {"code": {"type": "string"}, "message": {"type": "string"}}
    openai_form = {**form, "type": _error_types(), "param": {"type": ["string", "null"]}}
    return {
        "Opened": _fixed(opened, "turns", "durable"),
        "Answer": _fixed({"response_text": {"type": "string"}, **ended}, *optional),
        "AnswerPiece": _fixed({"delta": {"type": "string"}}),
        "AnswerEnd": _fixed({"delta": {"const": ""}, **ended}, *optional),
        "SessionDescription": _fixed(_description()),
        "Done": _fixed({"success": {"type": "boolean"}, "session_id": session_id}),
        "Error": _fixed({"error": _fixed(openai_form, "type", "param")}),
        "OpenAIError": _fixed({"error": _fixed(openai_form)}),
        "Health": _fixed({"status": {"enum": ["Healthy", "Draining"]}}),
    }


def _description() -> dict[str, Schema]:
    tiers = "Where the KV cache is: on the device, on the host, or nowhere."
    expires = "The expiry, or the idle limit if that comes first."
    return {
        "session_id": {"type": "string"},
        "expires": _described(expires, type="string", format="date-time"),
        "is_answering": {"type": "boolean"},
        "residency": _described(tiers, enum=["resident", "offloaded", "cold"]),
        "cached_tokens": _count(),
        "memory": _fixed({name: _count() for name in ("kv_bytes", "offloaded_bytes", "features_bytes")}),
    }


def _timings() -> Schema:
    return _fixed({field.name: {"type": "number", "minimum": 0} for field in fields(Timings)})


def _error_types() -> Schema:
    return {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]}


def _chat_replies() -> dict[str, Schema]:
    text = {"type": "string"}
    head = {"id": text, "created": _count(), "model": text, "system_fingerprint": text}
    usage = _fixed(
        {
            **{name: _count() for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
            "prompt_tokens_details": _fixed({"cached_tokens": _count()}),
        }
    )
    message = _fixed({"role": {"const": "assistant"}, "content": text, "refusal": {"type": "null"}})
    delta = _fixed({"role": {"const": "assistant"}, "content": text}, "role", "content")
    rest = {"index": {"const": 0}, "logprobs": {"type": "null"}}
    choice = _fixed({**rest, "message": message, "finish_reason": {"enum": ["stop", "length"]}})
    part = _fixed({**rest, "delta": delta, "finish_reason": {"enum": ["stop", "length", None]}})
    return {
        "ChatUsage": usage,
        "ChatCompletion": _fixed(
            {
                "object": {"const": "chat.completion"},
                **head,
                "choices": _one(choice),
                "usage": ref("ChatUsage"),
                "timings": _timings(),
            },
            "timings",
        ),
        "ChatCompletionChunk": _fixed(
            {
                "object": {"const": "chat.completion.chunk"},
                **head,
                "choices": {"type": "array", "maxItems": 1, "items": part},
                "usage": {"anyOf": [ref("ChatUsage"), {"type": "null"}]},
                "timings": _timings(),
            },
            "usage",
            "timings",
        ),
        "Model": _fixed({"id": text, "object": {"const": "model"}, "created": _count(), "owned_by": text}),
        "ModelList": _fixed({"object": {"const": "list"}, "data": _one(ref("Model"))}),
    }


def _fixed(properties: dict[str, Schema], *optional: str, is_open: bool = False) -> Schema:
    """Return the schema of an object that has these properties and, unless `is_open`, no others."""
    required = [name for name in properties if name not in optional]
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return schema if is_open else {**schema, "additionalProperties": False}


def _one(item: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "maxItems": 1, "items": item}


def _count() -> Schema:
    return {"type": "integer", "minimum": 0}


def _described(description: str, **schema: Any) -> Schema:
    return {"description": description, **schema}
