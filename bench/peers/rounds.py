"""The rounds of a comparison: the sides one after the other, in another order in each round, on equal chats.

Each sample has the CPU time of its side, and the share of the CPU that all other processes took meanwhile. A sample of
a noisy time is taken again. Samples are saved after each of them, so a run that was ended can be continued.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from ..driver import Pictures, Prompts
from ..harness import alternate
from ..machine import own_cpu_s
from .sides import KINDS, Runner
from .worker import Chat, Job, Outcome, Turn

ALONE, PARALLEL = "alone", "parallel"
NOISE = 0.1  # share of the CPU of other processes
ATTEMPTS = 3
QUIET_WAIT_S = 30.0
LOOK_S = 0.7
_TEMPLATE_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """What is measured. `rounds` and `parallel_rounds`: of one chat, and of `chats` at once."""

    sides: tuple[str, ...]
    rounds: int
    parallel_rounds: int
    chats: int = 8
    turns: int = 5
    prompt_tokens: int = 25
    answer_tokens: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One side in one round. `others`: the share of the CPU that processes of no side took; `idle_sides`: that of the
    sides which had no work. `attempts`: how often the round was taken; `attempt`: which of them this is, from 0.
    """

    side: str
    mode: str
    round: int
    seconds: float
    cpu_s: float
    others: float
    idle_sides: float
    attempts: int
    attempt: int
    chats: list[list[Turn]]

    @property
    def noise(self) -> float:
        """The share of the CPU that other processes took."""
        return self.others + self.idle_sides

    @property
    def tokens_s(self) -> float:
        """Answer tokens per second, including the pictures."""
        return sum(turn.tokens for chat in self.chats for turn in chat) / self.seconds


@dataclass
class Samples:
    """The samples of a run, and the file that has them."""

    path: Path
    plan: Plan
    taken: list[Sample] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, plan: Plan) -> Samples:
        """Return the saved samples, if they are of the same chats; else none."""
        samples = cls(path, plan)
        if path.exists():
            saved = json.loads(path.read_text())
            if saved["chats"] == samples._chats():
                samples.taken = [_sample(one) for one in saved["samples"]]
        return samples

    def has(self, side: str, mode: str, number: int) -> bool:
        """Whether this side has a sample of this round."""
        return any((one.side, one.mode, one.round) == (side, mode, number) for one in self.taken)

    def add(self, sample: Sample) -> None:
        """Add and save a sample."""
        self.taken.append(sample)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"chats": self._chats(), "samples": [asdict(one) for one in self.taken]})
        making = self.path.with_suffix(".making")
        making.write_text(text)
        making.replace(self.path)

    def of(self, side: str, mode: str) -> list[Sample]:
        """Return a side's samples."""
        return [one for one in self.taken if (one.side, one.mode) == (side, mode)]

    def _chats(self) -> dict:
        plan = asdict(self.plan)
        return {name: plan[name] for name in ("chats", "turns", "prompt_tokens", "answer_tokens", "seed")}


def _sample(saved: dict) -> Sample:
    chats = [[Turn(**turn) for turn in chat] for chat in saved.pop("chats")]
    return Sample(**saved, chats=chats)


def chats_of(plan: Plan, side: str, mode: str, number: int, attempt: int) -> list[Chat]:
    """Return a side's chats in a round: new pictures and questions in each round and attempt.

    They are the same for all sides but those with `Kind.has_own_chats`.
    """
    group = plan.seed * 4 + (mode == PARALLEL) * 2 + KINDS[side].has_own_chats
    seed = (group * 1_000 + number + 1) * 10 + attempt
    pictures = Pictures(seed)
    prompts = Prompts(seed)
    count = plan.chats if mode == PARALLEL else 1
    words = max(plan.prompt_tokens - _TEMPLATE_TOKENS, 1)
    return [Chat(pictures.jpeg(), [prompts.words(words) for _ in range(plan.turns)]) for _ in range(count)]


