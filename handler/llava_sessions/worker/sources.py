"""The pictures and clips that the messages of a request bring: where each of them is. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..media.sources import is_remote
from ..protocol.openai import Chat, ChatMessage
from ..protocol.requests import Ask, ClipSource, Open, PastTurn, PictureSource


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
