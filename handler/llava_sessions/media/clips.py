"""Read the headers of clips and sample their frames, in a child process. The content decides the format. Thread-safe.

MP4, MOV, WebM and Matroska, with H.264, HEVC, VP8, VP9, AV1 or MPEG-4. FFmpeg (PyAV) runs in `clip_child` with limits
on memory, CPU time and wall time, so that a hostile file can neither end the worker nor fill its memory. What the child
sends is checked, since a hostile file may have taken it over.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MediaLimits
from .decoder import sniff_format
from .limits import INVALID_REQUEST, TOO_LARGE, UNSUPPORTED_MEDIA, MediaError, check_size, clip_file_limits

# Children of a worker at once; other callers wait. Each child may take as much memory as `_memory_bytes` returns.
MAX_CHILDREN = 4
_CHILDREN = threading.BoundedSemaphore(MAX_CHILDREN)
_MODULE = "llava_sessions.media.clip_child"
_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
# Variables of the worker that the child has too. A child reads hostile files and needs no credentials.
_VARIABLES = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_MAX_MESSAGE_BYTES = 300
_CODES = (INVALID_REQUEST, TOO_LARGE, UNSUPPORTED_MEDIA)
_BASE_BYTES = 384 * 2**20
# Of a decoder: 16 reference frames and those of its threads, 3 bytes for a pixel of 10 bits in 4:2:0.
_DECODER_BYTES_PER_PIXEL = 64
_STRIP_PIXELS = 1_000_000


@dataclass(frozen=True)
class ClipHeader:
    """What a clip's file holds: its format, the size of a frame, the seconds that it is shown, and its frames.

    `width` and `height` are of a stored frame with square pixels: the frames of a phone's clip, turned by 90 degrees,
    have them exchanged. In a clip whose size changes they are of its beginning.
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
    return _format(data) is not None


def read_clip_header(data: bytes, limits: MediaLimits) -> ClipHeader:
    """Return what the file in `data` holds, without decoding it. Raise `MediaError`.

    All limits on clips are checked here: bytes, seconds, frames, pixels of a frame. Block for at most
    `limits.clip_timeout_s` seconds after a child process is free (`MAX_CHILDREN`).
    """
    clip_format = _checked_format(data, limits)
    with _child(data, clip_format, limits, 0) as child:
        return child.header()


