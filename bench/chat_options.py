"""Options that the loads of many chats share: `bench.load` and `bench.sessions`."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.options import Parser, decimal_number, whole_number

from . import harness
from .harness import Options


def chat_parser(prog: str, about: str | None) -> Parser:
    """Return a parser with the options of the server, the pauses, the pictures and the record."""
    parser = Parser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", help="a server that runs, such as http://127.0.0.1:8080 (default: start one)")
    add("--model", default=str(harness.DEMO_MODEL), metavar="DIR", help="the model to serve (default: models/shapes)")
    think = "mean pause before a further question, exponential (%(default)s)"
    add("--think-s", type=decimal_number(0), default=1.0, metavar="S", help=think)
    add("--picture-px", type=whole_number(28), default=224, metavar="N", help="sides of the pictures (%(default)s)")
    add("--seed", type=int, default=1, help="of pictures, questions and pauses (%(default)s)")
    add("--out", type=Path, default=harness.RESULTS, help="folder of the JSON and the plot (bench/results)")
    return parser


def chat_options(name: str, given: argparse.Namespace) -> Options:
    """Return the options of a benchmark from its parsed arguments, with the name of the served model."""
    options = harness.plain_options(name, given)
    if given.url is not None:
        options.preset, options.dtype = "another server's", "dtype unknown"
    else:
        options.preset = Path(given.model).resolve().name
    return options
