"""Write the golden tables: payloads and configurations, each with what the code makes of it.

`python -m tests.unit.golden.freeze` overwrites payloads.json and configurations.json. Run it only to add rows: a change
of an existing outcome is a change of the protocol. The first tables were written by commit a10d9d0.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.unit.golden.tables import CONFIGURATIONS, PAYLOADS, body_of, outcome_of_configuration, outcome_of_payload

COMMITTED = Path("handler/model-config.yaml")
SESSION = "x-amzn-sagemaker-session-id"
INFERENCE = "x-amzn-sagemaker-inference-id"
REQUEST_ID = "3f0c6a52-7f0e-4a55-9d39-2b1f0f6f1c11"
TOKEN = "a-token-of-sixteen-or-more"
DEEP = 5_000

# Bodies by field, as the JSON text of each value: so NaN and huge numbers can be written.
OPEN = {"type": '"start_session"', "image": '"AAAA"'}
ASK = {"type": '"send_text_prompt"', "session_id": '"s1"', "prompt_text": '"What is it?"'}
CLOSE = {"type": '"close_session"', "session_id": '"s1"'}
CANCEL = {"type": '"cancel"', "session_id": '"s1"'}
NEW = {"requestType": '"NEW_SESSION"', "image": '"AAAA"'}
STANDARD_CLOSE = {"requestType": '"CLOSE"', "session_id": '"s1"'}

# What every field is tried with.
VALUES = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "one": "1",
    "float one": "1.0",
    "half": "0.5",
    "NaN": "NaN",
    "1e999": "1e999",
    "huge": "1" + "0" * 400,
    "empty string": '""',
    "string": '"x"',
    "lone surrogate": '"x\\ud800"',
    "empty array": "[]",
    "array of a string": '["x"]',
    "array of a number": "[1]",
    "object": "{}",
}
OPTIONS = "stream return_token_ids max_new_tokens temperature top_p seed stop deadline_ms"
FIELDS = {
    "open": (OPEN, "session_id session_token request_id image images path video resume"),
    "ask": (
        ASK,
        f"session_id session_token request_id image images path prompt_text {OPTIONS}",
    ),
    "close": (CLOSE, "session_id session_token"),
    "cancel": (CANCEL, "session_id session_token"),
    "new": (NEW, "session_id session_token request_id image"),
    "standard close": (STANDARD_CLOSE, "session_id session_token"),
}


def text(fields: dict[str, str], **changes: str | None) -> str:
    """Return the JSON text of a body; a change to None removes the field."""
    given = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in given.items()) + "}"


def quoted(value: str) -> str:
    return json.dumps(value)


def raw(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}


def parts(*pieces: tuple[str, int]) -> dict[str, list]:
    """Return a long body as fragments, each with how often it is repeated."""
    return {"parts": [list(piece) for piece in pieces]}


def deep(fields: dict[str, str], name: str) -> dict[str, list]:
    """Return a body with an array in the field that is nested too deep to parse."""
    before, after = around(fields, name)
    return parts((before, 1), ("[", DEEP), ("]", DEEP), (after, 1))


def around(fields: dict[str, str], name: str) -> tuple[str, str]:
    """Return the JSON text before and after the value of a field."""
    before, after = text(fields, **{name: "\0"}).split("\0")
    return before, after


# The name of a row, its body, and the changes to it.
Boundary = tuple[str, dict[str, str], dict[str, str | None]]


def payloads() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Yield (name, body, headers, limits)."""
    for name, body in bodies_as_a_whole():
        yield f"body: {name}", body, {}, {}
    for name, body, headers in sessions():
        yield f"session: {name}", body, headers, {}
    for kind, (fields, names) in FIELDS.items():
        yield f"{kind}: plain", text(fields), {}, {}
        for name in names.split():
            yield f"{kind}: {name} absent", text(fields, **{name: None}), {}, {}
            for value_name, value in VALUES.items():
                yield f"{kind}: {name} {value_name}", text(fields, **{name: value}), {}, {}
            yield f"{kind}: {name} nested {DEEP}", deep(fields, name), {}, {}
        for unknown in ("temprature", "", "Type", "retry_key", "pictures", "frames", "imäge", "\ud800", "video_"):
            yield f"{kind}: unknown field {unknown!a}", text(fields, **{unknown: "1"}), {}, {}
        yield f"{kind}: unknown field null", text(fields, colour="null"), {}, {}
    for name, fields, changes in boundaries():
        yield name, text(fields, **changes), {}, {}
    for name, body, headers in retries():
        yield f"retry: {name}", body, headers, {}
    yield from lengths()


