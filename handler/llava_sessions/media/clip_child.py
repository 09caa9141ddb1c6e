"""Decode one clip, in a process of its own that `clips` starts: python -m llava_sessions.media.clip_child SETTINGS.

SETTINGS are the fields of `Settings` as JSON. The program writes messages into its socket: four bytes with the length
of a JSON text, the text, and for a frame its pixels row by row. The first message is sent before the clip is opened.
The program opens no file and no connection: the clip is read from a descriptor at the start. It ends when the other end
of the socket is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import av
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from .clip_reader import (
    TOO_LARGE,
    Clip,
    ReadLimits,
    Rejected,
    Sampler,
    check_complete,
    check_pixels,
    decoder_of,
    display_matrix,
    opened,
    square_size,
    video_stream,
)

INVALID_REQUEST = "invalid_request"
# The same pixels on every CPU: a rebuild on another instance must give the same frames.
_CONVERSION = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclass(frozen=True)
class Settings:
    """What the worker asks for. `count`: frames to sample; 0 for the header only. The limits are of `ReadLimits`."""

    socket_fd: int
    data_fd: int
    count: int
    cpu_seconds: int
    memory_bytes: int
    limits: dict[str, Any]


def main() -> None:
    """Read the clip, write its header or frames, and exit."""
    settings = Settings(**json.loads(sys.argv[1]))
    connection = socket.socket(fileno=settings.socket_fd)
    threading.Thread(target=_exit_when_closed, args=(connection,), daemon=True).start()
    with open(settings.data_fd, "rb") as file:
        data = file.read()
    av.logging.set_level(None)
    _restrict(settings)
    limits = ReadLimits(**settings.limits)
    _send(connection, {"ready": True})
    try:
        with _client_errors(settings, limits):
            for message, rows in _messages(data, settings.count, limits):
                _send(connection, message, rows)
            _send(connection, {"end": True})
    except Rejected as error:
        _send(connection, {"code": error.code, "message": error.message})
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
def _client_errors(settings: Settings, limits: ReadLimits) -> Iterator[None]:
    """Raise `Rejected` for every error that the data causes."""
    try:
        yield
    except (Rejected, BrokenPipeError):
        raise
    except MemoryError:
        message = f"the clip must be decoded in {settings.memory_bytes >> 20} MiB of memory, got one that needs more"
        raise Rejected(TOO_LARGE, message) from None
    except Exception:  # PyAV raises OSError, ValueError, EOFError and others
        message = f"the clip is damaged: its {limits.format} data cannot be decoded"
        raise Rejected(INVALID_REQUEST, message) from None


def _send(connection: socket.socket, message: dict[str, Any], rows: list[memoryview] | None = None) -> None:
    content = json.dumps(message).encode()
    connection.sendall(struct.pack(">I", len(content)) + content)
    for row in rows or ():
        connection.sendall(row)


def _messages(data: bytes, count: int, limits: ReadLimits) -> Iterator[tuple[dict[str, Any], list[memoryview]]]:
    """Yield the header, then each frame with its rows."""
    check_complete(data, limits)
    with opened(data, limits) as container:
        stream = video_stream(container)
        width, height = stream.codec_context.width, stream.codec_context.height
        check_pixels(width, height, limits)
        width, height = square_size(width, height, stream)
        check_pixels(width, height, limits)
        clip = Clip.read(container, stream, data, limits)
        yield {"width": width, "height": height, "seconds": clip.seconds, "frames": len(clip.times)}, []
        if count:
            for frame in Sampler(clip, decoder_of(stream), count).frames():
                yield _picture(frame, stream, limits)


def _picture(frame: VideoFrame, stream: VideoStream, limits: ReadLimits) -> tuple[dict[str, Any], list[memoryview]]:
    """Return a frame's message and its rows of RGB or RGBA, with square pixels, not yet upright."""
    check_pixels(frame.width, frame.height, limits)
    width, height = square_size(frame.width, frame.height, stream)
    check_pixels(width, height, limits)
    has_alpha = frame.format.components[-1].is_alpha
    channels = 4 if has_alpha else 3
    rgb = frame.reformat(width, height, "rgba" if has_alpha else "rgb24", interpolation=_CONVERSION, threads=1)
    plane = rgb.planes[0]
    pixels = memoryview(plane)
    rows = [pixels[row * plane.line_size :][: width * channels] for row in range(height)]
    message = {"width": width, "height": height, "channels": channels, "matrix": display_matrix(frame)}
    return message, rows


if __name__ == "__main__":
    main()
