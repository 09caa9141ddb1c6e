"""The process of a side that is measured without HTTP: one JSON request per line on stdin, one JSON reply on stdout.

A request has `kind`, `tokens`, and `chats`: a list of `{"jpeg": base64, "questions": [str, ...]}`. One chat is run
alone; several chats are run at once, and each asks its next question as soon as it has its answer. The reply has
`seconds` from the first question to the last token, and `chats`: a list of turns for each chat. A turn is
`{"ttft_ms": ..., "total_ms": ..., "tokens": ..., "answer": ...}`; without the time of a first token it has None.

The peers' environments import this module, so it needs the standard library only.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

READY = "ready"


@dataclass(frozen=True)
class Turn:
    """One turn at its client. Times are from the question; those of turn 1 are from the open of the picture."""

    ttft_ms: float | None
    total_ms: float | None
    tokens: int
    answer: str

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None without a first token's time."""
        if self.ttft_ms is None or self.total_ms is None:
            return None
        return (self.total_ms - self.ttft_ms) / max(self.tokens - 1, 1)


@dataclass(frozen=True)
class Chat:
    """A chat before it takes place."""

    jpeg: bytes
    questions: list[str]


@dataclass(frozen=True)
class Job:
    """The chats of one round. `kind`: the way of serving them, for a process that has several."""

    kind: str
    tokens: int
    chats: list[Chat]


@dataclass(frozen=True)
class Outcome:
    """The turns of each chat, and the seconds that all of them took together."""

    seconds: float
    chats: list[list[Turn]]


def job_line(job: Job) -> str:
    """Return a request as one line."""
    chats = [{"jpeg": base64.b64encode(chat.jpeg).decode(), "questions": chat.questions} for chat in job.chats]
    return json.dumps({"kind": job.kind, "tokens": job.tokens, "chats": chats}) + "\n"


def parse_job(line: str) -> Job:
    """Return the request of a line."""
    request = json.loads(line)
    chats = [Chat(base64.b64decode(chat["jpeg"]), chat["questions"]) for chat in request["chats"]]
    return Job(request["kind"], request["tokens"], chats)


def outcome_line(outcome: Outcome) -> str:
    """Return a reply as one line."""
    return json.dumps(asdict(outcome)) + "\n"


def parse_outcome(line: str) -> Outcome:
    """Return the reply of a line."""
    reply = json.loads(line)
    return Outcome(reply["seconds"], [[Turn(**turn) for turn in chat] for chat in reply["chats"]])


def serve(run: Callable[[Job], Outcome]) -> None:
    """Run the jobs of stdin until its end. Other output goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(READY, file=replies, flush=True)
    for line in sys.stdin:
        replies.write(outcome_line(run(parse_job(line))))
        replies.flush()
