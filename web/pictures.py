"""Pictures of one chat: as they were uploaded, and as the page shows them."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from llava_sessions_client.shrink import upright

from .problems import Problem

MAX_PICTURES = 32
MAX_PIXELS = 40_000_000
MAX_RATIO = 100
_SHOWN_PX = 1024
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # a JPEG may turn out to be an MPO


@dataclass
class StoredPicture:
    """A picture of a chat.

    `data`: as uploaded. `shown`: a PNG or JPEG without metadata for the page. `turn`: index of the turn that shows the
    picture; None for a picture of the open. `pending`: the next question shows it.
    """

    number: int
    data: bytes
    shown: bytes
    media_type: str
    turn: int | None = None
    pending: bool = False

    @property
    def held_bytes(self) -> int:
        """The memory that the picture takes: here, and as base64 in the client."""
        return len(self.data) + len(self.shown) + (len(self.data) + 2) // 3 * 4


def render(data: bytes) -> tuple[bytes, str]:
    """Return a picture as the page shows it, and its media type. Raise `Problem` if it cannot be read.

    The page shows what the model sees: opaque, and with deep grey scaled to 8 bits.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
                raise Problem(
                    "too_large",
                    "The picture has too many pixels, or is too narrow.",
                    "Send one of at most 40 million pixels.",
                    status=413,
                )
            opened.draft("RGB", (_SHOWN_PX, _SHOWN_PX))
            return _encoded(ImageOps.exif_transpose(opened), is_photo=opened.format in ("JPEG", "MPO"))
    except Problem:
        raise
    except Exception:  # Pillow raises many kinds of errors for damaged files
        advice = "Send a PNG, JPEG, WEBP, GIF, BMP or TIFF file."
        raise Problem("invalid_picture", "This file is not a picture that can be read.", advice, status=415) from None


def _encoded(image: Image.Image, *, is_photo: bool) -> tuple[bytes, str]:
    image.thumbnail((_SHOWN_PX, _SHOWN_PX))
    shown = upright(image)
    buffer = io.BytesIO()
    if is_photo:
        shown.save(buffer, "JPEG", quality=85)
        return buffer.getvalue(), "image/jpeg"
    shown.save(buffer, "PNG")
    return buffer.getvalue(), "image/png"
