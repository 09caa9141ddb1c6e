"""Every payload is parsed into Open, Ask, Close or Cancel, or rejected with a code and a message."""

from __future__ import annotations

import gzip
import json
import random
import re
from typing import Any

import pytest

from llava_sessions.config import RequestLimits
from llava_sessions.errors import STATUS_OF_CODE, Refused, describe, reason_phrase
from llava_sessions.ipc.messages import Timings, Usage
from llava_sessions.protocol import fields as protocol_fields
from llava_sessions.protocol import replies
from llava_sessions.protocol.constants import SESSION_HEADER, SESSION_ID_MAX_CHARS
from llava_sessions.protocol.parsing import Request, parse
from llava_sessions.protocol.requests import (
    Ask,
    Cancel,
    ClipSource,
    Close,
    Describe,
    Open,
    PictureSource,
    session_in_header,
)

LIMITS = RequestLimits()
HEADER = SESSION_HEADER.lower()
LONG = "x" * 40_000
# botocore, sagemaker-runtime 2017-05-13: NewSessionResponseHeader
EXPIRES_PATTERN = re.compile(
    r"^[a-zA-Z0-9](-*[a-zA-Z0-9])*;\sExpires=[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"
)


def ask(**fields: Any) -> dict:
    return {"type": "send_text_prompt", "session_id": "s1", "prompt_text": "What is it?", **fields}


def refusal(body: Any, headers: Any = None, limits: RequestLimits = LIMITS) -> Refused:
    with pytest.raises(Refused) as caught:
        parse(body, headers or {}, limits)
    return caught.value


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


# --- values that are too long ---


def test_a_long_session_id_is_refused_without_comparing_it_with_a_pattern(monkeypatch):
    compared: list[int] = []

    class Pattern:
        def fullmatch(self, text: str) -> None:
            compared.append(len(text))

    monkeypatch.setattr(protocol_fields, "ANNOUNCED_ID_PATTERN", Pattern())
    for body in ({"type": "close_session", "session_id": "a" * 9_999}, ask(session_id="a" * 9_999)):
        for headers in ({}, {HEADER: "b" * 9_999}):
            assert "session ID" in refusal(body, headers).message or "at most 226" in refusal(body, headers).message
    assert "`resume` must be at most 226" in refusal({"type": "start_session", "resume": "a" * 9_999}).message
    assert max(compared) < 500


# --- bodies of many values ---


@pytest.mark.parametrize("value", ["[],", "0,", '{"":0,"a":0},'])
@pytest.mark.parametrize("encoding", [None, "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(value, encoding, monkeypatch):
    text = '{"stop":[' + value * 1_000_000 + "0]}"
    monkeypatch.setattr(json, "loads", pytest.fail)
    refused = refusal(text if encoding is None else text.encode(encoding))
    assert (refused.code, refused.message) == ("too_large", "the body must have at most 98,304 commas, got more")


@pytest.mark.parametrize("value", ["[" * 500 + "]" * 500 + ",", '{"":' * 500 + "0" + "}" * 500 + ","])
def test_a_body_of_millions_of_nested_values_is_refused_before_it_is_parsed(value, monkeypatch):
    monkeypatch.setattr(json, "loads", pytest.fail)
    refused = refusal(f"[{value * 1_000}0]".encode())
    assert (refused.code, refused.status) == ("invalid_request", 400)
    assert refused.message == "the body must have at most 98,304 opening brackets, got more"


def test_a_picture_in_place_of_json_is_not_json_however_many_commas_it_has():
    refused = refusal(b"\x89PNG\r\n\x1a\n" + b",[" * 200_000, {"content-type": "image/png"})
    assert refused.code == "invalid_request"
    assert "with content type 'image/png'" in refused.message


def test_the_longest_question_may_consist_of_commas():
    body = json.dumps(ask(prompt_text="," * LIMITS.max_prompt_chars)).encode()
    assert len(parse(body, {}, LIMITS).prompt_text) == LIMITS.max_prompt_chars


# --- the container standard's dialect ---


def test_the_container_standard_opens_and_closes():
    opened = parse({"requestType": "NEW_SESSION", "image": "AAAA"}, {HEADER: "NEW_SESSION"}, LIMITS)
    assert opened == parse({"type": "start_session", "image": "AAAA"}, {}, LIMITS)
    assert parse({"requestType": "CLOSE"}, {HEADER: "s1"}, LIMITS) == Close(session_id="s1")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"requestType": "SESSION"}, "`requestType` must be 'NEW_SESSION' or 'CLOSE', got 'SESSION'"),
        ({"requestType": 7}, "`requestType` must be 'NEW_SESSION' or 'CLOSE', got 7"),
        ({"requestType": "CLOSE", "type": "close_session"}, "either `type` or `requestType`, got both"),
        ({"requestType": "CLOSE", "session_id": "s1", "prompt_text": "no"}, "got unknown field 'prompt_text'"),
        (
            {"requestType": "CLOSE"},
            "`session_id` (or the X-Amzn-SageMaker-Session-Id header) must be at most 226 letters",
        ),
    ],
)
def test_the_container_standards_mistakes_are_named(body: dict, message: str):
    refused = refusal(body)
    assert refused.code == "invalid_request"
    assert message in refused.message


# --- the body as a whole ---


@pytest.mark.parametrize(
    "wrap", [json.dumps, lambda b: json.dumps(b).encode(), lambda b: bytearray(json.dumps(b), "utf-8")]
)
def test_json_text_and_bytes_read_as_the_parsed_object_does(wrap):
    body = ask(prompt_text="Où est 猫? 🐈", stop=["ü"])
    assert parse(wrap(body), {}, LIMITS) == parse(body, {}, LIMITS)
    assert parse(wrap(body), {}, LIMITS).prompt_text == "Où est 猫? 🐈"


