"""The demo's plot of what sessions save is the committed record of `bench.turns`."""

from __future__ import annotations

import json
import re

from demo.chat import RECORD
from demo.recorded import recorded_plot


def test_the_plot_has_the_recorded_times_machine_and_date() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    plot = recorded_plot(RECORD)
    assert record["facts"]["cpu"] in plot
    assert record["facts"]["date"] in plot
    bars = re.findall(r"(#+) ([\d,]+) ms", plot)
    assert len(bars) == 3 * record["settings"]["turns"]
    medians = {re.match(r"[\d,]+", row["TTFT ms"])[0] for row in record["rows"]}
    assert {time for _, time in bars} <= medians
    lengths = sorted((int(time.replace(",", "")), len(bar)) for bar, time in bars)
    assert [length for _, length in lengths] == sorted(length for _, length in lengths)
    assert max(map(len, plot.splitlines())) <= 120
