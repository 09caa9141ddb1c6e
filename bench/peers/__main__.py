"""Compare the served engine with vLLM and OpenVINO GenAI on a CPU, round by round, on equal chats.

A chat has one new picture and five questions; each answer has 16 tokens, greedy. The sides:

    served               this project, as `make serve` runs it, over HTTP
    vllm                 vLLM's CPU build, over HTTP
    engine               this project's engine, in a process without a server
    openvino             OpenVINO GenAI, in process; eight chats: all histories in one call, turn by turn
    openvino-continuous  the same with continuous batching
    kept, stateless      `generate` of transformers with a KV cache kept for each chat, and with nothing kept

Without a step the command runs all of them: `install` (the peers' environments, 5 GB), `build` (one checkpoint for all
sides, 2.5 GB), `run`. `run` saves each sample; with --resume it continues a run that was ended.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from deploy.options import Parser, whole_number
from llava_sessions.engine.model import native_dtype

from .. import harness
from ..harness import FLOAT32, RESULTS, Options, Run
from . import table
from .checkpoint import FOLDER, checkpoint, openvino_model
from .environments import ENVIRONMENTS, PeerError, install
from .rounds import Comparison, Plan, Samples
from .sides import KINDS, started

STEPS = ("install", "build", "run")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m bench.peers", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("step", nargs="?", choices=STEPS, help="only this step (default: all of them)")
    add("--sides", nargs="+", choices=list(KINDS), default=list(KINDS), help="the sides to measure (default: all)")
    add("--rounds", type=whole_number(0), default=6, help="of one chat (%(default)s)")
    add("--parallel-rounds", type=whole_number(0), default=5, help="of eight chats at once (%(default)s)")
    add("--seed", type=int, default=0, help="of the pictures and the questions")
    add("--resume", action="store_true", help="continue the saved run")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON and the plot (bench/results)")
    parser.set_defaults(smoke=False)
    return parser.parse_args(argv)


def options_of(given: argparse.Namespace) -> Options:
    """Return the options of the record."""
    dtype = native_dtype(torch.device("cpu"))
    plain = harness.plain_options("peers" + (FLOAT32 if dtype == torch.float32 else ""), given)
    return replace(plain, dtype=dtype, preset="bench", checkpoint=checkpoint())


def run(given: argparse.Namespace) -> None:
    """Take the samples and write the record."""
    options = options_of(given)
    plan = Plan(tuple(given.sides), given.rounds, given.parallel_rounds, seed=given.seed)
    path = FOLDER / f"{options.name}-samples.json"
    if not given.resume:
        path.unlink(missing_ok=True)
    samples = Samples.load(path, plan)
    measured = Run(options)
    dtype = str(options.dtype).removeprefix("torch.")
    with started(given.sides, options.checkpoint, dtype, FOLDER / "logs", measured.say) as runners:
        comparison = Comparison(samples, runners, measured.say)
        comparison.warm_up()
        comparison.run()
        # The record has the CPU time of other processes. That of the sides is known while they run.
        measured.finish(table.report(samples), table.paint)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit code."""
    given = parse(argv)
    # SIGTERM ends the processes of all sides, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if given.step in (None, "install"):
            for environment in ENVIRONMENTS:
                install(environment)
        if given.step in (None, "build"):
            print(f"checkpoint: {checkpoint()}\nOpenVINO's: {openvino_model(checkpoint())}", flush=True)
        if given.step in (None, "run"):
            run(given)
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nended; `python -m bench.peers run --resume` continues the run", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
