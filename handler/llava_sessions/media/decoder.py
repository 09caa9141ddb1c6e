"""Decode the bytes of a picture to RGB, upright and opaque. The content decides the format. Thread-safe.

The limits are checked against the file's header before pixels are decoded.

Requires Pillow 13. Earlier versions read overlapping EXIF or TIFF entries without bound, and fill memory from one BMP
or GIF. `_check_jpeg_scans` and `_check_tiff_layout` reject files that still cost too much in Pillow 13 (measured).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..config import MediaLimits
from .limits import INVALID_REQUEST, TOO_LARGE, UNSUPPORTED_MEDIA, MediaError, check_size
from .png import without_texts

_FORMATS = "PNG, JPEG, WEBP, GIF, BMP or TIFF"

# Pillow's warnings contain numbers of the file, and Python keeps every distinct warning text for the life of the
# process: hostile pictures would grow that memory and the log. The oddities that matter are errors here.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class PictureHeader:
    """What the header of a picture declares: its format, and its size in stored pixels."""

    format: str  # PNG, JPEG, WEBP, GIF, BMP or TIFF
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """The number of pixels."""
        return self.width * self.height


@dataclass(frozen=True)
class DecodedPicture:
    """A decoded picture: RGB, upright, opaque. `width` and `height` are pixels of the upright picture."""

    image: Image.Image
    sha256: str  # hex digest of the encoded bytes
    format: str  # of the encoded bytes: PNG, JPEG, WEBP, GIF, BMP or TIFF
    width: int
    height: int

    def array(self) -> np.ndarray:
        """Return the pixels, uint8 `[height, width, 3]`: 3 bytes per pixel, where Pillow has 4.

        Pillow converts a whole picture through two copies of it. Here only one strip at a time has copies.
        """
        array = np.empty((self.height, self.width, 3), np.uint8)
        for box in _strips(self.image):
            array[box[1] : box[3]] = np.asarray(self.image.crop(box))
        return array


def read_header(data: bytes, limits: MediaLimits) -> PictureHeader:
    """Return what the header of the picture in `data` declares, without decoding it. Raise `MediaError`."""
    check_size(len(data), limits)
    picture_format = sniff_format(data)
    with _media_errors(picture_format, limits), _opened(data, picture_format, limits) as image:
        return PictureHeader(picture_format, image.width, image.height)


def load_bytes(data: bytes, limits: MediaLimits) -> DecodedPicture:
    """Decode the picture in `data`. Raise `MediaError`.

    Decode only the first frame of an animated file. Blend transparent pixels with white. Ignore ICC profiles.
    Takes at most twice the bytes of the decoded picture, which has 4 bytes per pixel.
    """
    check_size(len(data), limits)
    picture_format = sniff_format(data)
    with _media_errors(picture_format, limits):
        image = _decode(data, picture_format, limits)
    return DecodedPicture(image, hashlib.sha256(data).hexdigest(), picture_format, image.width, image.height)


@contextlib.contextmanager
def _media_errors(picture_format: str, limits: MediaLimits) -> Iterator[None]:
    """Raise the `MediaError` that a client receives for an error of Pillow."""
    try:
        yield
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(TOO_LARGE, f"the picture must have at most {limits.max_pixels} pixels, got more") from None
    except Exception as error:  # Pillow raises SyntaxError, struct.error, OSError, ValueError and others
        if _UNSUPPORTED.match(str(error)):
            message = f"the picture must be a usual {picture_format} file, got a kind that cannot be decoded here"
            raise MediaError(UNSUPPORTED_MEDIA, message) from error
        message = f"the picture is damaged: its {picture_format} data cannot be decoded"
        raise MediaError(INVALID_REQUEST, message) from error


# The beginnings of Pillow's messages for good files that it cannot decode.
_UNSUPPORTED = re.compile(r"unknown pixel mode|unknown data organization|cannot handle \d+-bit layers|Unsupported BMP")


# Sizes of the DIB header that follows the signature. "BM" alone also begins a word.
_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)
_TIFF_MAGIC = (b"II*\0", b"MM\0*")


def sniff_format(data: bytes) -> str:
    """Return the format by its signature, so that only one of Pillow's decoders runs. Raise `MediaError`."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if data[:4] in _TIFF_MAGIC:
        return "TIFF"
    raise MediaError(UNSUPPORTED_MEDIA, f"the picture must be {_FORMATS}, got {len(data)} bytes of another format")