def test_utf8_bytes_and_surrounding_white_space_are_read():
    body = json.dumps(ask(prompt_text="Grüße"), ensure_ascii=False)
    assert parse(f" \r\n{body}\n".encode(), {}, LIMITS).prompt_text == "Grüße"
    assert parse(b"\xef\xbb\xbf" + body.encode(), {}, LIMITS).prompt_text == "Grüße"  # a byte order mark


@pytest.mark.parametrize("body", ["", b"", bytearray(), "  \n", b" \t "])
def test_an_empty_body_is_refused_as_empty(body):
    refused = refusal(body)
    assert (refused.code, refused.status) == ("invalid_request", 400)
    assert refused.message == "the body must be a JSON object, got an empty body"


@pytest.mark.parametrize(
    ("body", "actual"),
    [
        (None, "null"),
        ([], "an empty array"),
        ([ask()], "an array of length 1 (object)"),
        (7, "7"),
        (0.5, "0.5"),
        (True, "true"),
        ('"start_session"', "a string of length 13"),
        ("null", "null"),
        ("[1]", "an array of length 1 (number)"),
        (b"false", "false"),
        ("NaN", "nan"),
        ("1e999", "inf"),
    ],
)
def test_a_body_that_is_no_object_is_described(body, actual):
    refused = refusal(body)
    assert refused.code == "invalid_request"
    assert refused.message == f"the body must be a JSON object, got {actual}"


@pytest.mark.parametrize(
    ("body", "position"),
    [
        ('{"type": }', 9),
        ('{"type": "cancel"', 17),
        ('{"a": 1,}', None),
        ("type=cancel", 0),
        ('{"a": "x\ny"}', 8),
        ("{} {}", 3),
    ],
)
def test_malformed_json_is_refused_with_the_place(body, position):
    with pytest.raises(json.JSONDecodeError) as plain:
        json.loads(body)
    refused = refusal(body)
    assert refused.code == "invalid_request"
    assert f"at character {plain.value.pos if position is None else position})" in refused.message


@pytest.mark.parametrize(
    "body", [b'{"type": "\xff"}', b"\x89PNG\r\n\x1a\n\x00", b"\xff\xfe", b"\x00", "[" * 50_000, '{"a":' * 50_000]
)
def test_undecodable_and_very_deep_bodies_are_refused(body):
    refused = refusal(body)
    assert refused.code == "invalid_request"
    assert re.search("got (malformed JSON|undecodable text)", refused.message)


@pytest.mark.parametrize("header", ["x-llava-content-type", "content-type"])
def test_a_body_is_read_as_json_and_an_error_names_its_content_type(header):
    body = b'{"type": "close_session", "session_id": "s1"}'
    for content_type in ("application/x-www-form-urlencoded", "text/plain; charset=utf-8", "application/json", ""):
        assert parse(body, {header: content_type}, LIMITS) == Close(session_id="s1")
    for wrong in (b"a=1", b"[]", b"\xff"):
        refused = refusal(wrong, {header: "Application/X-WWW-form-urlencoded; a=b"})
        assert (refused.code, refused.status) == ("invalid_request", 400)
        assert (
            refused.message.endswith("with content type 'application/x-www-form-urlencoded'") or ")" in refused.message
        )
        assert "application/x-www-form-urlencoded" in refused.message
        assert "content type" not in refusal(wrong, {header: "application/json"}).message
    refused = refusal(b"--x", {header: "multipart/form-data; boundary=x"})
    assert (refused.code, refused.status) == ("unsupported_media", 415)
    assert "multipart/form-data" in refused.message


def test_a_compressed_body_is_refused_as_such():
    refused = refusal(gzip.compress(b"{}"))
    assert (refused.code, refused.status) == ("unsupported_media", 415)


def test_the_value_that_announces_a_session_names_it():
    announced = "ls-1; Expires=2026-01-01T00:00:00Z"
    for body, headers in (
        ({"type": "close_session"}, {HEADER: announced}),
        ({"type": "close_session", "session_id": announced}, {}),
        ({"type": "close_session", "session_id": announced}, {HEADER: "ls-1"}),
        ({"type": "close_session", "session_id": "ls-1"}, {HEADER: announced}),
    ):
        assert parse(body, headers, LIMITS).session_id == "ls-1"
    assert refusal({"type": "close_session", "session_id": "ls-1; x"}).code == "invalid_request"


def test_an_integer_with_too_many_digits_to_convert_is_refused():
    assert refusal('{"type": "send_text_prompt", "seed": ' + "9" * 5_000 + "}").code == "invalid_request"


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "",
        "open",
        "START_SESSION",
        " cancel",
        1,
        True,
        1.5,
        [],
        ["cancel"],
        {},
        {"type": "cancel"},
        "naïve\ud800",
        "x" * 5_000,
    ],
)
def test_an_unknown_type_is_refused_naming_the_four_known_ones(kind):
    refused = refusal(ask(type=kind))
    assert refused.code == "invalid_request"
    for known in ("start_session", "send_text_prompt", "close_session", "cancel", "describe_session"):
        assert repr(known) in refused.message
    assert refused.message.isascii()
    assert len(refused.message) < 300


def test_a_missing_type_is_named_as_missing():
    assert refusal({}).message.endswith("or 'describe_session', got nothing")


