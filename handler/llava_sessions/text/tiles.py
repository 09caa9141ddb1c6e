"""Sizes of tiles, by the configuration of a vision tower and by a processor."""

from __future__ import annotations

from typing import Any


def tile_patches(vision: Any) -> int | None:
    """Return the patches of a tile, or None if the vision config has no sizes.

    `image_size` and `patch_size` are numbers, or pairs of height and width (InternVL).
    """
    sizes = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    side, patch = (size if isinstance(size, (list, tuple)) else (size, size) for size in sizes)
    if not all([*side, *patch]):
        return None
    return int(side[0] // patch[0]) * int(side[1] // patch[1])


def largest_picture(processor: Any) -> tuple[int, int]:
    """Return width and height, in pixels, of a picture that the processor cuts into the most tiles."""
    images = processor.image_processor
    grids = getattr(images, "image_grid_pinpoints", None)
    if grids:
        return max(((width, height) for height, width in grids), key=lambda sides: sides[0] * sides[1])
    tiles = getattr(images, "max_patches", None)
    if tiles:  # in one row
        return images.size["width"] * tiles, images.size["height"]
    return 64, 64