@contextlib.contextmanager
def _opened(data: bytes, picture_format: str, limits: MediaLimits) -> Iterator[Image.Image]:
    """Open a picture whose header is within the limits. Its pixels are not decoded."""
    if picture_format == "JPEG":
        _check_jpeg_scans(data)
    elif picture_format == "TIFF":
        _check_tiff_layout(data, limits)
    elif picture_format == "PNG":
        data = without_texts(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[picture_format])
    except UnidentifiedImageError:
        # Pillow keeps the plugin's reason to itself.
        Image.OPEN[picture_format][0](io.BytesIO(data), "").close()
        raise
    with image:
        _check_dimensions(image.width, image.height, limits)
        yield image


def _decode(data: bytes, picture_format: str, limits: MediaLimits) -> Image.Image:
    with _opened(data, picture_format, limits) as image:
        image.load()
        orientation = _orientation(image)  # after load(), which turns a TIFF upright and removes the tag
        upright = _to_rgb(image)
    del image  # before the next copy
    method = _TRANSPOSE.get(orientation)
    return upright if method is None else upright.transpose(method)


def _check_dimensions(width: int, height: int, limits: MediaLimits) -> None:
    if width < 1 or height < 1:
        raise MediaError(INVALID_REQUEST, "the picture is damaged: its header declares no pixels")
    if width * height > limits.max_pixels:
        raise MediaError(TOO_LARGE, f"the picture must have at most {limits.max_pixels} pixels, got {width} x {height}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MediaError(
            TOO_LARGE,
            f"the picture must have an aspect ratio of at most {limits.max_aspect:g}:1, got {width} x {height}",
        )


_MAX_JPEG_SCANS = 64  # encoders write 10 to 20
_MAX_JPEG_MARKERS = 100_000
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not a stuffed 0xFF, fill byte or restart marker
_JPEG_END_OF_IMAGE = 0xD9
_JPEG_START_OF_SCAN = 0xDA
_JPEG_WITHOUT_LENGTH = (0x01, 0xD8)


def _check_jpeg_scans(data: bytes) -> None:
    """Reject progressive files of very many scans: a scan of a few bytes costs a pass over all pixels.

    Measured: 1,000 scans of 61 bytes over 40 million grey pixels take Pillow 15 seconds, 10 MiB of scans 40 minutes.
    Read markers as libjpeg does, up to the end of the first picture: cameras append other data.
    """
    position = 2
    scans = 0
    markers = 0
    while (match := _JPEG_MARKER.search(data, position)) and scans <= _MAX_JPEG_SCANS:
        markers += 1
        if markers > _MAX_JPEG_MARKERS:
            raise MediaError(TOO_LARGE, f"the JPEG picture must have at most {_MAX_JPEG_MARKERS} markers, got more")
        position = match.end()
        marker = data[position - 1]
        if marker == _JPEG_END_OF_IMAGE:
            break
        if marker in _JPEG_WITHOUT_LENGTH:
            continue
        scans += marker == _JPEG_START_OF_SCAN
        position += int.from_bytes(data[position : position + 2], "big")
    if scans > _MAX_JPEG_SCANS:
        raise MediaError(TOO_LARGE, f"the JPEG picture must have at most {_MAX_JPEG_SCANS} scans, got more")


_MAX_TIFF_PARTS = 100_000
_TIFF_PART_TAGS = (273, 324)  # StripOffsets, TileOffsets
_TIFF_TILE_WIDTH = 322
_TIFF_TILE_LENGTH = 323
_TIFF_SIDE_CODES = {1: "B", 3: "H", 4: "I"}  # TIFF type (BYTE, SHORT, LONG) -> struct code; all fit into an entry


