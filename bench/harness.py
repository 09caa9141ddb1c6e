"""Shared parts of all benchmarks: options, table, JSON and plot.

A benchmark is a module with a `main(argv)`. It measures all sides of a comparison in one run, alternating, and reports
medians together with the best time. Every record includes the machine, its load and the versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from deploy.options import Parser, whole_number
from llava_sessions.engine.model import native_dtype

from . import machine
from .make_checkpoint import PRESETS, ensure_checkpoint

RESULTS = Path(__file__).parent / "results"
DEMO_MODEL = Path(__file__).parents[1] / "models" / "shapes"
FLOAT32 = "-float32"  # suffix of the name of a record from a CPU without bfloat16


@dataclass
class Options:
    """Options of a run. `extra`: the parsed arguments, with the options of this benchmark alone."""

    name: str
    checkpoint: Path
    preset: str
    dtype: torch.dtype
    device: torch.device
    rounds: int
    smoke: bool
    out: Path
    seed: int
    extra: argparse.Namespace

    def pick(self, usual: Any, smoke: Any) -> Any:
        """Return `smoke` in a smoke run, else `usual`."""
        return smoke if self.smoke else usual


def served_options(name: str, about: str | None, argv: list[str] | None, *, rounds: int, rounds_help: str) -> Options:
    """Parse the command line of a benchmark of the whole service, which always serves the demo model."""
    parser = Parser(
        prog=f"python -m bench.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=whole_number(1), default=rounds, help=rounds_help)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    parser.add_argument("--smoke", action="store_true", help="one short round: shows that it runs")
    given = parser.parse_args(argv)
    given.rounds = 1 if given.smoke else given.rounds
    return plain_options(name, given)


def plain_options(name: str, given: argparse.Namespace) -> Options:
    """Return the options of a benchmark that serves the demo model in float32, from its own parsed arguments."""
    return Options(
        name=name,
        checkpoint=DEMO_MODEL,
        preset="shapes",
        dtype=torch.float32,
        device=torch.device("cpu"),
        rounds=getattr(given, "rounds", 1),
        smoke=given.smoke,
        out=given.out,
        seed=getattr(given, "seed", 0),
        extra=given,
    )


def parse(
    name: str,
    about: str | None,
    argv: list[str] | None,
    rounds: int,
    more: Callable | None = None,
    preset: str = "bench",
) -> Options:
    """Parse the command line; build the checkpoint if it is missing. `more(parser)` adds a benchmark's own options.

    `preset`: the default.
    """
    parser = Parser(
        prog=f"python -m bench.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default=preset, help=f"the random-weight model ({preset})")
    words = "of weights and KV (default: the engine's choice on this device)"
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help=words)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=whole_number(1), help="torch threads (torch's default: all cores)")
    parser.add_argument("--rounds", type=whole_number(1), default=rounds, help=f"number of measurements ({rounds})")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and the prompts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the plot (bench/results)")
    parser.add_argument("--smoke", action="store_true", help="tiny model, float32, one round: shows that it runs")
    if more:
        more(parser)
    given = parser.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    preset = "tiny" if given.smoke else given.preset
    device = torch.device(given.device)
    dtype = getattr(torch, given.dtype) if given.dtype else native_dtype(device)
    # The tiny model runs in float32 on every machine. For other models, float32 results are a separate record.
    plain = "" if preset == "tiny" or dtype != torch.float32 else FLOAT32
    suffix = "-cuda" if given.device == "cuda" else plain
    return Options(
        name=name + suffix,
        checkpoint=ensure_checkpoint(preset),
        preset=preset,
        dtype=torch.float32 if given.smoke else dtype,
        device=device,
        rounds=1 if given.smoke else given.rounds,
        smoke=given.smoke,
        out=given.out,
        seed=given.seed,
        extra=given,
    )


def at_preset(options: Options, preset: str) -> Options:
    """Return the same options for another checkpoint. The tiny one is in float32, where equal answers are exact."""
    dtype = torch.float32 if preset == "tiny" else options.dtype
    return replace(options, checkpoint=ensure_checkpoint(preset), preset=preset, dtype=dtype)


@dataclass
class Result:
    """Results of a benchmark: the table, the ratios that `bar.py` reads, settings, samples and notes."""

    columns: list[str]
    rows: list[dict] = field(default_factory=list)
    ratios: dict[str, float | bool | int] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Run:
    """One run of a benchmark, from before its first measurement to its files."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.facts = machine.facts(options.device)
        self._neighbours = machine.Neighbours()
        self.bandwidth = machine.Bandwidth(options.device, options.pick(None, 16))
        self.bandwidth.measure()

    def say(self, text: str) -> None:
        """Print progress."""
        print(f"  {text}", flush=True)

    def finish(self, result: Result, paint: Callable | None = None) -> Result:
        """Print the table, write the JSON and the plot. `paint(axes, result)` draws."""
        self.bandwidth.measure()
        options = self.options
        document = {
            "bench": options.name,
            "facts": self.facts | self._neighbours.report() | {"bandwidth_gb_s": self.bandwidth.facts()},
            "model": {"preset": options.preset, "dtype": str(options.dtype).removeprefix("torch.")},
            "settings": {"rounds": options.rounds, "smoke": options.smoke, "seed": options.seed} | result.settings,
            "columns": result.columns,
            "rows": result.rows,
            "ratios": result.ratios,
            "notes": result.notes,
            "samples": result.samples,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{options.name}.json"
        path.write_text(json.dumps(document, indent=1, default=_plain) + "\n")
        show(document)
        if paint:
            draw(path.with_suffix(".png"), document, lambda axes: paint(axes, result))
        print(f"\nwritten: {path}")
        return result


def show(document: dict) -> None:
    """Print a result."""
    print(f"\n{document['bench']}: {document['model']['preset']}, {document['model']['dtype']}")
    for name, value in (document["facts"] | document["settings"]).items():
        print(f"  {name:20} {value}")
    print("\n" + table(document["columns"], document["rows"]))
    for name, value in document["ratios"].items():
        print(f"  {name:52} {number(value)}")
    for note in document["notes"]:
        print(f"  {note}")


def table(columns: list[str], rows: Iterable[dict], between: str = "  ") -> str:
    """Return rows as text: the first column left-aligned, the others right-aligned."""
    cells = [columns, *([number(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    return "\n".join("  " + between.join(line) for line in lines) + "\n"


def number(value: Any) -> str:
    """Return a number as text with its significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return str(value)


def median(values: Iterable[float]) -> float:
    """Return the median, or NaN for no values."""
    values = list(values)
    return statistics.median(values) if values else float("nan")


def spread(values: Iterable[float]) -> str:
    """Return median and best of times as text: `81 [79]`."""
    values = list(values)
    return f"{number(median(values))} [{number(min(values))}]" if values else ""


def percentile(values: Iterable[float], share: float) -> float:
    """Return the percentile by the nearest-rank method; `share` is between 0 and 1."""
    return np.quantile(list(values), share, method="inverted_cdf").item()


def alternate(sides: list, round_number: int) -> list:
    """Return the sides of a comparison, rotated by the round, so that each one is first in turn."""
    shift = round_number % len(sides)
    return sides[shift:] + sides[:shift]


def draw(path: Path, document: dict, paint: Callable) -> None:
    """Write one PNG next to the JSON, with the machine in its footer."""
    import matplotlib as mpl  # imported here, because loading it is slow and only plots need it

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    paint(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    facts = document["facts"]
    model = document["model"]
    where = facts["gpu"] or f"{facts['cpu']}, {facts['torch_threads']} threads"
    figure.supxlabel(
        f"{model['preset']} model, {model['dtype']} · {where} · torch {facts['torch']} · {facts['date']}", fontsize=7
    )
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _plain(value: Any) -> Any:
    """Return a value that `json` can't encode as text."""
    return str(value)