class CpuUse:
    """The CPU time of the machine, of this process and of each side's processes since the object was made, in s."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._before = self._read()

    def since(self) -> tuple[dict[str, float], float, float]:
        """Return the time of each side, the time of processes of no side, and the time of all cores together."""
        now = self._read()
        used = {name: now[name] - self._before[name] for name in now}
        sides = {name: used[name] for name in self._processes}
        return sides, max(used["busy"] - used["own"], 0.0), used["total"]

    def _read(self) -> dict[str, float]:
        times = psutil.cpu_times()
        total = sum(times[:8])  # the user time includes guest times
        idle = times.idle + getattr(times, "iowait", 0.0)
        sides = {name: own_cpu_s(process) for name, process in self._processes.items()}
        return sides | {"busy": total - idle, "total": total, "own": own_cpu_s(psutil.Process())}


class Comparison:
    """A comparison that runs. `runners`: by `Kind.process`."""

    def __init__(self, samples: Samples, runners: dict[str, Runner], say: Callable[[str], None]) -> None:
        self._samples = samples
        self._plan = samples.plan
        self._runners = runners
        self._pids = {name: runner.pid for name, runner in runners.items()}
        self._say = say

    def warm_up(self) -> None:
        """Run short chats on each side, one and then two at once, unmeasured."""
        for name in self._plan.sides:
            self._say(f"warming up: {name}")
            for mode in self._modes(name):
                chats = [Chat(chat.jpeg, chat.questions[:2]) for chat in chats_of(self._plan, name, mode, -1, 0)[:2]]
                self._run(name, Job(KINDS[name].way, 4, chats))

    def run(self) -> None:
        """Take the samples that are missing."""
        for mode, rounds in ((ALONE, self._plan.rounds), (PARALLEL, self._plan.parallel_rounds)):
            for number in range(rounds):
                for name in alternate(list(self._plan.sides), number):
                    most = KINDS[name].most_rounds if mode == PARALLEL else None
                    due = mode in self._modes(name) and (most is None or number < most)
                    if due and not self._samples.has(name, mode, number):
                        sample = self._quiet_sample(name, mode, number)
                        self._samples.add(sample)
                        self._say(f"{mode} {number + 1} of {rounds}: {described(sample)}")

    def _modes(self, name: str) -> list[str]:
        kind = KINDS[name]
        return [mode for mode, has in ((ALONE, kind.is_alone), (PARALLEL, kind.is_parallel)) if has]

    def _quiet_sample(self, name: str, mode: str, number: int) -> Sample:
        """Take a sample, again if other processes took part of the CPU. Return the quietest attempt."""
        best = None
        for attempt in range(ATTEMPTS):
            self._wait_until_quiet()
            sample = self._sample(name, mode, number, attempt)
            best = sample if best is None else min(best, sample, key=lambda one: one.noise)
            if sample.noise <= NOISE:
                break
            self._say(f"{name}: other processes took {sample.noise:.0%} of the CPU; attempt {attempt + 1}")
        return replace(best, attempts=attempt + 1)

    def _wait_until_quiet(self) -> None:
        until = time.monotonic() + QUIET_WAIT_S
        while True:
            use = CpuUse(self._pids)
            time.sleep(LOOK_S)
            sides, others, total = use.since()
            if (others + sum(sides.values())) / total <= NOISE or time.monotonic() > until:
                return

    def _sample(self, name: str, mode: str, number: int, attempt: int) -> Sample:
        job = Job(KINDS[name].way, self._plan.answer_tokens, chats_of(self._plan, name, mode, number, attempt))
        use = CpuUse(self._pids)
        outcome = self._run(name, job)
        sides, others, total = use.since()
        return Sample(
            side=name,
            mode=mode,
            round=number,
            seconds=outcome.seconds,
            cpu_s=sides.pop(KINDS[name].process),
            others=others / total,
            idle_sides=sum(sides.values()) / total,
            attempts=attempt + 1,
            attempt=attempt,
            chats=outcome.chats,
        )

    def _run(self, name: str, job: Job) -> Outcome:
        outcome = self._runners[KINDS[name].process].run(job)
        short = {turn.tokens for chat in outcome.chats for turn in chat} - {job.tokens}
        if short:
            raise RuntimeError(f"{name}: an answer must have {job.tokens} tokens, got {sorted(short)}")
        return outcome


def described(sample: Sample) -> str:
    """Return a sample in one line."""
    figures = f"{sample.tokens_s:.1f} tokens/s"
    if sample.mode == ALONE:
        figures = "TTFT " + " ".join(f"{turn.ttft_ms:.0f}" for turn in sample.chats[0])
        per_token = sorted(turn.tpot_ms for turn in sample.chats[0])
        figures += f" ms, {per_token[len(per_token) // 2]:.1f} ms per token"
    return f"{sample.side}: {figures}, {sample.cpu_s:.1f} CPU s, others {sample.noise:.0%}"
