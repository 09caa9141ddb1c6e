"""Read the headers of clips and sample their frames, in a child process. The content decides the format. Thread-safe.

MP4, MOV, WebM and Matroska, with H.264, HEVC, VP8, VP9, AV1 or MPEG-4. FFmpeg (PyAV) runs in `clip_child` with limits on
memory, CPU time and wall time, so that a hostile file can neither end the worker nor fill its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..config import MediaLimits


@dataclass(frozen=True)
class ClipHeader:
    """What a clip's file holds: its format, the size of a frame, the seconds that it is shown, and its frames.

    `width` and `height` are pixels of an upright frame of square pixels. Frames of a clip whose size changes may differ.
    """

    format: str  # MP4, MOV, WEBM or MATROSKA
    width: int
    height: int
    seconds: float
    frames: int  # of the file; at most so many can be sampled

    @property
    def pixels(self) -> int:
        """The number of pixels of one frame."""
        return self.width * self.height


def is_clip(data: bytes) -> bool:
    """Return whether `data` begins as MP4, MOV, WebM or Matroska. Reads a few bytes; never raises.

    Pictures in such a container (HEIC, AVIF) are not clips.
    """
    raise NotImplementedError


def read_clip_header(data: bytes, limits: MediaLimits) -> ClipHeader:
    """Return what the file in `data` holds, without decoding it. Raise `MediaError`.

    All limits on clips are checked here: bytes, seconds, frames, pixels of a frame. Block for at most
    `limits.clip_timeout_s` seconds after a child process is free (`MAX_CHILDREN`).
    """
    raise NotImplementedError


def clip_frames(data: bytes, limits: MediaLimits, count: int) -> Iterator[np.ndarray]:
    """Yield at most `count` frames, evenly spaced: uint8 `[height, width, 3]`, RGB, upright, opaque, of square pixels.

    Frame k is the one that is shown in the middle of the k-th of `count` equal parts of the clip's time. A frame that is
    shown in several of them is yielded once, so a clip with fewer frames yields fewer. The frames depend on the file and
    on `count` only: a rebuild decodes the same ones.

    One frame at a time is in memory here. The caller holds its pixels in the budget while it iterates, as for a
    picture: `with budget.reserve(header.pixels): for frame in clip_frames(...)`. Close the iterator, or exhaust it: its
    child process ends with it. Raise `MediaError`, also after some frames: then none of them may be used.
    """
    raise NotImplementedError
