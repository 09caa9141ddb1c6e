"""The frames of clips: which ones, how they look, and what becomes of bad and hostile files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from av.video.reformatter import Interpolation
from PIL import Image

from llava_sessions.config import MediaLimits
from llava_sessions.media.clips import ClipHeader, clip_frames, is_clip, read_clip_header
from llava_sessions.media.limits import MediaError, clip_file_limits
from tests.support.clips import (
    ClipSpec,
    box,
    box_at,
    boxes,
    clip,
    number_of,
    picture,
    red_corner,
    sound,
    video_frames,
    with_box,
    with_header_first,
)
from tests.support.pictures import LIMITS, PATIENCE_S, PNG, encode, rejected, two_colours

REPO = Path(__file__).parents[2]
WEBM = ClipSpec(codec="libvpx", container="webm")
LIVE = ClipSpec(codec="libvpx", container="webm", container_options={"live": "1"})  # as MediaRecorder writes
FRAGMENTED = ClipSpec(container_options={"movflags": "frag_keyframe+empty_moov"})
STBL = "moov/trak/mdia/minf/stbl/"


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return clip()


@pytest.fixture(scope="module")
def webm() -> bytes:
    return clip(WEBM)


@pytest.fixture(autouse=True)
def _no_child_is_left_over() -> Iterator[None]:
    yield
    assert decoders() == []


def decoders() -> list[psutil.Process]:
    """Return the children of this process that decode clips. It may have others: servers of other tests."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "llava_sessions.media.clip_child" in child.cmdline():
                found.append(child)
    return found


def numbers(data: bytes, count: int, limits: MediaLimits = LIMITS) -> list[int]:
    return [number_of(frame) for frame in clip_frames(data, limits, count)]


def all_frames(data: bytes, demuxer: str) -> dict[int, np.ndarray]:
    """Return every frame of a file by its time, decoded one after another."""
    flags = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    with av.open(io.BytesIO(data), format=demuxer) as container:
        container.streams.video[0].codec_context.flags |= av.codec.context.Flags.bitexact
        return {
            frame.pts or 0: frame.reformat(format="rgb24", interpolation=flags).to_ndarray()
            for frame in container.decode(video=0)
        }


# --- which frames ---


