"""Write the figures of `bench/results/*.json` into `bench/README.md`, between its markers.

python -m bench.report
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deploy.options import Parser

from .bar import BAR, PEERS_BAR, Measure
from .harness import FLOAT32, RESULTS, number

README = Path(__file__).parent / "README.md"
BENCHES = ("turns", "chats", "decode", "memory", "open", "stall", "pipe", "linears", "step_overhead", "quantized")
# They start whole servers; `python -m bench` does not run them.
SERVED = ("peers", "served", "route", "endpoint", "held_rows", "admission", "scrape", "load", "sessions")


def read(folder: Path = RESULTS) -> dict[str, dict]:
    """Return the existing documents by benchmark. Records of a CPU without bfloat16 have the suffix `FLOAT32`."""
    names = (*BENCHES, *SERVED, *(f"{name}{FLOAT32}" for name in BENCHES))
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def bar_table(documents: dict[str, dict]) -> str:
    """Return the targets against `transformers`: floor, aim, and the results on a CPU without bfloat16."""
    lines = ["| measure | floor | aim | float32 | |", "|---|---|---|---|---|"]
    for measure in BAR:
        cells = [measure.what, measure.show(measure.floor), measure.show(measure.aim)]
        cells += _result(documents, measure, FLOAT32)
        lines.append(f"| {' | '.join(cells)} |")
    memory = documents.get(f"memory{FLOAT32}")
    what = "500 open sessions under a KV budget that holds 20 (tiny model)"
    cells = [what, "all right, RSS flat", "1,000", *_cells(memory is not None and _many(memory))]
    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peers_table(documents: dict[str, dict]) -> str:
    """Return the targets against other servers and against the machine's limits, with the figures before the work."""
    lines = ["| measure | before | floor | aim | now | |", "|---|---|---|---|---|---|"]
    for measure in PEERS_BAR:
        before = "" if measure.before is None else measure.show(measure.before)
        cells = [measure.what, before, measure.show(measure.floor), measure.show(measure.aim)]
        lines.append(f"| {' | '.join((*cells, *_result(documents, measure)))} |")
    return "\n".join(lines)


def _result(documents: dict[str, dict], measure: Measure, kind: str = "") -> tuple[str, str]:
    """Return the result of a target and its verdict as two cells. `kind`: the suffix of the record."""
    value = documents.get(measure.bench + kind, {}).get("ratios", {}).get(measure.ratio)
    return _cells(value is not None and (measure.show(value), measure.verdict(value)))


def _cells(found: tuple[str, str] | bool) -> tuple[str, str]:
    """Return result and verdict as two cells. False: there is no result."""
    reached, verdict = found or ("not run", "")
    return reached, "**missed**" if verdict == "missed" else verdict


def _many(memory: dict) -> tuple[str, str]:
    """Return result and verdict of the row that isn't a ratio: many sessions under a small budget."""
    many = memory["samples"]["many"]
    growth = many["rss_growth_bytes"] / 2**20
    whole = many["kv_if_all_were_resident_bytes"] / 2**20
    right = "all right" if not many["wrong"] else f"{many['wrong']} wrong"
    figures = f"{many['sessions']:,}: {right}, RSS +{growth:.0f} MiB (all KV kept: {whole:,.0f} MiB)"
    return figures, "missed" if many["wrong"] else "aim" if many["sessions"] >= 1000 else "floor"


def section(document: dict) -> str:
    """Return a benchmark's machine line and table as Markdown."""
    facts = document["facts"]
    where = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_threads']} torch threads"
    load = " to ".join(map(str, facts["load_average"]))
    model, rounds = document["model"], document["settings"]["rounds"]
    parts = [
        facts["date"],
        where,
        f"read {facts['bandwidth_gb_s']['read']} GB/s",
        f"load {load}, {facts['cpu_share_of_others']:.0%} of the CPU taken by others",
        f"torch {facts['torch']}, transformers {facts['transformers']}, OMP {facts['omp']}",
        f"{model['preset']}, {model['dtype']}",
        f"{rounds} round{'s' if rounds != 1 else ''}",
        f"commit {facts.get('commit') or 'not noted'}",
    ]
    head = " · ".join(parts)
    columns = document["columns"]
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows += ["| " + " | ".join(number(row.get(column)) for column in columns) + " |" for row in document["rows"]]
    ratios = [f"- {name}: {number(value)}" for name, value in document["ratios"].items()]
    return "\n".join([f"<sub>{head}</sub>", "", *rows, "", *ratios])


def write(readme: Path = README, folder: Path = RESULTS) -> None:
    """Replace the text between `<!-- NAME -->` and `<!-- /NAME -->`, for the targets and for every result."""
    documents = read(folder)
    text = readme.read_text()
    parts = {name: section(document) for name, document in documents.items()}
    parts |= {"bar": bar_table(documents), "peers-bar": peers_table(documents)}
    for name, part in parts.items():
        head, start, rest = text.partition(f"<!-- {name} -->")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        text = f"{head}{start}\n{part}\n{end}{tail}" if start and end else text
    readme.write_text(text)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    Parser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    write()
    documents = read()
    print(f"{peers_table(documents)}\n\n{bar_table(documents)}")


if __name__ == "__main__":
    main()