@pytest.mark.parametrize("kind", ["start_session", "send_text_prompt", "close_session", "cancel"])
@pytest.mark.parametrize("field", ["temprature", "", "Type", "imäge\ud800", "n" * 10_000])
def test_an_unknown_field_is_refused_by_name_on_every_type(kind, field):
    refused = refusal({"type": kind, "session_id": "s1", field: 1})
    assert refused.code == "invalid_request"
    assert f"got unknown field {ascii(field)[:30]}" in refused.message
    assert refused.message.isascii()
    assert len(refused.message) < 700


def test_of_very_many_unknown_fields_only_some_are_listed():
    refused = refusal(ask(**{f"field{n:05}": 1 for n in range(5_000)}))
    assert "'field00000', 'field00001', 'field00002', 'field00003', 'field00004' and 4,995 more" in refused.message
    assert len(refused.message) < 1_000


@pytest.mark.parametrize("kind", ["close_session", "cancel", "describe_session"])
def test_fields_of_an_ask_are_unknown_to_close_cancel_and_describe(kind):
    assert "got unknown field 'prompt_text'" in refusal({"type": kind, "session_id": "s1", "prompt_text": "x"}).message


def test_a_body_above_its_limit_is_refused_before_it_is_parsed():
    body = json.dumps(ask())
    assert parse(body, {}, LIMITS, max_body_bytes=len(body)) == parse(body, {}, LIMITS)
    with pytest.raises(Refused) as refused:
        parse("[" * 200, {}, LIMITS, max_body_bytes=199)
    assert (refused.value.code, refused.value.status) == ("too_large", 413)
    assert refused.value.message == "the body must be at most 199 bytes, got 200"


def test_one_refusal_names_every_problem_in_the_order_of_the_fields():
    refused = refusal(ask(colour="red", stop=["a"] * 9, seed=-1, prompt_text="", images=[], session_id="-"))
    problems = refused.message.split("; ")
    assert [problem.split("`")[1] for problem in problems[1:]] == [
        "session_id",
        "prompt_text",
        "seed",
        "stop",
        "images",
    ]
    assert "got unknown field 'colour'" in problems[0]
    assert refused.code == "invalid_request"


def test_fields_that_exclude_each_other_hide_no_problem_of_their_own():
    refused = refusal({"type": "start_session", "image": 5, "path": "p", "video": [], "session_token": "short"})
    assert [problem.split(", got ")[1] for problem in refused.message.split("; ")] == [
        "`image` and `path`",
        "5",
        "an empty array",
        "both",
        "a string of length 5",
    ]


def test_the_code_of_several_problems_is_that_of_the_first_field():
    assert refusal(ask(stop=["a"] * 9, images=[])).code == "too_large"
    assert refusal(ask(seed=-1, stop=["a"] * 9)).code == "invalid_request"


@pytest.mark.parametrize("field", ["retry_key", "pictures", "frames", "_retry_key", "expected"])
def test_what_a_request_derives_is_no_field_of_a_payload(field):
    assert f"got unknown field '{field}'" in refusal(ask(**{field: "x"})).message


def test_many_unknown_fields_are_counted_and_the_first_five_are_named():
    fields = {f"x{number:06}": 1 for number in reversed(range(50_000))}
    message = refusal(ask(**fields)).message
    assert "got unknown field 'x000000', 'x000001', 'x000002', 'x000003', 'x000004' and 49,995 more" in message


@pytest.mark.parametrize(
    "field",
    ["prompt_text", "image", "path", "request_id", "session_token", "session_id", "resume", "video", "stop", "seed"],
)
@pytest.mark.parametrize("kind", ["start_session", "send_text_prompt"])
def test_a_message_never_repeats_what_a_client_wrote(kind, field):
    for value in (f"do-not-repeat-me ü\ud800 {LONG}", ["do-not-repeat-me", 1], {"do-not-repeat-me": 1}):
        payload = {"type": kind, field: value, "top_p": "do-not-repeat-me", "resume": 1}
        refused = refusal(payload, {HEADER: "-do-not-repeat-me"})
        assert "do-not-repeat-me" not in refused.message


# --- start_session ---


# An ask takes further pictures from the fields from which an open takes its first ones.
KINDS = {"open": {"type": "start_session"}, "ask": {"type": "send_text_prompt", "session_id": "s", "prompt_text": "x"}}


@pytest.fixture(params=KINDS)
def showing(request) -> dict:
    return KINDS[request.param]


@pytest.mark.parametrize("field", ["image", "path"])
def test_a_picture_is_taken_from_either_field(showing, field):
    assert parse({**showing, field: "value"}, {}, LIMITS).pictures == (PictureSource(**{field: "value"}),)


def test_several_pictures_keep_their_order(showing):
    request = parse({**showing, "images": ["a", "b", "a"]}, {}, LIMITS)
    assert request.pictures == (PictureSource("a"), PictureSource("b"), PictureSource("a"))


def test_an_open_without_a_picture_is_refused_and_an_ask_needs_none():
    for fields in ({}, {"image": None, "images": None, "path": None}):
        refused = refusal({"type": "start_session", **fields})
        assert refused.code == "invalid_request"
        assert refused.message == (
            "a request that opens a session must have `image`, `images`, `path`, `video`, `history` or `resume`, "
            "got no picture"
        )
        assert parse(ask(**fields), {}, LIMITS).pictures == ()