@pytest.mark.parametrize(
    "spec",
    [
        ClipSpec(),
        ClipSpec(options={"g": "7", "x264-params": "open-gop=1"}, frames=60),
        ClipSpec(container="mov"),
        ClipSpec(container="matroska"),
        FRAGMENTED,
        ClipSpec(codec="libx265", pixels="yuv420p10le"),
        ClipSpec(codec="libsvtav1"),
        ClipSpec(codec="mpeg4", options={"qmin": "1", "qmax": "2"}),
        WEBM,
        LIVE,
        ClipSpec(codec="libvpx", container="webm", frames=60, options={"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ClipSpec(codec="libvpx-vp9", container="webm", width=63, height=47),
    ],
    ids=lambda spec: f"{spec.codec}-{spec.container}-{spec.frames}",
)
def test_frames_are_those_in_the_middle_of_equal_parts(spec):
    data = clip(spec)
    name = {"mp4": "MP4", "mov": "MOV", "matroska": "MATROSKA", "webm": "WEBM"}[spec.container]
    seconds = spec.frames / spec.rate
    assert is_clip(data)
    assert read_clip_header(data, LIMITS) == ClipHeader(name, spec.width, spec.height, seconds, spec.frames)
    decoded = all_frames(data, "matroska" if name in ("WEBM", "MATROSKA") else "mov")
    every = [decoded[time] for time in sorted(decoded)]
    for count in (5, 2 * spec.frames):
        shown = list(dict.fromkeys((2 * part + 1) * spec.frames // (2 * count) for part in range(count)))
        frames = list(clip_frames(data, LIMITS, count))
        assert [number_of(frame) for frame in frames] == [number % 25 for number in shown]
        for frame, number in zip(frames, shown, strict=True):
            np.testing.assert_array_equal(frame, every[number])
            assert (frame.dtype, frame.shape, frame.flags.c_contiguous) == (
                np.uint8,
                (spec.height, spec.width, 3),
                True,
            )


def test_the_same_frames_are_decoded_each_time(mp4):
    digests = {tuple(hashlib.sha256(frame).hexdigest() for frame in clip_frames(mp4, LIMITS, 3)) for _ in range(2)}
    assert len(digests) == 1


def test_a_frame_count_below_one_is_a_mistake_of_the_caller(mp4):
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        clip_frames(mp4, LIMITS, 0)


@pytest.mark.parametrize("spec", [ClipSpec(frames=1), ClipSpec(frames=1, codec="libvpx", container="webm")])
def test_a_clip_of_one_frame_yields_it_once(spec):
    data = clip(spec)
    assert read_clip_header(data, LIMITS).frames == 1
    assert numbers(data, 8) == [0]


def test_frames_of_a_variable_rate_are_chosen_by_time():
    data = clip(frames=10, times=[0, 1, 2, 3, 4, 5, 6, 7, 16, 24])
    assert read_clip_header(data, LIMITS).seconds == 1.0
    assert numbers(data, 5) == [2, 7, 8]  # frame 7 is shown in three of the parts, and once here


def test_the_time_begins_with_the_first_frame():
    late = ClipSpec(codec="libvpx", container="webm", times=range(100, 125))
    assert read_clip_header(clip(late), LIMITS).seconds == 1.0
    assert numbers(clip(late), 5) == [2, 7, 12, 17, 22]


@pytest.mark.parametrize(
    ("edits", "seconds", "expected"),
    [
        ([(500, 1024 + 5 * 512, 65536)], 0.52, [6, 8, 11, 14, 16]),  # begins within a group of frames
        ([(2000, -1, 65536), (1000, 1024, 65536)], 1.0, [2, 7, 12, 17, 22]),  # an empty edit: shown later
        ([(1000, 1024, 65536)] * 2, 2.0, [5, 15, 0, 10, 20]),  # shown twice
    ],
)
def test_edit_lists_are_obeyed(mp4, edits, seconds, expected):
    content = struct.pack(">II", 0, len(edits)) + b"".join(struct.pack(">IiI", *edit) for edit in edits)
    data = with_box(mp4, "moov/trak/edts/elst", content)
    assert read_clip_header(data, LIMITS).seconds == seconds
    assert numbers(data, 5) == expected


@pytest.mark.parametrize("path", ["moov/mvhd", "moov/trak/mdia/mdhd"])
@pytest.mark.parametrize("duration", [0, 2**32 - 1])
def test_a_declared_duration_counts_for_nothing(mp4, path, duration):
    start, end = box_at(mp4, path)
    content = mp4[start : start + 16] + struct.pack(">I", duration) + mp4[start + 20 : end]
    assert read_clip_header(with_box(mp4, path, content), LIMITS).seconds == 1.0


def test_the_video_track_that_is_shown_by_default_is_read():
    buffer = io.BytesIO()
    wide = ClipSpec(width=96)
    with av.open(buffer, "w", format="mp4") as container:
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        tracks = []
        for spec, disposition in ((ClipSpec(), 0), (wide, av.stream.Disposition.default)):
            track = container.add_stream(spec.codec, rate=spec.rate)
            track.width, track.height, track.pix_fmt = spec.width, spec.height, spec.pixels
            track.disposition = disposition
            tracks.append((track, spec))
        container.mux(
            cover.encode(av.VideoFrame.from_ndarray(picture(0, 32, 32), format="rgb24").reformat(format="yuvj420p"))
        )
        container.mux(cover.encode(None))
        for track, spec in tracks:
            for frame in video_frames(spec):
                container.mux(track.encode(frame))
            container.mux(track.encode(None))
    header = read_clip_header(buffer.getvalue(), LIMITS)
    assert (header.width, header.frames) == (96, 25)


# --- how they look ---


@pytest.mark.parametrize(
    ("rotation", "mirrored", "shape", "corner"),
    [
        (90, False, (64, 48), ("lower", "left")),
        (180, False, (48, 64), ("lower", "right")),
        (270, False, (64, 48), ("upper", "right")),
        (0, True, (48, 64), ("upper", "right")),
        (90, True, (64, 48), ("lower", "right")),
    ],
)
def test_frames_are_upright(rotation, mirrored, shape, corner):
    data = clip(frames=3, rotation=rotation, mirrored=mirrored)
    header = read_clip_header(data, LIMITS)
    (frame,) = clip_frames(data, LIMITS, 1)
    assert (frame.shape[:2], red_corner(frame)) == (shape, corner)
    assert header.pixels == frame.shape[0] * frame.shape[1]


@pytest.mark.parametrize(
    ("ratio", "size"), [(Fraction(2), (128, 48)), (Fraction(1, 2), (64, 96)), (Fraction(100, 99), (64, 48))]
)
def test_pixels_are_square(ratio, size):
    data = clip(frames=2, pixel_ratio=ratio)
    header = read_clip_header(data, LIMITS)
    (frame,) = clip_frames(data, LIMITS, 1)
    assert ((header.width, header.height), frame.shape[:2]) == (size, size[::-1])


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparent_pixels_are_blended_with_white(codec):
    buffer = io.BytesIO()
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, :32] = (0, 0, 200, 255)
    pixels[:, 32:] = (0, 0, 200, 0)
    with av.open(buffer, "w", format="webm") as container:
        stream = container.add_stream(codec, rate=5, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva420p"
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="yuva420p")
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (shown,) = clip_frames(buffer.getvalue(), LIMITS, 1)
    assert shown.shape == (48, 64, 3)
    assert np.abs(shown[:, 8:24].astype(int) - (0, 0, 200)).max() < 12
    assert shown[:, 40:56].min() > 243


def test_each_frame_has_its_own_size():
    small, large = (
        ClipSpec(codec="libvpx", container="webm", frames=5),
        ClipSpec(codec="libvpx", container="webm", frames=5, width=96, height=80),
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for offset, spec in ((0, small), (200, large)):
            with av.open(io.BytesIO(clip(spec)), format="matroska") as part:
                for packet in part.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packet.pts, packet.dts = packet.pts + offset, packet.pts + offset
                        container.mux(packet)
    shapes = [frame.shape[:2] for frame in clip_frames(buffer.getvalue(), LIMITS, 10)]
    assert shapes == [(48, 64)] * 5 + [(80, 96)] * 5


# --- what is not a clip ---


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (PNG, "got a PNG picture"),
        (encode(two_colours(), "GIF", save_all=True, append_images=[Image.new("RGB", (24, 16))]), "got a GIF picture"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "bytes of another format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "bytes of another format"),
        (b"RIFF\x10\0\0\0AVI LIST", "bytes of another format"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x82\x84webx", "bytes of another format"),
        (box("ftyp", b"heic\0\0\0\0mif1heic"), "bytes of another format"),
        (box("ftyp", b"avif\0\0\0\0avifmif1"), "bytes of another format"),
    ],
)
def test_other_formats_are_rejected_unopened(data, words):
    assert not is_clip(data)
    error = rejected("unsupported_media", words, lambda: read_clip_header(data, LIMITS))
    assert error.message.startswith("the clip must be MP4, MOV, WebM or Matroska, got ")
    rejected("unsupported_media", words, lambda: clip_frames(data, LIMITS, 8))


@pytest.mark.parametrize("data", [b"", b"\0" * 3, b"\x1a\x45", b"\0\0\0\x08ftyp"])
def test_a_few_bytes_are_no_clip_or_a_damaged_one(data):
    with pytest.raises(MediaError) as caught:
        read_clip_header(data, LIMITS)
    assert caught.value.code in ("invalid_request", "unsupported_media")


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("webm", "libopus")])
def test_sound_alone_is_no_clip(container, codec):
    words = "the clip must have a video track, got sound only"
    rejected("unsupported_media", words, lambda: read_clip_header(sound(container, codec), LIMITS))


def test_other_codecs_are_rejected():
    data = clip(codec="mjpeg", pixels="yuvj420p", frames=2)
    words = "the clip's video must be H.264, HEVC, VP8, VP9, AV1 or MPEG-4, got another codec"
    rejected("unsupported_media", words, lambda: read_clip_header(data, LIMITS))


# --- limits ---


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"max_clip_bytes": 100}, "the clip must be at most 100 bytes, got "),
        ({"max_clip_s": 0.9}, "the clip must be at most 0.9 s long, got 1.0 s"),
        ({"max_clip_pixels": 3_000}, "a frame of the clip must have at most 3000 pixels, got 64 x 48"),
        ({"max_clip_frames": 24}, "the clip must have at most 24 frames, got more"),
    ],
)
@pytest.mark.parametrize("spec", [ClipSpec(), WEBM], ids=["mp4", "webm"])
def test_a_clip_above_a_limit_is_rejected(spec, limit, words):
    data = clip(spec)
    rejected("too_large", words, lambda: read_clip_header(data, MediaLimits(**limit)))
    rejected("too_large", words, lambda: list(clip_frames(data, MediaLimits(**limit), 2)))


