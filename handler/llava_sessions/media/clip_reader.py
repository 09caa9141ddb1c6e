"""Open the file of a clip with FFmpeg and decode chosen frames of it. Runs in `clip_child` only: FFmpeg may crash.

Uses the standard library and PyAV only, so that a child starts quickly.
"""

from __future__ import annotations

import io
import math
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import NoReturn

import av
import av.subtitles.codeccontext  # PyAV imports both when it opens a container, and then no file can be opened
import av.subtitles.stream
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

TOO_LARGE = "too_large"
UNSUPPORTED_MEDIA = "unsupported_media"

# Names of FFmpeg's demuxers by the format of a clip. Each reads one family of formats and has no protocol.
_MOV = "mov,mp4,m4a,3gp,3g2,mj2"
_MATROSKA = "matroska,webm"
_DEMUXERS = {"MP4": _MOV, "MOV": _MOV, "WEBM": _MATROSKA, "MATROSKA": _MATROSKA}
# Names of FFmpeg's codecs, and the decoders that may run for them.
_CODECS = {"h264": "H.264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9", "av1": "AV1", "mpeg4": "MPEG-4"}
_DECODERS = "h264,hevc,vp8,vp9,libdav1d,mpeg4,libvpx,libvpx-vp9"
# FFmpeg's own decoders of VP8 and VP9 ignore the plane of alpha.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Codecs that mark frames to which no other frame refers.
_WITH_NON_REFERENCE_FRAMES = ("h264", "hevc")
_MAX_STREAMS = 64
_READ_BYTES = 2**16
# The packets of a track may hold more bytes than the file: Matroska removes equal beginnings of frames.
_PACKET_OVERHEAD_BYTES = 64


@dataclass(frozen=True)
class ReadLimits:
    """The format of a clip, as in `clips.ClipHeader`, and the limits of `MediaLimits` that are checked here."""

    format: str
    max_seconds: float
    max_pixels: int  # of a frame
    max_frames: int
    max_aspect: float


class Rejected(Exception):
    """A clip that is not decoded: an error code, and a message for the client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


class DamagedError(Exception):
    """Data that contradicts itself or is cut off."""


def opened(data: bytes, limits: ReadLimits) -> InputContainer:
    """Open the container. Only the demuxer of the format and the allowed decoders can run. Raises PyAV's errors."""
    demuxer = _DEMUXERS[limits.format]
    options = {
        "codec_whitelist": _DECODERS,
        "format_whitelist": demuxer,
        "protocol_whitelist": "",
        "max_streams": str(_MAX_STREAMS),
        "threads": "1",
    }
    return av.open(
        io.BytesIO(data),
        mode="r",
        format=demuxer,
        options=options,
        metadata_errors="replace",
        buffer_size=_READ_BYTES,
        io_open=_open_nothing,
    )


def _open_nothing(*_: object) -> NoReturn:
    raise Rejected(UNSUPPORTED_MEDIA, "the clip must be one file, got one that refers to other files")


def video_stream(container: InputContainer) -> VideoStream:
    """Return the video track that is shown by default, else the first one. Cover pictures are not video.

    Packets of other tracks are not read. Raise `Rejected` if there is no such track, or none with an allowed codec;
    `DamagedError` if there is no track at all.
    """
    if not container.streams:
        raise DamagedError
    hidden = Disposition.attached_pic | Disposition.timed_thumbnails
    tracks = [stream for stream in container.streams.video if not stream.disposition & hidden]
    if not tracks:
        got = "sound only" if container.streams.audio else "none"
        raise Rejected(UNSUPPORTED_MEDIA, f"the clip must have a video track, got {got}")
    known = [stream for stream in tracks if stream.codec_context is not None and _codec(stream) in _CODECS]
    if not known:
        names = " or ".join(", ".join(_CODECS.values()).rsplit(", ", 1))
        raise Rejected(UNSUPPORTED_MEDIA, f"the clip's video must be {names}, got another codec")
    chosen = next((stream for stream in known if stream.disposition & Disposition.default), known[0])
    for stream in container.streams:
        if stream.index != chosen.index:
            stream.discard = Discard.all
    return chosen


def _codec(stream: VideoStream) -> str:
    return stream.codec_context.codec.canonical_name