def clip_frames(data: bytes, limits: MediaLimits, count: int) -> Generator[np.ndarray, None, None]:
    """Yield at most `count` frames, evenly spaced: uint8 `[height, width, 3]`, RGB, upright, opaque, of square pixels.

    Frame k is the one that is shown in the middle of the k-th of `count` equal parts of the clip's time. A frame that
    is shown in several of them is yielded once, so a clip with fewer frames yields fewer. The frames depend on the file
    and on `count` only: a rebuild decodes the same ones.

    One frame at a time is in memory here. The caller holds its pixels in the budget while it iterates, as for a
    picture: `with budget.reserve(header.pixels): for frame in clip_frames(...)`. Close the iterator, or exhaust it: its
    child process ends with it. Raise `MediaError`, also after some frames: then none of them may be used.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    return _frames(data, _checked_format(data, limits), limits, count)


def _frames(data: bytes, clip_format: str, limits: MediaLimits, count: int) -> Generator[np.ndarray, None, None]:
    with _child(data, clip_format, limits, count) as child:
        child.header()
        for _ in range(count):
            frame = child.frame()
            if frame is None:
                return
            yield frame
            del frame  # before the next one


_EBML = b"\x1a\x45\xdf\xa3"
_EBML_DOC_TYPES = ((b"\x42\x82\x84webm", "WEBM"), (b"\x42\x82\x88matroska", "MATROSKA"))
_EBML_HEADER_BYTES = 128
# First boxes of files of QuickTime before MP4.
_MOV_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
# Brands of pictures: HEIF, AVIF, JPEG 2000, JPEG XL, Canon's raw files.
_PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif", b"jp2 ", b"jpm ", b"jpx ", b"jxl ", b"crx ")


def _format(data: bytes) -> str | None:
    """Return the format by its signature, or None."""
    if data.startswith(_EBML):
        begin = data[:_EBML_HEADER_BYTES]
        return next((name for doc_type, name in _EBML_DOC_TYPES if doc_type in begin), None)
    box, brand = data[4:8], data[8:12]
    if box == b"ftyp" and brand not in _PICTURE_BRANDS:
        return "MOV" if brand == b"qt  " else "MP4"
    return "MOV" if box in _MOV_BOXES else None


def _checked_format(data: bytes, limits: MediaLimits) -> str:
    check_size(len(data), clip_file_limits(limits))
    clip_format = _format(data)
    if clip_format is not None:
        return clip_format
    try:
        got = f"a {sniff_format(data)} picture"
    except MediaError:
        got = f"{len(data)} bytes of another format"
    raise MediaError(UNSUPPORTED_MEDIA, f"the clip must be MP4, MOV, WebM or Matroska, got {got}")


@contextlib.contextmanager
def _child(data: bytes, clip_format: str, limits: MediaLimits, count: int) -> Iterator[_Child]:
    """Start a child for one clip, and end it."""
    with _CHILDREN:
        child = _Child(data, clip_format, limits, count)
        try:
            yield child
        finally:
            child.end()


class _Child:
    """One child process and the messages that it sends.

    Its methods raise `MediaError`, or RuntimeError if the process did not start.
    """

    def __init__(self, data: bytes, clip_format: str, limits: MediaLimits, count: int) -> None:
        self._format = clip_format
        self._limits = limits
        self._left_s = limits.clip_timeout_s
        self._is_ready = False
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as on_error, theirs, _memory_file(data) as file:
            on_error.callback(ours.close)
            settings = {
                "socket_fd": theirs.fileno(),
                "data_fd": file,
                "count": count,
                "cpu_seconds": math.ceil(limits.clip_timeout_s),
                "memory_bytes": _memory_bytes(limits),
                "limits": {
                    "format": clip_format,
                    "max_seconds": limits.max_clip_s,
                    "max_pixels": limits.max_clip_pixels,
                    "max_frames": limits.max_clip_frames,
                    "max_aspect": limits.max_aspect,
                },
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, json.dumps(settings)],
                pass_fds=[theirs.fileno(), file],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # a signal to the worker's group is not for the child
            )
            on_error.pop_all()
        self._socket = ours

    def header(self) -> ClipHeader:
        """Return the header of the clip."""
        self._is_ready = self._message().get("ready") is True
        message = self._message()
        width, height = self._size(message)
        seconds, frames = message.get("seconds"), message.get("frames")
        if not isinstance(seconds, float) or not 0 <= seconds <= self._limits.max_clip_s:
            raise self._damaged()
        if not isinstance(frames, int) or not 1 <= frames <= self._limits.max_clip_frames:
            raise self._damaged()
        return ClipHeader(self._format, width, height, seconds, frames)

    def frame(self) -> np.ndarray | None:
        """Return the next frame, or None behind the last one."""
        message = self._message()
        if message.get("end") is True:
            return None
        width, height = self._size(message)
        channels, matrix = message.get("channels"), message.get("matrix")
        if channels not in (3, 4):
            raise self._damaged()
        pixels = np.empty((height, width, channels), np.uint8)
        self._read(pixels.data.cast("B"))
        return np.ascontiguousarray(_upright(pixels if channels == 3 else _on_white(pixels), matrix))

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _message(self) -> dict[str, Any]:
        """Return the next message. Raise the `MediaError` that it contains."""
        length = bytearray(4)
        self._read(memoryview(length))
        (size,) = struct.unpack(">I", length)
        if size > _MAX_MESSAGE_BYTES:
            raise self._damaged()
        content = bytearray(size)
        self._read(memoryview(content))
        try:
            message = json.loads(content)
        except ValueError:
            raise self._damaged() from None
        if not isinstance(message, dict):
            raise self._damaged()
        if "code" in message:
            code, text = message["code"], message.get("message")
            if code not in _CODES or not isinstance(text, str) or not text.isprintable():
                raise self._damaged()
            raise MediaError(code, text)
        return message

    def _size(self, message: dict[str, Any]) -> tuple[int, int]:
        width, height = message.get("width"), message.get("height")
        if not isinstance(width, int) or not isinstance(height, int) or width < 1 or height < 1:
            raise self._damaged()
        if width * height > self._limits.max_clip_pixels:
            raise self._damaged()
        return width, height

    def _read(self, target: memoryview) -> None:
        """Fill `target`. Only waiting counts for the time limit, not what the caller does between frames."""
        while target:
            started_s = time.monotonic()
            self._socket.settimeout(max(self._left_s, 1e-3))
            try:
                received = self._socket.recv_into(target)
            except TimeoutError:
                raise self._too_slow() from None
            except OSError:
                received = 0
            self._left_s -= time.monotonic() - started_s
            if not received:
                raise self._ended()
            target = target[received:]

    def _ended(self) -> MediaError:
        """Return the error for a process that ended early. Raise RuntimeError if it ended before it was ready."""
        try:
            status = self._process.wait(timeout=max(self._left_s, 1.0))
        except subprocess.TimeoutExpired:
            return self._damaged()
        if not self._is_ready:
            raise RuntimeError(f"the process that decodes clips did not start: exit code {status}. Is av installed?")
        if status == -signal.SIGXCPU:
            return self._too_slow()
        if status == -signal.SIGKILL:  # by the kernel, when the machine has no memory left
            return MediaError(
                TOO_LARGE, "the clip must be decoded in the memory of this server, got one that needs more"
            )
        return self._damaged()

    def _too_slow(self) -> MediaError:
        most_s = self._limits.clip_timeout_s
        return MediaError(TOO_LARGE, f"the clip must be decoded within {most_s:g} s, got one that takes longer")

    def _damaged(self) -> MediaError:
        return MediaError(INVALID_REQUEST, f"the clip is damaged: its {self._format} data cannot be decoded")


def _environment() -> dict[str, str]:
    """Return the child's variables. The folder of the package comes first, wherever the archive was unpacked."""
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    path = os.pathsep.join(filter(None, [_PACKAGE_FOLDER, os.environ.get("PYTHONPATH")]))
    return {**variables, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}  # an arena of glibc maps 64 MiB


