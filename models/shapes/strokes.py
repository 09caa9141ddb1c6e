"""Painting one figure: filled, outlined or both."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

from models.shapes.drawing import Rgb
from models.shapes.outlines import Point


@dataclass(frozen=True)
class Figure:
    """A closed outline in units of the shorter side; `kind` is empty if the model does not know the figure."""

    outline: tuple[Point, ...]
    fill: Rgb | None
    line: Rgb | None
    pen: float
    kind: str
    colour: str


def paint_figure(canvas: Image.Image, figure: Figure, unit_px: int) -> None:
    """Paint the figure on the canvas; `unit_px` is the canvas' shorter side."""
    pen = ImageDraw.Draw(canvas)
    corners = [(x * unit_px, y * unit_px) for x, y in figure.outline]
    if figure.fill:
        pen.polygon(corners, fill=figure.fill)
    if figure.line:
        width = max(1, round(figure.pen * unit_px))
        pen.line([*corners, *corners[:2]], fill=figure.line, width=width, joint="curve")