@pytest.mark.parametrize("names", [("image", "path"), ("image", "images"), ("images", "path")])
def test_pictures_come_in_one_field(showing, names):
    given = {"image": "a", "images": ["b"], "path": "c"}
    refused = refusal({**showing, **{name: given[name] for name in names}})
    assert refused.code == "invalid_request"
    assert f"at most one of `image`, `images` and `path`, got `{names[0]}` and `{names[1]}`" in refused.message


@pytest.mark.parametrize(
    ("images", "actual"),
    [
        ("a", "a string of length 1"),
        ({}, "an empty object"),
        (False, "false"),
        ([], "an empty array"),
        (["a", None], "an array of length 2 (null, string)"),
        ([["a"]], "an array of length 1 (array)"),
    ],
)
def test_a_malformed_array_of_pictures_is_refused(showing, images, actual):
    refused = refusal({**showing, "images": images})
    assert refused.code == "invalid_request"
    assert refused.message == f"`images` must be an array of 1 to 8 strings, got {actual}"


def test_more_pictures_than_are_taken_are_refused_with_both_numbers(showing):
    limits = RequestLimits(max_pictures=3)
    assert len(parse({**showing, "images": ["a"] * 3}, {}, limits).pictures) == 3
    refused = refusal({**showing, "images": ["a"] * 4}, limits=limits)
    assert refused.code == "too_large"
    assert refused.message == "`images` must be an array of 1 to 3 strings, got an array of length 4 (string)"


def test_null_beside_the_picture_counts_as_absent():
    request = parse({"type": "start_session", "image": None, "images": None, "path": "p"}, {}, LIMITS)
    assert request == Open(path="p")
    assert request.pictures == (PictureSource(path="p"),)


@pytest.mark.parametrize("field", ["image", "path"])
@pytest.mark.parametrize(
    ("value", "actual"),
    [(1, "1"), (True, "true"), (False, "false"), ([], "an empty array"), ({}, "an empty object"), (0.0, "0.0")],
)
def test_a_picture_of_another_type_is_refused(field, value, actual):
    refused = refusal({"type": "start_session", field: value})
    assert refused.code == "invalid_request"
    assert refused.message.startswith(f"`{field}` must be a string (")
    assert refused.message.endswith(f", got {actual}")


# --- send_text_prompt ---


REQUEST_ID = "3f0c6a52-7f0e-4a55-9d39-2b1f0f6f1c11"


def test_a_request_id_is_the_bodys_or_sagemakers():
    header = {"x-amzn-sagemaker-inference-id": REQUEST_ID}
    by_header = parse(ask(), header, RequestLimits()).retry_key
    assert by_header == parse(ask(), header, RequestLimits()).retry_key is not None
    other = {"x-amzn-sagemaker-inference-id": "f" * 36}
    assert parse(ask(), other, RequestLimits()).retry_key != by_header
    in_body = [parse(ask(request_id=REQUEST_ID), headers, RequestLimits()).retry_key for headers in (header, other, {})]
    assert len(set(in_body)) == 1
    assert parse(ask(), {"x-amzn-sagemaker-inference-id": "short"}, RequestLimits()).retry_key is None


def test_the_same_id_with_another_question_is_another_request():
    def key(**fields):
        return parse(ask(request_id=REQUEST_ID, **fields), {}, RequestLimits()).retry_key

    assert key() == key(stream=True) == key(stream=False)
    assert len({key(), key(prompt_text="Something else?"), key(seed=1)}) == 3


@pytest.mark.parametrize("request_id", [5, "", "short", "x" * 65, "with a space in the id", "ümlaut-ümlaut-ümlaut"])
def test_a_request_id_that_could_be_anybodys_is_refused(request_id):
    with pytest.raises(Refused, match="request_id"):
        parse(ask(request_id=request_id), {}, RequestLimits())


def test_a_repeated_open_is_known_by_its_id_and_its_body():
    def key(image="AAAA", request_id=REQUEST_ID):
        body = {"type": "start_session", "image": image, "request_id": request_id}
        return parse(body, {}, RequestLimits()).retry_key

    assert key() == key() is not None
    assert len({key(), key(image="AAAB"), key(request_id="another-id-of-sixteen")}) == 3
    assert parse({"type": "start_session", "image": "AAAA"}, {}, RequestLimits()).retry_key is None


def test_a_deadline_holds_for_whole_answers_unless_it_is_given():
    assert parse(ask(), {}, RequestLimits(default_deadline_ms=9)).deadline_ms == 9
    assert parse(ask(stream=True), {}, RequestLimits()).deadline_ms is None
    assert parse(ask(stream=True, deadline_ms=70), {}, RequestLimits()).deadline_ms == 70
    for wrong in (0, -1, 1.5, "soon", 10**9):
        with pytest.raises(Refused, match="deadline_ms"):
            parse(ask(deadline_ms=wrong), {}, RequestLimits())


TURN = {"prompt_text": "What is it?", "response_text": "A dog."}


def clip_of(video: object, **fields: object) -> ClipSource | None:
    """Return the clip of an open. It is also that of a question and of a turn of a history."""
    opened = parse({"type": "start_session", "video": video, **fields}, {}, LIMITS).clip
    assert parse(ask(video=video, **fields), {}, LIMITS).clip == opened
    turns = [{**TURN, "video": video, **fields}]
    assert parse({"type": "start_session", "history": turns}, {}, LIMITS).history[0].clip == opened
    return opened


def test_a_clip_is_a_list_of_frames():
    frames = (PictureSource(image="AAAA"), PictureSource(image="BBBB"))
    clip = clip_of(["AAAA", "BBBB"])
    assert clip == ClipSource(frames=frames)
    assert clip.sources == frames
    assert parse(ask(video=None), {}, LIMITS).clip is None


