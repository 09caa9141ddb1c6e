"""This project's engine without a server, or `transformers`: `python -m bench.peers.own_side WHICH FOLDER DTYPE`.

WHICH is `engine` or `transformers`. Kinds of `transformers`: `kept` (a KV cache for each chat) and `stateless`; it runs
one question at a time.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from .. import harness
from ..chats import in_parallel, one_at_a_time
from ..driver import TurnTimes, load_engine
from ..reference import Chat, KeptKV, Reference
from .worker import Job, Outcome, Turn, serve


class EngineSide:
    """The engine. A chat's first question follows its open immediately."""

    def __init__(self, folder: Path, dtype: str) -> None:
        options = harness.plain_options("peers", argparse.Namespace(smoke=False, out=harness.RESULTS))
        self._chats = load_engine(replace(options, checkpoint=folder, dtype=getattr(torch, dtype)))

    def run(self, job: Job) -> Outcome:
        """Run a job."""
        load = [(chat.jpeg, chat.questions) for chat in job.chats]
        began = time.perf_counter()
        turns = in_parallel(self._chats, load, job.tokens)
        seconds = time.perf_counter() - began
        answers = [[self._chats.tokens.tokenizer.decode(turn.answer_ids) for turn in chat] for chat in turns]
        self._chats.close_all()
        return Outcome(seconds, _turns(turns, answers))


class TransformersSide:
    """`generate` of `transformers`."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._reference = Reference(folder, getattr(torch, dtype), torch.device("cpu"))

    def run(self, job: Job) -> Outcome:
        """Run a job."""
        load = [(chat.jpeg, chat.questions) for chat in job.chats]
        kind = KeptKV if job.kind == "kept" else Chat
        began = time.perf_counter()
        turns = one_at_a_time(self._reference, load, job.tokens, kind)
        seconds = time.perf_counter() - began
        answers = [[self._reference.tokens.tokenizer.decode(turn.answer_ids) for turn in chat] for chat in turns]
        return Outcome(seconds, _turns(turns, answers))


def _turns(chats: list[list[TurnTimes]], answers: list[list[str]]) -> list[list[Turn]]:
    return [
        [
            Turn(turn.ttft_ms, turn.total_ms, len(turn.answer_ids), text.strip())
            for turn, text in zip(turns, texts, strict=True)
        ]
        for turns, texts in zip(chats, answers, strict=True)
    ]


if __name__ == "__main__":
    which = {"engine": EngineSide, "transformers": TransformersSide}[sys.argv[1]]
    serve(which(Path(sys.argv[2]), sys.argv[3]).run)
