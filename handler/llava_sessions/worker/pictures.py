"""A request's pictures and clips: read, checked by their headers, then decoded and prepared one after another.

Thread-safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..chat.media import MessageMedia, StoredClip
from ..chat.transcript import Blob, BlobPool
from ..config import MediaLimits
from ..media.budget import PixelBudget
from ..media.clips import MAX_CHILDREN, clip_frames
from ..media.decoder import load_bytes
from ..media.limits import TOO_LARGE, MediaError, check_request_pixels
from ..text.pictures import PicturePreparer, Prepared, joined
from .known_media import KnownMedia, KnownMedium, picture_key
from .reading import Fetch, MediaReader
from .sources import MediaSources

T = TypeVar("T")
# The prepared clips of a request, by key. A clip that several of its messages show is decoded once.
RequestClips = dict[str, KnownMedium]


class ClipChanged(Exception):
    """The file of a stored clip gives other frames than when the clip was stored, or none."""


@dataclass(frozen=True)
class LoadedMedia:
    """The media of a message: prepared, and as they are stored."""

    prepared: Prepared
    media: MessageMedia


class PictureLoader:
    """Loads pictures and clips.

    All threads together decode at most the pixels of one picture of the largest size, and hold as many of frames of
    clips' files. Of a clip, one decoded frame is in memory at a time.
    """

    def __init__(self, pictures: PicturePreparer, limits: MediaLimits, blobs: BlobPool, fetch: Fetch) -> None:
        """`fetch` reads https and s3 sources."""
        self._pictures = pictures
        self._limits = limits
        self._pixels = PixelBudget(limits.max_pixels)
        # A clip holds pixels for as long as it is decoded, up to `clip_timeout_s`: pictures must not wait for that.
        self._clip_pixels = PixelBudget(limits.max_pixels)
        # A clip that waits for a child process must not hold pixels meanwhile.
        self._clip_files = threading.BoundedSemaphore(MAX_CHILDREN)
        self._known = KnownMedia()
        self._reader = MediaReader(limits, blobs, fetch, self._known)

    def load(self, sources: MediaSources, scope: str | None) -> MessageMedia:
        """Return the encoded media of one message. `scope`: as in `picture_key`.

        Raise `MediaError` unless all headers are within the limits.
        """
        media = self._reader.read(sources)
        pixels = [self._reader.pixels_of_picture(blob) for blob in media.pictures]
        pixels += [self._reader.pixels_of_clip(clip, scope) for clip in media.clips]
        check_request_pixels(sum(pixels), self._limits)
        return media

    def load_conversation(self, messages: Iterable[MediaSources], scope: str | None) -> tuple[MessageMedia, ...]:
        """Return the encoded media of each message. The limit on pixels is for those that were not prepared before.

        Raise `MediaError`.
        """
        found = tuple(self._reader.read(sources, is_repeated=True) for sources in messages)
        new: dict[str, int] = {}
        for media in found:
            for blob in media.pictures:
                key = picture_key(blob.sha256, scope)
                if key not in new and self._known.get(key, len(media.pictures) == 1) is None:
                    new[key] = self._reader.pixels_of_picture(blob)
            for clip in media.clips:
                key = clip_key(clip, scope)
                if key not in new and self._known.get(key) is None:
                    new[key] = self._reader.pixels_of_clip(clip, scope)
        check_request_pixels(sum(new.values()), self._limits)
        return found

    def known(self, sources: MediaSources, scope: str | None) -> Prepared | None:
        """Return the media of one message without arrays and unread, or None unless all were prepared before."""
        parts = []
        for source in sources.pictures:
            hashes = self._reader.known_hashes([source])
            found = hashes and self._known.get(picture_key(hashes[0], scope), len(sources.pictures) == 1)
            if not found:
                return None
            parts.append(found.prepared)
        for clip in sources.clips:
            hashes = self._reader.known_hashes(clip.sources)
            found = hashes and self._known.get(_clip_key(hashes, clip.count or 0, scope))
            if not found:
                return None
            parts.append(found.prepared)
        return joined(parts)

    def prepare(
        self, media: MessageMedia, scope: str | None, with_arrays: bool = True, clips: RequestClips | None = None
    ) -> LoadedMedia:
        """Prepare the media of one message. `scope`: as in `picture_key`.

        Without `with_arrays`, media that were prepared before are not decoded again, and have no arrays. `clips`: those
        of this request so far, which are not decoded again; new ones are added. Raise `ClipChanged` if the file of a
        clip gives other frames than before.
        """
        clips = {} if clips is None else clips
        parts = [self._picture(blob, len(media.pictures), scope, with_arrays) for blob in media.pictures]
        shown = [self._clip(clip, scope, with_arrays, clips) for clip in media.clips]
        stored = tuple(replace(clip, digest=one.digest) for clip, one in zip(media.clips, shown, strict=True))
        prepared = joined([*parts, *(one.prepared for one in shown)])
        return LoadedMedia(prepared, replace(media, clips=stored))

    def _picture(self, blob: Blob, of: int, scope: str | None, with_arrays: bool) -> Prepared:
        """Prepare one of the `of` pictures of a message."""
        key = picture_key(blob.sha256, scope)
        found = None if with_arrays else self._known.get(key, of == 1)
        if found is not None:
            return found.prepared
        prepared = self._with_decoded(blob, lambda pixels: self._pictures.picture(key, pixels, of))
        self._known.add(key, prepared, of == 1)
        return prepared

    def _clip(self, clip: StoredClip, scope: str | None, with_arrays: bool, clips: RequestClips) -> KnownMedium:
        """Prepare a clip, and add it to those of the request."""
        key = clip_key(clip, scope)
        found = clips.get(key) or (None if with_arrays else self._known.get(key))
        if found is None:
            frames, digest = self._frames(clip, scope)
            found = KnownMedium(self._pictures.clip(key, frames), digest)
            self._known.add(key, found.prepared, digest=digest)
        clips[key] = found
        if clip.digest not in ("", found.digest):
            raise ClipChanged
        return found

    def _frames(self, clip: StoredClip, scope: str | None) -> tuple[list[np.ndarray], str]:
        """Return the prepared frames of a clip, and the digest of those of a file.

        Raise `ClipChanged` if the file was decoded before and cannot be decoded any more.
        """
        if not clip.frames:
            return [self._with_decoded(blob, self._pictures.frame) for blob in clip.blobs], ""
        try:
            return self._file_frames(clip, scope)
        except MediaError as error:
            # A limit may be lower than before, or the machine too slow at the moment: that ends no session.
            if clip.digest and error.code != TOO_LARGE:
                raise ClipChanged from error
            raise

    def _file_frames(self, clip: StoredClip, scope: str | None) -> tuple[list[np.ndarray], str]:
        """Return the prepared frames of a file, and their digest."""
        frames = []
        digest = hashlib.sha256()
        header = self._reader.header_of_file(clip, scope)
        decoded = clip_frames(clip.blobs[0].data, self._limits, clip.frames)
        with self._clip_files, self._clip_pixels.reserve(header.pixels), contextlib.closing(decoded):
            for pixels in decoded:
                digest.update(f"{pixels.shape} ".encode())
                digest.update(np.ascontiguousarray(pixels).data)
                frames.append(self._pictures.frame(pixels))
                del pixels  # before the next frame is decoded
        return frames, digest.hexdigest()

    def _with_decoded(self, blob: Blob, prepare: Callable[[np.ndarray], T]) -> T:
        """Return what `prepare` makes of a picture's pixels. Nothing else refers to the pixels."""
        with self._pixels.reserve(self._reader.pixels_of_picture(blob)):
            return prepare(load_bytes(blob.data, self._limits).array())


def clip_key(clip: StoredClip, scope: str | None) -> str:
    """Return the key of a clip, as `picture_key`. Of a file, each number of frames is another clip."""
    return _clip_key([blob.sha256 for blob in clip.blobs], clip.frames, scope)


def _clip_key(hashes: Iterable[str], frames: int, scope: str | None) -> str:
    keys = [picture_key(sha256, scope) for sha256 in hashes]
    return hashlib.sha256(" ".join([*keys, *([str(frames)] if frames else [])]).encode()).hexdigest()
