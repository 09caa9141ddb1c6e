"""Measure and check the engine on a GPU, in one run of at most nine minutes.

    PYTHONPATH=.:handler:client PYTHONUNBUFFERED=1 python -m bench.gpu_day --out DIR

Needs no checkpoint, no network and no installed package of the project: models of published shapes with random weights
are made on the device. DIR/gpu_day.json is rewritten after every section. An error ends its section only. Sections for
which too little time is left are skipped with a note. Without a GPU only `--smoke` runs: tiny shapes, in seconds.

The exit status is 1 if a section ended with an error or a failed check.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.options import Parser, decimal_number

LIMIT_S = 540.0
NAMES = (
    "machine",
    "kernel numbers",
    "kernel bandwidth",
    "tests",
    "decode",
    "prefill and pictures",
    "memory",
    "moves",
    "faults",
    "soak",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse(argv)
    import torch  # here, so that --help needs no seconds

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(options.device)
    if options.child:
        from .children import serve

        serve(options.child, device, options.smoke, options.limit)
        return 0
    if device.type == "cpu" and not options.smoke:
        print("no CUDA device: nothing was measured (`--smoke` runs tiny shapes on the CPU)")
        return 0
    from .day import Day
    from .sections import SECTIONS

    day = Day(device, options.out, options.limit, options.smoke)
    bad = day.run([section for section in SECTIONS if not options.sections or section.name in options.sections])
    print(f"written: {options.out / 'gpu_day.json'}")
    return 1 if bad else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m bench.gpu_day", description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="folder of gpu_day.json (gpu_day)")
    limit = "seconds that the whole run may take (540)"
    parser.add_argument("--limit", type=decimal_number(1), default=LIMIT_S, metavar="SECONDS", help=limit)
    parser.add_argument("--sections", nargs="+", choices=NAMES, metavar="NAME", help=f"of: {', '.join(NAMES)}")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that every section runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