def bodies_as_a_whole() -> Iterator[tuple[str, Any]]:
    yield from bodies_of_text().items()
    yield from bodies_of_bytes()
    for name, value in VALUES.items():
        yield f"type {name}", text(ASK, type=value)
        yield f"requestType {name}", text(NEW, requestType=value)
    for value in ("open", "START_SESSION", " cancel", "NEW_SESSION", "naïve", "x" * 200):
        yield f"type {ascii(value)[:30]}", text(ASK, type=quoted(value))
    for value in ("start_session", "SESSION", "new_session", "CLOSE "):
        yield f"requestType {value!r}", text(NEW, requestType=quoted(value))
    yield "type nested", deep(ASK, "type")
    yield "an unknown field 5,000 times", parts((text(ASK)[:-1], 1), (', "field": 1', 5_000), ("}", 1))
    yield "100 unknown fields", text(ASK, **{f"field{number}": "1" for number in range(100)})
    yield "standard open without a picture", text(NEW, image=None)
    yield "standard close with a prompt", text(STANDARD_CLOSE, prompt_text='"no"')
    yield "close with a prompt", text(CLOSE, prompt_text='"x"')
    yield "cancel with a request_id", text(CANCEL, request_id=quoted(REQUEST_ID))


def bodies_of_text() -> dict[str, str]:
    return {
        "empty": "",
        "white space": " \r\n\t ",
        "null": "null",
        "array": "[1]",
        "array of an object": f"[{text(ASK)}]",
        "number": "7",
        "NaN": "NaN",
        "1e999": "1e999",
        "true": "true",
        "string": '"start_session"',
        "object": "{}",
        "form": "type=cancel",
        "cut": '{"type": "cancel"',
        "trailing comma": '{"type": "cancel", "session_id": "s1",}',
        "two objects": "{} {}",
        "control character": '{"type": "can\ncel"}',
        "white space around": f" \r\n{text(ASK)}\n",
        "seed of 4,000 digits": text(ASK, seed="9" * 4_000),
        "duplicate type": '{"type": "cancel", "type": "close_session", "session_id": "s1"}',
        "duplicate field, last valid": text(ASK)[:-1] + ', "seed": "x", "seed": 3}',
        "duplicate field, last invalid": text(ASK)[:-1] + ', "seed": 3, "seed": "x"}',
        "both dialects": text(CLOSE, requestType='"CLOSE"'),
        "both dialects, one null": text(CLOSE, requestType="null"),
        "both dialects, the other null": text(STANDARD_CLOSE, type="null"),
        "both dialects, both null": text(CLOSE, type="null", requestType="null"),
        "surrogate pair": text(ASK, prompt_text='"\\ud83d\\ude00"'),
        "unescaped non-ASCII": text(ASK, prompt_text='"Où est 猫? 🐈"'),
    }


