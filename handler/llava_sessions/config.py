"""Owns the meaning of `model-config.yaml`: reads it, checks it whole, and names every problem at once.

Must not know torch, TorchServe's API or where the file came from. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
# How long after a session's expiry TorchServe still keeps its sequence: longer than the longest turn.
FRONTEND_MARGIN_S = 120


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for; from `model-config.yaml`."""

    max_prompt_chars: int = 32_768
    default_new_tokens: int = 256
    max_new_tokens: int = 1_024
    max_stop_strings: int = 8
    max_stop_chars: int = 64
    max_pictures: int = 8
    max_frames: int = 32
    default_deadline_ms: int = 55_000


@dataclass(frozen=True)
class MediaLimits:
    """What one picture may cost and where it may come from."""

    max_bytes: int = 10 * 2**20  # of one encoded picture
    max_pixels: int = 40_000_000  # of one decoded picture, by its header; above 178 million Pillow refuses by itself
    fetch_timeout_s: float = 10.0  # the whole fetch: name look-up, redirects, headers, body
    allowed_hosts: tuple[str, ...] = ()  # empty: any public https host; else exact names or "*.suffix"
    s3_buckets: tuple[str, ...] = ()  # exact names; empty: s3:// is refused
    local_roots: tuple[str, ...] = ()  # directories; empty: local paths are refused
    max_aspect: float = 100.0  # longer side / shorter side: a model's resize by the shorter side multiplies it


class ConfigError(Exception):
    """The configuration can't work; the message names every problem, one a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class HandlerConfig:
    """The `llava:` section. Times in seconds, sizes in bytes or tokens as named."""

    checkpoint: str
    dtype: str
    device: str
    max_sessions: int
    session_ttl_s: float
    session_idle_s: float | None
    engine_hang_s: float
    journal_dir: str | None
    journal_s3_prefix: str | None
    prefill_chunk_tokens: int
    device_bytes: int | None
    host_bytes: int | None
    system_prompt: str
    limits: RequestLimits
    media: MediaLimits


def frontend_capacity(max_sessions: int) -> int:
    """What `batchSize` and `maxNumSequence` must be for so many sessions.

    TorchServe keeps a sequence, and a blocked thread, for each session until it ends, expires or is refused, so room
    for sessions that just expired and for requests about to be refused is added.
    """
    return 2 * max_sessions + 16


def read_config(model_yaml: Mapping[str, Any]) -> HandlerConfig:
    """Read the whole of `model-config.yaml`. Raises `ConfigError`."""
    problems: list[str] = []
    section = model_yaml.get("llava")
    if not isinstance(section, Mapping):
        raise ConfigError(["model-config.yaml has no 'llava:' section"])
    reader = _Section("llava", section, problems)
    config = HandlerConfig(
        checkpoint=reader.text("checkpoint"),
        dtype=reader.choice("dtype", "auto", DTYPES),
        device=reader.text("device", "auto"),
        max_sessions=reader.integer("max_sessions", 64, 1, 4096),
        session_ttl_s=reader.number("session_ttl_s", 1200, 1, 86_400),
        session_idle_s=reader.optional_number("session_idle_s", 1, 86_400),
        engine_hang_s=reader.number("engine_hang_s", 60, 3, 3600),
        journal_dir=reader.text("journal_dir", "") or None,
        journal_s3_prefix=reader.text("journal_s3_prefix", "") or None,
        prefill_chunk_tokens=reader.integer("prefill_chunk_tokens", 256, 1, 65_536),
        device_bytes=reader.size("device_bytes"),
        host_bytes=reader.size("host_bytes"),
        system_prompt=reader.text("system_prompt", ""),
        limits=_limits(reader.section("limits")),
        media=_media(reader.section("media")),
    )
    reader.finish()
    _check_frontend(model_yaml, config, problems)
    if problems:
        raise ConfigError(problems)
    return config


def _limits(reader: _Section) -> RequestLimits:
    default = RequestLimits()
    limits = RequestLimits(
        max_prompt_chars=reader.integer("max_prompt_chars", default.max_prompt_chars, 1, 10_000_000),
        default_new_tokens=reader.integer("default_new_tokens", default.default_new_tokens, 1, 1_000_000),
        max_new_tokens=reader.integer("max_new_tokens", default.max_new_tokens, 1, 1_000_000),
        max_frames=reader.integer("max_frames", default.max_frames, 1, 1_000),
        default_deadline_ms=reader.integer("default_deadline_ms", default.default_deadline_ms, 1, 600_000),
        max_pictures=reader.integer("max_pictures", default.max_pictures, 1, 1_000),
    )
    if limits.default_new_tokens > limits.max_new_tokens:
        reader.problem("default_new_tokens", f"is above max_new_tokens ({limits.max_new_tokens})")
    reader.finish()
    return limits


def _media(reader: _Section) -> MediaLimits:
    default = MediaLimits()
    media = MediaLimits(
        max_bytes=reader.integer("max_bytes", default.max_bytes, 1, 2**31),
        max_pixels=reader.integer("max_pixels", default.max_pixels, 1, 2**31),
        fetch_timeout_s=reader.number("fetch_timeout_s", default.fetch_timeout_s, 0.1, 60),
        allowed_hosts=reader.texts("allowed_hosts"),
        s3_buckets=reader.texts("s3_buckets"),
        local_roots=reader.texts("local_roots"),
    )
    reader.finish()
    return media


def _check_frontend(model_yaml: Mapping[str, Any], config: HandlerConfig, problems: list[str]) -> None:
    """TorchServe's own part of the file, as far as sessions depend on it."""
    switches = ("sequenceBatching", "continuousBatching")
    off = [key for key in switches if model_yaml.get(key) is not True]
    problems.extend(f"{key} is {model_yaml.get(key)!r}; it must be true" for key in off)
    capacity = frontend_capacity(config.max_sessions)
    for key in ("batchSize", "maxNumSequence"):
        if not isinstance(model_yaml.get(key), int) or model_yaml[key] < capacity:
            wanted = f"it must be at least {capacity} for max_sessions {config.max_sessions}"
            problems.append(f"{key} is {model_yaml.get(key)!r}; {wanted}")
    shortest_ms = (config.session_ttl_s + FRONTEND_MARGIN_S) * 1000
    for key in ("sequenceTimeoutMSec", "sequenceMaxIdleMSec"):
        if not isinstance(model_yaml.get(key), int) or model_yaml[key] < shortest_ms:
            wanted = f"it must be at least {shortest_ms:.0f}, session_ttl_s and {FRONTEND_MARGIN_S} s"
            problems.append(f"{key} is {model_yaml.get(key)!r}; {wanted}")
    workers, batch = model_yaml.get("maxWorkers", 1), model_yaml.get("batchSize")
    sequences = model_yaml.get("maxNumSequence")
    if all(isinstance(n, int) for n in (workers, batch, sequences)) and sequences > workers * batch:
        problems.append(
            f"maxNumSequence is {sequences}; above maxWorkers * batchSize ({workers * batch}) requests stall"
        )


