"""Read the pictures and clips of requests: their encoded bytes, and the pixels that headers declare. Thread-safe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from ..chat.media import MessageMedia, StoredClip
from ..chat.transcript import Blob, BlobPool
from ..config import MediaLimits
from ..media.clips import ClipHeader, read_clip_header
from ..media.decoder import read_header
from ..media.limits import clip_file_limits
from ..media.sources import read_base64, read_path
from ..protocol.requests import ClipSource, PictureSource
from .known_media import KnownMedia, picture_key
from .sources import MediaSources

Fetch = Callable[[str, MediaLimits], bytes]
_Read = Callable[[PictureSource, MediaLimits, Fetch], bytes]


class MediaReader:
    """Reads media into the pool of blobs, and notes which text each of them was."""

    def __init__(self, limits: MediaLimits, blobs: BlobPool, fetch: Fetch, known: KnownMedia) -> None:
        """`fetch` reads https and s3 sources. `known` keeps the texts and the headers."""
        self._limits = limits
        self._blobs = blobs
        self._fetch = fetch
        self._known = known

    def read(self, sources: MediaSources, is_repeated: bool = False) -> MessageMedia:
        """Return the encoded media of one message. `is_repeated`: the client may send it again. Raise `MediaError`."""
        pictures = tuple(self._read_one(source, read_picture, is_repeated) for source in sources.pictures)
        return MessageMedia(pictures, tuple(self._read_clip(clip, is_repeated) for clip in sources.clips))

    def known_hashes(self, sources: Iterable[PictureSource]) -> list[str] | None:
        """Return the sha256 of each picture or file, unread, or None unless all were read before as the same text."""
        found = []
        for source in sources:
            text = _text_digest(source)
            sha256 = None if text is None else self._known.sha256_of(text)
            if sha256 is None:
                return None
            found.append(sha256)
        return found

    def pixels_of_picture(self, blob: Blob) -> int:
        """Return the pixels that a picture's header declares. Raise `MediaError`."""
        return read_header(blob.data, self._limits).pixels

    def pixels_of_clip(self, clip: StoredClip, scope: str | None) -> int:
        """Return the pixels of the shown frames of a clip. `scope`: as in `picture_key`. Raise `MediaError`."""
        if not clip.frames:
            return sum(self.pixels_of_picture(blob) for blob in clip.blobs)
        header = self.header_of_file(clip, scope)
        return header.pixels * min(clip.frames, header.frames)

    def header_of_file(self, clip: StoredClip, scope: str | None) -> ClipHeader:
        """Return the header of a clip that is a file. `scope`: as in `picture_key`. Raise `MediaError`."""
        (blob,) = clip.blobs
        return self._known.header_of(picture_key(blob.sha256, scope), lambda: read_clip_header(blob.data, self._limits))

    def _read_clip(self, clip: ClipSource, is_repeated: bool) -> StoredClip:
        read = read_picture if clip.file is None else read_clip
        return StoredClip(tuple(self._read_one(one, read, is_repeated) for one in clip.sources), clip.count or 0)

    def _read_one(self, source: PictureSource, read: _Read, is_repeated: bool) -> Blob:
        blob = self._blobs.get(read(source, self._limits, self._fetch))
        text = _text_digest(source) if is_repeated else None
        if text is not None:
            self._known.add_text(text, blob.sha256)
        return blob


def _text_digest(source: PictureSource) -> bytes | None:
    """Return the sha256 of a picture's text, or None for a picture that is elsewhere, whose bytes may change."""
    text = source.image if source.image is not None else source.path
    if text is None or (source.image is None and text[:5].lower() != "data:"):
        return None
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def read_picture(source: PictureSource, limits: MediaLimits, fetch: Fetch) -> bytes:
    """Return the encoded bytes of a picture. Raise `MediaError`."""
    if source.image is not None:
        return read_base64(source.image, limits)
    return read_path(source.path or "", limits, fetch)


def read_clip(source: PictureSource, limits: MediaLimits, fetch: Fetch) -> bytes:
    """Return the encoded bytes of a clip's file. Raise `MediaError`."""
    return read_picture(source, clip_file_limits(limits), fetch)
