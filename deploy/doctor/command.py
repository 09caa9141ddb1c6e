"""The command line of `doctor`: run all checks, print a line for each finding."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.options import Parser, port_number, whole_number

from .findings import Finding, Subject, error

PROG = "python -m deploy.doctor"
ABOUT = "Check Java, packages, ports, memory, the checkpoint, the configuration and the session headers"
# Module and function of each check, in order. A module is imported when its check runs, since packages may be missing.
CHECKS = (
    ("software", "check_python"),
    ("software", "check_packages"),
    ("software", "check_java"),
    ("software", "check_haproxy"),
    ("ports", "check_ports"),
    ("checkpoint", "check_checkpoint"),
    ("checkpoint", "check_dtype"),
    ("gpu", "check_gpu"),
    ("resources", "check_memory"),
    ("resources", "check_shared_memory"),
    ("resources", "check_disk"),
    ("resources", "check_processes"),
    ("configuration", "check_configuration"),
    ("configuration", "check_properties"),
    ("headers", "check_headers"),
    ("headers", "check_haproxy_rules"),
    ("live", "check_live"),
)
# A running server has its ports and its memory.
_ONLY_STOPPED = ("check_ports", "check_memory", "check_disk", "check_processes")
_ONLY_LIVE = ("check_live",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor` to a parser."""
    add = parser.add_argument
    default = Subject()
    port = "the public port; the next two are used too (default: %(default)s; 0: free ports)"
    add("--port", type=port_number(further=2), default=default.port, metavar="N", help=port)
    add("--model", default=default.model, metavar="DIR_OR_HUB_ID", help="the checkpoint (default: %(default)s)")
    config = "the configuration that is packed (default: handler/model-config.yaml)"
    add("--config", type=Path, default=default.config, metavar="FILE", help=config)
    properties = "the frontend's properties (default: config.properties)"
    add("--properties", type=Path, default=default.properties, metavar="FILE", help=properties)
    env = "the worker's environment (default: deploy/serve/local.env)"
    add("--worker-env", type=Path, default=default.worker_env, metavar="FILE", help=env)
    add("--sessions", type=whole_number(1), metavar="N", help="as in build_mar.sh (default: as configured)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, help="as in build_mar.sh (default: as configured)")
    add("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: as configured)")
    live = "check the server that runs at the port: readiness, and the round trip of a session's header"
    add("--live", action="store_true", dest="is_live", help=live)
    add("--json", action="store_true", dest="as_json", help="print one JSON object")


def subject_of(args: argparse.Namespace) -> Subject:
    """Return what the options describe."""
    return Subject(
        port=args.port,
        model=args.model,
        config=args.config,
        properties=args.properties,
        worker_env=args.worker_env,
        sessions=args.sessions,
        dtype=args.dtype,
        device=args.device,
        is_live=args.is_live,
        environment=dict(os.environ),
    )


def findings(subject: Subject) -> Iterator[Finding]:
    """Run the checks in order, and yield what they find. A check that fails is a finding too."""
    for module, function in CHECKS:
        if function in (_ONLY_STOPPED if subject.is_live else _ONLY_LIVE):
            continue
        name = function.removeprefix("check_").replace("_", " ")
        try:
            check = getattr(importlib.import_module(f"deploy.doctor.{module}"), function)
            yield from check(subject)
        except ModuleNotFoundError as failure:
            yield error(name, f"not checked: the package {failure.name} is not installed", "run: make env")
        except OSError as failure:
            yield error(name, f"not checked: {failure}", "correct that path or its permissions")
        except Exception as failure:  # the other checks still help
            reason = " ".join(str(failure).split())
            yield error(name, f"not checked: {type(failure).__name__}: {reason}", "report this as a fault of doctor")


def run(args: argparse.Namespace) -> int:
    """Print the report. Return the exit code: 1 if there is an error."""
    found = []
    for finding in findings(subject_of(args)):
        found.append(finding)
        if not args.as_json:
            print(finding.line(), flush=True)
    counts = {level: sum(one.level == level for one in found) for level in ("ok", "warning", "error")}
    if args.as_json:
        print(json.dumps({"findings": [one.record() for one in found], **counts}, indent=1))
    else:
        print(f"\n{counts['error']} errors, {counts['warning']} warnings, {counts['ok']} checks passed")
    return 1 if counts["error"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog=PROG, description=f"{ABOUT}, and print what to do.")
    add_options(parser)
    args = parser.parse_args(argv)
    return run(args)
