"""Check model-config.yaml and config.properties: unknown keys, values, and contradictions between keys."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.pack import PackError
from deploy.pack.job import HANDLER_DIR
from deploy.serve.configuration import cors_origins, has_public_metrics, read_properties
from deploy.serve.processes import ServeError

from . import settings
from .findings import Finding, Subject, error, ok, warning
from .frontend_keys import MODEL_KEYS, PROPERTIES

_SHIPPED = "handler/model-config.yaml"
_MODULE = "llava_sessions.torchserve.check"
_TIMEOUT_S = 60
MAX_BODY_BYTES = 32 * 2**20  # of HAProxy (deploy/serve/sessions.cfg)
SAGEMAKER_LIMIT_MS = 60_000
# Keys of whole numbers and the least value of each. TorchServe replaces any other value by a default of its own.
_WHOLE_NUMBERS = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "maxSequenceJobQueueSize": 1,
    "maxBatchDelay": 1,
    "maxRetryTimeoutInSec": 0,
    "responseTimeout": 1,
    "startupTimeout": 1,
}
# Properties of whole numbers. The frontend does not start with any other value.
_PROPERTY_NUMBERS = (
    "default_response_timeout",
    "default_startup_timeout",
    "initial_worker_port",
    "job_queue_size",
    "max_request_size",
    "max_response_size",
    "metric_time_interval",
    "netty_client_threads",
    "number_of_netty_threads",
    "unregister_model_timeout",
)
_JAVA_INT = range(-(2**31), 2**31)
DEFAULTS = {  # of the handler; a test compares them
    "engine_hang_s": 60.0,
    "session_ttl_s": 1200.0,
    "default_deadline_ms": 55_000,
    "max_bytes": 10 * 2**20,
    "max_clip_bytes": 20 * 2**20,
    "max_pixels": 40_000_000,
    "max_request_pixels": 200_000_000,
}


def handler_problems(
    model_configs: Sequence[str] = (), properties: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None
) -> tuple[list[list[str]], list[str]]:
    """Return the problems that the handler finds in each model-config.yaml, and in the session headers.

    The handler's code runs in a process of its own, because `deploy` must not import it.
    """
    given = json.dumps(
        {"model_configs": list(model_configs), "properties": dict(properties or {}), "environment": dict(env or {})}
    )
    command = [sys.executable, "-P", "-W", "ignore", "-m", _MODULE]
    environment = {**os.environ, "PYTHONPATH": str(HANDLER_DIR)}
    done = subprocess.run(
        command, input=given, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise ServeError(f"the handler's check failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    problems = json.loads(done.stdout)
    return problems["model_configs"], problems["headers"]


def check_configuration(subject: Subject) -> Iterator[Finding]:
    """Check the model's configuration as the handler would, and for contradictions that the handler cannot see."""
    try:
        template = subject.config.read_text(encoding="utf-8")
        packed = settings.rendered(subject)
    except OSError as failure:
        yield error("configuration", f"{subject.config} cannot be read: {failure.strerror}", "give --config (CONFIG=)")
        return
    except UnicodeDecodeError:
        yield error("configuration", f"{subject.config} is not UTF-8 text", f"start again from {_SHIPPED}")
        return
    except PackError as failure:
        yield error("configuration", " ".join(str(failure).split()), f"compare it with {_SHIPPED}")
        return
    (problems, of_template), _ = handler_problems([packed, template])
    findings = [error("configuration", problem, f"correct it in {subject.config}") for problem in problems]
    corrected = [problem for problem in of_template if problem not in problems]
    findings += [warning("configuration", p, "build_mar.sh corrects it when it packs") for p in corrected]
    content = yaml.safe_load(packed)
    findings += _contradictions(content)
    findings += unknown_keys("model-config.yaml", content, MODEL_KEYS | {"llava"})
    yield from findings
    if not findings:
        llava = content["llava"]
        facts = f"{llava['max_sessions']} sessions, {content['batchSize']} places in TorchServe"
        yield ok("configuration", f"{subject.config}: {facts}, no contradiction")