def bodies_of_bytes() -> Iterator[tuple[str, Any]]:
    yield "bytes", raw(text(ASK).encode())
    yield "bytes with a byte order mark", raw(b"\xef\xbb\xbf" + text(ASK, prompt_text='"Grüße"').encode())
    yield "UTF-16", raw(text(ASK).encode("utf-16"))
    yield "Latin-1", raw(text(ASK, prompt_text='"Grüße"').encode("latin-1"))
    yield "invalid UTF-8", raw(b'{"type": "\xff"}')
    yield "a PNG", raw(b"\x89PNG\r\n\x1a\n\x00")
    yield "one zero byte", raw(b"\x00")
    yield "200,000 open brackets", parts(("[", 200_000))
    yield "200,000 open objects", parts(('{"a":', 200_000))
    yield "integer of 5,000 digits", parts((text(ASK)[:-1] + ', "seed": ', 1), ("9", 5_000), ("}", 1))


def sessions() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for kind, fields in (("ask", ASK), ("close", CLOSE), ("cancel", CANCEL), ("standard close", STANDARD_CLOSE)):
        yield f"{kind}, header only", text(fields, session_id=None), {SESSION: "s9"}
        yield f"{kind}, header and body agree", text(fields), {SESSION: "s1"}
        yield f"{kind}, header and body conflict", text(fields), {SESSION: "s2"}
        yield f"{kind}, header and body differ in case", text(fields), {SESSION: "S1"}
        yield f"{kind}, neither", text(fields, session_id=None), {}
        yield f"{kind}, body of another type beside a header", text(fields, session_id="1"), {SESSION: "s1"}
        yield f"{kind}, empty body field beside a header", text(fields, session_id='""'), {SESSION: "s1"}
        yield f"{kind}, malformed in the header", text(fields, session_id=None), {SESSION: "-a"}
        yield f"{kind}, malformed body beside a header", text(fields, session_id='"-a"'), {SESSION: "s1"}
    for value in ("", "  ", "NEW_SESSION", " NEW_SESSION ", None, 5, ["s2"], "new_session", " s1\t"):
        yield f"ask, header {value!r}", text(ASK), {SESSION: value}
    yield "ask, NEW_SESSION in the body", text(ASK, session_id='"NEW_SESSION"'), {}
    yield "ask, header in another case of letters", text(ASK, session_id=None), {"X-Amzn-SageMaker-Session-Id": "s9"}
    for value in ("s1", "NEW_SESSION", ""):
        yield f"open, header {value!r}", text(OPEN), {SESSION: value}
        yield f"open, body {value!r}", text(OPEN, session_id=quoted(value)), {}
    well_formed = ("a", "0", "a-b", "a--b", "ts-seq-1b4e28ba-2fa1", "A" * 226, "a" + "-" * 224 + "b")
    malformed = ("-a", "a-", "-", "a_b", "a b", "a:b", "a;b", "a\n", "ü", "٣", "a.b", "A" * 227, "a" + "-" * 300)
    for value in (*well_formed, *malformed):
        name = ascii(value) if len(value) < 40 else f"{value[:3]}... of {len(value)}"
        yield f"id {name} in the body", text(ASK, session_id=quoted(value)), {}
        yield f"id {name} in the header", text(CLOSE, session_id=None), {SESSION: value}
        yield f"id {name} to resume", text({"type": '"start_session"', "resume": quoted(value)}), {}


def boundaries() -> Iterator[Boundary]:
    """Yield (name, body, changes) at both ends of each range, and of fields that exclude each other."""
    yield from boundaries_of_a_question()
    for kind, fields in (("open", {"type": '"start_session"'}), ("ask", ASK)):
        yield from boundaries_of_pictures(kind, fields)
        yield from boundaries_of_ids(kind, fields)
    yield from boundaries_of_an_open()
    yield from several_problems()


