"""What a terminal chat prints or saves about its conversation."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ..answers import Turn
from ..chat import Chat
from ..clips import Clip


def clip_line(clip: Clip) -> str:
    """Return the name and the size of a clip."""
    return f"[{clip.name}, clip of {clip.size_bytes / 2**20:.1f} MiB]"


def history_lines(chat: Chat) -> list[str]:
    """Return the conversation, each turn with its number."""
    lines = []
    for number, turn in enumerate(chat.turns, 1):
        names = _names(turn)
        shown = f" [{', '.join(names)}]" if names else ""
        lines += [f"{number}. {turn.text}{shown}", f"   {turn.answer.text}"]
    return lines or ["no questions yet"]


def stats_table(chat: Chat) -> Table:
    """Return tokens and times of each answer, and their sums."""
    table = Table(show_footer=True)
    stats = chat.stats
    table.add_column("turn", footer="all")
    table.add_column("TTFT ms", justify="right", footer=f"{stats.ttft_s * 1e3:.0f}")
    table.add_column("total ms", justify="right", footer=f"{stats.total_s * 1e3:.0f}")
    table.add_column("cached", justify="right", footer=f"{stats.usage.cached_tokens}")
    table.add_column("computed", justify="right", footer=f"{stats.usage.computed_tokens}")
    table.add_column("answer", justify="right", footer=f"{stats.usage.completion_tokens}")
    table.add_column("replayed", footer=f"{stats.replays}")
    for number, turn in enumerate(chat.turns, 1):
        answer = turn.answer
        table.add_row(
            str(number),
            f"{answer.ttft_s * 1e3:.0f}",
            f"{answer.total_s * 1e3:.0f}",
            f"{answer.usage.cached_tokens}",
            f"{answer.usage.computed_tokens}",
            f"{answer.usage.completion_tokens}",
            "yes" if answer.replayed else "",
        )
    return table


def save(chat: Chat, path: Path) -> None:
    """Write the conversation: JSON for a name that ends in `.json`, else Markdown. Raise `OSError`."""
    if path.suffix == ".json":
        text = json.dumps([_record(turn) for turn in chat.turns], indent=1, ensure_ascii=False)
    else:
        names = ", ".join(picture.name for picture in chat.pictures)
        parts = [f"Pictures: {names}"] if names else []
        parts += [f"Clip: {chat.clip.name}"] if chat.clip is not None else []
        parts += [f"**{turn.text}**{_shown(turn)}\n\n{turn.answer.text}" for turn in chat.turns]
        text = "\n\n".join(parts)
    path.write_text(text + "\n", encoding="utf-8")


def _shown(turn: Turn) -> str:
    names = _names(turn)
    return f" ({', '.join(names)})" if names else ""


def _names(turn: Turn) -> list[str]:
    """Return the names of the pictures and the clip of a question."""
    clip = [] if turn.clip is None else [turn.clip.name]
    return [*(picture.name for picture in turn.pictures), *clip]


def _record(turn: Turn) -> dict[str, Any]:
    clip = {} if turn.clip is None else {"clip": turn.clip.name}
    names = [picture.name for picture in turn.pictures]
    return {"question": turn.text, "pictures": names, **clip, **asdict(turn.answer)}
