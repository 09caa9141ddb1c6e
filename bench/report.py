"""Writes the figures of `bench/results/*.json` into `bench/README.md`, between its markers, so that the page says what
was measured and nothing else.

    python -m bench.report
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .bar import BAR
from .harness import RESULTS, number

README = Path(__file__).parent / "README.md"
BENCHES = ("turns", "chats", "decode", "memory", "open", "stall", "pipe")
SERVED = ("route",)  # on a whole server; not among those that `python -m bench` runs


def read(folder: Path = RESULTS) -> dict[str, dict]:
    """The documents that are there, by bench."""
    paths = {name: folder / f"{name}.json" for name in (*BENCHES, *SERVED)}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def bar_table(documents: dict[str, dict]) -> str:
    """The project's bar: floor, aim, reached."""
    lines = ["| measure | floor | aim | reached | |", "|---|---|---|---|---|"]
    for measure in BAR:
        value = documents.get(measure.bench, {}).get("ratios", {}).get(measure.ratio)
        reached, verdict = ("not run", "") if value is None else (measure.show(value), measure.verdict(value))
        mark = f"**{verdict}**" if verdict == "missed" else verdict
        lines.append(
            f"| {measure.what} | {measure.show(measure.floor)} | {measure.show(measure.aim)} | {reached} | {mark} |"
        )
    lines.append(f"| {_many_row(documents.get('memory'))}")
    return "\n".join(lines)


def _many_row(memory: dict | None) -> str:
    """The row that isn't a ratio: many sessions under a small budget."""
    if memory is None:
        return "500 sessions under a KV budget that holds 20 | right, RSS flat | 1,000 | not run | |"
    many = memory["samples"]["many"]
    growth = many["rss_growth_bytes"] / 2**20
    whole = many["kv_if_all_were_resident_bytes"] / 2**20
    right = "all right" if not many["wrong"] else f"{many['wrong']} wrong"
    figures = f"{right}, RSS +{growth:.0f} MiB (all KV kept: {whole:,.0f} MiB)"
    model = memory["settings"]["many_preset"]
    what = f"{many['sessions']:,} open sessions under a KV budget that holds {many['room']} ({model} model)"
    verdict = "missed" if many["wrong"] else "aim" if many["sessions"] >= 1000 else "floor"
    return f"{what} | 500, all right, RSS flat | 1,000 | {figures} | {verdict} |"


def section(document: dict) -> str:
    """One bench's machine line and table, as Markdown."""
    facts = document["facts"]
    where = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_threads']} torch threads"
    load = " to ".join(map(str, facts["load_average"]))
    model = document["model"]
    parts = [
        facts["date"],
        where,
        f"read {facts['bandwidth_gb_s']['read']} GB/s",
        f"load {load}, {facts['cpu_share_of_others']:.0%} of the CPU taken by others",
        f"torch {facts['torch']}, transformers {facts['transformers']}, OMP {facts['omp']}",
        f"{model['preset']}, {model['dtype']}",
        f"{document['settings']['rounds']} rounds",
        f"commit {facts.get('commit') or 'not noted'}",
    ]
    head = " · ".join(parts)
    columns = document["columns"]
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows += ["| " + " | ".join(number(row.get(column)) for column in columns) + " |" for row in document["rows"]]
    ratios = [f"- {name}: {number(value)}" for name, value in document["ratios"].items()]
    return "\n".join([f"<sub>{head}</sub>", "", *rows, "", *ratios])


def write(readme: Path = README, folder: Path = RESULTS) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` for the bar and for every bench that was run."""
    documents = read(folder)
    text = readme.read_text()
    parts = {"bar": bar_table(documents)} | {name: section(document) for name, document in documents.items()}
    for name, part in parts.items():
        head, start, rest = text.partition(f"<!-- {name} -->")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        text = f"{head}{start}\n{part}\n{end}{tail}" if start and end else text
    readme.write_text(text)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    write()
    print(bar_table(read()))


if __name__ == "__main__":
    main()
