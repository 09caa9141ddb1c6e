"""Owns what all soaks share: their options, what a server holds at a moment, and the record of a run.

A run is a list of checks, each with the figures that it goes by, beside the machine, the date and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from bench import machine
from deploy.options import Parser, whole_number
from tests.support.chats import HANG_S, Crowd, PatientChat, Script, Tally
from tests.support.serving import ROOT, Processes, Served

RESULTS = ROOT / "bench" / "results"
# Memory that a process holds after a run beside what it held before: allocators and JIT compilers keep a little.
MEMORY_SHARE, MEMORY_BYTES = 0.05, 16 * 2**20
# Threads of pools and open sockets come and go by a few.
FEW = 8
# The worker's pools of threads (preparing.py, journal.py) fill up to their size as work comes, and stay.
POOLS = 30


def options(
    name: str, about: str | None, argv: list[str], words: dict[str, list[str]] | None = None, **defaults: int
) -> argparse.Namespace:
    """Parse the command line: a whole number for each of `defaults`, and some words of each list of `words` (all)."""
    parser = Parser(
        prog=f"python -m tests.soak {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in {**defaults, "seed": 0}.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=whole_number(0), default=default, help=f"({default})")
    for option, choices in (words or {}).items():
        parser.add_argument(f"--{option}", nargs="+", choices=choices, default=choices, help=f"({' '.join(choices)})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (bench/results)")
    return parser.parse_args(argv)


@dataclass
class Record:
    """One run."""

    name: str
    chosen: argparse.Namespace
    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=lambda: machine.facts(torch.device("cpu")))  # what was packed
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])

    def say(self, text: str) -> None:
        """Progress, on the terminal only."""
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def check(self, what: str, holds: bool, found: Any) -> None:
        """Something that must hold, and what was found."""
        self.checks.append({"check": what, "holds": bool(holds), "found": found})

    def finish(self) -> int:
        """Print the checks and write the record; 1 where one does not hold."""
        facts = self.facts | {"load_average": [self.load_average, os.getloadavg()[0]]}
        chosen = {name: value for name, value in vars(self.chosen).items() if name != "out"}
        document = {
            "soak": self.name,
            "facts": facts,
            "settings": chosen,
            "seconds": round(time.monotonic() - self.began, 1),
            "checks": self.checks,
            "figures": self.figures,
        }
        path = self.chosen.out / f"soak_{self.name.replace('-', '_')}.json"
        write(path, document)
        print()
        for check in self.checks:
            print(f"{'holds ' if check['holds'] else 'BROKEN'}  {check['check']}: {check['found']}")
        print(f"\nwritten: {path}")
        return 0 if all(check["holds"] for check in self.checks) else 1


def write(path: Path, document: dict[str, Any]) -> None:
    """Write what a soak found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def level(served: Served, http: httpx.Client, script: Script) -> dict[str, Any]:
    """What the server holds once it has answered one more chat: device bytes of sessions, and each process' memory,
    threads and open files.
    """
    chat = PatientChat(http).open(script.picture)
    chat.ask(script.questions[0])
    chat.close()
    figures = served.gauges(timeout_s=30, llava_open_sessions=0, llava_running_turns=0, llava_device_bytes=0)
    names = ("llava_open_sessions", "llava_device_bytes", "llava_offloaded_bytes")
    found: dict[str, Any] = {name: int(figures.get(name, 0)) for name in names}
    return found | Processes.of(served.server).sample()


def check_level(record: Record, before: dict[str, Any], after: dict[str, Any], processes: tuple[str, ...]) -> None:
    """Sessions hold nothing, and each of the processes holds what it held."""
    record.figures |= {"level_before": before, "level_after": after}
    names = ("llava_open_sessions", "llava_device_bytes", "llava_offloaded_bytes")
    held = {name: after[name] for name in names}
    record.check("no session is open, and none holds memory", not any(held.values()), held)
    for name in processes:
        then, now = before[name], after[name]
        most = then["rss_bytes"] * (1 + MEMORY_SHARE) + MEMORY_BYTES
        words = f"{then['rss_bytes'] / 2**20:.1f} MiB before, {now['rss_bytes'] / 2**20:.1f} MiB after"
        record.check(f"the {name} process' memory is at the level before", now["rss_bytes"] <= most, words)
        for what, more in (("threads", POOLS if name == "worker" else FEW), ("files", FEW)):
            words = f"{then[what]} before, {now[what]} after"
            record.check(f"the {name} process' {what} are at the level before", now[what] <= then[what] + more, words)


def check_crowd(record: Record, crowd: Crowd) -> None:
    """All chats were finished, each answer is the undisturbed run's, and nobody waited too long for a reply."""
    record.figures |= {
        "chats": crowd.chats,
        "turns": crowd.turns,
        "wrong": [vars(wrong) | {"said": vars(wrong.said), "expected": vars(wrong.expected)} for wrong in crowd.wrong],
        "failures": crowd.failures,
    }
    record.check("every session finished its chats", not crowd.failures, crowd.failures[:3] or f"{crowd.chats} chats")
    record.check(
        "every greedy answer is the undisturbed run's", not crowd.wrong, f"{len(crowd.wrong)} of {crowd.turns}"
    )
    check_tally(record, crowd.tally)


def check_tally(record: Record, tally: Tally) -> None:
    """Nobody waited too long for a reply."""
    slow, longest = sorted(tally.lost_s), tally.longest_request_s
    record.figures |= {
        "requests": tally.requests,
        "repeated_requests": dict(tally.repeated),
        "longest_request_s": round(longest, 2),
        "repeated_until_answered_s": {"median": _at(slow, 0.5), "longest": _at(slow, 1.0)},
    }
    record.check(f"no request hung longer than {HANG_S:.0f} s", longest <= HANG_S, f"the longest {longest:.1f} s")


def _at(ordered: list[float], share: float) -> float | None:
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 2) if ordered else None
