"""The pictures and clips of messages, and the flat form that a record has of them. Pure.

In a record the blobs of all messages follow one another: of each message its pictures, then its clips.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .blobs import Blob


@dataclass(frozen=True)
class StoredClip:
    """A clip: the encoded pictures that are its frames, or one encoded file.

    `frames` 0: `blobs` are the frames. Otherwise `blobs` is one file, of which so many evenly spaced frames are shown;
    fewer if the file has fewer. `digest`: sha256 (hex) of the decoded frames of a file, "" before they are decoded. A
    file that is decoded again must give the same frames.
    """

    blobs: tuple[Blob, ...]
    frames: int = 0
    digest: str = ""


@dataclass(frozen=True)
class MessageMedia:
    """The encoded pictures and clips of one message. The pictures precede the clips in the prompt."""

    pictures: tuple[Blob, ...] = ()
    clips: tuple[StoredClip, ...] = ()

    def __bool__(self) -> bool:
        """Whether the message shows a picture or a clip."""
        return bool(self.pictures or self.clips)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """All blobs, in the order of a record."""
        return (*self.pictures, *(blob for clip in self.clips for blob in clip.blobs))


@dataclass(frozen=True)
class ClipSpan:
    """A clip of a record: `blobs` blobs from index `first` on. `frames`, `digest`: as in `StoredClip`."""

    first: int
    blobs: int
    frames: int = 0
    digest: str = ""


@dataclass(frozen=True)
class RecordMedia:
    """The media of a record: all blobs, the number of blobs of each message, and which blobs are clips.

    `groups` is empty if all blobs are of one message.
    """

    pictures: tuple[Blob, ...] = ()
    groups: tuple[int, ...] = ()
    clips: tuple[ClipSpan, ...] = ()


def flattened(messages: Iterable[MessageMedia]) -> RecordMedia:
    """Return the media of messages as a record has them. Messages without media are left out."""
    shown = [message for message in messages if message]
    blobs: list[Blob] = []
    spans = []
    for message in shown:
        blobs += message.pictures
        for clip in message.clips:
            spans.append(ClipSpan(len(blobs), len(clip.blobs), clip.frames, clip.digest))
            blobs += clip.blobs
    groups = tuple(len(message.blobs) for message in shown) if len(shown) > 1 else ()
    return RecordMedia(tuple(blobs), groups, tuple(spans))


def by_message(media: RecordMedia) -> tuple[MessageMedia, ...]:
    """Return the media of each message that has some. Raise ValueError if a clip is not within one message."""
    groups = media.groups or ((len(media.pictures),) if media.pictures else ())
    spans = list(media.clips)
    found = []
    start = 0
    for count in groups:
        end = start + count
        own = [span for span in spans if start <= span.first < end]
        spans = spans[len(own) :]
        _check(own, min(end, len(media.pictures)))
        pictures = media.pictures[start : own[0].first if own else end]
        found.append(MessageMedia(pictures, tuple(_clip(span, media.pictures) for span in own)))
        start = end
    if spans:
        raise ValueError("a clip is outside its record")
    return tuple(found)


def _check(spans: Sequence[ClipSpan], end: int) -> None:
    """Raise ValueError unless the clips of a message follow one another up to `end`, and each file is one blob."""
    ends = [*(span.first for span in spans[1:]), end]
    for span, next_first in zip(spans, ends, strict=False):
        if span.blobs < 1 or span.first + span.blobs != next_first or (span.frames and span.blobs != 1):
            raise ValueError("a clip is not within its message")


def _clip(span: ClipSpan, blobs: tuple[Blob, ...]) -> StoredClip:
    return StoredClip(blobs[span.first : span.first + span.blobs], span.frames, span.digest)