def _contradictions(content: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield findings about keys that are valid alone and do not fit together."""
    llava = content["llava"]
    yield from _whole_number_findings(content)
    least, most = content.get("minWorkers", 1), content.get("maxWorkers", 1)
    if _number(least) and _number(most) and least > most:
        found = f"`minWorkers` must be at most `maxWorkers` ({most}), got {least}"
        yield error("configuration", found, "set both to 1")
    elif _number(most) and most > 1:
        found = f"`maxWorkers` is {most}: each worker loads the weights, and implicit sessions need one worker"
        yield warning("configuration", found, "set `minWorkers` and `maxWorkers` to 1")
    hang_s, response_s = _value(llava, "engine_hang_s"), content.get("responseTimeout", 120)
    if _number(response_s) and response_s <= hang_s:
        found = f"`responseTimeout` must be longer than `llava.engine_hang_s` ({hang_s:g} s), got {response_s} s"
        yield error("configuration", found, f"set `responseTimeout` to {int(hang_s * 2)}: the engine is replaced first")
    idle_s, ttl_s = llava.get("session_idle_s"), _value(llava, "session_ttl_s")
    if _number(idle_s) and idle_s >= ttl_s:
        found = f"`llava.session_idle_s` ({idle_s:g}) has no effect: `llava.session_ttl_s` ({ttl_s:g}) ends first"
        yield warning("configuration", found, "set `session_idle_s` to less, or leave it empty")
    yield from _limit_findings(llava)
    yield from _journal_findings(llava)


def _whole_number_findings(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key, least in _WHOLE_NUMBERS.items():
        value = content.get(key, least)
        if type(value) is not int or value < least:
            found = f"`{key}` must be an integer from {least}, got {value!r}"
            yield error("configuration", found, f"write it as in {_SHIPPED}")


def _limit_findings(llava: Mapping[str, Any]) -> Iterator[Finding]:
    limits, media = _section(llava, "limits"), _section(llava, "media")
    deadline_ms = _value(limits, "default_deadline_ms")
    if deadline_ms >= SAGEMAKER_LIMIT_MS:
        found = (
            f"`llava.limits.default_deadline_ms` is {deadline_ms:.0f}: SageMaker gives up after {SAGEMAKER_LIMIT_MS}"
        )
        yield warning("configuration", found, "set it to 55000 for an endpoint, and stream longer answers")
    fits = MAX_BODY_BYTES * 3 // 4  # in base64
    for key, kind in (("max_bytes", "picture"), ("max_clip_bytes", "clip")):
        size = _value(media, key)
        if size > fits:
            found = f"`llava.media.{key}` is {size:.0f}, and a request holds a {kind} of at most {fits}"
            yield warning("configuration", found, f"lower it, or let clients send larger {kind}s by URL")
    one, every = _value(media, "max_pixels"), _value(media, "max_request_pixels")
    if one > every:
        found = f"`llava.media.max_pixels` ({one:.0f}) is above `llava.media.max_request_pixels` ({every:.0f})"
        yield warning("configuration", found, "no picture may have more pixels than a request: lower the first")
    roots = media.get("local_roots")
    for root in roots if isinstance(roots, list) else ():
        if not os.path.isdir(str(root)):
            found = f"`llava.media.local_roots` has {root}, which is not a folder"
            yield warning("configuration", found, "make it, or remove it from the list")


def _journal_findings(llava: Mapping[str, Any]) -> Iterator[Finding]:
    folder, prefix = llava.get("journal_dir"), llava.get("journal_s3_prefix")
    if isinstance(folder, str) and folder:
        path = Path(folder)
        if not path.is_absolute():
            found = f"`llava.journal_dir` must be an absolute path, got {folder!r}"
            yield error("journal", found, "write the whole path: the worker runs in another folder")
        else:
            nearest = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
            if not os.path.isdir(nearest):
                found = f"`llava.journal_dir` {folder} cannot be made: {nearest} is not a folder"
                yield error("journal", found, "choose another folder")
            elif not os.access(nearest, os.W_OK):
                found = f"`llava.journal_dir` {folder} cannot be written: no permission for {nearest}"
                yield error("journal", found, "choose another folder, or change its owner")
    if isinstance(prefix, str) and prefix and not (prefix.startswith("s3://") and prefix[5:].strip("/").count("/")):
        yield error(
            "journal", f"`llava.journal_s3_prefix` must be s3://<bucket>/<prefix>, got {prefix!r}", "correct it"
        )
    if isinstance(folder, str) and folder and isinstance(prefix, str) and prefix:
        found = "`llava.journal_dir` and `llava.journal_s3_prefix` are both set: every answer waits for both"
        yield warning("journal", found, "keep one of them, unless two copies are meant")


def check_properties(subject: Subject) -> Iterator[Finding]:
    """Check config.properties, and the variables of the environment that change a server."""
    try:
        properties = read_properties(subject.properties)
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "it is not UTF-8 text"
        yield error("properties", f"{subject.properties} cannot be read: {reason}", "restore it: git checkout FILE")
        return
    findings = list(unknown_keys("config.properties", properties, PROPERTIES))
    findings += _property_number_findings(properties)
    given = properties.get("max_request_size")
    size = 0 if given is None else _java_int(given)
    if size is not None and size < MAX_BODY_BYTES:
        found = f"`max_request_size` must be at least {MAX_BODY_BYTES}, as in HAProxy, got {given or '(unset)'}"
        findings.append(error("properties", found, "set it to 33816576, or longer bodies end in a closed connection"))
    workers = properties.get("default_workers_per_model", "1")
    if workers != "1":
        found = f"`default_workers_per_model` must be 1, got {workers or '(empty)'}: sessions need one worker"
        findings.append(error("properties", found, "set it to 1"))
    if properties.get("disable_token_authorization", "false").lower() != "true":
        found = "`disable_token_authorization` must be true: with tokens, TorchServe answers /ping with 400"
        findings.append(error("properties", found, "set it to true"))
    findings += _environment_findings(subject.environment)
    yield from findings
    if not findings:
        yield ok("properties", f"{subject.properties}: {len(properties)} keys, all known to TorchServe")


def _property_number_findings(properties: Mapping[str, str]) -> Iterator[Finding]:
    for key in _PROPERTY_NUMBERS:
        if key in properties and _java_int(properties[key]) is None:
            found = f"`{key}` must be an integer below 2147483648, got {properties[key]!r}"
            yield error("properties", found, "correct it: TorchServe does not start with it")


def _java_int(text: str) -> int | None:
    """Return an integer as Java reads it, or None."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) and int(text) in _JAVA_INT else None


def _environment_findings(env: Mapping[str, str]) -> Iterator[Finding]:
    for check in (cors_origins, has_public_metrics):
        try:
            check(env)
        except ServeError as failure:
            yield error("environment", str(failure), "correct the variable, or unset it")
    if env.get("TS_CONFIG_FILE"):
        found = f"TS_CONFIG_FILE is {env['TS_CONFIG_FILE']}: `torchserve` reads it in place of --ts-config"
        yield warning("environment", found, "unset it, or start with python -m deploy.serve, which ignores it")


def unknown_keys(file: str, content: Mapping[str, Any], known: Collection[str]) -> Iterator[Finding]:
    """Yield a warning for each key that TorchServe does not read."""
    lower = {key.lower(): key for key in known}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key).lower(), list(lower), 1)
            remedy = f"write `{lower[close[0]]}`" if close else "remove it"
            yield warning("configuration", f"{file}: TorchServe ignores the unknown key `{key}`", remedy)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _section(llava: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a mapping of the file, empty if it is absent or malformed (the handler reports that)."""
    value = llava.get(key)
    return value if isinstance(value, Mapping) else {}


def _value(section: Mapping[str, Any], key: str) -> float:
    """Return a number of the file, or the handler's default if it is absent or malformed (the handler reports that)."""
    value: float = section.get(key, DEFAULTS[key])
    return value if _number(value) else DEFAULTS[key]