def boundaries_of_a_question() -> Iterator[Boundary]:
    numbers = {
        "max_new_tokens": ["-1", "2", "1023", "1024", "1025", "8.0", '"8"', "-1" + "0" * 400],
        "temperature": ["-0.0", "-0.1", "1e-300", "10", "10.01", '"0"', "-Infinity", "-1" + "0" * 400],
        "top_p": ["-0.0", "0.0", "-1", "5e-324", "1.0001", '"1"', "-Infinity"],
        "seed": ["-1", str(2**63 - 1), str(2**63), "0.0", "-0"],
        "deadline_ms": ["-1", "600000", "600001", "70", "70.0"],
    }
    for name, values in numbers.items():
        for value in values:
            yield f"ask: {name} {value[:24]}", ASK, {name: value}
    for value in ('"a"', '"\\n\\n"', '["a", "b"]', '["a", ""]', '["a", null]', '[["a"]]', quoted("x" * 64)):
        yield f"ask: stop {value[:24]}", ASK, {"stop": value}
    yield "ask: stop string of 65", ASK, {"stop": quoted("x" * 65)}
    yield "ask: stop 8 strings", ASK, {"stop": json.dumps([str(n) for n in range(8)])}
    yield "ask: stop 9 strings", ASK, {"stop": json.dumps([str(n) for n in range(9)])}
    yield "ask: stop 9 strings, one empty", ASK, {"stop": json.dumps(["a"] * 8 + [""])}
    yield "ask: stop one too long beside a short one", ASK, {"stop": json.dumps(["a", "x" * 65])}
    for value in (" ", "\n\t\u2003", "  <image> </s>\x00\n 猫🐈 \u202e \U0010ffff "):
        yield f"ask: prompt_text {value!a}", ASK, {"prompt_text": quoted(value)}
    yield "ask: streamed, without a deadline", ASK, {"stream": "true"}
    yield "ask: streamed, with a deadline", ASK, {"stream": "true", "deadline_ms": "70"}
    yield (
        "ask: every option",
        ASK,
        {
            "stream": "true",
            "max_new_tokens": "9",
            "temperature": "0.5",
            "top_p": "0.25",
            "seed": "3",
            "stop": '["a", "b"]',
            "return_token_ids": "true",
            "deadline_ms": "9000",
            "request_id": quoted(REQUEST_ID),
            "session_token": quoted(TOKEN),
            "images": '["AAAA", "BBBB"]',
        },
    )


def boundaries_of_pictures(kind: str, fields: dict[str, str]) -> Iterator[Boundary]:
    yield f"{kind}: images in their order", fields, {"images": '["a", "b", "a"]'}
    yield f"{kind}: 8 images", fields, {"images": json.dumps(["a"] * 8)}
    yield f"{kind}: 9 images", fields, {"images": json.dumps(["a"] * 9)}
    yield f"{kind}: images with a null", fields, {"images": '["a", null]'}
    yield f"{kind}: 9 images and one of them a number", fields, {"images": json.dumps(["a"] * 8 + [1])}
    yield f"{kind}: path", fields, {"path": '"https://a.example/x.png"'}
    yield f"{kind}: no picture, all null", fields, {"image": "null", "images": "null", "path": "null"}
    for pair in (("image", "path"), ("image", "images"), ("images", "path")):
        both = {"image": '"a"', "images": '["b"]', "path": '"c"'}
        yield f"{kind}: {' and '.join(pair)}", fields, {name: both[name] for name in pair}
    yield f"{kind}: 9 images and a path", fields, {"images": json.dumps(["a"] * 9), "path": '"c"'}
    yield f"{kind}: malformed image and a path", fields, {"image": "1", "path": '"c"'}


def boundaries_of_ids(kind: str, fields: dict[str, str]) -> Iterator[Boundary]:
    for length in (15, 16, 256, 257):
        yield f"{kind}: session_token of {length}", fields, {"session_token": quoted("t" * length), "image": '"a"'}
    yield f"{kind}: session_token with a space", fields, {"session_token": quoted("t" * 16 + " t"), "image": '"a"'}
    yield (
        f"{kind}: session_token with a line end",
        fields,
        {"session_token": quoted("t" * 16 + "\n"), "image": '"a"'},
    )
    for length in (15, 16, 64, 65):
        yield f"{kind}: request_id of {length}", fields, {"request_id": quoted("r" * length), "image": '"a"'}
    for value in ("with a space in the id", "ümlaut-ümlaut-ümlaut", "sixteen-and-more\n", "chat:1/turn:22-abc"):
        yield f"{kind}: request_id {value!a}", fields, {"request_id": quoted(value), "image": '"a"'}


