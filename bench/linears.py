"""The linears of a forward one by one: the engine's choice, oneDNN's packed linears and torch's plain ones.

The language model's linears and its head run in order, as in a forward of so many rows, without norms, activations and
attention. With one row the bound is the time to read the weights once. A round measures all sides and the bandwidth.
"""

from __future__ import annotations

import time

import torch

from llava_sessions.engine.cpu.linears import OneDNNLinear, pack, packable

from . import harness
from .harness import Options, Result, Run, median, spread
from .limits import language_linears
from .reference import Reference

ENGINE = "engine"
ONEDNN = "oneDNN"
PLAIN = "plain"
ROWS = (1, 16, 45, 577)


@torch.inference_mode()
def sides(options: Options) -> dict[str, list[torch.nn.Module]]:
    """Return the linears in each form, in the order of a forward."""
    plain = language_linears(Reference(options.checkpoint, options.dtype, options.device))
    fitting = [one for one in plain if packable(one)]
    return {ENGINE: [pack(one) for one in fitting], ONEDNN: [OneDNNLinear(one) for one in fitting], PLAIN: fitting}


@torch.inference_mode()
def timed(linears: list[torch.nn.Module], inputs: dict[int, torch.Tensor]) -> float:
    """Run all linears once; return milliseconds. `inputs`: rows by number of inputs."""
    began = time.perf_counter()
    for linear in linears:
        linear(inputs[linear.in_features])
    return (time.perf_counter() - began) * 1e3


def measure(options: Options, run: Run) -> tuple[dict[int, dict[str, list[float]]], int, list[float]]:
    """Return `{rows: {side: [ms]}}`, the bytes of the weights, and the readings of the bandwidth in bytes a second."""
    forms = sides(options)
    weight_bytes = sum(linear.weight.nbytes for linear in forms[PLAIN])
    widths = {linear.in_features for linear in forms[PLAIN]}
    taken: dict[int, dict[str, list[float]]] = {rows: {side: [] for side in forms} for rows in ROWS}
    readings = []
    for number in range(options.rounds):
        run.say(f"round {number + 1} of {options.rounds}")
        order = list(forms)[:: 1 if number % 2 else -1]
        readings.append(run.bandwidth.measure(2))
        for rows, times in taken.items():
            inputs = {width: torch.randn(rows, width, dtype=options.dtype) for width in widths}
            for side in order:
                times[side].append(min(timed(forms[side], inputs) for _ in range(3)))
    return taken, weight_bytes, readings


def report(taken: dict[int, dict[str, list[float]]], weight_bytes: int, readings: list[float]) -> Result:
    """Return the table and the ratios."""
    columns = ["rows", "engine ms", "oneDNN ms", "plain ms", "engine / oneDNN", "weights read, GB/s"]
    result = Result(columns, samples={str(rows): times for rows, times in taken.items()})
    for rows, times in taken.items():
        ratio = median(times[ENGINE]) / median(times[ONEDNN])
        result.rows.append(
            {
                "rows": rows,
                "engine ms": spread(times[ENGINE]),
                "oneDNN ms": spread(times[ONEDNN]),
                "plain ms": spread(times[PLAIN]),
                "engine / oneDNN": f"{ratio:.2f}",
                "weights read, GB/s": f"{weight_bytes / median(times[ENGINE]) / 1e6:.1f}",
            }
        )
        result.ratios[f"{rows} rows, engine / oneDNN"] = ratio
    bound_ms = weight_bytes / max(readings) * 1e3
    result.ratios["1 row, share of the read bandwidth"] = bound_ms / median(taken[ROWS[0]][ENGINE])
    result.ratios["1 row, share of the read bandwidth, oneDNN"] = bound_ms / median(taken[ROWS[0]][ONEDNN])
    result.notes = ["Times are medians [best] of the best of three passes; the bandwidth is the best of the run."]
    return result


def paint(axes, result: Result) -> None:
    """Draw the times of each side over the rows."""
    for side in (PLAIN, ONEDNN, ENGINE):
        values = [median(times[side]) for times in result.samples.values()]
        axes.plot(list(result.samples), values, marker="o", label=side)
    axes.set(xlabel="rows", ylabel="ms", yscale="log", title="Linears of a forward")
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.parse("linears", __doc__, argv, rounds=7)
    run = Run(options)
    return run.finish(report(*measure(options, run)), paint)


if __name__ == "__main__":
    main()
