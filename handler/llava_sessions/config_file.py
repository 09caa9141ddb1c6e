"""Read `model-config.yaml` by the models of `config`, and name every problem. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from .config import DEFAULT_ABOVE_MAX, FRONTEND_MARGIN_S, SECTIONS, HandlerConfig, Section, frontend_capacity
from .errors import describe

_TEXT_MAX_CHARS = 40
_DEVICES = HandlerConfig.model_fields["devices"].annotation


class ConfigError(Exception):
    """The configuration is unusable. The message has every problem, one in a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def read_config(model_yaml: Mapping[str, Any]) -> HandlerConfig:
    """Return the handler's part of `model-config.yaml`. Raise `ConfigError` with every problem of the file."""
    section = model_yaml.get("llava")
    if not isinstance(section, Mapping):
        raise ConfigError([f"`llava` must be a mapping, got {_shown(section)}"])
    problems: dict[str, str] = {}
    config: HandlerConfig | None = None
    try:
        config = HandlerConfig.model_validate(section)
    except ValidationError as error:
        problems = _problems_by_key(error, section)

    def value_of(key: str) -> Any:
        """Return a key's value, or its default if the value is absent or malformed."""
        value = None if f"llava.{key}" in problems else section.get(key)
        return HandlerConfig.model_fields[key].default if value is None else value

    frontend = _frontend_problems(model_yaml, value_of("max_sessions"), value_of("session_ttl_s"))
    every = [*problems.values(), *frontend]
    if config is not None and config.weights == "int8" and config.dtype in ("float32", "float16"):
        # With device auto, the engine checks float16 when it knows the device.
        if "cpu" in (config.device, *(config.devices or ())):
            every.append(f"`llava.dtype` must be auto or bfloat16 with int8 weights on a CPU, got {config.dtype!r}")
        elif config.dtype == "float32":
            every.append("`llava.dtype` must be auto, bfloat16 or float16 with int8 weights, got 'float32'")
    if config is not None:
        every += _device_problems(config, model_yaml)
    if every or config is None:
        raise ConfigError(every)
    return config


def expected(field: FieldInfo) -> str:
    """Return the values that a key may have, in words for messages and for the documentation."""
    kind = field.annotation
    if kind in SECTIONS.values():
        return "a mapping"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "a list of non-empty strings"
    if kind == _DEVICES:
        return "auto or a list of cpu, cuda:0, cuda:1 ..."
    kinds = get_args(kind) or (kind,)
    if kind is bool:
        return "true or false"
    if str in kinds:
        return "a non-empty string" if field.is_required() else "a string"
    low = next(limit.ge for limit in field.metadata if isinstance(limit, Ge))
    high = next(limit.le for limit in field.metadata if isinstance(limit, Le))
    number = f"{'an integer' if int in kinds else 'a number'} from {low} to {high}"
    return f"auto or {number}" if kind == int | None else number


def default_of(field: FieldInfo) -> str:
    """Return the default of a key as it is written in the file."""
    if field.is_required():
        return "required"
    if field.default is None:
        return "`auto`" if field.annotation in (int | None, _DEVICES) else "empty"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{default:g}`" if isinstance(default, float) else f"`{json.dumps(default)}`"


def _problems_by_key(error: ValidationError, section: Mapping[str, Any]) -> dict[str, str]:
    """Return one message for each malformed or unknown key."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        section_name = str(detail["loc"][0])
        if len(detail["loc"]) > 1 and section_name in SECTIONS:
            key, path = detail["loc"][1], f"llava.{section_name}.{detail['loc'][1]}"
            problem = _problem(path, key, SECTIONS[section_name], section[section_name], detail)
        else:
            key, path = detail["loc"][0], f"llava.{section_name}"
            problem = _problem(path, key, HandlerConfig, section, detail)
        problems.setdefault(path, problem)
    return problems


def _problem(path: str, key: object, model: type[Section], values: Mapping[Any, Any], detail: ErrorDetails) -> str:
    field = model.model_fields.get(str(key))
    if field is None:
        return f"`{path}` must be one of the keys {', '.join(sorted(model.model_fields))}, got an unknown key"
    if detail["type"] == DEFAULT_ABOVE_MAX:
        return f"`{path}` {detail['msg']}"
    return f"`{path}` must be {expected(field)}, got {_shown(values.get(key))}"


def _frontend_problems(model_yaml: Mapping[str, Any], max_sessions: int, session_ttl_s: float) -> Iterator[str]:
    """Yield the problems of TorchServe's own keys on which sessions depend."""
    for key in ("sequenceBatching", "continuousBatching"):
        if model_yaml.get(key) is not True:
            yield f"`{key}` must be true, got {_shown(model_yaml.get(key))}"
    capacity = frontend_capacity(max_sessions)
    for key in ("batchSize", "maxNumSequence"):
        if _is_below(model_yaml.get(key), capacity):
            least = f"{capacity} for {max_sessions} `llava.max_sessions`"
            yield f"`{key}` must be an integer of at least {least}, got {_shown(model_yaml.get(key))}"
    shortest_ms = (session_ttl_s + FRONTEND_MARGIN_S) * 1000
    for key in ("sequenceTimeoutMSec", "sequenceMaxIdleMSec"):
        if _is_below(model_yaml.get(key), shortest_ms):
            least = f"{shortest_ms:.0f} (`llava.session_ttl_s` and {FRONTEND_MARGIN_S} s)"
            yield f"`{key}` must be an integer of at least {least}, got {_shown(model_yaml.get(key))}"
    workers = model_yaml.get("maxWorkers", 1)
    batch = model_yaml.get("batchSize")
    sequences = model_yaml.get("maxNumSequence")
    if isinstance(workers, int) and isinstance(batch, int) and isinstance(sequences, int):
        # TorchServe stalls the requests of further sequences.
        most = workers * batch
        if sequences > most:
            yield f"`maxNumSequence` must be at most maxWorkers * batchSize ({most}), got {sequences}"


def _device_problems(config: HandlerConfig, model_yaml: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a list of devices. Two engines on one GPU would both take all of its free memory."""
    devices = config.devices
    if devices is None:
        return
    shown = ", ".join(devices)
    if config.device != "auto":
        yield f"`llava.devices` must be auto with `llava.device` {config.device}, got {shown}"
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        yield f"`llava.devices` must name each GPU once, got {shown}"
    if gpus and len(gpus) < len(devices):
        yield f"`llava.devices` must be GPUs only or CPUs only, got {shown}"
    workers = model_yaml.get("maxWorkers", 1)
    if workers != 1:
        yield f"`maxWorkers` must be 1 with a list of `llava.devices`, got {_shown(workers)}"


def _is_below(value: object, least: float) -> bool:
    return not isinstance(value, int) or value < least


def _shown(value: object) -> str:
    """Return a short form of a value of the file; only short strings are shown."""
    return repr(value) if isinstance(value, str) and len(value) <= _TEXT_MAX_CHARS else describe(value)