@pytest.mark.parametrize(
    ("video", "source"),
    [
        ("AAAAIGZ0eXA=", PictureSource(image="AAAAIGZ0eXA=")),
        ("data:video/mp4;base64,AAAA", PictureSource(path="data:video/mp4;base64,AAAA")),
        ("https://host/a.mp4", PictureSource(path="https://host/a.mp4")),
        (" s3://bucket/a.webm", PictureSource(path=" s3://bucket/a.webm")),
        ("/clips/a.mp4", PictureSource(path="/clips/a.mp4")),
    ],
)
def test_a_clip_is_a_file(video, source):
    clip = clip_of(video, video_frames=3)
    assert clip == ClipSource(file=source, count=3)
    assert clip.sources == (source,)
    assert clip_of(video) == ClipSource(file=source, count=8)


def test_an_operator_sets_the_default_number_of_frames():
    body = {"type": "start_session", "video": "AAAA"}
    assert parse(body, {}, RequestLimits(default_frames=5)).clip.count == 5


@pytest.mark.parametrize(
    ("video", "actual"),
    [
        ("", "an empty string"),
        ([], "an empty array"),
        ([5], "an array of length 1 (number)"),
        (5, "5"),
        ({"url": "x"}, "an object of length 1"),
    ],
)
def test_a_malformed_clip_is_refused(video, actual):
    expected = "a string (a video file) or an array of 1 to 32 strings (frames)"
    for body in ({"type": "start_session", "video": video}, ask(video=video)):
        refused = refusal(body)
        assert (refused.code, refused.param) == ("invalid_request", "video")
        assert refused.message == f"`video` must be {expected}, got {actual}"
    refused = refusal({"type": "start_session", "history": [{**TURN, "video": video}]})
    assert refused.message == f"`history[0].video` must be {expected}, got {actual}"


@pytest.mark.parametrize("fields", [{"video": ["AAAA"]}, {"image": "AAAA"}])
def test_frames_are_sampled_from_a_file_only(fields):
    for body in ({"type": "start_session", **fields}, ask(**fields)):
        refused = refusal({**body, "video_frames": 2})
        assert (refused.code, refused.param) == ("invalid_request", "video_frames")
        expected = "an integer from 1 to 32, with a `video` that is a file"
        assert refused.message == f"`video_frames` must be {expected}, got 2"


@pytest.mark.parametrize(("count", "actual"), [(0, "0"), (33, "33"), (True, "true"), (1.5, "1.5"), ("8", "a string")])
def test_a_malformed_number_of_frames_is_refused(count, actual):
    refused = refusal(ask(video="AAAA", video_frames=count))
    assert refused.message.startswith("`video_frames` must be an integer from 1 to 32,")
    assert f", got {actual}" in refused.message
    turn = {**TURN, "video": "AAAA", "video_frames": count}
    assert refusal({"type": "start_session", "history": [turn]}).param == "history[0].video_frames"


def test_a_clip_of_too_many_frames_is_too_large():
    limits = RequestLimits(max_frames=2, default_frames=2)
    for body in ({"type": "start_session"}, ask()):
        refused = refusal({**body, "video": ["A"] * 3}, limits=limits)
        assert refused.code == "too_large"
        assert "1 to 2 strings (frames), got an array of length 3" in refused.message


def test_a_session_is_opened_on_pictures_or_a_clip():
    refused = refusal({"type": "start_session", "video": ["A"], "image": "A"})
    message = "a request that opens a session must have either pictures or a `video`, got both"
    assert (refused.code, refused.message) == ("invalid_request", message)
    for video in (["A"], "AAAA"):
        assert "either `resume` or" in refusal({"type": "start_session", "video": video, "resume": "ls-1"}).message


def test_a_clip_counts_as_a_picture_of_its_question():
    limits = RequestLimits(max_pictures=2, max_history_pictures=3)
    request = parse(ask(images=["A"], video="AAAA"), {}, limits)
    assert (len(request.pictures), request.clip is not None) == (1, True)
    refused = refusal(ask(images=["A"] * 2, video="AAAA"), limits=limits)
    assert (refused.code, refused.param) == ("too_large", "video")
    assert refused.message == "a question must have at most 2 pictures and clips, got 3"
    turns = [{**TURN, "images": ["A", "A"], "video": "AAAA"}]
    assert len(parse({"type": "start_session", "history": turns}, {}, limits).history) == 1
    refused = refusal({"type": "start_session", "history": [*turns, {**TURN, "video": ["A"]}]}, limits=limits)
    assert (refused.code, refused.param) == ("too_large", "history")


def test_a_copy_without_pictures_has_neither_pictures_nor_clip():
    request = parse(ask(image="AAAA", video="AAAA", video_frames=2, request_id=REQUEST_ID), {}, LIMITS)
    copy = request.without_pictures()
    assert (copy.pictures, copy.clip, copy.retry_key) == ((), None, request.retry_key)
    assert copy.prompt_text == request.prompt_text


def test_a_retry_has_the_same_clip():
    def key(**fields):
        return parse(ask(request_id=REQUEST_ID, **fields), {}, LIMITS).retry_key

    assert len({key(), key(video="AAAA"), key(video=["AAAA"]), key(video="AAAA", video_frames=2)}) == 4


def test_an_ask_without_options_takes_the_defaults():
    request = parse(ask(), {}, RequestLimits(default_new_tokens=77))
    assert request == Ask(
        session_id="s1",
        prompt_text="What is it?",
        stream=False,
        max_new_tokens=77,
        temperature=0.0,
        top_p=1.0,
        seed=None,
        stop=(),
        return_token_ids=False,
        deadline_ms=55_000,
    )
    assert request.retry_key is None
    assert request.pictures == ()


