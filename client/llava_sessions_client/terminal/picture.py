"""Show a picture in the terminal: each character is two pixels, one above the other."""

from __future__ import annotations

from typing import cast

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..pictures import Picture
from ..shrink import upright

MAX_COLUMNS = 64
MAX_ROWS = 20
Pixel = tuple[int, int, int]
_UPPER_HALF = "▀"


def show_picture(console: Console, picture: Picture) -> None:
    """Print a picture in half blocks, or its name and size where colours cannot be shown."""
    if console.is_terminal and not console.no_color and console.color_system is not None:
        console.print(half_blocks(picture.image(), min(MAX_COLUMNS, console.width - 2)))
    console.print(Text(f"[{picture.name}, {picture.width} x {picture.height} pixels]", style="dim"))


def half_blocks(image: Image.Image, max_columns: int = MAX_COLUMNS, max_rows: int = MAX_ROWS) -> Text:
    """Return a picture as text: the foreground of each character is the upper pixel, the background the lower one."""
    columns, lines = _size(image.width, image.height, max(1, max_columns), max_rows)
    pixels = upright(image).resize((columns, lines), Image.Resampling.BOX).load()
    if pixels is None:
        raise ValueError("the image must have pixels")
    text = Text(no_wrap=True, end="")
    for line in range(0, lines, 2):
        for column in range(columns):
            above = Color.from_rgb(*cast("Pixel", pixels[column, line]))
            below = Color.from_rgb(*cast("Pixel", pixels[column, line + 1]))
            text.append(_UPPER_HALF, Style(color=above, bgcolor=below))
        if line + 2 < lines:
            text.append("\n")
    return text


def _size(width: int, height: int, max_columns: int, max_rows: int) -> tuple[int, int]:
    """Return columns, and an even number of pixel lines, that keep the aspect ratio."""
    scale = min(max_columns / width, 2 * max_rows / height)
    return max(1, round(width * scale)), 2 * max(1, round(height * scale / 2))
