"""Decode one clip, in a process of its own that `clips` starts: python -P clip_child.py SETTINGS.

SETTINGS are the fields of `Settings` as JSON. The program writes messages into its socket: four bytes with the
length of a JSON text, the text, and for a frame its pixels row by row. It opens no file and no connection: the clip is read from a descriptor at the start.
It ends when the other end of the socket is closed. It imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

INVALID_REQUEST = "invalid_request"
TOO_LARGE = "too_large"
UNSUPPORTED_MEDIA = "unsupported_media"

NO_PYAV_STATUS = 3
try:
    import av
    import av.subtitles.codeccontext  # PyAV imports both when it opens a container, and then no file can be opened
    import av.subtitles.stream
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.reformatter import Interpolation
    from av.video.stream import VideoStream
except ImportError:
    sys.exit(NO_PYAV_STATUS)

_MOV = "mov,mp4,m4a,3gp,3g2,mj2"
_MATROSKA = "matroska,webm"
# Names of FFmpeg's demuxers. Each reads one family of formats and has no protocol.
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
# Of a sample aspect ratio. Encoders write ratios such as 405:404 for sizes that they rounded.
_SQUARE = (Fraction(98, 100), Fraction(102, 100))
# The same pixels on every CPU: a rebuild on another instance must give the same frames.
_CONVERSION = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclass(frozen=True)
class Settings:
    """What the worker asks for, and its limits. `count`: frames to sample; 0 for the header only."""

    socket_fd: int
    data_fd: int
    format: str  # as in clips.ClipHeader
    count: int
    max_seconds: float
    max_pixels: int
    max_frames: int
    max_aspect: float
    cpu_seconds: int
    memory_bytes: int


class Rejected(Exception):
    """A clip that is not decoded: an error code, and a message for the client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


class DamagedError(Exception):
    """Data that contradicts itself or is cut off."""


def main() -> None:
    """Read the clip, write its header or frames, and exit."""
    settings = Settings(**json.loads(sys.argv[1]))
    connection = socket.socket(fileno=settings.socket_fd)
    threading.Thread(target=_exit_when_closed, args=(connection,), daemon=True).start()
    with open(settings.data_fd, "rb") as file:
        data = file.read()
    _restrict(settings)
    try:
        with _client_errors(settings):
            for message, rows in _messages(data, settings):
                _send(connection, message, rows)
            _send(connection, {"end": True}, [])
    except Rejected as error:
        _send(connection, {"code": error.code, "message": error.message}, [])
    os._exit(0)  # without the destructors of a library that has read a hostile file


def _exit_when_closed(connection: socket.socket) -> NoReturn:
    """Exit when the worker closes its end or dies. Runs in a thread of its own; the worker sends nothing."""
    with contextlib.suppress(OSError):
        connection.recv(1)
    os._exit(1)