def test_options_given_as_null_are_the_defaults():
    names = ("stream", "max_new_tokens", "temperature", "top_p", "seed", "stop", "return_token_ids")
    assert parse(ask(**dict.fromkeys(names)), {}, LIMITS) == parse(ask(), {}, LIMITS)


def test_an_ask_keeps_every_option_that_is_given():
    options = {
        "stream": True,
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.25,
        "seed": 3,
        "return_token_ids": True,
    }
    request = parse(ask(**options, stop=["a", "b"]), {}, LIMITS)
    assert {name: getattr(request, name) for name in options} == options
    assert request.stop == ("a", "b")


@pytest.mark.parametrize("prompt", [None, "", " ", "\n\t\u2003"])
def test_an_ask_without_words_is_refused(prompt):
    refused = refusal(ask(prompt_text=prompt))
    assert refused.code == "invalid_request"
    assert "`prompt_text` must be Unicode text of 1 to 32768 characters, not only white space, got" in refused.message


def test_an_ask_without_the_field_is_refused():
    assert refusal({"type": "send_text_prompt", "session_id": "s1"}).message.endswith("white space, got nothing")


@pytest.mark.parametrize("prompt", [1, True, ["a"], {"text": "a"}])
def test_a_prompt_of_another_type_is_refused(prompt):
    assert "`prompt_text` must be Unicode text" in refusal(ask(prompt_text=prompt)).message


def test_the_prompt_arrives_unchanged():
    text = "  <image> </s>\x00\n 猫🐈 \u202e \U0010ffff "
    assert parse(json.dumps(ask(prompt_text=text)), {}, LIMITS).prompt_text == text


def test_a_prompt_may_be_as_long_as_the_limit_and_no_longer():
    limits = RequestLimits(max_prompt_chars=5)
    assert parse(ask(prompt_text="猫" * 5), {}, limits).prompt_text == "猫" * 5
    refused = refusal(ask(prompt_text="猫" * 6), limits=limits)
    assert (refused.code, refused.status) == ("too_large", 413)
    assert "Unicode text of 1 to 5 characters, not only white space, got a string of length 6" in refused.message
    assert "猫" not in refused.message


@pytest.mark.parametrize("body", [ask(prompt_text="a\ud800b"), json.dumps(ask(prompt_text="\udfff"))])
def test_a_lone_surrogate_in_the_prompt_is_refused(body):
    refused = refusal(body)
    assert refused.code == "invalid_request"
    assert "`prompt_text` must be Unicode text" in refused.message


def test_a_surrogate_pair_in_json_is_one_character():
    body = '{"type":"send_text_prompt","session_id":"s1","prompt_text":"\\ud83d\\ude00"}'
    assert parse(body, {}, LIMITS).prompt_text == "😀"


@pytest.mark.parametrize("field", ["stream", "ignore_eos", "return_token_ids"])
@pytest.mark.parametrize("value", [0, 1, "true", "", [], {}, 1.0])
def test_a_flag_must_be_a_boolean(field, value):
    refused = refusal(ask(**{field: value}))
    assert refused.code == "invalid_request"
    assert f"`{field}` must be true or false, got " in refused.message


@pytest.mark.parametrize("field", ["stream", "ignore_eos", "return_token_ids"])
@pytest.mark.parametrize("value", [True, False])
def test_a_flag_is_taken_as_given(field, value):
    assert getattr(parse(ask(**{field: value}), {}, LIMITS), field) is value


@pytest.mark.parametrize("value", [1, 2, 1023, 1024])
def test_max_new_tokens_from_one_up_to_the_limit_is_taken(value):
    assert parse(ask(max_new_tokens=value), {}, LIMITS).max_new_tokens == value


@pytest.mark.parametrize("value", [0, -1, 1025, 10**400, -(10**400), 1.0, True, False, "8", [8], {}, float("nan")])
def test_any_other_max_new_tokens_is_refused_with_the_range(value):
    refused = refusal(ask(max_new_tokens=value))
    assert refused.code == "invalid_request"
    assert "`max_new_tokens` must be an integer from 1 to 1024, got " in refused.message


@pytest.mark.parametrize("value", [0, 1, 2**63 - 1])
def test_a_seed_of_63_bits_is_taken(value):
    assert parse(ask(seed=value), {}, LIMITS).seed == value


@pytest.mark.parametrize("value", [-1, 2**63, 10**4_000, 0.0, True, "1", [], float("inf")])
def test_any_other_seed_is_refused(value):
    refused = refusal(ask(seed=value))
    assert refused.code == "invalid_request"
    assert "`seed` must be an integer from 0 to 9223372036854775807, got " in refused.message
    assert len(refused.message) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", 10),
        ("temperature", 1e-300),
        ("top_p", 1),
        ("top_p", 5e-324),
    ],
)
def test_numbers_inside_their_range_become_floats(field, value):
    got = getattr(parse(ask(**{field: value}), {}, LIMITS), field)
    assert got == value
    assert isinstance(got, float)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("temperature", value)
            for value in (-0.1, 10.01, 10**400, -(10**400), float("nan"), float("inf"), "0", True, [])
        ],
        *[
            ("top_p", value)
            for value in (0, 0.0, -0.0, -1, 1.0001, 10**400, float("nan"), float("-inf"), "1", False, {})
        ],
    ],
)
def test_numbers_outside_their_range_or_of_another_type_are_refused(field, value):
    refused = refusal(ask(**{field: value}))
    assert refused.code == "invalid_request"
    assert f"`{field}` must be a number " in refused.message


