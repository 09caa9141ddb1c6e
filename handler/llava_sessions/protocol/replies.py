"""Bodies and headers of replies."""

from __future__ import annotations

import json

from .constants import NEW_SESSION_HEADER, SESSION_HEADER


def session_headers(session_id: str, expires: str) -> dict[str, str]:
    """Headers of an open's reply. `expires` is UTC, `YYYY-MM-DDTHH:MM:SSZ`."""
    value = f"{session_id}; Expires={expires}"
    return {SESSION_HEADER: value, NEW_SESSION_HEADER: value}


def opened(
    session_id: str, expires: str, image_tokens: int, prompt_tokens: int, turns: int = 0, durable: bool | None = None
) -> dict:
    """Body of an open's reply. `turns` were finished in the session that it carries on; `durable` None is not told."""
    counts = {"image_tokens": image_tokens, "prompt_tokens": prompt_tokens}
    body = {"session_id": session_id, "expires": expires, "usage": counts}
    if turns:
        body["turns"] = turns
    return body if durable is None else {**body, "durable": durable}


def closed(session_id: str) -> dict:
    """Body of a close's reply."""
    return {"success": True, "session_id": session_id}


def cancelled(session_id: str, had_turn: bool) -> dict:
    """Body of a cancel's reply; `success` is false when no turn was running."""
    return {"success": had_turn, "session_id": session_id}


def answer_facts(session_id: str, finish_reason: str, usage: dict, timings: dict, token_ids: list[int] | None) -> dict:
    """What is told of a finished turn, the last line of a stream and part of the one-shot body."""
    facts = {"session_id": session_id, "finish_reason": finish_reason, "usage": usage, "timings": timings}
    return facts if token_ids is None else {**facts, "token_ids": token_ids}


def line(body: dict) -> str:
    """One line of a streamed answer."""
    return json.dumps(body, ensure_ascii=False) + "\n"