class _Section:
    """Reads one mapping of the file and collects what is wrong with it."""

    def __init__(self, name: str, values: Mapping[str, Any], problems: list[str]) -> None:
        self._name = name
        self._values = values
        self._problems = problems
        self._read: set[str] = set()

    def problem(self, key: str, text: str) -> None:
        self._problems.append(f"{self._name}.{key} {text}")

    def finish(self) -> None:
        """Name the keys that nothing reads: a misspelt limit must not be ignored."""
        for key in self._values:
            if key not in self._read:
                self.problem(str(key), f"is unknown; known are {', '.join(sorted(self._read))}")

    def section(self, key: str) -> _Section:
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            self.problem(key, f"is {value!r}; a mapping is wanted")
            value = {}
        return _Section(f"{self._name}.{key}", value, self._problems)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str) or (default is None and not value):
            self.problem(key, f"is {value!r}; a text is wanted")
            return default or ""
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            self.problem(key, f"is {value!r}; a list of texts is wanted")
            return ()
        return tuple(value)

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        value = self._get(key, default)
        if value not in choices:
            self.problem(key, f"is {value!r}; one of {', '.join(choices)} is wanted")
            return default
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.problem(key, f"is {value!r}; a whole number from {low} to {high} is wanted")
            return default
        return value

    def size(self, key: str) -> int | None:
        """Bytes; None for "auto"."""
        return None if self._get(key, "auto") == "auto" else self.integer(key, 0, 0, 2**50)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.problem(key, f"is {value!r}; a number from {low:g} to {high:g} is wanted")
            return default
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return None if self._get(key, None) is None else self.number(key, low, low, high)

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value
