#!/usr/bin/env python3
"""Write the diagrams of the documentation, docs/img/*.svg. The charts of states come from docs/architecture.md.

Usage: .venv/bin/python scripts/diagrams.py

Each diagram is a light card, so that it is legible on light and dark pages.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "img"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
_INK, _SOFT, _LINE, _CARD = "#1b2333", "#54607a", "#5b6b8c", "#ffffff"
_FILLS = {"blue": "#e3ecfb", "green": "#e2f3e6", "orange": "#fdeed9", "grey": "#eef0f4"}
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif'"


class Drawing:
    """Shapes of one diagram, in pixels from the upper left corner."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self._title, self._width, self._height = title, width, height
        self._shapes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 13,
        anchor: str = "middle",
        weight: str = "400",
        on_line: bool = False,
    ) -> None:
        """Write one line. Its middle or its start is at `x`."""
        colour = _INK if weight == "600" else _SOFT
        style = f"font-size='{size}' font-weight='{weight}' text-anchor='{anchor}' fill='{colour}'"
        # On a line, the text has an edge in the card's colour.
        edge = f" paint-order='stroke' stroke='{_CARD}' stroke-width='4'" if on_line else ""
        self._shapes.append(f"<text x='{x:g}' y='{y:g}' {style}{edge}>{escape(text)}</text>")

    def box(self, x: float, y: float, width: float, height: float, lines: Sequence[str], fill: str = "blue") -> None:
        """Draw a box with a bold first line and further lines below it."""
        style = f"rx='8' fill='{_FILLS[fill]}' stroke='{_LINE}' stroke-width='1.2'"
        self._shapes.append(f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' {style}/>")
        top = y + height / 2 - 17 * (len(lines) - 1) / 2 + 5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * number, line, weight="400" if number else "600")

    def frame(self, x: float, y: float, width: float, height: float, name: str) -> None:
        """Draw a dashed frame around a process, with its name."""
        style = f"rx='10' fill='none' stroke='{_LINE}' stroke-dasharray='5 4'"
        self._shapes.append(f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' {style}/>")
        self.text(x + 12, y + 18, name, size=12, anchor="start")

    def arrow(self, x1: float, y1: float, x2: float, y2: float, label: str = "") -> None:
        """Draw an arrow. The label is above a horizontal one and right of any other."""
        line = f"x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}' stroke='{_LINE}' stroke-width='1.5'"
        self._shapes.append(f"<line {line} marker-end='url(#head)'/>")
        if label and y1 == y2:
            lines = textwrap.wrap(label, max(12, int(abs(x2 - x1) / 6.4)))
            for number, line in enumerate(reversed(lines)):
                self.text((x1 + x2) / 2, y1 - 6 - 14 * number, line, size=12, on_line=True)
        elif label:
            self.text((x1 + x2) / 2 + 10, (y1 + y2) / 2 + 4, label, size=12, anchor="start", on_line=True)

    def lifeline(self, x: float, top: float, bottom: float) -> None:
        """Draw a vertical line below a box of a chart."""
        line = f"x1='{x:g}' y1='{top:g}' x2='{x:g}' y2='{bottom:g}'"
        self._shapes.append(f"<line {line} stroke='{_LINE}' stroke-width='1' stroke-dasharray='2 4'/>")

    def bar(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Draw a filled part of a bar."""
        style = f"fill='{_FILLS[fill]}' stroke='{_LINE}' stroke-width='1'"
        self._shapes.append(f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' {style}/>")

    def svg(self) -> str:
        """Return the file's text."""
        size = f"viewBox='0 0 {self._width} {self._height}' width='{self._width}' height='{self._height}'"
        heads = (
            "<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' "
            f"orient='auto'><path d='M0,0 L10,5 L0,10 z' fill='{_LINE}'/></marker></defs>"
        )
        card = f"<rect width='{self._width}' height='{self._height}' rx='12' fill='{_CARD}'/>"
        made = "<!-- Made by scripts/diagrams.py. Do not edit. -->"
        head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} {_FONT} role='img'>"
        return "\n".join(
            [head, made, f"<title>{escape(self._title)}</title>", heads, card, *self._shapes, "</svg>", ""]
        )


@dataclass(frozen=True)
class Step:
    """An arrow of a chart from one column to another."""

    source: str
    target: str
    label: str


def chart(title: str, columns: Sequence[str], steps: Iterable[Step], spacing: int = 180) -> Drawing:
    """Draw a column for each name and one row for each step, in their order."""
    steps = list(steps)
    width, height = spacing * len(columns), 92 + 46 * len(steps)
    drawing = Drawing(title, width, height)
    places = {name: spacing * (number + 0.5) for number, name in enumerate(columns)}
    for name, x in places.items():
        drawing.lifeline(x, 56, height - 18)
        is_end = name in (START, END)
        drawing.box(x - 62, 18, 124, 38, [name], fill="grey" if is_end else "blue")
    for number, step in enumerate(steps):
        y = 102 + 46 * number
        drawing.arrow(places[step.source], y, places[step.target], y, step.label)
    return drawing


START, END = "start", "end"


def state_chart(name: str, page: str) -> Drawing:
    """Return the chart of a state diagram in Mermaid, found in `page` below the heading `name`."""
    section = page.split(f"### {name}\n", 1)[1].split("\n#", 1)[0]
    found = re.findall(r"^ +(\S+) --> (\S+?)(?:: (.*))?$", section, re.MULTILINE)
    steps = [Step(START if a == "[*]" else a, END if b == "[*]" else b, label) for a, b, label in found]
    names = dict.fromkeys([*(step.source for step in steps), *(step.target for step in steps)])
    inner = [one for one in names if one not in (START, END)]
    columns = [*([START] if START in names else []), *inner, *([END] if END in names else [])]
    return chart(f"{name}: states and transitions", columns, steps)


def overview() -> Drawing:
    """Draw the processes, what each owns, and the path of a request."""
    drawing = Drawing("Processes of a server and the path of a request", 940, 420)
    drawing.box(30, 60, 200, 96, ["Clients", "Python client, web chat,", "boto3, OpenAI clients, curl"], fill="grey")
    drawing.box(30, 250, 200, 96, ["SageMaker Runtime", "keeps each session ID", "on one instance"], fill="grey")
    drawing.arrow(130, 156, 130, 250, "or directly")
    drawing.frame(280, 20, 640, 384, "one server (instance, container or machine)")
    drawing.box(310, 60, 200, 96, ["HAProxy", "readiness, JSON errors,", "limits of a request"])
    drawing.box(310, 250, 200, 96, ["TorchServe (Java)", "one sequence for each", "session ID"])
    drawing.arrow(230, 108, 310, 108)
    drawing.arrow(230, 270, 309, 150)
    drawing.arrow(410, 156, 410, 250, "all requests")
    drawing.frame(560, 48, 340, 150, "worker process")
    drawing.box(
        580,
        80,
        300,
        100,
        ["pump, sessions, preparation", "parse, admit or reject, stream", "journal of open sessions"],
        "green",
    )
    drawing.frame(560, 236, 340, 150, "engine process")
    drawing.box(
        580,
        268,
        300,
        100,
        ["model and device memory", "features and KV cache of each session", "one packed forward for all"],
        "orange",
    )
    drawing.arrow(510, 290, 578, 150)
    drawing.arrow(690, 180, 690, 268, "commands")
    drawing.arrow(800, 268, 800, 180, "events")
    return drawing


def question() -> Drawing:
    """Draw the six hops of a question between processes."""
    columns = ("client", "handler", "pump", "manager", "engine")
    steps = (
        Step("client", "handler", "question with the session's ID"),
        Step("handler", "pump", "1  rows of a TorchServe batch"),
        Step("pump", "manager", "2  parsed request"),
        Step("manager", "engine", "3, 4  prompt IDs, by the pipe"),
        Step("engine", "manager", "5  text of each step"),
        Step("manager", "pump", "6  reply of the turn"),
        Step("pump", "handler", "next batch"),
        Step("handler", "client", "streamed text"),
    )
    return chart("The six hops of a question", columns, steps)


def tiers() -> Drawing:
    """Draw the places of a session's state, and how it moves between them."""
    drawing = Drawing("Where the state of a session is kept", 940, 300)
    drawing.frame(20, 20, 400, 262, "device (GPU, or a CPU's memory)")
    drawing.box(50, 54, 340, 88, ["vision features", "kept while the session is open"], "orange")
    drawing.box(50, 172, 340, 88, ["KV cache (resident)", "keys and values of the conversation"], "orange")
    drawing.frame(560, 20, 360, 262, "host")
    drawing.box(590, 172, 300, 88, ["KV cache (offloaded)", "dropped if the host budget is full"], "green")
    drawing.box(590, 54, 300, 88, ["encoded pictures, token IDs", "optional journal: directory or S3"], "green")
    drawing.arrow(390, 200, 590, 200, "offload, least recently used")
    drawing.arrow(590, 236, 390, 236, "restore")
    drawing.arrow(590, 84, 390, 84, "encode again after a loss")
    drawing.arrow(220, 142, 220, 172, "prefill (cold session)")
    return drawing


def work() -> Drawing:
    """Draw the tokens that five turns compute, without and with a session. The numbers are those of LLaVA-1.5."""
    turns, picture, text = 5, 576, 40
    drawing = Drawing("Work of each turn, stateless and with a session", 960, 330)
    drawing.text(40, 36, "Stateless: each question computes picture and history again", anchor="start", weight="600")
    drawing.text(540, 36, "With a session: each question computes its own tokens", anchor="start", weight="600")
    scale = 0.38
    for number in range(turns):
        y = 58 + 38 * number
        drawing.text(40, y + 19, f"turn {number + 1}", anchor="start", size=12)
        widths = {"orange": picture * scale, "grey": number * text * scale, "blue": text * scale}
        x = 92.0
        for fill, width in widths.items():
            if width:
                drawing.bar(x, y, width, 28, fill)
            x += width
    for number, name in enumerate(["open", *(f"turn {one}" for one in range(1, turns + 1))]):
        y = 58 + 38 * number
        drawing.text(540, y + 19, name, anchor="start", size=12)
        width, fill = (text, "blue") if number else (picture, "orange")
        drawing.bar(592, y, width * scale, 28, fill)
    for x, fill, name in (
        (40, "orange", "picture, 576 tokens"),
        (240, "grey", "history"),
        (350, "blue", "the new turn"),
    ):
        drawing.bar(x, 290, 16, 16, fill)
        drawing.text(x + 24, 303, name, anchor="start", size=12)
    return drawing


def diagrams() -> dict[str, str]:
    """Return the text of each file by its name."""
    page = ARCHITECTURE.read_text(encoding="utf-8")
    drawings = {"overview": overview(), "question": question(), "tiers": tiers(), "work": work()}
    states = {f"states-{name}": state_chart(name, page) for name in re.findall(r"### (\w+)\n[^#]*?```mermaid", page)}
    return {f"{name}.svg": drawing.svg() for name, drawing in {**drawings, **states}.items()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for file, content in diagrams().items():
        (FOLDER / file).write_text(content, encoding="utf-8")
