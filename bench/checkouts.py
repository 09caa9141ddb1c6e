"""Speed of two checkouts of the project: the same bench in both, run by run in turn.

Each round runs `python -m bench.NAME --rounds 1` once in each checkout, in alternating order. The ratio of a figure is
its median over the rounds of new / old in the same round. Next to it is the ratio of the old checkout with itself, of
each round with the next one: the noise of the machine. A ratio above 1 means that the new checkout takes more time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from deploy.options import Parser, whole_number

from . import machine

# Figures of each bench: name, side of its samples, key of the samples.
FIGURES = {
    "turns": [("open", "engine", "open_ms"), ("TTFT", "engine", "ttft_ms"), ("time per token", "engine", "tpot_ms")],
    "pipe": [("TTFT in process", "in-process", "ttft_ms"), ("TTFT over the pipe", "over the pipe", "ttft_ms")],
}


def flat(samples: Any) -> list[float]:
    """Return all numbers of nested lists."""
    if isinstance(samples, list):
        return [number for item in samples for number in flat(item)]
    return [float(samples)]


def run(checkout: Path, python: str, bench: str, options: list[str]) -> dict[str, float]:
    """Run the bench once in a checkout. Return the median of each figure in milliseconds."""
    with tempfile.TemporaryDirectory() as out:
        command = [python, "-m", f"bench.{bench}", "--rounds", "1", "--out", out, *options]
        subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
        (record,) = Path(out).glob("*.json")
        samples = json.loads(record.read_text())["samples"]
    figures = [figure for figure in FIGURES[bench] if figure[2] in samples[figure[1]]]
    return {name: statistics.median(flat(samples[side][key])) for name, side, key in figures}


def main(words: list[str] | None = None) -> None:
    """Print the ratios, and write them to `bench/results/checkouts-NAME.json`."""
    parser = Parser(
        prog="python -m bench.checkouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="checkout with the code before the change")
    parser.add_argument("new", type=Path, help="checkout with the code after it")
    parser.add_argument("--bench", choices=FIGURES, default="turns")
    parser.add_argument("--rounds", type=whole_number(1), default=10)
    parser.add_argument("--smoke", action="store_true", help="tiny model: shows the cost of Python code")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(words)
    if options.rounds < 2:
        parser.error("--rounds must be 2 or more, since each round of the old checkout is compared with the next one")
    extra = ["--smoke"] if options.smoke else []
    sides = {"old": options.old, "new": options.new}
    taken: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for number in range(options.rounds):
        for side in ("old", "new") if number % 2 == 0 else ("new", "old"):
            taken[side].append(run(sides[side], sys.executable, options.bench, extra))
        print(f"round {number + 1} of {options.rounds}: {taken['old'][-1]} {taken['new'][-1]}", flush=True)
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['date']}")
    ratios = {}
    for name in taken["old"][0]:
        old = [figures[name] for figures in taken["old"]]
        new = [figures[name] for figures in taken["new"]]
        between = statistics.median(b / a for a, b in zip(old, new, strict=True))
        itself = statistics.median(b / a for a, b in itertools.pairwise(old))
        ratios[name] = {"new / old": between, "old / old": itself}
        print(f"{name}: new / old {between:.3f}, old with itself {itself:.3f}")
    name = f"checkouts-{options.bench}{'-smoke' if options.smoke else ''}.json"
    record = {"facts": facts, "rounds": options.rounds, "ratios": ratios, "samples": taken}
    (options.out / name).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
