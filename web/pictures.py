"""Pictures and clips of one chat: as they were uploaded, and as the page shows them."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageOps

from llava_sessions_client.shrink import upright

from .problems import Problem

MAX_PICTURES = 32
MAX_PIXELS = 40_000_000
MAX_RATIO = 100
_SHOWN_PX = 1024
_CLIP_TILE_PX = (320, 240)
_EBML = b"\x1a\x45\xdf\xa3"  # WebM and Matroska
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # the first one of an MP4 or MOV file
_PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif", b"jp2 ", b"jpm ", b"jpx ", b"jxl ", b"crx ")
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # a JPEG may turn out to be an MPO


@dataclass
class StoredPicture:
    """A picture or a clip of a chat.

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
    def is_clip(self) -> bool:
        """Whether this is a video file."""
        return is_clip(self.data)

    @property
    def held_bytes(self) -> int:
        """The memory that the picture takes: here, and as base64 in the client."""
        return len(self.data) + len(self.shown) + (len(self.data) + 2) // 3 * 4


def is_clip(data: bytes) -> bool:
    """Return whether a file begins as MP4, MOV, WebM or Matroska, and is no picture in such a container."""
    return data.startswith(_EBML) or (data[4:8] in _BOXES and data[8:12] not in _PICTURE_BRANDS)


def render(data: bytes) -> tuple[bytes, str]:
    """Return a picture as the page shows it, and its media type. Raise `Problem` if it cannot be read.

    The page shows what the model sees: opaque, and with deep grey scaled to 8 bits. Of a clip it shows a sign: only the
    model server decodes video.
    """
    if is_clip(data):
        return _clip_tile(), "image/png"
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
        advice = "Send a PNG, JPEG, WEBP, GIF, BMP or TIFF file, or a clip as MP4, MOV or WebM."
        raise Problem("invalid_picture", "This file is not a picture that can be read.", advice, status=415) from None


def _clip_tile() -> bytes:
    """Return the sign of a clip as PNG: a triangle on grey."""
    tile = Image.new("RGB", _CLIP_TILE_PX, (40, 44, 52))
    ImageDraw.Draw(tile).polygon([(125, 70), (125, 170), (210, 120)], fill=(235, 235, 235))
    buffer = io.BytesIO()
    tile.save(buffer, "PNG")
    return buffer.getvalue()


def _encoded(image: Image.Image, *, is_photo: bool) -> tuple[bytes, str]:
    image.thumbnail((_SHOWN_PX, _SHOWN_PX))
    shown = upright(image)
    buffer = io.BytesIO()
    if is_photo:
        shown.save(buffer, "JPEG", quality=85)
        return buffer.getvalue(), "image/jpeg"
    shown.save(buffer, "PNG")
    return buffer.getvalue(), "image/png"
