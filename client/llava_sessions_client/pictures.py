"""Pictures: from whatever the caller has to the encoded bytes of a request."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from PIL import Image, UnidentifiedImageError

from . import sources
from .errors import InvalidPicture

_ARRAY_MODES = {(): "L", (1,): "L", (3,): "RGB", (4,): "RGBA"}
_HEADER_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # a JPEG may turn out to be an MPO


@runtime_checkable
class ArrayLike(Protocol):
    """An array as NumPy describes it."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Shape, type and memory."""


PictureSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | ArrayLike


@dataclass(frozen=True)
class Picture:
    """An encoded picture. `width` and `height` are pixels as stored, before EXIF orientation; `name` is for people."""

    data: bytes
    width: int
    height: int
    media_type: str
    name: str = "picture"

    @cached_property
    def base64(self) -> str:
        """The picture as the `image` field of a request."""
        return base64.b64encode(self.data).decode()

    @property
    def data_url(self) -> str:
        """The picture as a data URL."""
        return f"data:{self.media_type};base64,{self.base64}"

    @property
    def encoded_bytes(self) -> int:
        """Length of the picture in a request."""
        return (len(self.data) + 2) // 3 * 4

    def image(self) -> Image.Image:
        """Decode the picture. Raise `InvalidPicture`."""
        try:
            image = Image.open(io.BytesIO(self.data))
            image.load()
        except Exception as error:  # Pillow raises many kinds of errors for damaged files
            raise InvalidPicture(f"{self.name} must be a whole picture, got {len(self.data)} bytes: {error}") from error
        return image


def picture_of(data: bytes, name: str) -> Picture:
    """Return encoded bytes as a picture. Only their header is read. Raise `InvalidPicture`."""
    try:
        with Image.open(io.BytesIO(data), formats=_HEADER_FORMATS) as image:
            width, height = image.size
            media_type = "image/jpeg" if image.format == "MPO" else f"image/{str(image.format).lower()}"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        message = f"{name} must be a PNG, JPEG, WEBP, GIF, BMP or TIFF picture, got {len(data)} bytes of something else"
        raise InvalidPicture(message) from error
    return Picture(data, width, height, media_type, name)


def encode(image: Image.Image, name: str) -> Picture:
    """Return a Pillow image as PNG. Modes that PNG cannot store become RGB."""
    buffer = io.BytesIO()
    try:
        kept = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
        kept.save(buffer, "PNG", compress_level=1)
    except (OSError, ValueError) as error:
        raise InvalidPicture(f"{name} must be a picture that PNG can store, got mode {image.mode}") from error
    return Picture(buffer.getvalue(), image.width, image.height, "image/png", name)


def load_picture(source: PictureSource | Picture, *, region: str | None = None) -> Picture:
    """Return a picture. Raise `InvalidPicture`.

    A string is an `http://` or `https://` URL, an `s3://` URI, a data URL, or else a path. URLs are fetched by this
    client, not by the server, so that pictures in a private network work with any server; `sources` has the limits.
    Encoded bytes stay as they are. Arrays are 8-bit grey, RGB or RGBA.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        return encode(source, getattr(source, "filename", "") or "picture")
    if isinstance(source, bytes | bytearray | memoryview):
        return picture_of(bytes(source), "the picture")
    if isinstance(source, str) and sources.is_url(source):
        return picture_of(sources.fetch(source, region), sources.shown(source))
    if isinstance(source, str | os.PathLike):
        return picture_of(read_file(Path(source)), str(source))
    if isinstance(source, ArrayLike):
        return encode(_from_array(source), "the array")
    raise InvalidPicture(f"a picture must be a path, URL, bytes, PIL image or array, got {type(source).__name__}")


def load_pictures(
    given: PictureSource | Picture | Sequence[PictureSource | Picture] | None, *, region: str | None = None
) -> tuple[Picture, ...]:
    """Return one picture, several or none as a tuple. Raise `InvalidPicture`."""
    if given is None:
        return ()
    if isinstance(given, list | tuple):
        return tuple(load_picture(source, region=region) for source in given)
    return (load_picture(cast("PictureSource | Picture", given), region=region),)


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raise `InvalidPicture`."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise InvalidPicture(f"{path} must be a readable file: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # a NUL in the path, or the home of an unknown user
        raise InvalidPicture(f"{str(path)!r} must be the path of a file: {error}") from error


def _from_array(source: ArrayLike) -> Image.Image:
    """Return an array as an image, without importing NumPy."""
    interface = source.__array_interface__
    shape = tuple(interface["shape"])
    kind = str(interface["typestr"])
    if kind[1:] != "u1" or len(shape) not in (2, 3) or shape[2:] not in _ARRAY_MODES or 0 in shape:
        message = "an array must be uint8 of shape (height, width), (height, width, 3) or (height, width, 4), got "
        raise InvalidPicture(f"{message}{kind} of shape {shape}")
    mode = _ARRAY_MODES[shape[2:]]
    return Image.frombytes(mode, (shape[1], shape[0]), source.tobytes())  # type: ignore[attr-defined]  # of every array
