"""Owns what is agreed with TorchServe's frontend: the two headers that carry a session, and the end of a sequence.

The frontend takes their names from its properties, the worker from its environment, and neither tells when they differ:
requests of one session then reach different workers, or the handler sees no session at all. Must not know TorchServe's
Python API.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import psutil

from ..protocol.constants import CLOSED_SESSION_HEADER, SESSION_HEADER

log = logging.getLogger(__name__)


# property of the frontend, environment variable that overrides it, environment variable of the worker, what it must be
_KEYS = (
    ("ts_header_key_sequence_id", "TS_HEADER_KEY_SEQUENCE_ID", "TS_REQUEST_SEQUENCE_ID", SESSION_HEADER),
    ("ts_header_key_sequence_end", "TS_HEADER_KEY_SEQUENCE_END", "TS_REQUEST_SEQUENCE_END", CLOSED_SESSION_HEADER),
)


def read_properties(text: str) -> dict[str, str]:
    """The pairs of a Java properties file, as far as TorchServe's own launcher reads them (ts/model_server.py)."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def frontend_properties() -> dict[str, str] | None:
    """The properties that the frontend was started with: the `-f` file of the Java process above this worker.

    None when no such process is seen, {} when it was started without a file.
    """
    for process in psutil.Process().parents():
        try:
            command = process.cmdline()
            if "org.pytorch.serve.ModelServer" not in command:
                continue
            if "-f" not in command[:-1]:
                return {}
            path = Path(command[command.index("-f") + 1])
            return read_properties((Path(process.cwd()) / path).read_text())
        except (psutil.Error, OSError):
            continue
    return None


def header_problems(properties: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """How the frontend's and the worker's session headers differ from what they must be; empty when all is well."""
    problems = []
    from_environment = properties.get("enable_envvars_config", "false").lower() == "true"
    for key, override, worker_variable, wanted in _KEYS:
        frontend = properties.get(key)
        if from_environment and environment.get(override):
            key, frontend = f"environment variable {override}", environment[override]
        if frontend != wanted:
            has = f"the frontend has {key}={frontend or '(unset)'}"
            problems.append(f"{has}; it must be {wanted} (config.properties)")
        worker = environment.get(worker_variable)
        if worker != wanted:
            problems.append(
                f"the worker has {worker_variable}={worker or '(unset)'}; it must be {wanted} (deploy/local.env)"
            )
    return problems
