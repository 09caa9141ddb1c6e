"""The pictures and clips that a request brings: where they are, and how they are read. Thread-safe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from ..config import MediaLimits
from ..media.limits import clip_file_limits
from ..media.sources import is_remote, read_base64, read_path
from ..protocol.openai import Chat, ChatMessage
from ..protocol.requests import Ask, ClipSource, Open, PastTurn, PictureSource

Fetch = Callable[[str, MediaLimits], bytes]


@dataclass(frozen=True)
class MediaSources:
    """The pictures and clips of one message. The pictures precede the clips in the prompt."""

    pictures: tuple[PictureSource, ...] = ()
    clips: tuple[ClipSource, ...] = ()

    def __bool__(self) -> bool:
        """Whether the message shows a picture or a clip."""
        return bool(self.pictures or self.clips)

    @property
    def are_any_remote(self) -> bool:
        """Whether any of them is read over the network."""
        files = (source for clip in self.clips for source in clip.sources)
        return any(source.path is not None and is_remote(source.path) for source in (*self.pictures, *files))

    @property
    def have_file(self) -> bool:
        """Whether a clip is a file, which takes seconds to decode."""
        return any(clip.file is not None for clip in self.clips)


def sources_of(message: Open | Ask | PastTurn | ChatMessage) -> MediaSources:
    """Return the media of one message, or of an opening without its history."""
    if isinstance(message, ChatMessage):
        return MediaSources(message.pictures, message.clips)
    return MediaSources(message.pictures, () if message.clip is None else (message.clip,))


def all_sources(request: Open | Ask | Chat) -> MediaSources:
    """Return the media of all messages of a request."""
    if isinstance(request, Chat):
        parts = [sources_of(message) for message in request.messages]
    elif isinstance(request, Open):
        parts = [sources_of(request), *(sources_of(turn) for turn in request.history)]
    else:
        parts = [sources_of(request)]
    return joined_sources(*parts)


def joined_sources(*parts: MediaSources) -> MediaSources:
    """Return the media of several messages as those of one."""
    pictures = tuple(picture for part in parts for picture in part.pictures)
    return MediaSources(pictures, tuple(clip for part in parts for clip in part.clips))


def text_digest(source: PictureSource) -> bytes | None:
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