def boundaries_of_an_open() -> Iterator[Boundary]:
    bare = {"type": '"start_session"'}
    yield "open: video", bare, {"video": '["AAAA", "BBBB"]'}
    yield "open: 32 frames", bare, {"video": json.dumps(["a"] * 32)}
    yield "open: 33 frames", bare, {"video": json.dumps(["a"] * 33)}
    yield "open: video of strings and a number", bare, {"video": '["a", 5]'}
    yield "open: video and image", bare, {"video": '["a"]', "image": '"a"'}
    yield "open: video and images", bare, {"video": '["a"]', "images": '["a"]'}
    yield "open: resume", bare, {"resume": '"s1"'}
    yield "open: resume with a token", bare, {"resume": '"s1"', "session_token": quoted(TOKEN)}
    yield "open: resume and image", bare, {"resume": '"s1"', "image": '"a"'}
    yield "open: resume and video", bare, {"resume": '"s1"', "video": '["a"]'}
    yield "open: nothing but the type", bare, {}


def several_problems() -> Iterator[Boundary]:
    """Yield bodies with several problems: the code is that of the first field in the order of the protocol."""
    bare = {"type": '"start_session"'}
    nine = json.dumps(["a"] * 9)
    frames = json.dumps(["a"] * 33)
    yield "several: unknown field and 9 images", bare, {"images": nine, "colour": "1"}
    yield "several: unknown field and 9 stop strings", ASK, {"stop": nine, "colour": "1"}
    yield "several: malformed session_id and 9 stop strings", ASK, {"session_id": '"-a"', "stop": nine}
    yield "several: malformed seed and 9 stop strings", ASK, {"seed": "-1", "stop": nine}
    yield "several: 9 stop strings and a malformed request_id", ASK, {"stop": nine, "request_id": '"short"'}
    yield "several: 9 stop strings and a malformed session_token", ASK, {"stop": nine, "session_token": '"short"'}
    yield "several: malformed deadline_ms and 9 images", ASK, {"deadline_ms": "0", "images": nine}
    yield "several: 9 images and a malformed session_token", ASK, {"images": nine, "session_token": '"short"'}
    yield "several: 9 images and a video", bare, {"images": nine, "video": '["a"]'}
    yield "several: image and 33 frames", bare, {"image": '"a"', "video": frames}
    yield "several: 33 frames and resume", bare, {"video": frames, "resume": '"s1"'}
    yield "several: 9 images and a malformed request_id", bare, {"images": nine, "request_id": '"short"'}
    yield "several: session_id to open and 9 images", bare, {"session_id": '"s1"', "images": nine}
    yield (
        "several: every option malformed",
        ASK,
        {
            "stream": "1",
            "max_new_tokens": "0",
            "temperature": "-1",
            "top_p": "0",
            "seed": "-1",
            "stop": "[]",
            "return_token_ids": "0",
        },
    )


