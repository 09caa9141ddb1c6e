"""Render model-config.yaml: set our values and keep its comments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from .errors import PackError

CONFIG_FILE = "model-config.yaml"

# The default of `llava.max_implicit_sessions`.
_DEFAULT_IMPLICIT = 64


def render_config(template: str, llava: Mapping[str, object], sessions: int | None) -> tuple[str, int]:
    """Return the template with the values of `llava` set, and the number of sessions that it allows.

    TorchServe blocks one thread for each idle sequence and stalls when no thread is left. Therefore batchSize and
    maxNumSequence are twice the sessions, also those without a name (a closed sequence stays in the frontend for a
    while), with room for rejected requests.
    """
    config = _parse_config(template)
    if sessions is None:
        sessions = config["llava"].get("max_sessions")
        if not isinstance(sessions, int) or isinstance(sessions, bool) or sessions < 1:
            raise PackError(f"{CONFIG_FILE}: `llava.max_sessions` must be an integer from 1, got {sessions!r}")
    rows = 2 * (sessions + _implicit_sessions(config["llava"])) + 16
    top: dict[str, object] = {"batchSize": rows, "maxNumSequence": rows}
    nested = {**llava, "max_sessions": sessions}

    missing = [key for key in top if key not in config]
    missing += [f"llava.{key}" for key in nested if key not in config["llava"]]
    if missing:
        raise PackError(f"{CONFIG_FILE} lacks keys that packing sets", missing)

    text = template
    for key, value in top.items():
        text = _replace_value(text, key, value, indented=False)
    for key, value in nested.items():
        text = _replace_value(text, key, value, indented=True)
    if _parse_config(text) != {**config, **top, "llava": {**config["llava"], **nested}}:
        raise PackError(f"{CONFIG_FILE} has a layout that packing cannot edit: write one `key: value` per line")
    return text, sessions


def _implicit_sessions(llava: dict[str, Any]) -> int:
    """Return `max_implicit_sessions`; the handler's default if it is absent or malformed (the handler reports that)."""
    value = llava.get("max_implicit_sessions")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else _DEFAULT_IMPLICIT


def system_prompt(template: str) -> str:
    """Return the operator's text before each conversation; empty if there is none."""
    return str(_parse_config(template)["llava"].get("system_prompt") or "")


def _parse_config(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise PackError(f"{CONFIG_FILE} is not YAML: {err}") from err
    if not isinstance(config, dict) or not isinstance(config.get("llava"), dict):
        raise PackError(f"{CONFIG_FILE} has no `llava:` section")
    return config


def _replace_value(text: str, key: str, value: object, *, indented: bool) -> str:
    """Return the text with the value of one `key: value` line replaced, at the top level or one level below `llava:`.

    A comment at the end of the line is kept.
    """
    lines = text.split("\n")
    line_of_key = re.compile(rf"^({'[ ]+' if indented else ''}{re.escape(key)}:[ ]*)([^#\n]*?)([ ]+#.*)?[ ]*$")
    inside = not indented
    for number, line in enumerate(lines):
        if indented and re.match(r"^\S", line) and not line.startswith("#"):
            inside = line.startswith("llava:")
        if inside and (match := line_of_key.match(line)):
            lines[number] = f"{match[1].rstrip()} {_scalar(value)}{match[3] or ''}"
            break
    return "\n".join(lines)


def _scalar(value: object) -> str:
    """Return a value as YAML. A string is quoted only if YAML would read it as something else."""
    text = str(value)
    plain = isinstance(value, str) and not re.search(r"[\s#:\"']", text) and yaml.safe_load(text) == value
    return text if plain else json.dumps(value)
