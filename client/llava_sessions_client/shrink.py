"""Re-encode pictures that are larger than the model, the server or the platform can use."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageOps

from .pictures import Picture

DEFAULT_SIDE_PX = 2048
QUALITY = 90
_STEP = 0.8
_MIN_SIDE_PX = 64
_MIN_RATIO = 0.7  # of the bytes of a JPEG that a PNG may exceed it by: a screenshot stays free of artefacts


@dataclass(frozen=True)
class PictureLimits:
    """`max_side_px`: of the longer side. `max_bytes`: of one encoded picture, before base64."""

    max_side_px: int = DEFAULT_SIDE_PX
    max_bytes: int = 10 * 1024 * 1024


@dataclass(frozen=True)
class Fitted:
    """Pictures within the limits, and a sentence for each one that was re-encoded."""

    pictures: tuple[Picture, ...]
    notices: tuple[str, ...] = ()


def fit(pictures: Sequence[Picture], limits: PictureLimits) -> Fitted:
    """Return the pictures with each one within the limits. One that is within them stays byte for byte.

    A picture that is re-encoded is turned as its EXIF orientation says, and blended with white where it is transparent,
    as the server does. Raise `InvalidPicture`.
    """
    fitted = [_fit_one(picture, limits) for picture in pictures]
    changed = [(old, new) for old, new in zip(pictures, fitted, strict=True) if new is not old]
    return Fitted(tuple(fitted), tuple(notice(old, new) for old, new in changed))


def fit_together(pictures: Sequence[Picture], max_encoded_bytes: int) -> Fitted:
    """Shrink the largest pictures until all of them together, as base64, take at most `max_encoded_bytes`.

    Pictures of 64 pixels stay as they are, so the result may still be too large. Raise `InvalidPicture`.
    """
    fitted = list(pictures)
    share = max_encoded_bytes // 4 * 3 // max(1, len(fitted))  # base64 adds a third
    while (excess := sum(picture.encoded_bytes for picture in fitted) - max_encoded_bytes) > 0:
        place = max(range(len(fitted)), key=lambda index: fitted[index].encoded_bytes)
        smaller = _smaller(fitted[place], max(share, len(fitted[place].data) - excess))
        if smaller is None:
            break
        fitted[place] = smaller
    changed = [(old, new) for old, new in zip(pictures, fitted, strict=True) if new is not old]
    return Fitted(tuple(fitted), tuple(notice(old, new) for old, new in changed))


def notice(old: Picture, new: Picture) -> str:
    """Return a sentence for the user: old and new size."""
    return (
        f"{old.name} was shrunk from {old.width} x {old.height} pixels ({_size(old)}) "
        f"to {new.width} x {new.height} ({_size(new)})"
    )


def upright(image: Image.Image) -> Image.Image:
    """Return an image as the server sees it: EXIF orientation applied, transparency blended with white, RGB."""
    turned = ImageOps.exif_transpose(image)
    if turned.has_transparency_data:
        layer = turned.convert("RGBA")
        blended = Image.new("RGBA", layer.size, "white")
        blended.alpha_composite(layer)
        turned = blended
    if turned.mode.startswith("I;16"):
        turned = turned.point(lambda value: value / 256).convert("L")
    return turned.convert("RGB")


def _fit_one(picture: Picture, limits: PictureLimits) -> Picture:
    longer = max(picture.width, picture.height)
    if longer > limits.max_side_px:
        picture = _encoded(picture, limits.max_side_px / longer)
    if len(picture.data) > limits.max_bytes:
        return _smaller(picture, limits.max_bytes) or picture
    return picture


def _smaller(picture: Picture, most_bytes: int) -> Picture | None:
    """Return a picture of at most `most_bytes`, or the smallest one; None if it is small already."""
    best = picture
    scale = 1.0
    while max(picture.width, picture.height) * scale > _MIN_SIDE_PX:
        encoded = _encoded(picture, scale)
        best = min(best, encoded, key=lambda each: len(each.data))
        if len(best.data) <= most_bytes:
            break
        scale *= min(_STEP, math.sqrt(most_bytes / len(encoded.data)))
    return None if best is picture else best


def _encoded(picture: Picture, scale: float) -> Picture:
    """Return a picture scaled and encoded again: as PNG if that takes little more than JPEG."""
    image = upright(picture.image())
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    jpeg = _bytes(image, "JPEG", quality=QUALITY)
    if picture.media_type != "image/jpeg":
        png = _bytes(image, "PNG")
        if len(png) * _MIN_RATIO <= len(jpeg):
            return replace(picture, data=png, width=image.width, height=image.height, media_type="image/png")
    return replace(picture, data=jpeg, width=image.width, height=image.height, media_type="image/jpeg")


def _bytes(image: Image.Image, picture_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, picture_format, **options)
    return buffer.getvalue()


def _size(picture: Picture) -> str:
    kib = len(picture.data) / 1024
    return f"{kib:.0f} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"