def retries() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for kind, fields in (("open", OPEN), ("new", NEW), ("ask", ASK)):
        yield f"{kind}, in the body", text(fields, request_id=quoted(REQUEST_ID)), {}
        yield f"{kind}, Inference-Id", text(fields), {INFERENCE: REQUEST_ID}
        yield f"{kind}, the body's goes first", text(fields, request_id=quoted(REQUEST_ID)), {INFERENCE: "f" * 36}
        yield f"{kind}, null in the body", text(fields, request_id="null"), {INFERENCE: REQUEST_ID}
        yield f"{kind}, malformed in the body", text(fields, request_id='"short"'), {INFERENCE: REQUEST_ID}
        yield f"{kind}, with a session_token", text(fields, session_token=quoted(TOKEN)), {INFERENCE: REQUEST_ID}
    for value in (
        "short",
        "x" * 64,
        "x" * 65,
        "with a space in the id",
        "",
        None,
        5,
        "ümlaut-ümlaut-ümlaut",
        "a:b" * 8,
    ):
        name = ascii(value) if len(str(value)) < 60 else f"of {len(value)}"
        yield f"ask, Inference-Id {name}", text(ASK), {INFERENCE: value}
    asked = {**ASK, "request_id": quoted(REQUEST_ID)}
    yield "ask, stream true", text(asked, stream="true"), {}
    yield "ask, stream false", text(asked, stream="false"), {}
    yield "ask, stream null", text(asked, stream="null"), {}
    yield "ask, another question", text(asked, prompt_text='"Something else?"'), {}
    yield "ask, a seed", text(asked, seed="1"), {}
    yield "ask, a float as an integer", text(asked, temperature="1"), {}
    yield "ask, a float", text(asked, temperature="1.0"), {}
    yield "ask, an explicit null", text(asked, seed="null"), {}
    yield "ask, fields in another order", text(dict(reversed(asked.items()))), {}
    yield "ask, session in the header", text(asked, session_id=None), {SESSION: "s1"}
    yield "ask, session in both", text(asked), {SESSION: "s1"}
    yield "ask, non-ASCII", text(asked, prompt_text='"Où est 猫? 🐈"'), {}
    yield "ask, image with a lone surrogate", text(asked, image='"A\\ud800"'), {}


