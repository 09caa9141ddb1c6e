"""A request's pictures: read, checked by their headers, then decoded and prepared one after another. Thread-safe."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ..chat.transcript import Blob, BlobPool
from ..config import MediaLimits
from ..ipc.messages import PreparedPicture
from ..media.budget import PixelBudget
from ..media.decoder import load_bytes, read_header
from ..media.limits import check_request_pixels
from ..media.sources import read_base64, read_path
from ..protocol.requests import PictureSource
from ..text.pictures import PicturePreparer, Prepared, joined

T = TypeVar("T")
Fetch = Callable[[str, MediaLimits], bytes]


# Characters of the tokens of pictures that are remembered: about 1,000 pictures of 2,880 tokens.
_KNOWN_CHARS = 20_000_000
_KNOWN_TEXTS = 10_000


class _KnownPictures:
    """Pictures that were prepared before, without their arrays: their keys and tokens. Thread-safe.

    A picture that arrives as the same text again is found by the digest of the text: that takes a sixth of the time of
    decoding base64.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, bool], Prepared] = OrderedDict()  # by key, and whether it is alone
        self._chars = 0
        self._by_text: OrderedDict[bytes, str] = OrderedDict()  # sha256 of a data URL: sha256 of its picture
        self._lock = threading.Lock()

    def sha256_of(self, text: bytes) -> str | None:
        """Return the sha256 of the picture that the text with this digest encodes, or None if it is not known."""
        with self._lock:
            return self._by_text.get(text)

    def add_text(self, text: bytes, sha256: str) -> None:
        """Remember the picture of a text by its digest."""
        with self._lock:
            self._by_text[text] = sha256
            self._by_text.move_to_end(text)
            while len(self._by_text) > _KNOWN_TEXTS:
                self._by_text.popitem(last=False)

    def get(self, key: str, alone: bool) -> Prepared | None:
        """Return a picture without arrays, or None if it is not known."""
        with self._lock:
            found = self._known.get((key, alone))
            if found is not None:
                self._known.move_to_end((key, alone))
            return found

    def add(self, key: str, alone: bool, prepared: Prepared) -> None:
        """Remember a prepared picture."""
        pictures = tuple(PreparedPicture(picture.key, {}) for picture in prepared.pictures)
        with self._lock:
            if (key, alone) in self._known:
                return
            self._known[key, alone] = replace(prepared, pictures=pictures)
            self._chars += _chars(prepared)
            while self._chars > _KNOWN_CHARS:
                self._chars -= _chars(self._known.popitem(last=False)[1])


def _chars(prepared: Prepared) -> int:
    return sum(len(tokens) for tokens in prepared.tokens)


class PictureLoader:
    """Loads pictures. All threads together decode at most the pixels of one picture of the largest size."""

    def __init__(self, pictures: PicturePreparer, limits: MediaLimits, blobs: BlobPool, fetch: Fetch) -> None:
        """`fetch` reads https and s3 sources."""
        self._pictures = pictures
        self._limits = limits
        self._blobs = blobs
        self._fetch = fetch
        self._pixels = PixelBudget(limits.max_pixels)
        self._known = _KnownPictures()

    def load(self, sources: tuple[PictureSource, ...]) -> tuple[Blob, ...]:
        """Return the encoded pictures of a request. Raise `MediaError` unless all headers are within the limits."""
        blobs = tuple(self._blobs.get(_read(source, self._limits, self._fetch)) for source in sources)
        check_request_pixels(sum(read_header(blob.data, self._limits).pixels for blob in blobs), self._limits)
        return blobs

    def load_conversation(
        self, messages: Sequence[tuple[PictureSource, ...]], scope: str | None
    ) -> tuple[tuple[Blob, ...], ...]:
        """Return the encoded pictures of each message. The limit on pixels is for those that were not prepared before.

        Raise `MediaError`.
        """
        groups = tuple(tuple(self._load_again(one) for one in group) for group in messages)
        new = {
            blob.sha256: read_header(blob.data, self._limits).pixels
            for group in groups
            for blob in group
            if self._known.get(picture_key(blob.sha256, scope), len(group) == 1) is None
        }
        check_request_pixels(sum(new.values()), self._limits)
        return groups

    def known(self, sources: tuple[PictureSource, ...], scope: str | None) -> Prepared | None:
        """Return the pictures of one message without arrays and unread, or None unless all were prepared before."""
        parts = []
        for source in sources:
            text = _text_digest(source)
            sha256 = None if text is None else self._known.sha256_of(text)
            prepared = None if sha256 is None else self._known.get(picture_key(sha256, scope), len(sources) == 1)
            if prepared is None:
                return None
            parts.append(prepared)
        return joined(parts)

    def _load_again(self, source: PictureSource) -> Blob:
        """Read a picture that its client may send again."""
        blob = self._blobs.get(_read(source, self._limits, self._fetch))
        text = _text_digest(source)
        if text is not None:
            self._known.add_text(text, blob.sha256)
        return blob

    def prepare(self, blobs: tuple[Blob, ...], scope: str | None, with_arrays: bool = True) -> Prepared:
        """Prepare the pictures of one message. `scope`: as in `picture_key`.

        Without `with_arrays`, pictures that were prepared before are not decoded again, and have no arrays.
        """
        alone = len(blobs) == 1

        def prepare(sha256: str, pixels: np.ndarray) -> Prepared:
            key = picture_key(sha256, scope)
            prepared = self._pictures.picture(key, pixels, len(blobs))
            self._known.add(key, alone, prepared)
            return prepared

        def known(blob: Blob) -> Prepared | None:
            return None if with_arrays else self._known.get(picture_key(blob.sha256, scope), alone)

        return joined(known(blob) or self._with_decoded(blob, prepare) for blob in blobs)

    def prepare_clip(self, blobs: tuple[Blob, ...], scope: str | None) -> Prepared:
        """Prepare the frames of a clip. `scope`: as in `picture_key`."""
        pictures = self._pictures
        frames = [self._with_decoded(blob, lambda _, pixels: pictures.frame(pixels)) for blob in blobs]
        clip_key = hashlib.sha256(" ".join(picture_key(blob.sha256, scope) for blob in blobs).encode()).hexdigest()
        return pictures.clip(clip_key, frames)

    def _with_decoded(self, blob: Blob, prepare: Callable[[str, np.ndarray], T]) -> T:
        """Return what `prepare` makes of a picture's sha256 and pixels. Nothing else refers to the pixels."""
        with self._pixels.reserve(read_header(blob.data, self._limits).pixels):
            return prepare(blob.sha256, load_bytes(blob.data, self._limits).array())


def picture_key(sha256: str, scope: str | None) -> str:
    """Return the key by which sessions share a picture's features and prefix: only sessions of the same scope do.

    The scope is the digest of the session's token. Otherwise the time of an open would show a caller whether another
    caller has shown the same picture.
    """
    return sha256 if scope is None else hashlib.sha256(f"{scope} {sha256}".encode()).hexdigest()


def _text_digest(source: PictureSource) -> bytes | None:
    """Return the sha256 of a picture's text, or None for a picture that is elsewhere, whose bytes may change."""
    text = source.image if source.image is not None else source.path
    if text is None or (source.image is None and text[:5].lower() != "data:"):
        return None
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _read(source: PictureSource, limits: MediaLimits, fetch: Callable[[str, MediaLimits], bytes]) -> bytes:
    if source.image is not None:
        return read_base64(source.image, limits)
    return read_path(source.path or "", limits, fetch)
