"""Encoded pictures for tests, and short ways to load one and to expect a `MediaError`."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import pytest
from PIL import Image, ImageDraw

from llava_sessions.config import MediaLimits
from llava_sessions.media.decoder import DecodedPicture, load_bytes
from llava_sessions.media.limits import MediaError
from llava_sessions.media.sources import Fetch, read_base64, read_path

LIMITS = MediaLimits()
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
# A rejection takes milliseconds. Without its check it takes minutes, or for ever.
PATIENCE_S = 20.0


def encode(image: Image.Image, picture_format: str, **options: object) -> bytes:
    """Return `image` as a file of this format."""
    buffer = io.BytesIO()
    image.save(buffer, picture_format, **options)
    return buffer.getvalue()


def two_colours() -> Image.Image:
    """Return a picture of 24 x 16 pixels, the left half red, the right half blue."""
    image = Image.new("RGB", (24, 16), RED)
    ImageDraw.Draw(image).rectangle((12, 0, 23, 15), fill=BLUE)
    return image


PNG = encode(two_colours(), "PNG")


def png_of(width: int, height: int, packed: bytes = b"") -> bytes:
    """Return a PNG whose header declares this size, whatever its data has."""
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _png_chunk(b"IDAT", packed or zlib.compress(b"")) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def load_base64(text: str, limits: MediaLimits) -> DecodedPicture:
    """Read and decode a picture in base64 or a data URL."""
    return load_bytes(read_base64(text, limits), limits)


def load_path(source: str, limits: MediaLimits, fetch: Fetch | None = None) -> DecodedPicture:
    """Read and decode the picture at a URL or path."""
    return load_bytes(read_path(source, limits, fetch), limits)


def rejected(code: str, words: str, call: Callable[[], object]) -> MediaError:
    """Assert that `call` raises a `MediaError` of this code with `words` in its message. Return the error."""
    with pytest.raises(MediaError) as caught:
        call()
    assert caught.value.code == code, caught.value.message
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    return caught.value