def lengths() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Yield what the limits of the configuration decide."""
    before, after = around(ASK, "prompt_text")
    for name, character in (("ASCII", "a"), ("CJK", "猫"), ("escaped", "\\u732b"), ("astral", "🐈")):
        for count in (5, 6):
            body = parts((before + '"', 1), (character, count), ('"' + after, 1))
            yield f"limits: prompt of {count} {name} characters", body, {}, {"max_prompt_chars": 5}
    long = parts((before + '"', 1), ("a", 32_768), ('"' + after, 1))
    longer = parts((before + '"', 1), ("a", 32_769), ('"' + after, 1))
    yield "limits: prompt of 32,768", long, {}, {}
    yield "limits: prompt of 32,769", longer, {}, {}
    yield "limits: prompt of 32,769 spaces", parts((before + '"', 1), (" ", 32_769), ('"' + after, 1)), {}, {}
    surrogates = parts((before + '"', 1), ("\\ud800", 6), ('"' + after, 1))
    yield "limits: long prompt of lone surrogates", surrogates, {}, {"max_prompt_chars": 5}
    wrong = parts((before + '"', 1), ("a", 32_769), ('", "seed": -1' + after, 1))
    yield "limits: long prompt, malformed seed", wrong, {}, {}
    yield (
        "limits: long prompt, unknown field",
        parts((before + '"', 1), ("a", 6), ('", "colour": 1' + after, 1)),
        {},
        {"max_prompt_chars": 5},
    )
    yield "limits: default_new_tokens", text(ASK), {}, {"default_new_tokens": 77}
    yield "limits: max_new_tokens reached", text(ASK, max_new_tokens="2000"), {}, {"max_new_tokens": 2_000}
    yield "limits: max_new_tokens exceeded", text(ASK, max_new_tokens="2001"), {}, {"max_new_tokens": 2_000}
    yield "limits: default_deadline_ms", text(ASK), {}, {"default_deadline_ms": 9}
    yield "limits: default_deadline_ms, streamed", text(ASK, stream="true"), {}, {"default_deadline_ms": 9}
    for count in (3, 4):
        images = json.dumps(["a"] * count)
        yield f"limits: {count} images of 3", text(ASK, images=images), {}, {"max_pictures": 3}
        yield f"limits: {count} frames of 3", text(OPEN, image=None, video=images), {}, {"max_frames": 3}


def frontend(**changes: Any) -> dict[str, Any]:
    fits = {"sequenceBatching": True, "continuousBatching": True, "batchSize": 144, "maxNumSequence": 144}
    return {**fits, "sequenceTimeoutMSec": 1_320_000, "sequenceMaxIdleMSec": 1_320_000, **changes}


def configured(**fields: Any) -> dict[str, Any]:
    return {**frontend(), "llava": {"checkpoint": "checkpoint", **fields}}


NAN = float("nan")
INFINITY = float("inf")
ANY = (None, True, False, 0, 1, -1, 1.0, 1.5, "", "x", "auto", [], ["x"], {}, {"a": 1}, NAN, INFINITY, 10**400)
KEYS = {
    "checkpoint": ("a/b", "ümlaut"),
    "dtype": ("float32", "bfloat16", "float16", "bananas", "FLOAT32", 16),
    "device": ("cpu", "cuda:1"),
    "max_sessions": (60, 64, 65, 4096, 4097, "64"),
    "session_ttl_s": (0.99, 600, 1200, 1201, 86_400, 86_401, "1200"),
    "session_idle_s": (0.99, 60, 86_400, 86_401, "60"),
    "engine_hang_s": (2.99, 3, 3600, 3601),
    "journal_dir": ("/var/journal",),
    "journal_s3_prefix": ("s3://bucket/prefix",),
    "prefill_chunk_tokens": (65_536, 65_537, 2.5),
    "device_bytes": (2**50, 2**50 + 1, "Auto", "1G"),
    "host_bytes": (2**50, 2**50 + 1, "Auto", "1G"),
    "system_prompt": ("Be kind.", "x" * 1_000),
    "limits": ("none",),
    "media": ("none",),
    "limits.max_prompt_chars": (10_000_000, 10_000_001),
    "limits.default_new_tokens": (256, 1_024, 1_025, 1_000_000, 1_000_001),
    "limits.max_new_tokens": (255, 256, 1_000_000, 1_000_001),
    "limits.default_deadline_ms": (600_000, 600_001),
    "limits.max_frames": (1_000, 1_001),
    "limits.max_pictures": (1_000, 1_001),
    "limits.max_stop_strings": (),
    "limits.max_stop_chars": (),
    "limits.max_body_bytes": (),
    "media.max_bytes": (2**31, 2**31 + 1, "10M"),
    "media.max_pixels": (2**31, 2**31 + 1, 1e6),
    "media.fetch_timeout_s": (0.09, 0.1, 60, 61, "10"),
    "media.allowed_hosts": (["a.example", "*.b.example"], [1], [""], [None], ["a", 1]),
    "media.s3_buckets": (["b"], [["a"]]),
    "media.local_roots": (["/data"], [5]),
    "media.max_aspect": (),
}
TORCHSERVE = {
    "sequenceBatching": (False, None, "true", 1),
    "continuousBatching": (False, None, "true", 1),
    "batchSize": (143, 145, None, "144", 144.0, True),
    "maxNumSequence": (143, 145, None, "144", 144.0, True),
    "sequenceTimeoutMSec": (1_319_999, 0, None, "1320000", 1_320_000.0, True),
    "sequenceMaxIdleMSec": (1_319_999, 0, None, "1320000", 1_320_000.0, 2**40),
    "maxWorkers": (0, 1, 2, None, "2", 1.0, True),
    "minWorkers": (None, 1, "x"),
}


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, content of model-config.yaml)."""
    yield "committed", yaml.safe_load(COMMITTED.read_text(encoding="utf-8"))
    for value in (None, [], "x", 5, True):
        yield f"llava: {value!r}", {**frontend(), "llava": value}
    yield "no llava", frontend()
    yield "empty file", {}
    yield "Llava", {**frontend(), "Llava": {"checkpoint": "checkpoint"}}
    yield "minimal", configured()
    yield "no checkpoint", {**frontend(), "llava": {}}
    for path, values in KEYS.items():
        for value in (*ANY, *values):
            section, _, key = path.rpartition(".")
            fields = {section: {key: value}} if section else {key: value}
            name = ascii(value) if len(ascii(value)) < 50 else ascii(value)[:12] + "..."
            yield f"llava.{path}: {name}", configured(**fields)
    for key, values in TORCHSERVE.items():
        for value in values:
            yield f"{key}: {value!r}", {**configured(), key: value}
    for key in TORCHSERVE:
        model_yaml = configured()
        model_yaml.pop(key, None)
        yield f"{key} absent", model_yaml
    for fields in ({"max_session": 5}, {"Checkpoint": "x"}, {"colour": None}, {"limits": {"max_new_token": 5}}):
        yield f"unknown {fields!r}", configured(**fields)
    yield "unknown media.allowed_host", configured(media={"allowed_host": []})
    yield "numbers as keys", {**frontend(), "llava": {"checkpoint": "c", 7: 1, "limits": {8: 1}}}
    yield from several_configurations()