def _restrict(settings: Settings) -> None:
    """Limit this process: CPU time, memory, no new descriptors, no files, no core dump."""
    resource.setrlimit(resource.RLIMIT_CPU, (settings.cpu_seconds, settings.cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # 0, 1 and 2 are in use
    if sys.platform == "linux":  # macOS does not have this limit
        resource.setrlimit(resource.RLIMIT_AS, (settings.memory_bytes, settings.memory_bytes))


@contextlib.contextmanager
def _client_errors(settings: Settings) -> Iterator[None]:
    """Raise `Rejected` for every error that the data causes."""
    try:
        yield
    except (Rejected, BrokenPipeError):
        raise
    except MemoryError:
        message = f"the clip must be decoded in {settings.memory_bytes >> 20} MiB of memory, got one that needs more"
        raise Rejected(TOO_LARGE, message) from None
    except Exception:  # PyAV raises OSError, ValueError, EOFError and others
        message = f"the clip is damaged: its {settings.format} data cannot be decoded"
        raise Rejected(INVALID_REQUEST, message) from None


def _send(connection: socket.socket, message: dict[str, Any], rows: list[memoryview]) -> None:
    content = json.dumps(message).encode()
    connection.sendall(struct.pack(">I", len(content)) + content)
    for row in rows:
        connection.sendall(row)


def _messages(data: bytes, settings: Settings) -> Iterator[tuple[dict[str, Any], list[memoryview]]]:
    """Yield the header, then the frames with their rows."""
    with _opened(data, settings) as container:
        stream = _video_stream(container)
        clip = Clip.read(container, stream, len(data), settings)
        ratio = _pixel_ratio(stream)
        _check_pixels(stream.codec_context.width, stream.codec_context.height, settings)
        width, height = _square_size(stream.codec_context.width, stream.codec_context.height, ratio)
        _check_pixels(width, height, settings)
        yield {"width": width, "height": height, "seconds": clip.seconds, "frames": len(clip.times)}, []
        if settings.count:
            for frame in Sampler(clip, _decoder(stream, settings)).sample(settings.count):
                yield _picture(frame, ratio, settings)


def _opened(data: bytes, settings: Settings) -> av.container.InputContainer:
    """Open the container. Only the chosen demuxer and the allowed decoders can run."""
    demuxer = _DEMUXERS[settings.format]
    options = {
        "codec_whitelist": _DECODERS,
        "format_whitelist": demuxer,
        "protocol_whitelist": "",
        "max_streams": str(_MAX_STREAMS),
        "max_pixels": str(settings.max_pixels),
        "threads": "1",
    }
    return av.open(
        io.BytesIO(data),
        format=demuxer,
        options=options,
        metadata_errors="replace",
        buffer_size=_READ_BYTES,
        io_open=_open_nothing,
    )


def _open_nothing(*_: object) -> NoReturn:
    raise Rejected(UNSUPPORTED_MEDIA, "the clip must be one file, got one that refers to other files")


def _video_stream(container: av.container.InputContainer) -> VideoStream:
    """Return the video track that is shown by default, else the first one. Cover pictures are not video."""
    hidden = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    tracks = [stream for stream in container.streams.video if not stream.disposition & hidden]
    if not tracks:
        got = "sound only" if container.streams.audio else "none"
        raise Rejected(UNSUPPORTED_MEDIA, f"the clip must have a video track, got {got}")
    known = [stream for stream in tracks if stream.codec_context is not None and _codec(stream) in _CODECS]
    if not known:
        names = ", ".join(_CODECS.values())
        raise Rejected(UNSUPPORTED_MEDIA, f"the clip must have a video codec of {names}, got another codec")
    chosen = next((stream for stream in known if stream.disposition & av.stream.Disposition.default), known[0])
    for stream in container.streams:
        if stream.index != chosen.index:
            stream.discard = av.stream.Discard.all
    return chosen


def _codec(stream: VideoStream) -> str:
    return stream.codec_context.codec.canonical_name


@dataclass(frozen=True)
class Clip:
    """The packets of the video track in the order of decoding, and its time line in units of the track's time base.

    The time line is computed from the packets: a declared duration may be missing or wrong. `times`: when frames appear,
    ascending. `end`: when the last frame disappears.
    """

    packets: list[av.Packet[VideoStream]]
    times: list[int]
    end: int
    seconds: float

    @classmethod
    def read(
        cls, container: av.container.InputContainer, stream: VideoStream, data_bytes: int, settings: Settings
    ) -> Clip:
        """Read all packets; none is decoded. They hold at most the bytes of the file."""
        _check_frames(len(stream.index_entries), settings)
        packets: list[av.Packet[VideoStream]] = []
        left_bytes = data_bytes
        for packet in container.demux(stream):
            if not packet.size:  # to a decoder that is the end
                continue
            left_bytes += _PACKET_OVERHEAD_BYTES - packet.size
            if packet.is_corrupt or left_bytes < 0 or packet.pts is None:
                raise DamagedError
            packets.append(packet)
            _check_frames(len(packets), settings)
        shown = [packet for packet in packets if not packet.is_discard]
        if not shown or _is_cut_off(stream, data_bytes):
            raise DamagedError
        times = sorted({packet.pts or 0 for packet in shown})
        end = max((packet.pts or 0) + max(packet.duration or 0, 0) for packet in shown)
        if end <= times[-1] and len(times) > 1:
            end = times[-1] + (times[-1] - times[0]) // (len(times) - 1)
        seconds = float((end - times[0]) * (stream.time_base or 0))
        if seconds > settings.max_seconds:
            raise Rejected(TOO_LARGE, f"the clip must be at most {settings.max_seconds:g} s long, got {seconds:.1f} s")
        return cls(packets, times, end, seconds)

    def sampled_times(self, count: int) -> list[int]:
        """Return when the frames appear that are shown in the middle of each of `count` equal parts, each once."""
        start = self.times[0]
        chosen: list[int] = []
        index = 0
        for part in range(count):
            middle = start + (2 * part + 1) * (self.end - start) // (2 * count)
            while index + 1 < len(self.times) and self.times[index + 1] <= middle:
                index += 1
            if not chosen or chosen[-1] != self.times[index]:
                chosen.append(self.times[index])
        return chosen


def _is_cut_off(stream: VideoStream, data_bytes: int) -> bool:
    """Return whether the index of an MP4 file points behind its end."""
    return any(entry.pos + entry.size > data_bytes for entry in stream.index_entries)


def _check_frames(count: int, settings: Settings) -> None:
    if count > settings.max_frames:
        raise Rejected(TOO_LARGE, f"the clip must have at most {settings.max_frames} frames, got more")


def _check_pixels(width: int, height: int, settings: Settings) -> None:
    if width < 1 or height < 1:
        raise DamagedError
    if width * height > settings.max_pixels:
        most = settings.max_pixels
        raise Rejected(TOO_LARGE, f"a frame of the clip must have at most {most} pixels, got {width} x {height}")
    if max(width, height) > settings.max_aspect * min(width, height):
        most_aspect = f"an aspect ratio of at most {settings.max_aspect:g}:1"
        raise Rejected(TOO_LARGE, f"a frame of the clip must have {most_aspect}, got {width} x {height}")


def _pixel_ratio(stream: VideoStream) -> Fraction:
    """Return the width of a pixel by its height, 1 if that is unknown or nearly square."""
    ratio = stream.sample_aspect_ratio
    if ratio is None or ratio <= 0 or _SQUARE[0] <= ratio <= _SQUARE[1]:
        return Fraction(1)
    return ratio


def _square_size(width: int, height: int, ratio: Fraction) -> tuple[int, int]:
    """Return the size with square pixels. The side that is too short grows."""
    return (round(width * ratio), height) if ratio >= 1 else (width, round(height / ratio))


def _decoder(stream: VideoStream, settings: Settings) -> VideoCodecContext:
    decoder = stream.codec_context
    alpha_decoder = _ALPHA_DECODERS.get(_codec(stream))
    if alpha_decoder is not None and stream.metadata.get("alpha_mode") == "1":
        decoder = av.CodecContext.create(alpha_decoder, "r")
    decoder.options = {"max_pixels": str(settings.max_pixels)}
    decoder.flags |= av.codec.context.Flags.bitexact
    decoder.thread_count = 1
    return decoder


class Sampler:
    """Decodes the frames of chosen times: each from the last key frame before it, or on from where it is."""

    def __init__(self, clip: Clip, decoder: VideoCodecContext) -> None:
        self._clip = clip
        self._decoder = decoder
        self._keys = [index for index, packet in enumerate(clip.packets) if packet.is_keyframe] or [0]
        self._wanted: frozenset[int] = frozenset()
        self._frames: Iterator[VideoFrame] = iter(())
        self._next = 0  # packet that is decoded next
        self._held: VideoFrame | None = None  # decoded, and later than the last chosen frame

    def sample(self, count: int) -> Iterator[VideoFrame]:
        """Yield the frames of `Clip.sampled_times`. Raise `DamagedError`."""
        times = self._clip.sampled_times(count)
        self._wanted = frozenset(times)
        last: int | None = None
        for time in times:
            frame = self._frame(time)
            if frame.pts != last:
                last = frame.pts
                yield frame

    def _frame(self, time: int) -> VideoFrame:
        """Return the frame that is shown at `time`."""
        position = self._last_key(time)
        if self._keys[position] >= self._next:
            self._restart(self._keys[position], skips=True)
        frame = self._advance(time)
        if frame is not None and frame.pts == time:
            return frame
        # The file's marks are not exact, or the codec has frames that are not shown. Decode everything, from earlier
        # key frames if necessary.
        back = 0
        while True:
            position = max(position - back, 0)
            self._restart(self._keys[position] if position else 0, skips=False)
            frame = self._advance(time)
            if frame is not None:
                return frame
            if not position:
                break
            back = 2 * back or 1
        if self._held is None:
            raise DamagedError
        return self._held  # the first one that can be decoded

    def _last_key(self, time: int) -> int:
        """Return the position in `_keys` of the last key frame that appears at `time` or before."""
        packets = self._clip.packets
        return max(
            (position for position, index in enumerate(self._keys) if (packets[index].pts or 0) <= time), default=0
        )

    def _restart(self, index: int, *, skips: bool) -> None:
        """Decode from packet `index` on. `skips`: without frames that nothing refers to and that are not wanted."""
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
        while self._next < len(self._clip.packets):
            packet = self._clip.packets[self._next]
            self._next += 1
            self._decoder.skip_frame = "NONREF" if skips and packet.pts not in self._wanted else "DEFAULT"
            yield from self._decoder.decode(packet)
        yield from self._decoder.decode(None)


def _picture(frame: VideoFrame, ratio: Fraction, settings: Settings) -> tuple[dict[str, Any], list[memoryview]]:
    """Return a frame's message and its rows of RGB or RGBA."""
    _check_pixels(frame.width, frame.height, settings)
    width, height = _square_size(frame.width, frame.height, ratio)
    _check_pixels(width, height, settings)
    has_alpha = frame.format.components[-1].is_alpha
    channels = 4 if has_alpha else 3
    rgb = frame.reformat(width, height, "rgba" if has_alpha else "rgb24", interpolation=_CONVERSION, threads=1)
    plane = rgb.planes[0]
    pixels = memoryview(plane)
    rows = [pixels[row * plane.line_size :][: width * channels] for row in range(height)]
    message = {"width": width, "height": height, "channels": channels, "matrix": _display_matrix(frame)}
    return message, rows


def _display_matrix(frame: VideoFrame) -> list[int] | None:
    """Return the elements a, b, c and d of the matrix that turns a frame upright, or None. Units: 1/65536."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            elements = memoryview(bytes(data)).cast("i")
            return [elements[index] for index in (0, 1, 3, 4)]
    return None


if __name__ == "__main__":
    main()
