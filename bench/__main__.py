"""Run every benchmark, each in its own process, and update the figures of bench/README.md.

python -m bench [options of every bench, such as --preset, --rounds or --smoke]
"""

from __future__ import annotations

import subprocess
import sys

from deploy.options import version_line

from . import report


def run_all(options: list[str]) -> int:
    """Run the benchmarks in order. Return the exit status of the first one that fails, else 0."""
    for name in report.BENCHES:
        print(f"== {name}", flush=True)
        status = subprocess.run([sys.executable, "-m", f"bench.{name}", *options]).returncode
        if status:
            return status
    return 0


def asked_about(options: list[str], about: str | None) -> bool:
    """Print the help text or the version if the options ask for one. Return whether they do."""
    if {"-h", "--help"} & set(options):
        print(f"{about}\n`python -m bench.turns --help` lists the options.")
        return True
    if "--version" in options:
        print(version_line())
        return True
    return False


if __name__ == "__main__":
    if asked_about(sys.argv[1:], __doc__):
        sys.exit(0)
    status = run_all(sys.argv[1:])
    if status == 0 and not {"--smoke", "--out", "--device"} & set(sys.argv):
        report.main([])
    sys.exit(status)