def test_a_long_ratio_is_rejected():
    data = clip(frames=1, pixel_ratio=Fraction(2))
    ratio = b"pasp" + struct.pack(">II", 2, 1)
    assert ratio in data
    data = data.replace(ratio, b"pasp" + struct.pack(">II", 200, 1))
    rejected("too_large", "an aspect ratio of at most 100:1", lambda: read_clip_header(data, LIMITS))


def test_a_clip_of_hours_is_rejected_by_its_times(mp4):
    slow = with_box(mp4, STBL + "stts", struct.pack(">IIII", 0, 1, 25, 3 * 3600 * 512))
    slow = with_box(slow, "moov/trak/edts/elst", struct.pack(">IIIII", 0, 1, 10**8, 0, 65536))
    rejected("too_large", "at most 600 s long, got 10800.0 s", lambda: read_clip_header(slow, LIMITS))


def test_a_table_of_ten_million_frames_is_rejected(mp4):
    count = 10_000_000
    data = with_box(mp4, STBL + "stsz", struct.pack(">III", 0, 1, count))
    data = with_box(data, STBL + "stts", struct.pack(">IIII", 0, 1, count, 512))
    data = with_box(data, STBL + "stsc", struct.pack(">IIIII", 0, 1, 1, count, 1))
    rejected("too_large", "at most 40000 frames", lambda: read_clip_header(data, LIMITS))


