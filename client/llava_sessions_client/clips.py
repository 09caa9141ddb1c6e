"""Clips: from whatever the caller has to a video file, or frames, in a request."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from . import sources
from .errors import InvalidClip
from .pictures import Picture, PictureSource, load_pictures, read_file

_FILE_HEAD = "data:video/mp4;base64,"  # the server detects the format by the content
_FRAMES_HEAD = "data:video/jpeg;base64,"


@dataclass(frozen=True)
class Clip:
    """A clip: the bytes of a video `file`, or its `frames` in their order.

    `sampled_frames`: the most frames that the server samples from the file; None for its default. `name` is for people.
    """

    file: bytes = b""
    frames: tuple[Picture, ...] = ()
    sampled_frames: int | None = None
    name: str = "clip"

    @cached_property
    def data_url(self) -> str:
        """The clip as the URL of a `video_url`."""
        if self.frames:
            return _FRAMES_HEAD + ",".join(frame.base64 for frame in self.frames)
        return _FILE_HEAD + base64.b64encode(self.file).decode()

    @property
    def video(self) -> str | list[str]:
        """The clip as the `video` field of a request."""
        return [frame.base64 for frame in self.frames] if self.frames else self.data_url

    @property
    def size_bytes(self) -> int:
        """The bytes of the file, or of all encoded frames."""
        return len(self.file) + sum(len(frame.data) for frame in self.frames)

    @property
    def encoded_bytes(self) -> int:
        """Length of the clip in a request."""
        return (len(self.file) + 2) // 3 * 4 + sum(frame.encoded_bytes for frame in self.frames)


VideoSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Sequence[PictureSource | Picture] | Clip


def load_clip(source: VideoSource, *, frames: int | None = None, region: str | None = None) -> Clip:
    """Return a clip. Raise `InvalidPicture`.

    A list or a tuple has the frames, each as in `load_picture`. Anything else is a video file: its bytes, a path, an
    `http://` or `https://` URL, an `s3://` URI or a data URL. URLs are fetched by this client. Files and frames stay
    byte for byte. `frames`: the most frames that the server samples from the file.
    """
    if isinstance(source, list | tuple):
        if frames is not None or not source:
            raise InvalidClip("a clip must be a video file, or one or more frames of which none is sampled")
        return Clip(frames=load_pictures(source, region=region), name=f"clip of {len(source)} frames")
    if isinstance(source, Clip):
        return source if frames is None else replace(source, sampled_frames=frames)
    if isinstance(source, bytes | bytearray | memoryview):
        return _clip(bytes(source), "the clip", frames)
    if isinstance(source, str) and sources.is_url(source):
        return _clip(sources.fetch(source, region), sources.shown(source), frames)
    if isinstance(source, str | os.PathLike):
        return _clip(read_file(Path(source)), str(source), frames)
    raise InvalidClip(f"a clip must be a path, URL, bytes or a list of frames, got {type(source).__name__}")


def load_optional_clip(source: VideoSource | None, *, frames: int | None, region: str | None) -> Clip | None:
    """Return a clip, or None without a source. Raise `InvalidPicture`."""
    if source is not None:
        return load_clip(source, frames=frames, region=region)
    if frames is not None:
        raise InvalidClip("`video_frames` must be absent without a `video`")
    return None


def _clip(data: bytes, name: str, frames: int | None) -> Clip:
    if not data:
        raise InvalidClip(f"{name} must be a video file, got 0 bytes")
    return Clip(data, sampled_frames=frames, name=name)