def test_nan_and_infinity_written_in_json_are_refused():
    for literal in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = json.dumps(ask())[:-1] + f', "temperature": {literal}}}'
        assert "`temperature` must be a number from 0 to 10, got " in refusal(body).message


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ()), ([], ()), ("a", ("a",)), (["a"], ("a",)), (["é", "\n\n"], ("é", "\n\n")), ("x" * 64, ("x" * 64,))],
)
def test_stop_strings_are_one_string_or_a_list(value, expected):
    assert parse(ask(stop=value), {}, LIMITS).stop == expected


@pytest.mark.parametrize("value", ["", [""], ["a", ""], [1], ["a", None], [["a"]], 1, True, {"a": 1}])
def test_stop_of_another_shape_is_refused(value):
    refused = refusal(ask(stop=value))
    assert refused.code == "invalid_request"
    assert "`stop` must be a string of 1 to 64 characters or an array of at most 8 such strings" in refused.message


@pytest.mark.parametrize("value", ["x" * 65, ["a"] * 9, ["a", "x" * 65]])
def test_too_many_or_too_long_stop_strings_are_too_large(value):
    refused = refusal(ask(stop=value))
    assert refused.code == "too_large"
    assert "`stop` must be a string of 1 to 64 characters or an array of at most 8 such strings" in refused.message


def test_as_many_stop_strings_as_the_limit_are_taken():
    assert len(parse(ask(stop=[str(n) for n in range(8)]), {}, LIMITS).stop) == 8


# --- which session ---


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("close_session", Close(session_id="s1")),
        ("cancel", Cancel(session_id="s1")),
        ("describe_session", Describe(session_id="s1")),
    ],
)
def test_close_cancel_and_describe_name_their_session_in_the_header_or_in_the_body(kind, expected):
    assert parse({"type": kind, "session_id": "s1"}, {}, LIMITS) == expected
    assert parse({"type": kind}, {HEADER: "s1"}, LIMITS) == expected
    assert parse({"type": kind, "session_id": "s1"}, {HEADER: "s1"}, LIMITS) == expected


def test_header_and_body_that_name_two_sessions_are_refused():
    refused = refusal(ask(session_id="s1"), {HEADER: "s2"})
    assert refused.code == "invalid_request"
    assert "must be the same, got two session IDs" in refused.message


def test_the_agreement_of_header_and_body_is_case_sensitive():
    assert "must be the same, got two session IDs" in refusal(ask(session_id="Ab"), {HEADER: "aB"}).message


@pytest.mark.parametrize("value", ["", "  ", "NEW_SESSION", " NEW_SESSION ", None, 5, b"s2", ["s2"]])
def test_a_header_that_names_no_session_leaves_the_body_to_do_it(value):
    assert session_in_header({HEADER: value}) is None
    assert parse(ask(), {HEADER: value}, LIMITS).session_id == "s1"


def test_white_space_around_the_header_is_dropped():
    assert parse(ask(session_id=None), {HEADER: " s9\t"}, LIMITS).session_id == "s9"


@pytest.mark.parametrize("value", ["new_session", "New_Session", "NEW_SESSION1"])
def test_only_the_exact_constant_means_a_new_session(value):
    assert session_in_header({HEADER: value}) == value


@pytest.mark.parametrize("kind", ["send_text_prompt", "close_session", "cancel", "describe_session"])
@pytest.mark.parametrize("session_id", [None, ""])
def test_a_request_that_names_no_session_is_refused(kind, session_id):
    refused = refusal({"type": kind, "session_id": session_id})
    assert refused.code == "invalid_request"
    assert "`session_id` (or the X-Amzn-SageMaker-Session-Id header) must be at most 226 letters" in refused.message


@pytest.mark.parametrize("session_id", [1, True, [], {}, 0.5])
def test_a_session_id_of_another_type_is_refused_even_beside_a_header(session_id):
    for headers in ({}, {HEADER: "s1"}):
        assert (
            "`session_id` (or the X-Amzn-SageMaker-Session-Id header) must be"
            in refusal(ask(session_id=session_id), headers).message
        )


@pytest.mark.parametrize(
    "session_id", ["a", "0", "a-b", "a--b", "ts-seq-1b4e28ba-2fa1", "A" * 226, "a" + "-" * 224 + "b"]
)
def test_well_formed_ids_are_taken(session_id):
    assert parse(ask(session_id=session_id), {}, LIMITS).session_id == session_id
    assert parse(ask(session_id=None), {HEADER: session_id}, LIMITS).session_id == session_id


@pytest.mark.parametrize(
    "session_id",
    [
        "-a",
        "a-",
        "-",
        "a_b",
        "a b",
        "a;b",
        "a\n",
        "a\nb",
        "ü",
        "٣",
        "a.b",
        "A" * 227,
        "-" * 200_000,
        "a" + "-" * 200_000,
    ],
)
def test_malformed_ids_are_refused_without_being_repeated(session_id):
    refused = refusal(ask(session_id=session_id))
    assert refused.code == "invalid_request"
    actual = f"a string of length {len(session_id):,}"
    assert refused.message.endswith(f" must be at most 226 letters, digits and inner hyphens, got {actual}")


# --- replies ---


