"""OpenAI's words: each body becomes a `Chat` or is refused by the client's own name of the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava_sessions.config import RequestLimits
from llava_sessions.errors import STATUS_OF_CODE, Refused
from llava_sessions.ipc.messages import Timings, Usage
from llava_sessions.protocol import replies
from llava_sessions.protocol.constants import FORWARDED_API_HEADER, SESSION_HEADER
from llava_sessions.protocol.openai import Chat, ChatMessage, Models, OpenAIForm, RefusedChat
from llava_sessions.protocol.parsing import parse
from llava_sessions.protocol.requests import ClipSource, PictureSource

LIMITS = RequestLimits()
PATH = {"url_path": "v1/chat/completions"}
HEADER = SESSION_HEADER.lower()
URL = "data:image/png;base64,AAAA"
IMAGE = {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}
INFERENCE_ID = {"x-amzn-sagemaker-inference-id": "3f0c6a52-7f0e-4a55-9d39-2b1f0f6f1c11"}


def user(content: Any = "What is it?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any = "A circle.") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any = "Be brief.", role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(
    *messages: Any,
    headers: dict[str, str] | None = None,
    limits: RequestLimits = LIMITS,
    allow_system: bool = True,
    **options: Any,
) -> Chat:
    body = json.dumps({"model": "llava", "messages": list(messages or [user()]), **options})
    request = parse(body.encode(), PATH if headers is None else headers, limits, allow_system=allow_system)
    assert isinstance(request, Chat)
    return request


def refusal(*messages: Any, **options: Any) -> RefusedChat:
    with pytest.raises(RefusedChat) as caught:
        chat(*messages, **options)
    return caught.value


def conversation(*messages: Any, **options: Any) -> list[tuple[str, str, int]]:
    """Return role, text and number of pictures of each message."""
    return [(one.role, one.text, len(one.pictures)) for one in chat(*messages, **options).messages]


# --- options ---


def test_a_plain_request_has_the_defaults() -> None:
    plain = chat()
    assert plain == Chat(
        messages=(ChatMessage("user", "What is it?"),),
        model="llava",
        max_new_tokens=256,
        deadline_ms=55_000,
        is_sse=True,
    )
    assert (plain.temperature, plain.top_p, plain.seed, plain.stop, plain.retry_key) == (0, 1, None, (), None)


NEUTRAL: list[dict[str, Any]] = [
    {"frequency_penalty": 0, "presence_penalty": 0.0},
    {"logprobs": False, "top_logprobs": 0},
    {"top_logprobs": None, "logprobs": None},
    {"response_format": {"type": "text"}},
    {"tools": [], "tool_choice": "none"},
    {"tool_choice": "auto", "functions": [], "function_call": "auto"},
    {"logit_bias": {}},
    {"store": True, "metadata": {"a": "b"}},
    {"parallel_tool_calls": False},
    {"service_tier": "auto", "safety_identifier": "x", "prediction": None},
    {"sagemaker_base_url": "https://a.example", "drop_params": True, "allowed_openai_params": []},
    {"n": 1, "best_of": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0},
    {"reasoning_effort": "none", "reasoning": {}, "thinking": {"type": "disabled"}},
    {"modalities": ["text"], "audio": None, "verbosity": "medium"},
    {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": True},
    {"stream_options": None, "max_tokens": None, "stop": None, "seed": None, "temperature": None, "user": None},
    {"max_tokens": -1, "seed": -1, "max_completion_tokens": -1},
    {"stream": False, "echo": False, "skip_special_tokens": True},
    {"stop": []},
]


@pytest.mark.parametrize("options", NEUTRAL, ids=lambda options: ", ".join(options))
def test_an_option_that_changes_nothing_is_ignored(options: dict[str, Any]) -> None:
    assert chat(**options) == chat()


UNSUPPORTED: list[tuple[str, Any, str]] = [
    ("tools", [{"type": "function"}], "`tools` must be absent or [], got an array of length 1 (object)"),
    ("tool_choice", "required", '`tool_choice` must be absent or "none" or "auto", got a string of length 8'),
    ("functions", [{}], "`functions` must be absent or [], got an array of length 1 (object)"),
    ("n", 2, "`n` must be absent or 1, got 2"),
    ("n", True, "`n` must be absent or 1, got true"),
    ("response_format", {"type": "json_object"}, '`response_format` must be absent or {"type": "text"}, got an object'),
    ("frequency_penalty", 0.5, "`frequency_penalty` must be absent or 0, got 0.5"),
    ("presence_penalty", False, "`presence_penalty` must be absent or 0, got false"),
    ("logprobs", True, "`logprobs` must be absent or false, got true"),
    ("logprobs", 0, "`logprobs` must be absent or false, got 0"),
    ("logit_bias", {"5": 1}, "`logit_bias` must be absent or {}, got an object of length 1"),
    ("audio", {"voice": "x"}, "`audio` must be absent, got an object of length 1"),
    ("modalities", ["text", "audio"], '`modalities` must be absent or ["text"] or [], got an array of length 2'),
    ("top_k", 40, "`top_k` must be absent or 0 or -1, got 40"),
    ("repetition_penalty", 1.1, "`repetition_penalty` must be absent or 1, got 1.1"),
    ("guided_json", {"a": 1}, "`guided_json` must be absent, got an object of length 1"),
    ("reasoning_effort", "high", '`reasoning_effort` must be absent or "none", got a string of length 4'),
    ("session_id", "s1", "`session_id` must be absent, got a string of length 2"),
    ("type", "start_session", "`type` must be absent, got a string of length 13"),
    ("requestType", "NEW_SESSION", "`requestType` must be absent, got a string of length 11"),
    ("prompt_text", "x", "`prompt_text` must be absent, got a string of length 1"),
    ("max_new_tokens", 5, "`max_new_tokens` must be absent, got 5"),
    ("image", "AAAA", "`image` must be absent, got a string of length 4"),
]


@pytest.mark.parametrize(("name", "value", "message"), UNSUPPORTED)
@pytest.mark.parametrize("headers", [PATH, {}])
def test_an_option_that_would_change_the_answer_is_refused_by_name(
    name: str, value: Any, message: str, headers: dict[str, str]
) -> None:
    refused = refusal(headers=headers, **{name: value})
    assert (refused.code, refused.param) == ("invalid_request", name)
    assert refused.message.startswith(message)


MALFORMED: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "`max_tokens` must be an integer above 0, or -1, got 0"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "`max_completion_tokens` must be an integer above 0"),
    ({"max_tokens": "8"}, "max_tokens", "`max_tokens` must be an integer above 0, or -1, got a string of length 1"),
    ({"max_tokens": True}, "max_tokens", "`max_tokens` must be an integer above 0, or -1, got true"),
    ({"temperature": 11}, "temperature", "`temperature` must be a number from 0 to 10, got 11"),
    ({"top_p": 0}, "top_p", "`top_p` must be a number above 0 and up to 1, got 0"),
    ({"seed": -2}, "seed", "`seed` must be an integer from 0 to 9223372036854775807, or -1, got -2"),
    ({"stream": "yes"}, "stream", "`stream` must be true or false, got a string of length 3"),
    ({"stream_options": []}, "stream_options", "`stream_options` must be an object, got an empty array"),
    ({"model": 5}, "model", "`model` must be Unicode text of at most 256 characters, got 5"),
    ({"model": "x\ud800"}, "model", "`model` must be Unicode text"),
    ({"user": 5}, "user", "`user` must be a string, got 5"),
    ({"prompt_cache_key": []}, "prompt_cache_key", "`prompt_cache_key` must be a string, got an empty array"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "`min_tokens` must be an integer from 0 to"),
    ({"ignore_eos": 1}, "ignore_eos", "`ignore_eos` must be true or false, got 1"),
    ({"session_token": "short"}, "session_token", "`session_token` must be 16 to 256 printable ASCII characters"),
]


@pytest.mark.parametrize(("options", "param", "message"), MALFORMED, ids=lambda value: str(value)[:40])
def test_a_malformed_option_is_named_as_the_client_names_it(options: dict, param: str, message: str) -> None:
    refused = refusal(**options)
    assert (refused.code, refused.param) == ("invalid_request", param)
    assert refused.message.startswith(message)


def test_every_malformed_option_is_named_at_once() -> None:
    refused = refusal(tools=[1], temperature=-1, max_tokens=0)
    assert [name in refused.message for name in ("`tools`", "`temperature`", "`max_tokens`")] == [True, True, True]
    assert refused.param == "tools"


def test_the_number_of_tokens_is_lowered_to_the_limit() -> None:
    assert chat(max_tokens=4_096).max_new_tokens == LIMITS.max_new_tokens
    assert chat(max_completion_tokens=10**400).max_new_tokens == LIMITS.max_new_tokens
    assert chat(max_tokens=7, max_completion_tokens=9).max_new_tokens == 9
    both = chat(max_tokens=4_096, min_tokens=4_096, ignore_eos=True)
    assert (both.max_new_tokens, both.min_tokens, both.ignore_eos) == (1_024, 1_024, True)


def test_stop_strings_are_limited() -> None:
    assert chat(stop="x").stop == ("x",)
    assert chat(stop=["a", "b"]).stop == ("a", "b")
    for stop in (["a"] * 9, "x" * 65):
        refused = refusal(stop=stop)
        assert (refused.code, refused.param) == ("too_large", "stop")


def test_the_label_is_of_user_and_prompt_cache_key() -> None:
    labels = [chat(**options).label for options in ({"user": "a"}, {"prompt_cache_key": "a"}, {"user": "b"})]
    assert len(set(labels)) == 3
    assert chat().label is None
    assert chat(user="a").label == labels[0]


def test_a_retry_has_the_same_key_whatever_the_form_of_its_answer() -> None:
    headers = {**PATH, **INFERENCE_ID}
    key = chat(user([IMAGE]), headers=headers).retry_key
    assert key is not None
    assert chat(user([IMAGE]), headers=headers, stream=True, store=True).retry_key == key
    other = {"type": "image_url", "image_url": f"{URL}AA"}
    others = [chat(user([other]), headers=headers), chat(user([IMAGE]), headers=headers, temperature=1)]
    assert key not in [one.retry_key for one in others]
    assert chat(user([IMAGE])).retry_key is None


def test_a_copy_without_pictures_keeps_the_rest() -> None:
    request = chat(user([IMAGE, {"type": "text", "text": "What?"}]), headers={**PATH, **INFERENCE_ID})
    copy = request.without_pictures()
    assert (copy.pictures, copy.messages[0].text, copy.retry_key) == ((), "What?", request.retry_key)
    assert request.pictures == (PictureSource(path=URL),)


# --- clips ---


def clip(url: Any = "https://host/a.mp4", **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **options}}


def test_a_clip_is_a_file_or_the_frames_of_a_data_url() -> None:
    def read(part: Any) -> tuple[ClipSource, ...]:
        message = chat(user([part, {"type": "text", "text": "What?"}])).messages[0]
        assert (message.text, message.pictures) == ("What?", ())
        return message.clips

    file = PictureSource(path="https://host/a.mp4")
    assert read(clip()) == (ClipSource(file=file, count=8),)
    assert read({"type": "video_url", "video_url": "https://host/a.mp4"}) == read(clip())
    assert read(clip(video_frames=3)) == (ClipSource(file=file, count=3),)
    url = "data:video/mp4;base64,AAAA"
    assert read(clip(url)) == (ClipSource(file=PictureSource(path=url), count=8),)
    frames = ClipSource(frames=(PictureSource(image="AAAA"), PictureSource(image="BBBB")))
    assert read(clip("data:video/jpeg;base64,AAAA,BBBB")) == (frames,)
    assert read(clip("DATA:Video/JPEG;base64,AAAA,BBBB", video_frames=None)) == (frames,)
    assert read(clip("data:video/jpeg;base64,AAAA")) == (ClipSource(frames=(PictureSource(image="AAAA"),)),)


def test_a_message_has_pictures_and_clips() -> None:
    first = user([clip("https://host/1.mp4"), IMAGE, {"type": "text", "text": "What?"}])
    request = chat(first, user([clip("https://host/2.mp4")]), said(), user([IMAGE]))
    assert request.pictures == (PictureSource(path=URL),) * 2
    assert [one.file and one.file.path for one in request.clips] == ["https://host/1.mp4", "https://host/2.mp4"]
    assert [(len(one.pictures), len(one.clips)) for one in request.messages] == [(1, 2), (0, 0), (1, 0)]


@pytest.mark.parametrize(
    ("message", "param", "code", "text"),
    [
        (user([clip(None)]), "messages[0].content[0]", "invalid_request", "must have `video_url` as a string, or as"),
        (user([clip(5)]), "messages[0].content[0]", "invalid_request", "must have `video_url` as a string, or as"),
        (user([{"type": "video_url"}]), "messages[0].content[0]", "invalid_request", "must have `video_url` as a"),
        (user([{"type": "video"}]), "messages[0].content[0].type", "invalid_request", "'image_url' or 'video_url'"),
        (said([clip()]), "messages[0].content[0]", "invalid_request", "must be text in a message of role assistant"),
        (
            user([clip("data:video/jpeg;base64,A" + ",A" * 32)]),
            "messages[0].content[0]",
            "too_large",
            "must have at most 32 frames, got 33",
        ),
    ],
)
def test_a_malformed_clip_is_refused(message: Any, param: str, code: str, text: str) -> None:
    refused = refusal(message, user())
    assert (refused.code, refused.param) == (code, param)
    assert text in refused.message


@pytest.mark.parametrize(
    ("count", "actual"), [(0, "0"), (33, "33"), ("8", "a string of length 1"), (True, "true"), (1.5, "1.5")]
)
def test_a_malformed_number_of_frames_is_refused(count: Any, actual: str) -> None:
    refused = refusal(user(), said(), user([clip(video_frames=count)]))
    assert (refused.code, refused.param) == ("invalid_request", "messages[2].content[0].video_url.video_frames")
    expected = "an integer from 1 to 32, with the URL of a file"
    assert refused.message == f"`{refused.param}` must be {expected}, got {actual}"


def test_frames_are_not_sampled_from_frames() -> None:
    refused = refusal(user([clip("data:video/jpeg;base64,AAAA,BBBB", video_frames=1)]))
    assert refused.param == "messages[0].content[0].video_url.video_frames"


def test_clips_count_as_pictures() -> None:
    assert conversation(user([clip(), IMAGE]), said(), user([clip()]), limits=SMALL)
    refused = refusal(user([clip()] * 2), said(), user([clip(), IMAGE]), limits=SMALL)
    assert refused.message == "`messages` must have at most 3 pictures and clips together, got more"
    assert refused.code == "too_large"
    refused = refusal(user([clip(), clip(), IMAGE]), limits=SMALL)
    assert refused.message == "the last of `messages` must have at most 2 pictures and clips, got 3"


def test_a_retry_has_the_same_clips() -> None:
    def key(*urls: str, **options: Any) -> str | None:
        return chat(user([clip(url, **options) for url in urls]), headers={**PATH, **INFERENCE_ID}).retry_key

    one, two, frames = "https://host/1.mp4", "https://host/2.mp4", "data:video/jpeg;base64,AAAA"
    assert key(one) == key(one) is not None
    keys = [key(one), key(two), key(one, two), key(two, one), key(one, video_frames=2), key(frames), key(frames + ",A")]
    assert len(set(keys)) == len(keys)


def test_a_copy_without_pictures_has_no_clips() -> None:
    copy = chat(user([clip(), {"type": "text", "text": "What?"}])).without_pictures()
    assert (copy.clips, copy.messages[0].text) == ((), "What?")


# --- where it is sent, and how the answer is streamed ---


def test_a_stream_is_server_sent_events_on_its_own_path_and_lines_elsewhere() -> None:
    assert chat(stream=True).is_sse
    assert not chat(stream=True, headers={}).is_sse
    assert chat(stream=True).deadline_ms is None


@pytest.mark.parametrize(
    ("api", "sent", "streamed"),
    [
        ("InvokeEndpointWithResponseStream", {}, True),
        ("InvokeEndpointWithResponseStream", {"stream": None}, True),
        ("InvokeEndpointWithResponseStream", {"stream": False}, False),
        ("InvokeEndpoint", {}, False),
        ("InvokeEndpoint", {"stream": True}, True),
    ],
)
def test_sagemakers_operation_asks_for_a_stream_if_the_body_does_not_say(api: str, sent: dict, streamed: bool) -> None:
    assert chat(headers={FORWARDED_API_HEADER.lower(): api}, **sent).stream is streamed


def test_only_the_header_names_a_session() -> None:
    assert chat(headers={HEADER: "s1"}).session_id == "s1"
    assert chat(headers={HEADER: "s1; Expires=2026-11-26T01:25:52Z"}).session_id == "s1"
    assert chat(headers={HEADER: ""}).session_id is None
    refused = refusal(headers={HEADER: "NEW_SESSION"})
    assert "must be absent or a session's ID" in refused.message
    assert "at most 226 letters" in refusal(headers={HEADER: "-a"}).message


@pytest.mark.parametrize("path", ["v1/models", "/v1/models/", "v1/models?limit=5"])
def test_the_models_are_listed(path: str) -> None:
    assert parse(b"", {"url_path": path}, LIMITS) == Models()


def test_a_model_is_described_by_its_name() -> None:
    request = parse(b"", {"url_path": "v1/models/llava"}, LIMITS)
    assert isinstance(request, Models)
    body = request.body("llava", 5.5)
    assert body == {"id": "llava", "object": "model", "created": 5, "owned_by": "llava-sessions"}
    assert Models().body("llava", 5.5) == {"object": "list", "data": [body]}
    with pytest.raises(RefusedChat) as caught:
        request.body("other", 5.5)
    assert (caught.value.code, caught.value.status) == ("model_not_found", 404)


@pytest.mark.parametrize(
    "path", ["v1/completions", "v1/responses", "v1/embeddings", "v1/chat", "v1/chat/completions/x"]
)
def test_another_path_is_not_found(path: str) -> None:
    with pytest.raises(RefusedChat) as caught:
        parse(json.dumps({"messages": [user()]}), {"url_path": path}, LIMITS)
    assert (caught.value.code, caught.value.status) == ("not_found", 404)


def test_a_path_of_another_kind_is_read_as_before() -> None:
    assert parse({"type": "close_session", "session_id": "s1"}, {"url_path": "predict"}, LIMITS).session_id == "s1"


@pytest.mark.parametrize("body", [b"", b"[1]", b'{"messages": ', b"{}", b'{"messages": null}', b'{"messages": []}'])
def test_a_body_that_is_no_chat_is_refused_in_openais_form(body: bytes) -> None:
    with pytest.raises(RefusedChat) as caught:
        parse(body, PATH, LIMITS)
    assert caught.value.code == "invalid_request"


# --- messages ---

CONVERSATIONS: list[tuple[list[Any], list[tuple[str, str, int]]]] = [
    ([user()], [("user", "What is it?", 0)]),
    ([user([IMAGE, {"type": "text", "text": "a"}])], [("user", "a", 1)]),
    ([user([{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}])], [("user", "a\nb", 1)]),
    ([user([{"type": "image_url", "image_url": URL}])], [("user", "", 1)]),
    ([user([{**IMAGE, "cache_control": {}}])], [("user", "", 1)]),
    ([user("a"), user([IMAGE]), user("b")], [("user", "a\nb", 1)]),
    ([user("a"), said("b"), said("c"), user("d")], [("user", "a", 0), ("assistant", "b\nc", 0), ("user", "d", 0)]),
    ([said("Hi."), user([IMAGE])], [("assistant", "Hi.", 0), ("user", "", 1)]),
    ([user("a"), said(None), user("b")], [("user", "a", 0), ("assistant", "", 0), ("user", "b", 0)]),
    ([user("a"), said(""), said("x"), user("b")], [("user", "a", 0), ("assistant", "x", 0), ("user", "b", 0)]),
    ([system(), user()], [("system", "Be brief.", 0), ("user", "What is it?", 0)]),
    ([system("a"), system("b", role="developer"), user()], [("system", "a\nb", 0), ("user", "What is it?", 0)]),
    ([system([{"type": "text", "text": "a"}]), user()], [("system", "a", 0), ("user", "What is it?", 0)]),
    ([system(""), user()], [("user", "What is it?", 0)]),
    ([user("a"), said("b"), system("c"), user("d")], [("user", "a", 0), ("assistant", "b", 0), ("user", "c\nd", 0)]),
    ([user("a"), system("b")], [("user", "a\nb", 0)]),
    ([{**user(), "name": "Ann"}, {**said(), "refusal": None, "tool_calls": [], "function_call": None}, user("x")],
     [("user", "What is it?", 0), ("assistant", "A circle.", 0), ("user", "x", 0)]),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "expected"), CONVERSATIONS)
def test_messages_become_a_conversation(messages: list[Any], expected: list[tuple[str, str, int]]) -> None:
    assert conversation(*messages) == expected


# Messages, the field to blame, and what it must be.
REFUSED_MESSAGES: list[tuple[list[Any], str, str]] = [
    (["x"], "messages[0]", "must be an object, got a string of length 1"),
    (
        [{"role": "tool", "content": "x"}],
        "messages[0].role",
        "must be 'system', 'developer', 'user' or 'assistant', got",
    ),
    ([{"content": "x"}], "messages[0].role", "must be 'system', 'developer', 'user' or 'assistant', got null"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role", "must be"),
    ([user(5)], "messages[0].content", "must be a string or an array of parts, got 5"),
    (
        [user(["x"])],
        "messages[0].content[0]",
        "must be an object with `type` 'text', 'image_url' or 'video_url', got a string",
    ),
    ([user([{"type": "text"}])], "messages[0].content[0]", "must have `text` as a string, got null"),
    (
        [user([{"type": "image_url", "image_url": {}}])],
        "messages[0].content[0]",
        "must have `image_url` as a string, or",
    ),
    (
        [user(), user([{"type": "input_audio", "input_audio": {}}])],
        "messages[1].content[0].type",
        "must be 'text', 'image_url' or 'video_url', got 'input_audio'",
    ),
    (
        [user([{"type": "file", "file": {}}])],
        "messages[0].content[0].type",
        "must be 'text', 'image_url' or 'video_url', got 'file'",
    ),
    (
        [user([{"type": "video", "video": {}}])],
        "messages[0].content[0].type",
        "must be 'text', 'image_url' or 'video_url', got",
    ),
    ([user(), said([IMAGE]), user()], "messages[1].content[0]", "must be text in a message of role assistant, got"),
    ([system([IMAGE]), user()], "messages[0].content[0]", "must be text in a message of role system, got"),
    ([user(), {**said(), "tool_calls": [{}]}, user()], "messages[1].tool_calls", "must be absent, got an array"),
    ([user(), said()], "messages", "must end with a user's message, got one of role assistant"),
    ([system()], "messages", "must end with a user's message, got one of role system"),
    (
        [user("  \n")],
        "messages",
        "must end with text that is not only white space, a picture or a clip, got none of them",
    ),
    ([user("x\ud800")], "messages[0].content", "must be Unicode text, got a string of length 2"),
]


@pytest.mark.parametrize(("messages", "param", "expected"), REFUSED_MESSAGES)
def test_a_malformed_message_is_refused_by_its_place(messages: list[Any], param: str, expected: str) -> None:
    refused = refusal(*messages)
    assert (refused.code, refused.param) == ("invalid_request", param)
    assert refused.message.startswith(f"`{param}` {expected}")


def test_an_operator_can_refuse_system_messages() -> None:
    for role in ("system", "developer"):
        refused = refusal(user(), said(), system(role=role), user(), allow_system=False)
        assert refused.message.startswith("A system message is not supported: the operator sets the system prompt")
        assert (refused.status, refused.param) == (400, "messages[2]")
    assert conversation(user(), allow_system=False) == [("user", "What is it?", 0)]


SMALL = RequestLimits(
    max_history_messages=4, max_history_chars=20, max_history_pictures=3, max_pictures=2, max_prompt_chars=10
)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("a")] * 5, "`messages` must be an array of at most 4 objects, got an array of length 5"),
        ([user("a"), said("x" * 20), user("b")], "`messages` must have at most 20 characters together, got more"),
        (
            [user([IMAGE] * 2), said("x"), user([IMAGE] * 2)],
            "`messages` must have at most 3 pictures and clips together",
        ),
        ([user("a" * 11)], "the last of `messages` must have at most 10 characters, got a string of length 11"),
        ([user([IMAGE] * 3)], "the last of `messages` must have at most 2 pictures and clips, got 3"),
        ([user([{"type": "text", "text": ""}] * 57)], "`messages` must have fewer parts, got too many"),
    ],
)
def test_a_history_beyond_a_limit_is_too_large(messages: list[Any], message: str) -> None:
    refused = refusal(*messages, limits=SMALL)
    assert (refused.code, refused.status, refused.param) == ("too_large", 413, "messages")
    assert refused.message.startswith(message)


def test_a_history_at_its_limits_is_read() -> None:
    messages = [user([IMAGE]), said("x" * 10), user([IMAGE, IMAGE, {"type": "text", "text": "y" * 10}])]
    assert conversation(*messages, limits=SMALL) == [("user", "", 1), ("assistant", "x" * 10, 0), ("user", "y" * 10, 2)]


def test_no_message_beyond_the_limit_is_looked_at() -> None:
    class Watched(list):
        def __iter__(self):
            raise AssertionError("looks at every message")

    with pytest.raises(RefusedChat, match="at most 256 objects"):
        parse({"messages": Watched([user()] * 100_000)}, PATH, LIMITS)


# --- histories of the native protocol ---


def open_with(history: Any, **fields: Any) -> Any:
    return parse({"type": "start_session", "history": history, **fields}, {}, LIMITS)


def test_a_session_is_opened_with_its_history() -> None:
    turn = {"prompt_text": "What is it?", "images": ["AAAA"], "response_text": "A circle."}
    opened = open_with([turn, {"prompt_text": "Sure?", "response_text": ""}])
    assert [(one.prompt_text, one.response_text) for one in opened.history] == [
        ("What is it?", "A circle."),
        ("Sure?", ""),
    ]
    assert [one.pictures for one in opened.history] == [(PictureSource(image="AAAA"),), ()]
    assert open_with([turn], image="BBBB").pictures == (PictureSource(image="BBBB"),)
    assert open_with([], image="BBBB").history == ()


def test_an_open_by_the_container_standard_may_be_empty() -> None:
    opened = parse({"requestType": "NEW_SESSION"}, {HEADER: "NEW_SESSION"}, LIMITS)
    assert (opened.pictures, opened.clip, opened.history, opened.resume) == ((), None, (), None)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("x", "`history` must be an array of turns"),
        ([5], "`history[0]` must be an object with `prompt_text`, `response_text` and pictures, got 5"),
        (
            [{"prompt_text": "a", "response_text": "b"}, {"prompt_text": "a"}],
            "`history[1].response_text` must be Unicode",
        ),
        ([{"prompt_text": " ", "response_text": "b"}], "`history[0].prompt_text` must be Unicode text of 1 to 32768"),
        ([{"prompt_text": "a", "response_text": "b", "images": []}], "`history[0].images` must be an array of 1 to 8"),
        ([{"prompt_text": "a", "response_text": "b", "x": 1}], "`history[0]` must be an object with"),
        ([{"prompt_text": "a", "response_text": "b\ud800"}], "`history[0].response_text` must be Unicode text, got a"),
    ],
)
def test_a_malformed_history_is_refused_by_its_place(history: Any, message: str) -> None:
    with pytest.raises(Refused) as caught:
        open_with(history)
    assert caught.value.code == "invalid_request"
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    "history",
    [
        [{"prompt_text": "a", "response_text": "b"}] * 129,
        [{"prompt_text": "a", "response_text": "b" * 131_072}],
        [{"prompt_text": "a", "response_text": "b", "images": ["A"] * 8}] * 5,
    ],
    ids=["turns", "characters", "pictures"],
)
def test_a_native_history_beyond_a_limit_is_too_large(history: Any) -> None:
    with pytest.raises(Refused) as caught:
        open_with(history)
    assert caught.value.code == "too_large"


def test_a_history_and_a_resume_exclude_each_other() -> None:
    with pytest.raises(Refused, match="either `resume` or pictures, a `video` or a `history`, got both"):
        open_with([{"prompt_text": "a", "response_text": "b"}], resume="s1")


def test_a_question_may_ask_for_a_least_number_of_tokens() -> None:
    ask = {"type": "send_text_prompt", "session_id": "s1", "prompt_text": "x", "max_new_tokens": 5}
    assert parse({**ask, "min_tokens": 5}, {}, LIMITS).min_tokens == 5
    with pytest.raises(Refused, match="`min_tokens` must be an integer from 0 to the most tokens of the answer, got 6"):
        parse({**ask, "min_tokens": 6}, {}, LIMITS)


# --- replies ---

FACTS = replies.answer_facts("s1", "stop", Usage(51, 40, 6), Timings(0.1, 35.4, 765.7), None)
USAGE = {
    "prompt_tokens": 51,
    "completion_tokens": 6,
    "total_tokens": 57,
    "prompt_tokens_details": {"cached_tokens": 40},
}


def form(**fields: Any) -> OpenAIForm:
    request = chat(**fields)
    return OpenAIForm.of(request, "chatcmpl-1", 5.5, served_name="served", fingerprint="fp_1")


def events(text: str) -> list[Any]:
    """Return the JSON of server-sent events, and [DONE]."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def deltas(chunks: list[Any]) -> list[tuple[dict[str, str], str | None]]:
    return [(one["choices"][0]["delta"], one["choices"][0]["finish_reason"]) for one in chunks]


