"""The clock and the record of one run: sections, their findings, and the file that is rewritten after each of them."""

from __future__ import annotations

import gc
import json
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

# A section that takes so many times its usual time is ended, so that later ones can run.
_PATIENCE = 2.0
# The last seconds are for the file and the summary.
_SPARE_S = 5.0


class OutOfTime(Exception):
    """The time of a section, or of the whole run, is over."""


@dataclass
class Findings:
    """What a section found: measured `results`, the outcome of each check, and remarks for the reader.

    A section fills it step by step, so that an error leaves what was found before.
    """

    results: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, holds: bool) -> None:
        """Note the outcome of a check. A name that was noted before must hold each time."""
        self.checks[name] = bool(holds) and self.checks.get(name, True)


@dataclass(frozen=True)
class Section:
    """A part of the run. `usual_s`: its time on an H100. It is skipped if less than `least_s` is left."""

    name: str
    run: Callable[[Day, Findings], None]
    usual_s: float
    least_s: float


class Day:
    """One run on one device. `smoke`: tiny shapes, in seconds and also on a CPU."""

    def __init__(self, device: torch.device, out: Path, limit_s: float, smoke: bool = False) -> None:
        """`out`: folder of `gpu_day.json`. `limit_s`: seconds from now until the run must end."""
        self.device = device
        self.out = out
        self.smoke = smoke
        self._ends_at = time.monotonic() + limit_s
        self._section_ends_at = self._ends_at
        self._record: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "device": torch.cuda.get_device_name(device) if self.on_cuda else "cpu",
            "limit_s": limit_s,
            "smoke": smoke,
            "sections": {},
        }

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until the run must end."""
        return self._ends_at - time.monotonic() - _SPARE_S

    @property
    def section_left_s(self) -> float:
        """Seconds until the running section must end."""
        return min(self.left_s, self._section_ends_at - time.monotonic())

    def pick(self, usual: Any, smoke: Any) -> Any:
        """Return `smoke` in a smoke run, else `usual`."""
        return smoke if self.smoke else usual

    def say(self, text: str) -> None:
        """Print progress."""
        print(f"  {text}", flush=True)

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give memory that torch caches back to the device, also that of unused models."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Return a replay of the launches of `work`, so that the host's time does not count. On a CPU: `work`."""
        if not self.on_cuda:
            return work
        work()  # a capture must not compile anything
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def times_ms(self, work: Callable[[], Any], repeats: int, warm_ups: int = 2) -> list[float]:
        """Return the milliseconds of each run of `work`, the device's part included, by the clock of this process.

        Ends early if the section has no time left, after at least one run.
        """
        for _ in range(warm_ups):
            work()
        taken: list[float] = []
        for _ in range(repeats):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            taken.append((time.perf_counter() - began) * 1e3)
            if self.section_left_s <= 0:
                break
        return taken

    def median_ms(self, work: Callable[[], Any], repeats: int, warm_ups: int = 2) -> float:
        """Return the median of `times_ms`."""
        return statistics.median(self.times_ms(work, self.pick(repeats, 1), self.pick(warm_ups, 1)))

    def run(self, sections: Sequence[Section]) -> int:
        """Run the sections in order; write the file after each. Return the number of those with an error or a failure.

        An error ends its section only.
        """
        bad = 0
        for number, section in enumerate(sections, 1):
            print(f"[{number}/{len(sections)}] {section.name}, {max(self.left_s, 0):.0f} s left", flush=True)
            entry = self._run_one(section)
            self._record["sections"][section.name] = entry
            self._write()
            print(f"  {entry['status']} in {entry['seconds']:.1f} s", flush=True)
            bad += entry["status"] in ("failed", "error")
        return bad

    def _run_one(self, section: Section) -> dict[str, Any]:
        """Run one section; return its entry in the file."""
        began = time.monotonic()
        if self.left_s < self.pick(section.least_s, 0):
            note = f"{section.least_s:.0f} s are needed, {max(self.left_s, 0):.0f} s are left"
            return {"status": "skipped", "seconds": 0.0, "notes": [note]}
        self._section_ends_at = began + _PATIENCE * section.usual_s
        found = Findings()
        error = None
        try:
            with _alarm(self.section_left_s):
                section.run(self, found)
        except Exception as caught:
            error = "".join(traceback.format_exception(caught))
            print(f"  {type(caught).__name__}: {caught}", flush=True)
        for name, holds in found.checks.items():
            if not holds:
                print(f"  check failed: {name}", flush=True)
        status = "error" if error else "passed" if all(found.checks.values()) else "failed"
        entry = {"status": status, "seconds": round(time.monotonic() - began, 2), **vars(found)}
        return entry | ({"error": error} if error else {})

    def _write(self) -> None:
        """Replace the file, so that it is complete at any time."""
        self.out.mkdir(parents=True, exist_ok=True)
        whole = self.out / "gpu_day.json"
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(self._record, indent=1, default=str) + "\n")
        part.replace(whole)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in this block after so many seconds. Without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise OutOfTime(f"the section took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
