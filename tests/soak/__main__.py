"""Run all soaks, one after another, or one: python -m tests.soak [NAME [options]]."""

from __future__ import annotations

import subprocess
import sys

from deploy.options import error_prefix, typed, version_line

from . import churn, client_faults, devices, fuzz, isolation, kills, lifecycles, memory, moves

SOAKS = {
    "engine-kills": kills.engine_kills,
    "engine-stops": kills.engine_stops,
    "worker-kills": kills.worker_kills,
    "server-kills": kills.server_kills,
    "devices": devices.devices,
    "isolation": isolation.isolation,
    "churn": churn.main,
    "fuzz": fuzz.main,
    "lifecycles": lifecycles.main,
    "memory": memory.memory,
    "moves": moves.moves,
    "client-faults": client_faults.client_faults,
}


def main(argv: list[str]) -> int:
    """Return 0 if every check of every soak holds."""
    if not argv:
        return max([_alone(name) for name in SOAKS])
    if argv[0] in SOAKS:
        return SOAKS[argv[0]](argv[1:])
    if argv[0] == "--version":
        print(version_line())
        return 0
    if argv[0] not in ("-h", "--help"):
        start = error_prefix("python -m tests.soak")
        print(f"{start}error: {typed('NAME')} must be one of {', '.join(SOAKS)}, got {argv[0]!r}", file=sys.stderr)
        return 2
    lines = [f"  {name:14} {soak.__doc__.splitlines()[0]}" for name, soak in SOAKS.items()]
    print("usage: python -m tests.soak [NAME [options]]   all of them, or one; NAME --help lists its options\n")
    print("\n".join(lines))
    return 0


def _alone(name: str) -> int:
    """Run one soak in a process of its own, so that it finds no leftovers of another."""
    print(f"== {name}", flush=True)
    return subprocess.run([sys.executable, "-m", __package__, name], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