def _memory_bytes(limits: MediaLimits) -> int:
    """Return how much memory a child may map: Python and FFmpeg, the file twice, the frames of a decoder."""
    return _BASE_BYTES + 2 * limits.max_clip_bytes + _DECODER_BYTES_PER_PIXEL * limits.max_clip_pixels


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    """Yield the descriptor of a file with `data`, in memory on Linux. Its position is 0."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("clip")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _upright(pixels: np.ndarray, matrix: object) -> np.ndarray:
    """Return a view of `pixels` `[height, width, 3]`, turned and mirrored as the display matrix asks.

    `matrix`: a, b, c and d with x' = a*x + c*y and y' = b*x + d*y, or None. Other angles become the nearest right one.
    Source: libavutil/display.h.
    """
    if not (isinstance(matrix, list) and len(matrix) == 4 and all(isinstance(element, int) for element in matrix)):
        return pixels
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        to_right, to_bottom = a, d
    else:
        pixels = pixels.transpose(1, 0, 2)
        to_right, to_bottom = c, b
    return pixels[:: -1 if to_bottom < 0 else 1, :: -1 if to_right < 0 else 1]


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """Return `[height, width, 4]` blended with white, as `[height, width, 3]`. Only one strip at a time has copies."""
    height, width, _ = pixels.shape
    blended = np.empty((height, width, 3), np.uint8)
    rows = max(_STRIP_PIXELS // width, 1)
    for first in range(0, height, rows):
        strip = pixels[first : first + rows].astype(np.uint16)
        alpha = strip[..., 3:]
        blended[first : first + rows] = (strip[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return blended