@dataclass(frozen=True)
class Clip:
    """The packets of the video track in the order of decoding, and its time line in units of the track's time base.

    The time line is computed from the packets: a declared duration may be missing or wrong. `times`: when frames
    appear, ascending. `end`: when the last frame disappears.
    """

    packets: list[Packet[VideoStream]]
    times: list[int]
    end: int
    seconds: float

    @classmethod
    def read(cls, container: InputContainer, stream: VideoStream, data: bytes, limits: ReadLimits) -> Clip:
        """Read all packets of the track; none is decoded. They hold at most about the bytes of the file.

        Raise `Rejected` or `DamagedError`.
        """
        check_frames(len(stream.index_entries), limits)
        packets: list[Packet[VideoStream]] = []
        left_bytes = len(data)
        for packet in container.demux(stream):
            if not packet.size:  # a decoder takes it as the end
                continue
            left_bytes += _PACKET_OVERHEAD_BYTES - packet.size
            if packet.is_corrupt or left_bytes < 0 or packet.pts is None:
                raise DamagedError
            packets.append(packet)
            check_frames(len(packets), limits)
        if any(entry.pos + entry.size > len(data) for entry in stream.index_entries):
            raise DamagedError
        times, end = _time_line(packets)
        seconds = float((end - times[0]) * (stream.time_base or 0))
        if seconds > limits.max_seconds:
            raise Rejected(TOO_LARGE, f"the clip must be at most {limits.max_seconds:g} s long, got {seconds:.1f} s")
        return cls(packets, times, end, seconds)

    def sampled_times(self, count: int) -> list[int]:
        """Return when the frames appear that are shown in the middle of each of `count` equal parts, each once."""
        start = self.times[0]
        length = self.end - start
        middles = (start + (2 * part + 1) * length // (2 * count) for part in range(count))
        return sorted({self.times[bisect_right(self.times, middle) - 1] for middle in middles})


def _time_line(packets: list[Packet[VideoStream]]) -> tuple[list[int], int]:
    """Return when frames appear, ascending, and when the last one disappears."""
    shown = [packet for packet in packets if not packet.is_discard]
    if not shown:
        raise DamagedError
    times = sorted({packet.pts or 0 for packet in shown})
    end = max((packet.pts or 0) + max(packet.duration or 0, 0) for packet in shown)
    if end == times[-1] and len(times) > 1:  # the last one has no duration: the mean of the others
        end += (times[-1] - times[0]) // (len(times) - 1)
    return times, end


_BOXES_OF_CLIPS = (b"moov", b"moof", b"mdat")
_SEGMENT = b"\x18\x53\x80\x67"


def check_complete(data: bytes, limits: ReadLimits) -> None:
    """Raise `DamagedError` if the end of a file is missing. FFmpeg would read the rest as a shorter clip.

    A recording that is not finished, which has no length, is complete at any end of a block.
    """
    end = _segment_end(data) if _DEMUXERS[limits.format] == _MATROSKA else _boxes_end(data)
    if end > len(data):
        raise DamagedError


def _boxes_end(data: bytes) -> int:
    """Return where the boxes of an MP4 file end. Layout: ISO/IEC 14496-12, 4.2."""
    start = 0
    while start + 16 <= len(data):
        size, kind, large_size = struct.unpack_from(">I4sQ", data, start)
        if size == 1:
            size = large_size
        elif size == 0:  # to the end of the file
            break
        if start + size > len(data):
            return start + size if kind in _BOXES_OF_CLIPS else 0  # others behind the clip are not its data
        start += max(size, 8)
    return 0


def _segment_end(data: bytes) -> int:
    """Return where the first segment of a Matroska file ends, 0 if its size is not written. Layout: RFC 8794."""
    header_bytes, header_start = _vint(data, 4)
    segment = header_start + header_bytes
    if data[segment : segment + 4] != _SEGMENT:
        return 0
    size, start = _vint(data, segment + 4)
    return start + size if size else 0


def _vint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number at `position`, 0 if it is "unknown", and the position behind it."""
    length = 9 - data[position].bit_length()
    number = int.from_bytes(data[position : position + length], "big") & (1 << 7 * length) - 1
    return 0 if number == (1 << 7 * length) - 1 else number, position + length


def check_frames(count: int, limits: ReadLimits) -> None:
    """Raise `Rejected` if a file has more frames than allowed."""
    if count > limits.max_frames:
        raise Rejected(TOO_LARGE, f"the clip must have at most {limits.max_frames} frames, got more")


def check_pixels(width: int, height: int, limits: ReadLimits) -> None:
    """Raise `Rejected` or `DamagedError` unless a frame of this size is allowed."""
    if width < 1 or height < 1:
        raise DamagedError
    if width * height > limits.max_pixels:
        most = limits.max_pixels
        raise Rejected(TOO_LARGE, f"a frame of the clip must have at most {most} pixels, got {width} x {height}")
    if max(width, height) > limits.max_aspect * min(width, height):
        most_aspect = f"an aspect ratio of at most {limits.max_aspect:g}:1"
        raise Rejected(TOO_LARGE, f"a frame of the clip must have {most_aspect}, got {width} x {height}")


# Of a sample aspect ratio. Encoders write ratios such as 405:404 for sizes that they rounded.
_SQUARE = (Fraction(98, 100), Fraction(102, 100))


def square_size(width: int, height: int, stream: VideoStream) -> tuple[int, int]:
    """Return the size of a frame with square pixels. The side that is too short grows."""
    ratio = stream.sample_aspect_ratio
    if ratio is None or ratio <= 0 or _SQUARE[0] <= ratio <= _SQUARE[1]:
        return width, height
    return (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))


def decoder_of(stream: VideoStream) -> VideoCodecContext:
    """Return the decoder of a track, with one thread: the file's bytes bound its work."""
    decoder = stream.codec_context
    alpha_decoder = _ALPHA_DECODERS.get(_codec(stream))
    if alpha_decoder is not None and stream.metadata.get("alpha_mode") == "1":
        with_alpha = av.CodecContext.create(alpha_decoder, "r")
        decoder = with_alpha if isinstance(with_alpha, VideoCodecContext) else decoder
    decoder.flags |= av.codec.context.Flags.bitexact
    decoder.thread_count = 1
    return decoder


class Sampler:
    """Decodes the frames of chosen times: each from the last key frame before it, or on from the last chosen one."""

    def __init__(self, clip: Clip, decoder: VideoCodecContext, count: int) -> None:
        """`count`: frames to choose, as in `Clip.sampled_times`."""
        self._clip = clip
        self._decoder = decoder
        self._chosen = clip.sampled_times(count)
        keys = sorted((packet.pts or 0, index) for index, packet in enumerate(clip.packets) if packet.is_keyframe)
        self._key_times = [time for time, _ in keys]
        self._keys = list(accumulate((index for _, index in keys), max))  # the last one that appears at each of them
        self._frames: Iterator[VideoFrame] = iter(())
        self._next = 0  # packet that is decoded next
        self._held: VideoFrame | None = None  # decoded, and later than the last chosen frame

    def frames(self) -> Iterator[VideoFrame]:
        """Yield the chosen frames. Raise `DamagedError` or PyAV's errors."""
        last: int | None = None
        for time in self._chosen:
            frame = self._frame(time)
            if frame.pts != last:
                last = frame.pts
                yield frame

    def _frame(self, time: int) -> VideoFrame:
        """Return the frame that is shown at `time`."""
        starts = [0, *self._keys[: bisect_right(self._key_times, time)]]
        if starts[-1] >= self._next:
            self._restart(starts[-1], skips=True)
        frame = self._advance(time)
        if frame is not None and frame.pts == time:
            return frame
        # The file's marks of key frames are wrong, or its codec has packets that are not shown. Decode all frames, from
        # earlier key frames if necessary. The distance doubles: a file of wrong marks must not cost a pass for each.
        back = 1
        while True:
            self._restart(starts[max(len(starts) - back, 0)], skips=False)
            frame = self._advance(time)
            if frame is not None:
                return frame
            if back >= len(starts):
                break
            back *= 2
        if self._held is None:
            raise DamagedError
        return self._held  # the first frame that can be decoded

    def _restart(self, index: int, *, skips: bool) -> None:
        """Decode from packet `index` on. `skips`: without frames to which nothing refers and that are not chosen."""
        self._decoder.flush_buffers()
        self._held = None
        self._next = index
        self._frames = self._decoded(skips and self._decoder.codec.canonical_name in _WITH_NON_REFERENCE_FRAMES)

    def _advance(self, time: int) -> VideoFrame | None:
        """Return the last frame that appears at `time` or before, from here on. Hold the first one after it."""
        found: VideoFrame | None = None
        while True:
            frame = self._held or next(self._frames, None)
            self._held = None
            if frame is None:
                break
            if frame.pts is None:
                raise DamagedError
            if frame.pts > time:
                self._held = frame
                break
            found = frame
            if frame.pts == time:
                break
        if found is not None and found.is_corrupt:
            raise DamagedError
        return found

    def _decoded(self, skips: bool) -> Iterator[VideoFrame]:
        """Yield frames in the order of their times."""
        chosen = frozenset(self._chosen)
        while self._next < len(self._clip.packets):
            packet = self._clip.packets[self._next]
            self._next += 1
            self._decoder.skip_frame = "NONREF" if skips and packet.pts not in chosen else "DEFAULT"
            yield from self._decoder.decode(packet)
        yield from self._decoder.decode(None)


def display_matrix(frame: VideoFrame) -> list[int] | None:
    """Return the elements a, b, c and d of the matrix that turns a frame upright, or None. Units: 1/65536."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # the frame has side data of a type that PyAV does not know: the rotation without mirroring
        angle = math.radians(frame.rotation)
        cosine, sine = round(65536 * math.cos(angle)), round(65536 * math.sin(angle))
        return [cosine, -sine, sine, cosine]
    if not isinstance(matrix, SideData):
        return None
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    return [a, b, c, d]
