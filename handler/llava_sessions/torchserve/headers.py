"""Check that TorchServe's frontend and worker use the same headers for a session and for the end of a sequence.

The frontend takes the header names from its properties, the worker takes them from its environment. TorchServe does not
report a difference: requests of one session then reach different workers, or the handler receives no session ID.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..protocol.constants import CLOSED_SESSION_HEADER, SESSION_HEADER


@dataclass(frozen=True)
class _Agreement:
    """One header name, and the three settings that must have it.

    `override` is the frontend's environment variable that replaces its property if `enable_envvars_config` is true.
    """

    frontend_property: str
    override: str
    worker_variable: str
    header: str


_AGREEMENTS = (
    _Agreement(
        frontend_property="ts_header_key_sequence_id",
        override="TS_HEADER_KEY_SEQUENCE_ID",
        worker_variable="TS_REQUEST_SEQUENCE_ID",
        header=SESSION_HEADER,
    ),
    _Agreement(
        frontend_property="ts_header_key_sequence_end",
        override="TS_HEADER_KEY_SEQUENCE_END",
        worker_variable="TS_REQUEST_SEQUENCE_END",
        header=CLOSED_SESSION_HEADER,
    ),
)


def read_properties(text: str) -> dict[str, str]:
    """Parse a Java properties file, to the extent that TorchServe's own launcher does (ts/model_server.py)."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def frontend_properties() -> dict[str, str] | None:
    """Return the properties in the `-f` file of the Java process that is an ancestor of this worker.

    Return {} if that process was started without a file, and None if no such process or file is readable.
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
    """Return one message for each session header that the frontend or the worker has wrong.

    `properties` are the frontend's. Frontend and worker share `environment`.
    """
    problems = []
    for agreement in _AGREEMENTS:
        setting, name = _frontend_setting(agreement, properties, environment)
        if name != agreement.header:
            problems.append(
                f"the frontend's {setting} must be {agreement.header}, got {name or '(unset)'} (config.properties)"
            )
        variable = agreement.worker_variable
        name = environment.get(variable)
        if name != agreement.header:
            problems.append(f"the worker's {variable} must be {agreement.header}, got {name or '(unset)'} (local.env)")
    return problems


def _frontend_setting(
    agreement: _Agreement, properties: Mapping[str, str], environment: Mapping[str, str]
) -> tuple[str, str | None]:
    """Return the setting that the frontend uses and its value."""
    from_environment = properties.get("enable_envvars_config", "false").lower() == "true"
    if from_environment and environment.get(agreement.override):
        return f"environment variable {agreement.override}", environment[agreement.override]
    return agreement.frontend_property, properties.get(agreement.frontend_property)