def test_a_huge_declared_frame_is_rejected(webm):
    # PixelWidth and PixelHeight of one byte each become numbers of four bytes; the sizes around them are not changed.
    width = webm.index(b"\xb0\x81\x40")
    data = (
        webm[:width]
        + b"\xb0\x84"
        + struct.pack(">I", 100_000)
        + b"\xba\x84"
        + struct.pack(">I", 100_000)
        + webm[width + 6 :]
    )
    with pytest.raises(MediaError):
        read_clip_header(data, LIMITS)


def test_a_table_cannot_show_the_same_bytes_again_and_again(mp4):
    size = len(mp4) - 100
    data = with_box(mp4, STBL + "stsz", struct.pack(">III", 0, size, 25))
    data = with_box(data, STBL + "stco", struct.pack(">III", 0, 1, 0))
    rejected("invalid_request", "damaged", lambda: read_clip_header(data, LIMITS))


def bomb(inter_frames: int) -> bytes:
    """Return a small file of many large frames: all but the first are the same frame of almost no bytes."""
    spec = ClipSpec(
        codec="libvpx-vp9",
        container="webm",
        frames=2,
        is_still=True,
        width=4096,
        height=2304,
        options={"cpu-used": "8", "deadline": "realtime", "error-resilient": "default"},
    )
    with av.open(io.BytesIO(clip(spec)), format="matroska") as container:
        key, inter = (packet for packet in container.demux(video=0) if packet.size)
        key_bytes, inter_bytes = bytes(key), bytes(inter)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=25)
        stream.width, stream.height, stream.pix_fmt = 4096, 2304, "yuv420p"
        for number in range(inter_frames + 1):
            packet = av.Packet(inter_bytes if number else key_bytes)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 1000), number == 0
            packet.pts = packet.dts = 10 * number
            container.mux(packet)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def slow_clip() -> bytes:
    data = bomb(8_000)
    assert len(data) < 2**21
    return data


