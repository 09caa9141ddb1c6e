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
_PNG_HEADER_BYTES = 8 + 25  # the signature and IHDR


def png_of(width: int, height: int, packed: bytes = b"") -> bytes:
    """Return a PNG whose header declares this size, whatever its data has."""
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _png_chunk(b"IDAT", packed or zlib.compress(b"")) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: tuple[bytes, bytes], of: bytes = PNG) -> bytes:
    """Return a PNG with further chunks, each a (type, body), behind its header."""
    return b"".join([of[:_PNG_HEADER_BYTES], *(_png_chunk(*chunk) for chunk in chunks), of[_PNG_HEADER_BYTES:]])


def deep_grey_tiff(image: Image.Image, bits: int, *, order: str = "<", white_is_zero: bool = False) -> bytes:
    """Return an 8-bit grey picture of even width as an uncompressed TIFF of 12 or 16 bits. `order`: as in struct."""
    top = 2**bits - 1
    values = [round(value * top / 255) for value in image.tobytes()]
    values = [top - value for value in values] if white_is_zero else values
    if bits == 12:  # two pixels in three bytes
        pairs = zip(values[::2], values[1::2], strict=True)
        pixels = b"".join((left << 12 | right).to_bytes(3, "big") for left, right in pairs)
    else:
        pixels = struct.pack(f"{order}{len(values)}H", *values)
    short, long = 3, 4
    entries = [
        (256, short, image.width),
        (257, short, image.height),
        (258, short, bits),
        (259, short, 1),  # not compressed
        (262, short, 0 if white_is_zero else 1),
        (273, long, 8 + 2 + 9 * 12 + 4),  # the pixels follow the directory
        (277, short, 1),
        (278, short, image.height),
        (279, long, len(pixels)),
    ]
    values_of = {short: f"{order}Hxx", long: f"{order}I"}
    directory = [struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(values_of[kind], n) for tag, kind, n in entries]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return b"".join([head, *directory, bytes(4), pixels])


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
