"""A request's pictures: read, checked by their headers, then decoded and prepared one after another. Thread-safe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ..chat.transcript import Blob, BlobPool
from ..config import MediaLimits
from ..media.budget import PixelBudget
from ..media.decoder import load_bytes, read_header
from ..media.limits import check_request_pixels
from ..media.sources import read_base64, read_path
from ..protocol.requests import PictureSource
from ..text.pictures import PicturePreparer, Prepared, joined

T = TypeVar("T")
Fetch = Callable[[str, MediaLimits], bytes]


class PictureLoader:
    """Loads pictures. All threads together decode at most the pixels of one picture of the largest size."""

    def __init__(self, pictures: PicturePreparer, limits: MediaLimits, blobs: BlobPool, fetch: Fetch) -> None:
        """`fetch` reads https and s3 sources."""
        self._pictures = pictures
        self._limits = limits
        self._blobs = blobs
        self._fetch = fetch
        self._pixels = PixelBudget(limits.max_pixels)

    def load(self, sources: tuple[PictureSource, ...]) -> tuple[Blob, ...]:
        """Return the encoded pictures of a request. Raise `MediaError` unless all headers are within the limits."""
        blobs = tuple(self._blobs.get(_read(source, self._limits, self._fetch)) for source in sources)
        check_request_pixels(sum(read_header(blob.data, self._limits).pixels for blob in blobs), self._limits)
        return blobs

    def prepare(self, blobs: tuple[Blob, ...], token_digest: str | None) -> Prepared:
        """Prepare the pictures of one request of a session with this token."""

        def prepare(sha256: str, pixels: np.ndarray) -> Prepared:
            return self._pictures.picture(picture_key(sha256, token_digest), pixels, len(blobs))

        return joined(self._with_decoded(blob, prepare) for blob in blobs)

    def prepare_clip(self, blobs: tuple[Blob, ...], token_digest: str | None) -> Prepared:
        """Prepare the frames of a clip of a session with this token."""
        pictures = self._pictures
        frames = [self._with_decoded(blob, lambda _, pixels: pictures.frame(pixels)) for blob in blobs]
        clip_key = hashlib.sha256(
            " ".join(picture_key(blob.sha256, token_digest) for blob in blobs).encode()
        ).hexdigest()
        return pictures.clip(clip_key, frames)

    def _with_decoded(self, blob: Blob, prepare: Callable[[str, np.ndarray], T]) -> T:
        """Return what `prepare` makes of a picture's sha256 and pixels. Nothing else refers to the pixels."""
        with self._pixels.reserve(read_header(blob.data, self._limits).pixels):
            return prepare(blob.sha256, load_bytes(blob.data, self._limits).array())


def picture_key(sha256: str, token_digest: str | None) -> str:
    """Return the key by which sessions share a picture's features and prefix: only sessions of the same token do.

    Otherwise the time of an open would tell a caller whether another caller has shown the same picture.
    """
    return sha256 if token_digest is None else hashlib.sha256(f"{token_digest} {sha256}".encode()).hexdigest()


def _read(source: PictureSource, limits: MediaLimits, fetch: Callable[[str, MediaLimits], bytes]) -> bytes:
    if source.image is not None:
        return read_base64(source.image, limits)
    return read_path(source.path or "", limits, fetch)