def _check_tiff_layout(data: bytes, limits: MediaLimits) -> None:
    """Reject very many strips and very large tiles, which cost memory apart from the pixels.

    Measured: 10 MB that declare 9.9 million one-byte strip offsets make Pillow allocate 2.3 GB in Image.open. One tile
    of 16,384 x 16,384 in a picture of 16 x 16 makes libtiff allocate 268 MB. Layout: TIFF 6.0, section 2.
    Raise `MediaError`, or struct.error if the directory is cut off.
    """
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, directory)
    tile_sides = {_TIFF_TILE_WIDTH: 0, _TIFF_TILE_LENGTH: 0}
    for index in range(entries):
        entry = directory + 2 + 12 * index
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, entry)
        if tag in _TIFF_PART_TAGS and count > _MAX_TIFF_PARTS:
            raise MediaError(TOO_LARGE, f"the TIFF picture must have at most {_MAX_TIFF_PARTS} parts, got {count}")
        if tag in tile_sides:
            code = _TIFF_SIDE_CODES.get(kind)
            if code is None or count != 1:
                raise MediaError(INVALID_REQUEST, "the picture is damaged: its TIFF tile size is not a number")
            (side,) = struct.unpack_from(f"{order}{code}", data, entry + 8)
            tile_sides[tag] = max(tile_sides[tag], side)  # decoders differ in which of two equal tags they use
    if math.prod(tile_sides.values()) > limits.max_pixels:
        raise MediaError(TOO_LARGE, f"the TIFF picture must have tiles of at most {limits.max_pixels} pixels, got more")


_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {  # EXIF 2.32, orientation -> the operation that turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 if the picture has none.

    Not ImageOps.exif_transpose: it writes all EXIF entries again, however many there are.
    """
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as opaque RGB: transparent pixels blended with white, deep grey scaled to 8 bits.

    Converted strip by strip, so that only `image` and the result exist as a whole.
    """
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise MediaError(
            UNSUPPORTED_MEDIA, f"the picture must have grey, palette, RGB(A) or CMYK pixels, got mode {image.mode}"
        )
    to_rgb = _strip_to_rgb(image)
    rgb = Image.new("RGB", image.size)
    for box in _strips(image):
        rgb.paste(to_rgb(image.crop(box)), box)
    return rgb


def _strip_to_rgb(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return the conversion of a strip of `image`."""
    if image.mode.startswith("I;16"):
        depth, inverted = _grey_depth(image)
        scale = 255 / (2**depth - 1) * (-1 if inverted else 1)
        offset = 0.5 + (255 if inverted else 0)  # Pillow cuts the fraction off
        # Pillow's conversion clips 16-bit values at 255, and only mode "I" can be scaled.
        return lambda strip: strip.convert("I").point(lambda value: value * scale + offset).convert("L").convert("RGB")
    if image.has_transparency_data:
        return _on_white
    return lambda strip: strip.convert("RGB")


_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262


def _grey_depth(image: Image.Image) -> tuple[int, bool]:
    """Return the bits of a grey pixel of more than 8 bits, and whether 0 is white."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))
    return int(bits[0]), tags.get(_TIFF_PHOTOMETRIC, 1) == 0


def _on_white(strip: Image.Image) -> Image.Image:
    layer = strip.convert("RGBA")
    paper = Image.new("RGB", layer.size, "white")
    paper.paste(layer, mask=layer.getchannel("A"))
    return paper


_STRIP_PIXELS = 1_000_000


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes (left, upper, right, lower) of whole rows that cover `image`, of about `_STRIP_PIXELS` each."""
    rows = max(_STRIP_PIXELS // image.width, 1)
    for upper in range(0, image.height, rows):
        yield (0, upper, image.width, min(upper + rows, image.height))
