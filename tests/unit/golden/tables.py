"""Read the golden tables, and write what the code makes of a row as plain JSON."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from llava_sessions.config import RequestLimits
from llava_sessions.config_file import ConfigError, read_config
from llava_sessions.errors import Refused
from llava_sessions.protocol.parsing import parse

PAYLOADS = Path(__file__).with_name("payloads.json")
CONFIGURATIONS = Path(__file__).with_name("configurations.json")

_REQUESTS = {
    "Open": ("pictures", "frames", "retry_key", "session_token", "resume"),
    "Ask": (
        *("session_id", "prompt_text", "stream", "max_new_tokens", "temperature", "top_p", "seed", "stop"),
        *("return_token_ids", "retry_key", "deadline_ms", "pictures", "session_token"),
    ),
    "Close": ("session_id", "session_token"),
    "Cancel": ("session_id", "session_token"),
}
_CONFIG = (
    *("checkpoint", "dtype", "device", "max_sessions", "session_ttl_s", "session_idle_s", "engine_hang_s"),
    *("journal_dir", "journal_s3_prefix", "prefill_chunk_tokens", "device_bytes", "host_bytes", "system_prompt"),
)
_LIMITS = (
    *("max_prompt_chars", "default_new_tokens", "max_new_tokens", "max_pictures", "max_frames"),
    "default_deadline_ms",
)
_MEDIA = ("max_bytes", "max_pixels", "fetch_timeout_s", "allowed_hosts", "s3_buckets", "local_roots")


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return json.loads(path.read_text(encoding="utf-8"))


def body_of(row: dict[str, Any]) -> str | bytes:
    """Return the body as a client sends it: JSON text, bytes (from base64), or long text from repeated parts."""
    body = row["body"]
    if isinstance(body, str):
        return body
    if "base64" in body:
        return base64.b64decode(body["base64"])
    return "".join(text * times for text, times in body["parts"])


def parsed_body_of(row: dict[str, Any]) -> Any:
    """Return the body as TorchServe hands it over: parsed where it is JSON."""
    body = body_of(row)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body


def outcome_of_payload(body: Any, headers: dict[str, Any], limits: dict[str, int]) -> dict[str, Any]:
    """Return {"request", its fields} of an accepted body, or {"status", "code"} of a refused one."""
    try:
        request = parse(body, headers, RequestLimits(**limits))
    except Refused as refused:
        return {"status": refused.status, "code": refused.code}
    kind = type(request).__name__
    fields = {name: _plain(_value(request, name)) for name in _REQUESTS[kind]}
    if len(fields.get("prompt_text", "")) > 1_000:
        fields["prompt_text"] = f"{len(fields['prompt_text'])} characters"
    return {"request": kind, **fields}


def _value(request: Any, name: str) -> Any:
    """Return a field of a request. `frames` are those of its clip, as before clips could be files."""
    if name == "frames":
        return () if request.clip is None else request.clip.frames
    return getattr(request, name)


def outcome_of_configuration(model_yaml: Any) -> dict[str, Any]:
    """Return {"config"} of an accepted file, or {"problems"}: the sorted keys that are named."""
    try:
        config = read_config(model_yaml)
    except ConfigError as error:
        return {"problems": sorted({_key(problem) for problem in error.problems})}
    described = {name: getattr(config, name) for name in _CONFIG}
    if described["prefill_chunk_tokens"] is None:
        described["prefill_chunk_tokens"] = 256  # the default of the tables, before there was `auto`
    described["limits"] = {name: getattr(config.limits, name) for name in _LIMITS}
    described["media"] = {name: _plain(getattr(config.media, name)) for name in _MEDIA}
    return {"config": described}


def _key(problem: str) -> str:
    if problem == "model-config.yaml has no 'llava:' section":
        return "llava"
    return problem.split(" ")[0].strip("`")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {"image": value.image, "path": value.path} if hasattr(value, "image") else value
