"""Small clips for tests, written by PyAV: each frame shows its number as a level of grey, and a red corner.

Unlike `llava_sessions.media`, this runs FFmpeg in the process of the tests: on files of their own only.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

os.environ.setdefault("SVT_LOG", "-1")  # the encoder of AV1 writes to stderr

import av
import numpy as np

RATE = 25
_LEVEL_STEP = 9
_LEVEL_OF_0 = 20
_QUIET = {"libx265": {"x265-params": "log-level=none"}}


@dataclass(frozen=True)
class ClipSpec:
    """What to write. `times`: of the frames, in units of 1/`rate` seconds; 0, 1, 2 ... if empty."""

    frames: int = 25
    codec: str = "libx264"
    container: str = "mp4"
    width: int = 64
    height: int = 48
    pixels: str = "yuv420p"
    rate: int = RATE
    times: Sequence[int] = ()
    options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    rotation: int | None = None  # degrees counter-clockwise
    mirrored: bool = False
    pixel_ratio: Fraction | None = None
    is_still: bool = False  # all frames are equal


def clip(spec: ClipSpec | None = None, **fields: object) -> bytes:
    """Return a clip as a file."""
    spec = spec or ClipSpec(**fields)  # type: ignore[arg-type]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=spec.container, options=spec.container_options) as container:
        stream = container.add_stream(
            spec.codec, rate=spec.rate, options={**_QUIET.get(spec.codec, {}), **spec.options}
        )
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, spec.pixels
        stream.time_base = Fraction(1, spec.rate)
        if spec.pixel_ratio is not None:
            stream.codec_context.sample_aspect_ratio = spec.pixel_ratio
        if spec.rotation is not None or spec.mirrored:
            stream.set_display_rotation(spec.rotation or 0, hflip=spec.mirrored)
        for frame in video_frames(spec):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def video_frames(spec: ClipSpec) -> Iterator[av.VideoFrame]:
    """Yield the frames of a clip with their times."""
    for number in range(spec.frames):
        shown = picture(0 if spec.is_still else number, spec.width, spec.height)
        frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
        frame = frame.reformat(format=spec.pixels)
        frame.pts = spec.times[number] if spec.times else number
        frame.time_base = Fraction(1, spec.rate)
        yield frame


def picture(number: int, width: int, height: int) -> np.ndarray:
    """Return the picture of a frame: grey, the quarter at the upper left red."""
    pixels = np.full((height, width, 3), _LEVEL_OF_0 + _LEVEL_STEP * (number % 25), np.uint8)
    pixels[: height // 2, : width // 2] = (200, 0, 0)
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """Return the number of a frame, modulo 25, whatever its orientation: by the median of its grey pixels."""
    colours = pixels.reshape(-1, 3).astype(int)
    grey = colours[np.ptp(colours, axis=1) < 30]
    return round((float(np.median(grey)) - _LEVEL_OF_0) / _LEVEL_STEP)


def red_corner(pixels: np.ndarray) -> tuple[str, str]:
    """Return where the red quarter is: ("upper" or "lower", "left" or "right")."""
    redness = pixels[..., 0].astype(int) - pixels[..., 1]
    height, width = redness.shape
    rows, columns = redness[:, [width // 8, -width // 8]].max(1), redness[[height // 8, -height // 8]].max(0)
    return (
        "upper" if rows[: height // 4].mean() > rows[-height // 4 :].mean() else "lower",
        "left" if columns[: width // 4].mean() > columns[-width // 4 :].mean() else "right",
    )


def sound(container: str, codec: str) -> bytes:
    """Return a file with a tenth of a second of silence and no video."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4_800), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        frame.pts = 0
        resampled = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=48_000).resample(frame)
        for one in resampled:
            file.mux(stream.encode(one))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start of the content, end) of the MP4 boxes in a part of a file."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        size = size or end - start
        yield kind, start + 8, start + size
        start += size


def box_at(data: bytes, path: str) -> tuple[int, int]:
    """Return the start and end of the content of a box such as "moov/trak/tkhd"."""
    start, end = 0, len(data)
    for kind in path.split("/"):
        _, start, end = next(found for found in boxes(data, start, end) if found[0] == kind.encode())
    return start, end


def box(kind: str, *parts: bytes) -> bytes:
    """Return an MP4 box."""
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind.encode("latin-1") + content


def with_box(data: bytes, path: str, content: bytes) -> bytes:
    """Return an MP4 file whose box at `path` has another content. Boxes behind it move: the data must precede it."""

    def rebuilt(start: int, end: int, names: list[str]) -> bytes:
        parts = []
        for kind, first, last in boxes(data, start, end):
            inner = data[first:last]
            if kind == names[0].encode():
                inner = rebuilt(first, last, names[1:]) if names[1:] else content
            parts.append(box(kind.decode("latin-1"), inner))
        return b"".join(parts)

    return rebuilt(0, len(data), path.split("/"))


def with_header_first(data: bytes) -> bytes:
    """Return an MP4 file whose header precedes its data."""
    start, end = box_at(data, "moov")
    first_data = next(first for kind, first, _ in boxes(data) if kind == b"mdat") - 8
    path = "moov/trak/mdia/minf/stbl/stco"
    offsets, offsets_end = box_at(data, path)
    entries = [entry + end - start + 8 for (entry,) in struct.iter_unpack(">I", data[offsets + 8 : offsets_end])]
    moved = with_box(data, path, data[offsets : offsets + 8] + struct.pack(f">{len(entries)}I", *entries))
    return moved[:first_data] + moved[start - 8 : end] + moved[first_data : start - 8]