@pytest.mark.parametrize("session_id", ["a", "ts-seq-1b4e28ba-2fa1-11d2", "A" * SESSION_ID_MAX_CHARS])
def test_the_headers_of_an_open_fit_sagemakers_pattern_and_length(session_id):
    headers = replies.session_headers(session_id, "2026-11-22T10:20:30Z")
    assert set(headers) == {"X-Amzn-SageMaker-Session-Id", "X-Amzn-SageMaker-New-Session-Id"}
    for value in headers.values():
        assert EXPIRES_PATTERN.match(value)
        assert value.isascii()
        assert len(value) <= 256


def test_bodies_of_the_replies_say_what_the_protocol_says():
    assert replies.opened("s", "E", 16, 20) == {
        "session_id": "s",
        "expires": "E",
        "usage": {"image_tokens": 16, "prompt_tokens": 20},
    }
    assert replies.closed("s") == {"success": True, "session_id": "s"}
    assert replies.cancelled("s", had_turn=True) == {"success": True, "session_id": "s"}
    assert replies.cancelled("s", had_turn=False) == {"success": False, "session_id": "s"}


def test_token_ids_are_told_only_when_asked_for():
    ended = ("s", "stop", Usage(7, 3, 2), Timings(0.04, 1.26, 2.0))
    facts = {
        "session_id": "s",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 7, "cached_tokens": 3, "completion_tokens": 2},
        "timings": {"queue_ms": 0.0, "ttft_ms": 1.3, "total_ms": 2.0},
    }
    assert replies.answer_facts(*ended, None) == facts
    assert replies.answer_facts(*ended, []) == {**facts, "token_ids": []}


def test_a_streamed_line_is_one_line_of_json_whatever_the_text_holds():
    text = 'a\nb\r\u2028"\\ 猫'
    written = replies.line({"delta": text})
    assert written.endswith("\n")
    assert "\n" not in written[:-1]
    assert "\r" not in written
    assert json.loads(written) == {"delta": text}


def test_every_error_code_has_its_status_and_an_ascii_phrase():
    for code, status in STATUS_OF_CODE.items():
        refused = Refused(code, "why")
        assert refused.status == status
        assert refused.body() == {"error": {"code": code, "message": "why"}}
        assert reason_phrase(status).isascii()
        assert reason_phrase(status)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (-1, "-1"),
        (0.5, "0.5"),
        (10**4_000, "an integer of 13,288 bits"),
        (float("nan"), "nan"),
        ("", "an empty string"),
        ("secret", "a string of length 6"),
        ([], "an empty array"),
        (["secret", None, 1], "an array of length 3 (null, number, string)"),
        ({}, "an empty object"),
        ({"secret": 1}, "an object of length 1"),
        (b"secret", "a value of type bytes"),
    ],
)
def test_a_value_is_described_by_its_type_and_length(value, text):
    assert describe(value) == text


def test_an_unknown_error_code_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="teapot"):
        Refused("teapot", "no")


# --- any value at all ---

_KINDS = ["start_session", "send_text_prompt", "close_session", "cancel", "describe_session", "other", None]
_FIELDS = sorted({"type", "requestType", "unknown", *Ask.model_fields, *Open.model_fields})
_SCALARS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    64,
    2**63,
    10**300,
    0.0,
    0.7,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "a-b",
]
_SCALARS += ["-", "\ud800", "猫", "\x00", "<image>", "x" * 70]


def any_json(rng: random.Random, depth: int = 0) -> Any:
    shape = rng.random()
    if depth > 3 or shape < 0.6:
        return rng.choice(_SCALARS)
    size = rng.randrange(4)
    if shape < 0.8:
        return [any_json(rng, depth + 1) for _ in range(size)]
    return {rng.choice(_FIELDS): any_json(rng, depth + 1) for _ in range(size)}


def any_request(rng: random.Random) -> dict:
    """A payload of a known type, most of its fields right or nearly so."""
    fields = {name: any_json(rng) for name in rng.sample(_FIELDS, rng.choice([0, 0, 1, 2, 3]))}
    return {"session_id": "a-b", "prompt_text": "q", **fields, "type": rng.choice(_KINDS)}


def outcome(body: Any, headers: dict) -> Request | Refused:
    try:
        return parse(body, headers, LIMITS)
    except Refused as refused:
        return refused


def is_proper(result: Any) -> bool:
    """Whether it is a request, or a refusal that is safe to send."""
    if isinstance(result, Refused):
        text = json.dumps(result.body(), ensure_ascii=False)
        return result.code in ("invalid_request", "too_large") and text.isascii() and len(text) < 3_000
    return isinstance(result, Open | Ask | Close | Cancel | Describe)


@pytest.mark.parametrize("seed", range(20))
def test_any_json_value_either_parses_or_is_refused(seed):
    rng = random.Random(seed)
    seen = set()
    for _ in range(200):
        body = rng.choice([any_json, any_request])(rng)
        sent = rng.choice([body, json.dumps(body), json.dumps(body).encode()])
        result = outcome(sent, rng.choice([{}, {HEADER: rng.choice(_SCALARS)}]))
        assert is_proper(result), sent
        seen.add(type(result))
    assert Refused in seen
    assert len(seen) > 1


@pytest.mark.parametrize("seed", range(10))
def test_any_bytes_either_parse_or_are_refused(seed):
    rng = random.Random(seed)
    whole = json.dumps(ask(stop=["é"], temperature=0.5), ensure_ascii=False).encode()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        assert is_proper(outcome(bytes(damaged), {})), damaged


def test_a_deeply_nested_value_is_refused_where_it_stands():
    for name in ("prompt_text", "stop", "seed", "stream"):
        assert refusal(ask(**{name: nested(500)})).code == "invalid_request"