def test_a_whole_answer_is_a_chat_completion() -> None:
    assert form().whole("Two.", FACTS) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "llava",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Two.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
    assert form(model=None).whole("", FACTS)["model"] == "served"


def test_only_a_reply_on_invocations_has_the_servers_times() -> None:
    assert form(headers={}).whole("Two.", FACTS)["timings"] == {"queue_ms": 0.1, "ttft_ms": 35.4, "total_ms": 765.7}
    assert "timings" not in form().whole("Two.", FACTS)


def test_events_have_one_piece_each_the_role_first_and_an_end() -> None:
    made = form()
    text = made.chunk(["There", "", " are"], is_first=True) + made.chunk([], is_first=False)
    text += made.last_chunk([" two\u2028猫"], is_first=False, facts=FACTS)
    assert text.isascii()
    *chunks, end = events(text)
    assert end == "data: [DONE]"
    assert deltas(chunks) == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "There"}, None),
        ({"content": " are"}, None),
        ({"content": " two\u2028猫"}, None),
        ({}, "stop"),
    ]
    assert {(one["id"], one["object"], one["created"], one["model"]) for one in chunks} == {
        ("chatcmpl-1", "chat.completion.chunk", 5, "llava")
    }


def test_an_event_stream_without_text_has_a_role_and_an_end() -> None:
    *chunks, end = events(form().last_chunk([], is_first=True, facts=FACTS))
    assert (deltas(chunks), end) == ([({"role": "assistant", "content": ""}, "stop")], "data: [DONE]")