def test_a_clip_that_takes_too_long_is_stopped(slow_clip):
    limits = MediaLimits(clip_timeout_s=0.8)
    started_s = time.monotonic()
    words = "the clip must be decoded within 0.8 s, got one that takes longer"
    rejected("too_large", words, lambda: list(clip_frames(slow_clip, limits, 1)))
    assert time.monotonic() - started_s < PATIENCE_S


def first_child() -> psutil.Process:
    """Return the child of a clip that is being decoded, once it has its limits."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        for child in decoders():
            if child.rlimit(psutil.RLIMIT_NOFILE) == (3, 3):
                return child
        time.sleep(0.01)
    raise AssertionError("no child was started")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are read from Linux")
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGSEGV, "invalid_request", "the clip is damaged: its WEBM data cannot be decoded"),
        (signal.SIGXCPU, "too_large", "the clip must be decoded within 20 s"),
        (signal.SIGKILL, "too_large", "in the memory of this server"),
    ],
)
def test_a_child_that_ends_is_an_error_of_the_clip(slow_clip, number, code, words):
    errors = []

    def decode() -> None:
        with pytest.raises(MediaError) as caught:
            list(clip_frames(slow_clip, LIMITS, 1))
        errors.append(caught.value)

    thread = threading.Thread(target=decode)
    thread.start()
    child = first_child()
    assert child.rlimit(psutil.RLIMIT_CPU) == (20, 21)
    assert child.rlimit(psutil.RLIMIT_FSIZE) == child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert child.rlimit(psutil.RLIMIT_AS)[0] < 2**30
    assert set(child.environ()) <= {
        "PATH",
        "PYTHONPATH",
        "PYTHONHOME",
        "LD_LIBRARY_PATH",
        "MALLOC_ARENA_MAX",
        "LC_CTYPE",
    }
    child.send_signal(number)
    thread.join(PATIENCE_S)
    (error,) = errors
    assert error.code == code
    assert words in error.message


def test_frames_larger_than_the_header_says_are_rejected(slow_clip):
    size = b"\xb0\x82\x10\x00\xba\x82\x09\x00"  # PixelWidth 4096, PixelHeight 2304
    assert size in slow_clip
    data = slow_clip.replace(size, b"\xb0\x82\x00\x40\xba\x82\x00\x30")
    limits = MediaLimits(max_clip_pixels=64 * 48)
    rejected("too_large", "got 4096 x 2304", lambda: read_clip_header(slow_clip, limits))
    rejected("too_large", "", lambda: list(clip_frames(data, limits, 1)))


def test_the_child_ends_with_its_iterator(slow_clip, mp4):
    frames = clip_frames(mp4, LIMITS, 8)
    next(frames)
    assert decoders() != []
    frames.close()
    assert decoders() == []
    unused = clip_frames(mp4, LIMITS, 8)
    del unused
    assert decoders() == []


def test_the_child_ends_with_its_worker(slow_clip, tmp_path):
    path = tmp_path / "clip"
    path.write_bytes(slow_clip)
    program = (
        "import sys; from llava_sessions.media.clips import clip_frames; from llava_sessions.config import MediaLimits;"
        "list(clip_frames(open(sys.argv[1], 'rb').read(), MediaLimits(), 1))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO / "handler")}
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, str(path)], env=environment) as worker:
        deadline_s = time.monotonic() + PATIENCE_S
        children: list[psutil.Process] = []
        while not children and time.monotonic() < deadline_s:
            children = psutil.Process(worker.pid).children()
        (child,) = children
        worker.kill()
    psutil.wait_procs([child], timeout=PATIENCE_S / 2)
    assert not child.is_running()


def test_one_frame_at_a_time_is_in_memory():
    frame_bytes = 1280 * 720 * 3
    data = clip(frames=20, width=1280, height=720, rotation=90, options={"preset": "ultrafast"})
    tracemalloc.start()
    for frame in clip_frames(data, LIMITS, 20):
        assert frame.nbytes == frame_bytes
        del frame
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2.5 * frame_bytes  # a turned frame is copied once


def test_clips_are_decoded_side_by_side(mp4):
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(numbers(mp4, 5))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == [[2, 7, 12, 17, 22]] * 6


# --- damaged files ---


@pytest.mark.parametrize("kind", ["mp4", "header first", "webm"])
def test_a_file_that_is_cut_off_is_damaged(mp4, webm, kind):
    data = {"mp4": mp4, "header first": with_header_first(mp4), "webm": webm}[kind]
    assert numbers(data, 5) == [2, 7, 12, 17, 22]
    for tenth in range(1, 10):
        rejected(
            "invalid_request", "the clip is damaged", lambda tenth=tenth: numbers(data[: len(data) * tenth // 10], 4)
        )


@pytest.mark.parametrize("spec", [LIVE, FRAGMENTED], ids=["live", "fragmented"])
def test_a_recording_without_a_length_ends_where_its_data_ends(spec):
    data = clip(spec)
    outcomes = []
    for tenth in range(1, 10):
        try:
            outcomes.append(numbers(data[: len(data) * tenth // 10], 4))
        except MediaError as error:
            outcomes.append(error.code)
    assert set(map(type, outcomes)) == {str, list} or set(outcomes) == {"invalid_request"}


@pytest.mark.parametrize("spec", [ClipSpec(options={"g": "5"}), ClipSpec(codec="libvpx-vp9", container="webm")])
def test_changed_bytes_cost_an_error_at_most(spec):
    data = clip(spec)
    changes = random.Random(16)
    for _ in range(12):
        changed = bytearray(data)
        for _ in range(changes.choice((1, 3, 30))):
            changed[changes.randrange(len(data))] = changes.randrange(256)
        with contextlib.suppress(MediaError):
            assert 1 <= len(list(clip_frames(bytes(changed), LIMITS, 4))) <= 4


@pytest.mark.parametrize(
    "content",
    [
        struct.pack(">III", 0, 1, 2**32 - 1),  # one size for 4,294,967,295 samples
        struct.pack(">III", 0, 0, 2**32 - 1),  # as many sizes, of which none is there
    ],
)
def test_sample_tables_larger_than_the_file_are_damaged(mp4, content):
    rejected("invalid_request", "damaged", lambda: read_clip_header(with_box(mp4, STBL + "stsz", content), LIMITS))


def test_boxes_in_boxes_are_damaged(mp4):
    nested = b""
    for _ in range(20_000):
        nested = box("moov", nested)
    rejected("invalid_request", "damaged", lambda: read_clip_header(mp4[: box_at(mp4, "moov")[0] - 8] + nested, LIMITS))


def test_very_many_tracks_are_rejected(mp4):
    start, end = box_at(mp4, "moov")
    track = next(mp4[first - 8 : last] for kind, first, last in boxes(mp4, start, end) if kind == b"trak")
    first, last = box_at(mp4, "moov/mvhd")
    with pytest.raises(MediaError):
        read_clip_header(mp4[: start - 8] + box("moov", mp4[first - 8 : last], track * 1000), LIMITS)


@pytest.mark.parametrize("count", [1_000, 100_000])
def test_very_many_edits_are_rejected(mp4, count):
    edits = struct.pack(">II", 0, count) + struct.pack(">IiI", 1000, 1024, 65536) * count
    with pytest.raises(MediaError) as caught:
        read_clip_header(with_box(mp4, "moov/trak/edts/elst", edits), LIMITS)
    assert caught.value.code == "too_large"


def test_a_time_scale_of_zero_is_an_error_at_most(mp4):
    start, end = box_at(mp4, "moov/trak/mdia/mdhd")
    content = mp4[start : start + 12] + bytes(4) + mp4[start + 16 : end]
    assert len(numbers(with_box(mp4, "moov/trak/mdia/mdhd", content), 4)) <= 4


def test_the_file_of_a_clip_has_a_limit_of_its_own():
    limits = MediaLimits(max_bytes=1, max_clip_bytes=5, allowed_hosts=("a.example",))
    of_clips = clip_file_limits(limits)
    assert (of_clips.max_bytes, of_clips.noun, of_clips.allowed_hosts) == (5, "clip", ("a.example",))
    assert limits.noun == "picture"
