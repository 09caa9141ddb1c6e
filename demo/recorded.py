"""A recorded benchmark as a plot of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIDES = {"stateless": "stateless", "KV kept": "kept KV cache", "engine": "LLaVA Sessions"}  # of the record -> shown
TTFT = "TTFT ms"
WIDTH = 50  # characters of the longest bar


def recorded_plot(path: Path) -> str:
    """Return the times to first token of a record of `bench.turns`: one bar for each turn and each server."""
    record = json.loads(path.read_text(encoding="utf-8"))
    facts = record["facts"]
    rows = [(row["turn"], SIDES[row["side"]], _median_ms(row)) for row in record["rows"] if row["side"] in SIDES]
    longest = max(ms for _, _, ms in rows)
    names = list(SIDES.values())
    lines = [
        "  Median time to first token of each turn: generate(), stateless, with a kept KV cache, and LLaVA Sessions.",
        f"  {facts['cpu']}, {facts['cores']} cores, {record['model']['dtype']}, {facts['date']}, python -m bench.turns",
        "",
    ]
    for turn, name, ms in sorted(rows, key=lambda row: (row[0], names.index(row[1]))):
        bar = "#" * max(round(WIDTH * ms / longest), 1)
        label = f"turn {turn}" if name == names[0] else ""
        lines.append(f"  {label:7} {name:15} {bar} {ms:,.0f} ms")
    return "\n".join(lines)


def _median_ms(row: dict[str, Any]) -> float:
    """Return the median of a cell such as "8,878 [6,950]", which also has the best time."""
    return float(str(row[TTFT]).partition(" ")[0].replace(",", ""))