def test_usage_is_an_event_of_its_own_if_it_was_asked_for() -> None:
    made = form(stream=True, stream_options={"include_usage": True})
    *chunks, usage, _ = events(made.chunk(["a"], is_first=True) + made.last_chunk([], is_first=False, facts=FACTS))
    assert [one["usage"] for one in chunks] == [None] * 3
    assert (usage["choices"], usage["usage"]) == ([], USAGE)
    assert "usage" not in form().last_chunk([], is_first=True, facts=FACTS)


def test_lines_have_all_text_of_a_step_in_one_object() -> None:
    made = form(headers={}, stream=True, stream_options={"include_usage": True})
    first = made.chunk(["There", " are"], is_first=True)
    last = made.last_chunk([" two", "."], is_first=False, facts=FACTS)
    assert [text.count("\n") for text in (first, last)] == [1, 1]
    chunks = [json.loads(first), json.loads(last)]
    assert deltas(chunks) == [({"role": "assistant", "content": "There are"}, None), ({"content": " two."}, "stop")]
    assert (chunks[1]["usage"], chunks[1]["timings"]) == (USAGE, FACTS["timings"])
    assert made.chunk([], is_first=True) == ""
    assert "usage" not in json.loads(form(headers={}).last_chunk([], is_first=True, facts=FACTS))


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("stop", "stop"), ("length", "length"), ("deadline", "length"), ("cancelled", "length"), ("shutdown", "length")],
)
def test_the_finish_reason_is_one_of_openais(reason: str, finish: str) -> None:
    body = form().whole("x", {**FACTS, "finish_reason": reason})
    assert body["choices"][0]["finish_reason"] == finish


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("invalid_request", 400, "invalid_request_error"),
        ("session_not_found", 404, "invalid_request_error"),
        ("context_length_exceeded", 400, "invalid_request_error"),
        ("session_busy", 409, "invalid_request_error"),
        ("capacity", 429, "rate_limit_error"),
        ("internal", 500, "server_error"),
        ("engine_restarting", 503, "server_error"),
    ],
)
def test_an_error_has_openais_form_and_status(code: str, status: int, kind: str) -> None:
    made = OpenAIForm()
    refused = Refused(code, "Why.", param="stop")
    assert made.status(refused) == status
    assert made.error(refused) == {"error": {"message": "Why.", "type": kind, "param": "stop", "code": code}}


def test_only_one_code_has_another_status_in_openais_form() -> None:
    made = OpenAIForm()
    changed = {code for code, status in STATUS_OF_CODE.items() if made.status(Refused(code, "x")) != status}
    assert changed == {"context_length_exceeded"}
