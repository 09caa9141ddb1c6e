"""Check that TorchServe's frontend, the worker, HAProxy and SageMaker name a session by the same header."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from deploy.serve.configuration import read_env_file, read_properties
from deploy.serve.haproxy import BODY_LIMIT, CONFIGS, find_haproxy
from deploy.serve.processes import LOOPBACK

from .configuration import handler_problems
from .findings import Finding, Subject, error, ok

SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
HEADERS = (SESSION_HEADER, "X-Amzn-SageMaker-New-Session-Id", "X-Amzn-SageMaker-Closed-Session-Id")
_ADJUST = re.compile(r"^\s*h1-case-adjust\s+(\S+)\s+(\S+)", re.MULTILINE)
_CHECK_TIMEOUT_S = 60


def check_headers(subject: Subject) -> Iterator[Finding]:
    """Compare the settings of frontend and worker, and HAProxy's rules, with SageMaker's names."""
    try:
        properties = read_properties(subject.properties)
        variables = read_env_file(subject.worker_env)
    except (OSError, UnicodeDecodeError) as failure:
        reason = f"{failure.strerror}: {failure.filename}" if isinstance(failure, OSError) else "not UTF-8 text"
        yield error("headers", f"the settings cannot be read: {reason}", "restore the file: git checkout FILE")
        return
    env = {**subject.environment, **variables}
    _, problems = handler_problems(properties=properties, env=env)
    for problem in problems:
        yield error("headers", problem, "write the name as it is here: upper and lower case matter")
    rules = haproxy_problems(CONFIGS)
    for problem in rules:
        yield error("headers", problem, "restore deploy/serve/sessions.cfg")
    if not problems and not rules:
        yield ok("headers", f"frontend, worker and HAProxy agree on SageMaker's {SESSION_HEADER}")


def haproxy_problems(configs: tuple[Path, ...]) -> list[str]:
    """Return a problem for each header whose spelling HAProxy would not correct."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in configs)
    spelled = dict(_ADJUST.findall(text))
    return [
        f"HAProxy must spell {header.lower()} as {header}, got {spelled.get(header.lower(), '(no rule)')}"
        for header in HEADERS
        if spelled.get(header.lower()) != header
    ]


def check_haproxy_rules(subject: Subject, configs: tuple[Path, ...] = CONFIGS) -> Iterator[Finding]:
    """Let the installed HAProxy check its rules."""
    haproxy = find_haproxy()
    if haproxy is None:
        return  # the check of the programs reports it
    variables = {
        "FRONT_HOST": LOOPBACK,
        "FRONT_PORT": "8080",
        "FRONT_TARGET": "8081",
        "MODEL_NAME": "llava",
        "MODEL_VERSION": "1.0",
        "BODY_LIMIT": str(BODY_LIMIT),
        "SESSIONS_RUN": "/tmp",
    }
    command = [haproxy, "-c", "-q", *(word for path in configs for word in ("-f", str(path)))]
    env = {"PATH": os.defpath, **subject.environment, **variables}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S, check=False)
    alerts = [line for line in (done.stdout + done.stderr).splitlines() if "[ALERT]" in line]
    if done.returncode:
        first = re.sub(r"\s+", " ", alerts[0] if alerts else "no reason given").removeprefix("[ALERT] ")
        yield error("haproxy rules", f"HAProxy rejects its rules: {first}", "restore deploy/serve/*.cfg")
    else:
        yield ok("haproxy rules", f"{shutil.which('haproxy') or haproxy} accepts {', '.join(p.name for p in configs)}")
