"""Owns the way from encoded bytes to one RGB picture: format by content, limits by header, upright and opaque.

Must not know where the bytes came from. Holds no state between calls and changes no setting of Pillow, so any number of
threads may call it at once.

Pillow 13 or later is expected: earlier versions can be made to read overlapping EXIF or TIFF entries without bound, and
to fill memory from one BMP or GIF. What Pillow 13 leaves open (measured) is closed here: see `_check_jpeg_scans`
and `_check_tiff_layout`.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
from dataclasses import dataclass

from PIL import Image

from ..config import MediaLimits
from .limits import INVALID_REQUEST, TOO_LARGE, UNSUPPORTED_MEDIA, MediaError, check_size

_FORMATS_TEXT = "PNG, JPEG, WEBP, GIF, BMP or TIFF"

# Pillow warns in words that hold numbers of the file, and Python remembers every warning it has shown, for ever:
# pictures made for it would grow that memory and the log. What matters in those warnings is an error here anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class DecodedPicture:
    """A decoded picture: RGB, upright, opaque; `width` and `height` in pixels as it is seen."""

    image: Image.Image
    sha256: str  # hex, of the encoded bytes
    format: str  # of the encoded bytes: PNG, JPEG, WEBP, GIF, BMP or TIFF
    width: int
    height: int


def load_bytes(data: bytes, limits: MediaLimits) -> DecodedPicture:
    """The picture encoded in `data`, its format judged by content. Raises MediaError.

    Only the first frame of an animated file is decoded. Transparent pixels are laid on white. ICC profiles are ignored.
    """
    check_size(len(data), limits)
    picture_format = _sniff_format(data)
    try:
        image = _decode(data, picture_format, limits)
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(
            TOO_LARGE, f"the picture declares too many pixels, at most {limits.max_pixels} are wanted"
        ) from None
    except Exception as error:  # Pillow raises nearly everything: SyntaxError, struct.error, OSError, ValueError...
        message = f"the picture is damaged: its {picture_format} data cannot be decoded"
        raise MediaError(INVALID_REQUEST, message) from error
    return DecodedPicture(image, hashlib.sha256(data).hexdigest(), picture_format, image.width, image.height)


_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)  # of the DIB header that follows: "BM" alone is also a word
_TIFF_MAGIC = (b"II*\0", b"MM\0*")


def _sniff_format(data: bytes) -> str:
    """The format by its signature. Only that one decoder of Pillow gets to see the bytes. Raises MediaError."""
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
    raise MediaError(UNSUPPORTED_MEDIA, f"the bytes are not a picture in a known format, wanted {_FORMATS_TEXT}")


def _decode(data: bytes, picture_format: str, limits: MediaLimits) -> Image.Image:
    if picture_format == "JPEG":
        _check_jpeg_scans(data)
    elif picture_format == "TIFF":
        _check_tiff_layout(data, limits)
    with Image.open(io.BytesIO(data), formats=[picture_format]) as image:
        _check_dimensions(image.width, image.height, limits)
        image.load()
        orientation = _orientation(image)  # after load(): Pillow turns TIFF by itself there, and forgets the tag
        upright = _to_rgb(image)
    method = _TRANSPOSE.get(orientation)
    return upright if method is None else upright.transpose(method)


def _check_dimensions(width: int, height: int, limits: MediaLimits) -> None:
    if width < 1 or height < 1:
        raise MediaError(INVALID_REQUEST, "the picture is damaged: it has no pixels")
    if width * height > limits.max_pixels:
        raise MediaError(
            TOO_LARGE, f"the picture is {width} x {height} pixels, at most {limits.max_pixels} in all are wanted"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MediaError(
            TOO_LARGE, f"the picture is {width} x {height} pixels, a shape of at most {limits.max_aspect:g}:1 is wanted"
        )


_MAX_JPEG_SCANS = 64  # encoders write about 10, the thriftiest about 20
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither a stuffed 0xFF, nor fill, nor a restart marker


def _check_jpeg_scans(data: bytes) -> None:
    """Refuse progressive files of very many scans: each costs a few bytes to send and a pass over all pixels to decode.

    Measured: 1 000 scans of 61 bytes over 40 million grey pixels keep Pillow busy for 15 seconds, 10 MiB of them for
    40 minutes. Reads markers as libjpeg does, up to the end of the first picture.
    """
    position, scans = 2, 0
    while (match := _JPEG_MARKER.search(data, position)) and scans <= _MAX_JPEG_SCANS:
        marker, position = data[match.end() - 1], match.end()
        if marker == 0xD9:  # end of image; cameras append other things
            break
        if marker in (0x01, 0xD8):  # no length follows
            continue
        scans += marker == 0xDA
        position += int.from_bytes(data[position : position + 2], "big")
    if scans > _MAX_JPEG_SCANS:
        raise MediaError(TOO_LARGE, f"the JPEG picture has more than {_MAX_JPEG_SCANS} scans")


_MAX_TIFF_PARTS = 100_000
_TIFF_PART_TAGS = (273, 324)  # StripOffsets, TileOffsets
_TIFF_TILE_TAGS = (322, 323)  # TileWidth, TileLength


def _check_tiff_layout(data: bytes, limits: MediaLimits) -> None:
    """Refuse what costs memory before or besides the pixels: very many strips, very large tiles.

    Measured: 10 MB that declare 9.9 million one-byte strip offsets make Pillow allocate 2.3 GB in Image.open; one tile
    of 16384 x 16384 in a picture of 16 x 16 has libtiff allocate 268 MB. Layout: TIFF 6.0, section 2.
    Raises MediaError, and struct.error where the directory is cut off.
    """
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, directory)
    tile_sides = dict.fromkeys(_TIFF_TILE_TAGS, 0)
    for index in range(entries):
        entry = directory + 2 + 12 * index
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, entry)
        if tag in _TIFF_PART_TAGS and count > _MAX_TIFF_PARTS:
            raise MediaError(TOO_LARGE, f"the TIFF picture has {count} parts, at most {_MAX_TIFF_PARTS} are wanted")
        if tag in _TIFF_TILE_TAGS:
            code = {1: "B", 3: "H", 4: "I"}.get(kind)  # BYTE, SHORT, LONG: all that can hold a side in the entry itself
            if code is None or count != 1:
                raise MediaError(INVALID_REQUEST, "the picture is damaged: its TIFF tile size is not a number")
            (side,) = struct.unpack_from(f"{order}{code}", data, entry + 8)
            tile_sides[tag] = max(tile_sides[tag], side)  # of a tag given twice, whichever a decoder takes is covered
    if tile_sides[322] * tile_sides[323] > limits.max_pixels:
        raise MediaError(TOO_LARGE, f"the TIFF picture has tiles of more than {limits.max_pixels} pixels")


_TRANSPOSE = {  # EXIF 2.32, tag 0x0112: how to turn what is stored into what was seen
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none.

    Not ImageOps.exif_transpose: it writes all EXIF entries again, however many there are.
    """
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """`image` as opaque RGB: transparent pixels on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit values at 255 on conversion; only mode "I" can be scaled.
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise MediaError(
            UNSUPPORTED_MEDIA, f"the picture has pixels of mode {image.mode}, wanted grey, palette, RGB(A) or CMYK"
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer.getchannel("A"))
        return paper
    # Pillow may hand back the very object it has just decoded; the copy outlives the file it was read from.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