def several_configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "65 sessions with their room", {**configured(max_sessions=65), "batchSize": 146, "maxNumSequence": 146}
    yield "288 sequences, 2 workers", {**configured(), "maxNumSequence": 288, "maxWorkers": 2}
    yield "289 sequences, 2 workers", {**configured(), "maxNumSequence": 289, "maxWorkers": 2}
    yield "a long session, one patient time-out", {**configured(session_ttl_s=3600), "sequenceMaxIdleMSec": 3_720_000}
    yield "default above max", configured(limits={"default_new_tokens": 11, "max_new_tokens": 10})
    yield "default above max, max malformed", configured(limits={"default_new_tokens": 2_000, "max_new_tokens": "all"})
    yield "default malformed, max below it", configured(limits={"default_new_tokens": 0, "max_new_tokens": 100})
    yield "idle longer than ttl", configured(session_ttl_s=10, session_idle_s=20)
    yield "both journals", configured(journal_dir="/j", journal_s3_prefix="s3://b/p")
    every = yaml.safe_load(COMMITTED.read_text(encoding="utf-8"))
    wrong = copy.deepcopy(every)
    wrong["llava"].update(checkpoint="", dtype="int3", device=5, max_sessions="many", session_ttl_s=-1, colour="red")
    wrong["llava"].update(session_idle_s=0, engine_hang_s=0, journal_dir=5, journal_s3_prefix=[], device_bytes="1G")
    wrong["llava"].update(host_bytes=-1, prefill_chunk_tokens=0, system_prompt=1)
    wrong["llava"]["limits"] = dict.fromkeys(every["llava"]["limits"], "all") | {"tokens": 1}
    wrong["llava"]["media"] = dict.fromkeys(every["llava"]["media"], 0) | {"hosts": 1}
    wrong.update(sequenceBatching=False, batchSize=1, sequenceTimeoutMSec=None)
    yield "every problem at once", wrong
    yield "only TorchServe's keys missing", {"llava": {"checkpoint": "c"}}
    yield "sections malformed, TorchServe's keys missing", {"llava": {"limits": 1, "media": 2}}


def frozen_payloads() -> Iterator[dict[str, Any]]:
    for name, body, headers, limits in payloads():
        row = {"name": name, "body": body, "headers": headers, "limits": limits}
        row = {key: value for key, value in row.items() if value != {}}
        yield {**row, "outcome": outcome_of_payload(body_of(row), headers, limits)}


def frozen_configurations() -> Iterator[dict[str, Any]]:
    for name, model_yaml in configurations():
        text_of_file = yaml.safe_dump(model_yaml, default_flow_style=True, width=10**9, sort_keys=False).strip()
        read_back = yaml.safe_load(text_of_file)
        yield {"name": name, "yaml": text_of_file, "outcome": outcome_of_configuration(read_back)}


def write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    lines = [json.dumps(row) for row in rows]
    names = [json.loads(line)["name"] for line in lines]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    print(write(PAYLOADS, frozen_payloads()), "payloads")
    print(write(CONFIGURATIONS, frozen_configurations()), "configurations")
