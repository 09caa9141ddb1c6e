"""py: every format, every limit, every way out of the house. Nothing but loopback is listened on or dialled."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpcore
import pytest
from PIL import Image, ImageDraw

from llava_sessions.config import MediaLimits
from llava_sessions.media import sources
from llava_sessions.media.addresses import is_public_address
from llava_sessions.media.decoder import DecodedPicture, load_bytes
from llava_sessions.media.fetch import Fetcher, resolve_host
from llava_sessions.media.limits import MediaError
from llava_sessions.media.sources import is_remote, load_base64, load_path, read_base64
from tests.support.private_hosts import PRIVATE_HOSTS

LIMITS = MediaLimits()
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
PUBLIC = "93.184.215.14"  # any public address: the test backend never dials it
NAME = "pictures.example"
PATIENCE_S = 20.0  # what is refused at once takes milliseconds; otherwise minutes, or it never ends


def encode(image: Image.Image, picture_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, picture_format, **options)
    return buffer.getvalue()


def two_colours() -> Image.Image:
    """24 x 16: left half red, right half blue."""
    image = Image.new("RGB", (24, 16), RED)
    ImageDraw.Draw(image).rectangle((12, 0, 23, 15), fill=BLUE)
    return image


PNG = encode(two_colours(), "PNG")


def near(got: object, want: tuple[int, int, int], tolerance: int = 12) -> bool:
    return isinstance(got, tuple) and all(abs(a - b) <= tolerance for a, b in zip(got, want, strict=True))


def refused(code: str, words: str, call: Callable[[], object]) -> MediaError:
    """Asserts that `call` raises a MediaError of `code` whose message has `words`; gives it back."""
    with pytest.raises(MediaError) as caught:
        call()
    assert caught.value.code == code, caught.value.message
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    return caught.value


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, packed: bytes = b"") -> bytes:
    """A PNG whose header may declare anything."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", packed or zlib.compress(b"")) + png_chunk(b"IEND", b"")


def tiff_of(entries: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    """A little-endian TIFF from (tag, type, count, value or offset); `rest` follows the directory."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + rest


# ---- formats and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_decoded_and_named(picture_format: str) -> None:
    data = encode(two_colours(), picture_format, **({"quality": 95} if picture_format in ("JPEG", "WEBP") else {}))
    picture = load_bytes(data, LIMITS)
    assert isinstance(picture, DecodedPicture)
    assert (picture.format, picture.width, picture.height) == (picture_format, 24, 16)
    assert picture.image.mode == "RGB"
    assert picture.image.size == (24, 16)
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert near(picture.image.getpixel((3, 8)), RED)
    assert near(picture.image.getpixel((20, 8)), BLUE)


@pytest.mark.parametrize(
    ("mode", "colour", "picture_format", "options", "want"),
    [
        ("1", 1, "PNG", {}, WHITE),
        ("L", 100, "PNG", {}, (100, 100, 100)),
        ("L", 100, "JPEG", {}, (100, 100, 100)),
        ("LA", (100, 0), "PNG", {}, WHITE),
        ("LA", (0, 128), "PNG", {}, (127, 127, 127)),
        ("RGBA", (255, 0, 0, 0), "PNG", {}, WHITE),
        ("RGBA", (255, 0, 0, 255), "PNG", {}, RED),
        ("RGBA", (255, 0, 0, 128), "PNG", {}, (255, 127, 127)),
        ("RGBA", (0, 0, 255, 0), "WEBP", {"lossless": True}, WHITE),
        ("RGBA", (0, 0, 255, 255), "TIFF", {}, BLUE),
        ("RGB", (0, 0, 255), "PNG", {"transparency": (0, 0, 255)}, WHITE),
        ("L", 0, "PNG", {"transparency": 0}, WHITE),
        ("I;16", 65535, "PNG", {}, WHITE),
        ("I;16", 32768, "PNG", {}, (127, 127, 127)),
        ("I;16", 257 * 10, "TIFF", {}, (10, 10, 10)),
        ("CMYK", (0, 255, 255, 0), "JPEG", {}, RED),
        ("CMYK", (0, 255, 255, 0), "TIFF", {}, RED),
        ("YCbCr", (76, 85, 255), "JPEG", {}, RED),
        ("RGB", BLUE, "TIFF", {"compression": "tiff_lzw"}, BLUE),
        ("RGB", BLUE, "TIFF", {"compression": "tiff_adobe_deflate"}, BLUE),
        ("RGB", BLUE, "JPEG", {"progressive": True}, BLUE),
    ],
)
def test_every_mode_becomes_opaque_rgb(mode, colour, picture_format, options, want) -> None:
    picture = load_bytes(encode(Image.new(mode, (8, 8), colour), picture_format, **options), LIMITS)
    assert picture.image.mode == "RGB"
    assert near(picture.image.getpixel((4, 4)), want, tolerance=4)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    image = Image.new("I;16", (256, 1))
    for x in range(256):
        image.putpixel((x, 0), 257 * x)
    limits = replace(LIMITS, max_aspect=256)
    for picture_format in ("PNG", "TIFF"):
        row = load_bytes(encode(image, picture_format), limits).image
        assert [row.getpixel((x, 0))[0] for x in range(256)] == list(range(256))


def test_palette_with_and_without_transparency() -> None:
    palette = two_colours().quantize(4)
    assert load_bytes(encode(palette, "PNG"), LIMITS).image.getpixel((3, 3)) == RED
    clear = palette.getpixel((3, 3))
    for picture_format in ("PNG", "GIF"):
        picture = load_bytes(encode(palette, picture_format, transparency=clear), LIMITS)
        assert picture.image.getpixel((3, 3)) == WHITE
        assert picture.image.getpixel((20, 3)) == BLUE


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_pixels_without_a_standard_range_are_unsupported(mode: str) -> None:
    data = encode(Image.new(mode, (8, 8)), "TIFF")
    refused("unsupported_media", f"mode {mode}", lambda: load_bytes(data, LIMITS))


@pytest.mark.parametrize("picture_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(picture_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if picture_format == "WEBP" else {}
    data = encode(frames[0], picture_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
    assert load_bytes(data, LIMITS).image.getpixel((8, 8)) == RED


def test_a_picture_outlives_its_file_and_can_be_written_to() -> None:
    image = load_bytes(PNG, LIMITS).image
    image.putpixel((0, 0), WHITE)
    assert type(image) is Image.Image
    assert image.getpixel((0, 0)) == WHITE


# Where the red corner of a 12 x 8 picture, stored at the top left, is seen, and whether the sides swap: EXIF 2.32.
CORNERS = {
    1: ((0, 0), False),
    2: ((11, 0), False),
    3: ((11, 7), False),
    4: ((0, 7), False),
    5: ((0, 0), True),
    6: ((7, 0), True),
    7: ((7, 11), True),
    8: ((0, 11), True),
}


@pytest.mark.parametrize("orientation", sorted(CORNERS))
@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "TIFF", "TIFF deflate"])
def test_exif_orientation_is_applied_once(picture_format: str, orientation: int) -> None:
    image = Image.new("RGB", (12, 8), BLUE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    name, _, deflate = picture_format.partition(" ")
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(name, {})
    if deflate:
        options = {"compression": "tiff_adobe_deflate"}
    picture = load_bytes(encode(image, name, exif=exif, **options), LIMITS)
    corner, swapped = CORNERS[orientation]
    assert (picture.width, picture.height) == picture.image.size == ((8, 12) if swapped else (12, 8))
    red = max(
        ((x, y) for x in range(picture.width) for y in range(picture.height)),
        key=lambda at: picture.image.getpixel(at)[0] - picture.image.getpixel(at)[2],
    )
    assert red == corner


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense" * 9])
def test_broken_exif_does_not_spoil_a_good_picture(exif: bytes) -> None:
    for picture_format in ("JPEG", "PNG", "WEBP"):
        assert load_bytes(encode(two_colours(), picture_format, exif=exif), LIMITS).width == 24


# ---- damage and strangers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_cut_anywhere_is_damaged_or_whole(picture_format: str) -> None:
    noise = Image.frombytes("RGB", (40, 40), bytes((i * 37 + i // 7) % 256 for i in range(4800)))
    data = encode(noise, picture_format)
    half = refused("invalid_request", "damaged", lambda: load_bytes(data[: len(data) // 2], LIMITS))
    assert picture_format in half.message
    for end in range(1, len(data), max(1, len(data) // 60)):
        wanted = {"invalid_request", "whole"} if end >= 20 else {"invalid_request", "unsupported_media"}
        assert outcome(data[:end]) in wanted, end  # before byte 20 it is not yet known to be a picture


def outcome(data: bytes) -> str:
    """The error code, or "whole"."""
    try:
        assert load_bytes(data, LIMITS).image.mode == "RGB"
    except MediaError as error:
        return error.code
    return "whole"


@pytest.mark.filterwarnings("ignore")  # Pillow warns of every oddity; pytest takes away the filter that py sets
def test_flipped_bytes_never_raise_anything_else() -> None:
    seed = 1
    for picture_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        good = encode(two_colours(), picture_format)
        for _ in range(150):
            data = bytearray(good)
            for _ in range(3):
                seed = seed * 1103515245 + 12345 & 0x7FFFFFFF
                data[(seed >> 8) % len(data)] = seed & 0xFF
            assert outcome(bytes(data)) in {"whole", "invalid_request", "too_large", "unsupported_media"}


def test_a_wrong_png_checksum_is_damage() -> None:
    data = bytearray(PNG)
    data[29] ^= 0xFF  # in the checksum of IHDR
    refused("invalid_request", "damaged", lambda: load_bytes(bytes(data), LIMITS))


@pytest.mark.parametrize(
    "data",
    [
        b"this is no picture",
        b"BMW is a maker of cars, and this is a sentence about them",
        b"<svg xmlns='http://www.w3.org/2000/svg'><rect/></svg>",
        b"<?xml version='1.0'?><svg/>",
        b"<!doctype html><html><img src=x></html>",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
        b"\0\0\0\x1cftypavif\0\0\0\0",
        b"II\x2b\0\x08\0\0\0",  # BigTIFF
        b"PK\x03\x04",
        b"\x00",
        encode(two_colours(), "ICO"),
        encode(two_colours(), "PPM"),
        encode(two_colours(), "TGA"),
    ],
)
def test_what_is_no_picture_is_unsupported(data: bytes) -> None:
    error = refused("unsupported_media", "PNG, JPEG, WEBP, GIF, BMP or TIFF", lambda: load_bytes(data, LIMITS))
    assert "svg" not in error.message
    assert "BMW" not in error.message


# ---- size ------------------------------------------------------------------------------------------------------------


def resident_peak_mib(code: str, data: bytes) -> float:
    """Peak memory of a fresh process that runs `code` with `data` at hand, above what it had before, in MiB."""
    script = (
        "import resource, sys\nfrom llava_sessions import media\nfrom PIL import Image\nImage.init()\n"
        "data = sys.stdin.buffer.read()\nmedia.load_bytes(open(sys.argv[1], 'rb').read(), MediaLimits())\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\nbefore = peak()\n"
        f"{code}\nprint(peak() - before)\n"
    )
    good = Path(os.environ["PYTEST_MEDIA_GOOD"])
    done = subprocess.run([sys.executable, "-c", script, str(good)], input=data, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b"", "Pillow's warnings reached the log"
    return float(done.stdout)


REFUSE = (
    "try: load_bytes(data, MediaLimits())\n"
    "except MediaError as error: assert error.code == 'too_large', error\n"
    "else: raise SystemExit('was not refused')"
)


@pytest.fixture
def good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "good.png"
    path.write_bytes(PNG)
    monkeypatch.setenv("PYTEST_MEDIA_GOOD", str(path))
    monkeypatch.setenv("PYTHONPATH", str(Path(sources.__file__).parents[2]))
    return path


def many_strips() -> bytes:
    count = 5_000_000
    entries = [
        *((256, 4, 1, 2), (257, 4, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)),
        *((273, 1, count, 200), (277, 3, 1, 1), (278, 4, 1, 1)),
    ]
    return tiff_of(entries, b"\x01" * count + b"\0" * 300)


def huge_tile() -> bytes:
    side = 16_384
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(side)) for _ in range(side)) + packer.flush()
    offset = 8 + 2 + 12 * 10 + 4
    entries = [
        *((256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)),
        *((322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, offset), (325, 4, 1, len(packed))),
    ]
    return tiff_of(entries, packed)


def bomb(name: str) -> bytes:
    if name == "PNG":
        return png_of(50_000, 50_000)
    if name == "PNG below Pillow's own limit":
        return png_of(12_000, 12_000)
    if name == "GIF":
        return b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;"
    if name == "BMP":
        header = struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 60, 0, 0, 54) + header + b"\0" * 6
    if name == "WEBP":  # a VP8X canvas of 12000 x 12000 over a tiny lossless frame
        frame = encode(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
        canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (11_999).to_bytes(3, "little") * 2
        anim = b"ANIM" + struct.pack("<I", 6) + bytes(6)
        anmf = b"ANMF" + struct.pack("<I", 16 + len(frame)) + bytes(16) + frame
        body = b"WEBP" + canvas + anim + anmf
        return b"RIFF" + struct.pack("<I", len(body)) + body
    if name == "JPEG":
        data = bytearray(encode(Image.new("L", (8, 8)), "JPEG"))
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
        return bytes(data)
    return {"TIFF strips": many_strips, "TIFF tile": huge_tile}[name]()


BOMBS = ["PNG", "PNG below Pillow's own limit", "GIF", "BMP", "WEBP", "JPEG", "TIFF strips", "TIFF tile"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once_and_without_their_memory(name: str, good_file: Path) -> None:
    data = bomb(name)
    started = time.perf_counter()
    refused("too_large", "picture", lambda: load_bytes(data, LIMITS))
    assert time.perf_counter() - started < PATIENCE_S
    assert resident_peak_mib(REFUSE, data) < 48 + len(data) / 2**20


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_too_large_even_where_warnings_are_errors() -> None:
    for side in (12_000, 50_000):  # Pillow warns of the first and raises on the second
        refused("too_large", "pixels", lambda side=side: load_bytes(png_of(side, side), LIMITS))


def test_more_scans_than_any_encoder_writes_are_refused_quickly() -> None:
    good = encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    last_scan = good[good.rindex(b"\xff\xda") : -2]
    assert load_bytes(good[:-2] + last_scan * 20 + b"\xff\xd9", LIMITS).width == 2000
    data = good[:-2] + last_scan * 50_000 + b"\xff\xd9"
    started = time.perf_counter()
    refused("too_large", "scans", lambda: load_bytes(data, LIMITS))
    assert time.perf_counter() - started < PATIENCE_S


def test_scan_markers_that_are_none_are_not_counted() -> None:
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    good = encode(two_colours(), "JPEG")
    appended = b"\0\0" + b"\xff\xda\0\2" * 200  # what a phone appends to its pictures can hold anything
    assert load_bytes(good[:2] + comment + good[2:] + appended, LIMITS).width == 24


def test_max_pixels_and_max_bytes_are_exact() -> None:
    assert load_bytes(PNG, replace(LIMITS, max_pixels=24 * 16, max_bytes=len(PNG))).width == 24
    refused("too_large", "24 x 16", lambda: load_bytes(PNG, replace(LIMITS, max_pixels=24 * 16 - 1)))
    refused("too_large", f"{len(PNG)} bytes", lambda: load_bytes(PNG, replace(LIMITS, max_bytes=len(PNG) - 1)))


def test_a_shape_that_a_resize_would_blow_up_is_too_large() -> None:
    strip = encode(Image.new("RGB", (1001, 10)), "PNG")
    refused("too_large", "100:1", lambda: load_bytes(strip, LIMITS))
    assert load_bytes(encode(Image.new("RGB", (10, 1000)), "PNG"), LIMITS).height == 1000


def test_a_picture_without_pixels_or_bytes() -> None:
    refused("invalid_request", "damaged", lambda: load_bytes(png_of(0, 5), LIMITS))
    refused("invalid_request", "empty", lambda: load_bytes(b"", LIMITS))


# ---- base64 and data URLs --------------------------------------------------------------------------------------------

B64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "text",
    [
        B64,
        base64.urlsafe_b64encode(PNG).decode(),
        B64.rstrip("="),
        "\n".join(B64[i : i + 76] for i in range(0, len(B64), 76)) + "\r\n",
        f"  {B64} \t",
        f"data:image/png;base64,{B64}",
        f"DATA:image/PNG;charset=x;BASE64,{B64}",
        f"data:;base64,{B64}",
        f"data:text/html;base64,{B64}",  # judged by content
        "data:image/png;base64," + B64.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ],
)
def test_base64_as_people_send_it(text: str) -> None:
    assert load_base64(text, LIMITS).sha256 == hashlib.sha256(PNG).hexdigest()
    if text.lower().startswith("data:"):
        assert load_path(text, LIMITS).sha256 == hashlib.sha256(PNG).hexdigest()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("====", "empty"),
        ("not base64!", "not valid base64"),
        (B64[:20] + "=" + B64[20:], "not valid base64"),
        (B64 + "ä", "not valid base64"),
        ("A", "not valid base64"),
        ("\ud800AAAA", "not valid base64"),
        (None, "NoneType"),
        (b"AAAA", "bytes"),
        (["AAAA"], "list"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png,%89PNG", "not base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,%", "not valid base64"),
        ("data:image/png;base64,%ff%fe", "not valid base64"),
    ],
)
def test_what_is_not_base64(text: object, words: str) -> None:
    refused("invalid_request", words, lambda: load_base64(text, LIMITS))


def test_urlsafe_digits_are_told_from_noise() -> None:
    data = b"\xfb\xff\xbe" * 5
    assert read_base64("-_--" + "+/++", LIMITS) == base64.b64decode("+/++" * 2)
    assert read_base64(base64.urlsafe_b64encode(data).decode(), LIMITS) == data


def test_base64_is_measured_before_it_is_decoded() -> None:
    limits = replace(LIMITS, max_bytes=300)
    assert len(read_base64(base64.b64encode(bytes(300)).decode(), limits)) == 300
    for size in (301, 3_000_000):
        text = base64.b64encode(bytes(size)).decode()
        refused("too_large", f"{size} bytes", lambda text=text: read_base64(text, limits))
        refused("too_large", f"{size} bytes", lambda text=text: load_path(f"data:;base64,{text}", limits))
    # Not valid, yet too long: the length is looked at first.
    refused("too_large", "bytes", lambda: read_base64("!" * 5000, limits))


def test_text_as_a_picture() -> None:
    text = base64.b64encode(b"hello, I am a text").decode()
    refused("unsupported_media", "PNG", lambda: load_base64(text, LIMITS))


# ---- kinds of sources ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("https://x.example/a.png", True),
        (" HTTPS://x.example/a.png", True),
        ("s3://bucket/key", True),
        ("http://x.example/a.png", False),
        ("data:image/png;base64,AA", False),
        ("/srv/a.png", False),
        ("file:///srv/a.png", False),
        ("", False),
        (None, False),
    ],
)
def test_is_remote(source: object, want: bool) -> None:
    assert is_remote(source) is want


@pytest.mark.parametrize(
    "source", ["http://x.example/a.png", "ftp://x/y", "gopher://x", "javascript:alert(1)", "blob:x"]
)
def test_other_schemes_are_refused(source: str) -> None:
    refused("invalid_request", "scheme", lambda: load_path(source, LIMITS, fetch=None))


@pytest.mark.parametrize("source", ["", "  ", None, 7, {"url": "x"}, b"https://x.example"])
def test_what_is_no_source(source: object) -> None:
    refused("invalid_request", "wanted", lambda: load_path(source, LIMITS))


def test_fetch_is_given_the_remote_source_and_its_bytes_are_decoded() -> None:
    seen = []

    def fetch(source: str, limits: MediaLimits) -> bytes:
        seen.append((source, limits))
        return PNG

    assert load_path(" https://x.example/a ", LIMITS, fetch).width == 24
    assert seen == [("https://x.example/a", LIMITS)]


def test_an_overlong_source() -> None:
    refused("invalid_request", "characters", lambda: load_path("https://x.example/" + "a" * 9000, LIMITS))


# ---- local paths -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """root/ with pictures and links in it, outside/ beside it, and root-too/, whose name begins like the root's."""
    for name in ("root/inner", "outside", "root-too"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(PNG)
    (tmp_path / "root/ä b.png").write_bytes(PNG)
    (tmp_path / "root/escape.png").symlink_to(tmp_path / "outside/a.png")
    (tmp_path / "root/door").symlink_to(tmp_path / "outside")
    (tmp_path / "root/fine.png").symlink_to(tmp_path / "root/inner/a.png")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root/loop")
    os.mkfifo(tmp_path / "root/pipe")
    return tmp_path


def test_local_paths_below_a_root(shelf: Path) -> None:
    limits = replace(LIMITS, local_roots=("/nowhere", str(shelf / "root")))
    for source in (
        f"{shelf}/root/inner/a.png",
        f"{shelf}/root/fine.png",
        f"{shelf}/root/inner/../ä b.png",
        f"file://{shelf}/root/inner/a.png",
        f"file://localhost{shelf}/root/%C3%A4%20b.png",
        f"FILE:{shelf}/root/inner/a.png",
    ):
        assert load_path(source, limits).width == 24, source


def test_a_root_may_itself_be_a_link(shelf: Path) -> None:
    (shelf / "alias").symlink_to(shelf / "root")
    limits = replace(LIMITS, local_roots=(f"{shelf}/alias/",))
    assert load_path(f"{shelf}/alias/inner/a.png", limits).width == 24


def test_local_paths_that_leave_the_roots(shelf: Path) -> None:
    limits = replace(LIMITS, local_roots=(str(shelf / "root"),))
    for source in (
        f"{shelf}/outside/a.png",
        f"{shelf}/root/../outside/a.png",
        f"{shelf}/root/inner/../../outside/a.png",
        f"{shelf}/root/escape.png",
        f"{shelf}/root/door/a.png",
        f"{shelf}/root/door/../outside/a.png",
        f"{shelf}/root-too/a.png",
        f"{shelf}/root",
        f"file://{shelf}/root/%2e%2e/outside/a.png",
        f"{shelf}/outside/is-not-there.png",
        "/etc/passwd",
        "a.png",
        f"{shelf}/root/inner/a.png\0.txt",
        "\ud800",
    ):
        error = refused("invalid_request", "outside", lambda source=source: load_path(source, limits))
        assert str(shelf) not in error.message


def test_local_paths_are_refused_by_default(shelf: Path) -> None:
    for source in (f"{shelf}/root/inner/a.png", f"file://{shelf}/root/inner/a.png"):
        refused("invalid_request", "not served", lambda source=source: load_path(source, LIMITS))


def test_local_things_that_are_no_picture_file(shelf: Path) -> None:
    limits = replace(LIMITS, local_roots=(str(shelf / "root"),))
    refused("invalid_request", "not a regular file", lambda: load_path(f"{shelf}/root/inner", limits))
    refused("invalid_request", "not a regular file", lambda: load_path(f"{shelf}/root/pipe", limits))
    refused("invalid_request", "does not exist", lambda: load_path(f"{shelf}/root/none.png", limits))
    refused("invalid_request", "cannot be read", lambda: load_path(f"{shelf}/root/loop", limits))
    refused("invalid_request", "cannot be read", lambda: load_path(f"{shelf}/root/{'n' * 300}", limits))
    for url in (f"file://elsewhere{shelf}/root/inner/a.png", "file://", "file:relative.png", "file:///a.png?x=1"):
        refused("invalid_request", "file URL", lambda url=url: load_path(url, limits))
    small = replace(limits, max_bytes=len(PNG) - 1)
    refused("too_large", "bytes", lambda: load_path(f"{shelf}/root/inner/a.png", small))


# ---- https: a loopback server with a certificate of its own ----------------------------------------------------------


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and a certificate of that authority for pictures.example and *.cdn.example."""
    if not shutil.which("openssl"):
        pytest.skip("the openssl command is needed to make a certificate")
    folder = tmp_path_factory.mktemp("certificates")
    names = f"DNS:{NAME},DNS:*.cdn.example,IP:{PUBLIC},IP:2606:2800:21f:cb07:6820:80da:af6b:8b2c"
    (folder / "leaf.ext").write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n")
    signed = ["-out", "leaf.pem", "-days", "2", "-extfile", "leaf.ext"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for command in (
        ["req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test authority"],
        ["req", *key, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=leaf"],
        ["x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", *signed],
    ):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    return folder


Answer = Callable[[ssl.SSLSocket], None]


class Server:
    """A TLS server on loopback that answers each path as it is told, byte for byte, and counts who knocked."""

    def __init__(self, certificates: Path) -> None:
        self.answers: dict[str, Answer | bytes] = {}
        self.requests: list[str] = []  # whole request heads
        self.names: list[str | None] = []  # asked for by SNI
        self.connections = 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificates / "leaf.pem", certificates / "leaf.key")
        self.context.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            plain.settimeout(10)
            with self.context.wrap_socket(plain, server_side=True) as connection:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    piece = connection.recv(65536)
                    if not piece:
                        return
                    head += piece
                self.requests.append(head.decode())
                answer = self.answers.get(head.split()[1].decode(), b"HTTP/1.1 404 Not Found\r\n\r\n")
                if callable(answer):
                    answer(connection)
                else:
                    connection.sendall(answer)
        except OSError:
            pass  # the client hung up, or did not trust us
        finally:
            plain.close()

    def close(self) -> None:
        self.listener.close()


class Rerouted(httpcore.NetworkBackend):
    """Notes where a connection was wanted, and makes it to the loopback server instead."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.dialled: list[tuple[str, int]] = []

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *_: object) -> httpcore.NetworkStream:
        self.dialled.append((host, port))
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self.port, timeout=timeout)


@pytest.fixture
def server(certificates: Path) -> Iterator[Server]:
    running = Server(certificates)
    yield running
    running.close()


@pytest.fixture
def route(server: Server) -> Rerouted:
    return Rerouted(server.port)


@pytest.fixture
def fetcher(certificates: Path, route: Rerouted) -> Fetcher:
    """Trusts the test authority; every name but one resolves to a public address, which leads to the server."""
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    return Fetcher(resolve=lambda _host, _port: [PUBLIC], backend=route, ssl_context=context)


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", "Content-Type: text/plain", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def test_an_https_picture(server: Server, route: Rerouted, fetcher: Fetcher) -> None:
    server.answers["/a%20b.png?size=%C3%A4"] = ok(PNG)
    picture = load_path("https://Pictures.Example./a b.png?size=ä#part", LIMITS, fetcher)
    assert picture.sha256 == hashlib.sha256(PNG).hexdigest()
    assert route.dialled == [(PUBLIC, 443)]
    assert server.names == [NAME]
    head = server.requests[0].lower()
    assert head.startswith("get /a%20b.png?size=%c3%a4 http/1.1\r\n")
    assert f"host: {NAME}\r\n" in head
    assert "accept-encoding: identity\r\n" in head
    assert "cookie" not in head
    assert "authorization" not in head


@pytest.mark.parametrize("host", [PUBLIC, "[2606:2800:21f:cb07:6820:80da:af6b:8b2c]"])
def test_a_public_address_in_the_url(host: str, server: Server, route: Rerouted, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(PNG)
    assert load_path(f"https://{host}:443/a.png", LIMITS, fetcher).width == 24
    assert route.dialled == [(host.strip("[]"), 443)]
    assert f"Host: {host}\r\n" in server.requests[0]


def test_the_certificate_must_be_for_the_name_and_from_a_known_authority(server: Server, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(PNG)
    error = refused("invalid_request", "certificate", lambda: fetcher("https://other.example/a.png", LIMITS))
    assert "ostname mismatch" in error.message
    strict = replace(fetcher, ssl_context=httpcore.default_ssl_context())
    refused("invalid_request", "certificate", lambda: strict(f"https://{NAME}/a.png", LIMITS))
    assert server.connections == 2
    assert server.requests == []


def test_proxies_of_the_environment_are_not_used(server, fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/a.png"] = ok(PNG)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetcher(f"https://{NAME}/a.png", LIMITS) == PNG


def test_many_threads_fetch_and_decode_at_once(server: Server, fetcher: Fetcher) -> None:
    bodies = {f"/{i}": encode(Image.new("RGB", (10 + i, 10)), "PNG") for i in range(24)}
    server.answers.update({path: ok(body) for path, body in bodies.items()})
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda path: load_path(f"https://{NAME}{path}", LIMITS, fetcher), bodies))
    assert [picture.width for picture in pictures] == [10 + i for i in range(24)]


# ---- https: addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_addresses_in_any_spelling(host: str, server: Server, route: Rerouted, fetcher: Fetcher) -> None:
    real = replace(fetcher, resolve=resolve_host)  # numbers and localhost need no name server
    server.answers["/latest/meta-data"] = ok(PNG)
    refused("invalid_request", "", lambda: load_path(f"https://{host}/latest/meta-data", LIMITS, real))
    assert route.dialled == []
    assert server.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        f"https://user@{NAME}/a.png",
        f"https://user:secret@{NAME}/a.png",
        f"https://{NAME}@127.0.0.1/a.png",
        f"https://127.0.0.1\\@{NAME}/a.png",
        f"https://{NAME}\\@127.0.0.1/a.png",
        f"https://{NAME}:8443/a.png",
        f"https://{NAME}:80/a.png",
        f"https://{NAME}:0/a.png",
        f"https://{NAME}:99999/a.png",
        f"https://{NAME}:x/a.png",
        f"https://{NAME}:443:443/a.png",
        f"https://[{NAME}]/a.png",
        f"https://[::1]{NAME}/a.png",
        "https://[::1/a.png",
        "https://[::1.png",
        "https:///a.png",
        "https://",
        "https:a.png",
        "https://./a.png",
        "https://a..example/a.png",
        f"https://{'a' * 64}.example/a.png",
        f"https://{'a.' * 130}example/a.png",
        "https://%31%32%37.0.0.1/a.png",
        "https://pictures.example%00.evil.example/a.png",
        "https://-a.example/a.png",
        f"https://{NAME}/a.png\r\nX-Injected: 1",
        f"https://{NAME}/a\tb.png",
        f"https://{NAME} /a.png",
        "https://pictures\u2024example/a.png",
    ],
)
def test_bad_urls(url: str, server: Server, route: Rerouted, fetcher: Fetcher) -> None:
    error = refused("invalid_request", "", lambda: load_path(url, LIMITS, fetcher))
    assert route.dialled == []
    assert server.connections == 0
    assert "secret" not in error.message
    assert "a.png" not in error.message


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", PUBLIC, "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"],
)
def test_public_addresses(address: str) -> None:
    assert is_public_address(address)


def test_an_address_of_one_interface_is_not_public() -> None:
    assert not is_public_address("2606:4700::1111%eth0")


def test_one_private_answer_among_public_ones(server: Server, route: Rerouted, fetcher: Fetcher) -> None:
    for answers in ([PUBLIC, "10.0.0.7"], ["::1", PUBLIC], [PUBLIC, "fe80::1%eth0"], [PUBLIC, "nonsense"]):
        mixed = replace(fetcher, resolve=lambda _host, _port, answers=answers: answers)
        error = refused(
            "invalid_request", "not a public address", lambda mixed=mixed: mixed(f"https://{NAME}/a", LIMITS)
        )
        assert "10.0.0.7" not in error.message  # what the inside looks like is no one's business
    assert route.dialled == []
    assert server.connections == 0


def test_a_name_that_changes_its_mind_is_asked_once(server: Server, route: Rerouted, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(PNG)
    answers = [[PUBLIC], ["127.0.0.1"]]
    rebinding = replace(fetcher, resolve=lambda _host, _port: answers.pop(0))
    assert rebinding(f"https://{NAME}/a.png", LIMITS) == PNG
    assert route.dialled == [(PUBLIC, 443)]
    assert answers == [["127.0.0.1"]]


def test_a_name_that_is_not_found(fetcher: Fetcher) -> None:
    def unknown(_host: str, _port: int) -> list[str]:
        raise socket.gaierror("no such name")

    for resolve in (unknown, lambda _host, _port: []):
        error = refused(
            "invalid_request",
            "not found",
            lambda resolve=resolve: replace(fetcher, resolve=resolve)(f"https://{NAME}/a.png?token=secret", LIMITS),
        )
        assert NAME in error.message
        assert "secret" not in error.message


class Unreachable(Rerouted):
    """The first addresses are dead, as many as are named."""

    dead = 1
    timeout_s: float | None = None

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *_: object) -> httpcore.NetworkStream:
        if len(self.dialled) < self.dead:
            self.dialled.append((host, port))
            self.timeout_s = timeout
            raise httpcore.ConnectTimeout("dead")
        return super().connect_tcp(host, port, timeout)


def test_the_next_address_is_tried(server: Server, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(PNG)
    route = Unreachable(server.port)
    two = replace(fetcher, backend=route, resolve=lambda _host, _port: ["2606:4700::1111", PUBLIC])
    assert two(f"https://{NAME}/a.png", LIMITS) == PNG
    assert route.dialled == [("2606:4700::1111", 443), (PUBLIC, 443)]
    assert route.timeout_s is not None
    assert 0 < route.timeout_s <= LIMITS.fetch_timeout_s / 2  # the dead one leaves time for the next


def test_a_refused_connection_and_no_tls(server: Server, fetcher: Fetcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    nobody = replace(fetcher, backend=Rerouted(port))
    refused("invalid_request", "refused the connection", lambda: nobody(f"https://{NAME}/a.png", LIMITS))
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def speak_plainly() -> None:
            connection, _ = plain.accept()
            with connection, suppress(OSError):
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        threading.Thread(target=speak_plainly, daemon=True).start()
        wrong = replace(fetcher, backend=Rerouted(plain.getsockname()[1]))
        refused("invalid_request", "TLS", lambda: wrong(f"https://{NAME}/a.png", LIMITS))


# ---- https: allowed hosts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        (NAME, True),
        ("PICTURES.example.", True),
        ("a.cdn.example", True),
        ("cdn.example", False),
        ("evilcdn.example", False),
        ("x.pictures.example", False),
        ("pictures.example.evil.example", False),
        (PUBLIC, False),
    ],
)
def test_allowed_hosts(host: str, allowed: bool, server: Server, fetcher: Fetcher) -> None:
    limits = replace(LIMITS, allowed_hosts=("Pictures.example", "*.cdn.example"))
    server.answers["/a.png"] = ok(PNG)
    if allowed:
        assert fetcher(f"https://{host}/a.png", limits) == PNG
    else:
        refused("invalid_request", "not served here", lambda: fetcher(f"https://{host}/a.png", limits))
        assert server.connections == 0


def test_an_allowed_host_must_still_be_public(server: Server, fetcher: Fetcher) -> None:
    private = replace(fetcher, resolve=lambda _host, _port: ["10.1.2.3"])
    limits = replace(LIMITS, allowed_hosts=(NAME, "127.0.0.1"))
    refused("invalid_request", "not a public address", lambda: private(f"https://{NAME}/a.png", limits))
    refused("invalid_request", "not a public address", lambda: private("https://127.0.0.1/a.png", limits))
    assert server.connections == 0


# ---- https: redirects ------------------------------------------------------------------------------------------------


def test_three_redirects_are_followed_and_four_are_not(server: Server, route: Rerouted, fetcher: Fetcher) -> None:
    server.answers["/1"] = redirect("/2", 301)
    server.answers["/2"] = redirect(f"https://{NAME}/3?x=1", 307)
    server.answers["/3?x=1"] = redirect("//a.cdn.example/4", 308)
    server.answers["/4"] = ok(PNG)
    assert fetcher(f"https://{NAME}/1", LIMITS) == PNG
    assert server.names == [NAME, NAME, NAME, "a.cdn.example"]
    server.answers["/0"] = redirect("/1", 303)
    refused("invalid_request", "more than 3 times", lambda: fetcher(f"https://{NAME}/0", LIMITS))
    server.answers["/loop"] = redirect("/loop")
    before = server.connections
    refused("invalid_request", "more than 3 times", lambda: fetcher(f"https://{NAME}/loop", LIMITS))
    assert server.connections - before == 4


@pytest.mark.parametrize(
    "location",
    [
        "https://127.0.0.1/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://2130706433/x",
        "https://inside.example/x",
        "http://pictures.example/x",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "s3://bucket/key",
        "https://user:secret@pictures.example/x",
        "https://pictures.example:8443/x",
        "https://[::1",
        "/" + "x" * 9000,
    ],
)
def test_redirects_to_where_no_one_may_go(location: str, server: Server, route: Rerouted, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = redirect(location)
    inside = {"inside.example": ["10.0.0.1"]}
    careful = replace(fetcher, resolve=lambda host, _port: inside.get(host, [PUBLIC]))
    error = refused("invalid_request", "", lambda: careful(f"https://{NAME}/a.png", LIMITS))
    assert route.dialled == [(PUBLIC, 443)]
    assert server.connections == 1
    assert "secret" not in error.message


def test_a_refusal_says_what_is_wrong_with_the_url(server: Server, fetcher: Fetcher) -> None:
    refused("invalid_request", "user name", lambda: fetcher(f"https://user:secret@{NAME}/a.png", LIMITS))
    refused("invalid_request", "port 8443", lambda: fetcher(f"https://{NAME}:8443/a.png", LIMITS))
    refused("invalid_request", "plain spelling", lambda: fetcher("https://0177.0.0.1/a.png", LIMITS))
    refused("invalid_request", "backslash", lambda: fetcher(f"https://{NAME}\\a.png", LIMITS))
    server.answers["/a.png"] = redirect("http://pictures.example/x")
    refused("invalid_request", f"{NAME} redirects to", lambda: fetcher(f"https://{NAME}/a.png", LIMITS))


def test_redirects_off_the_allowed_hosts(server: Server, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = redirect("https://a.cdn.example/b.png")
    server.answers["/b.png"] = ok(PNG)
    limits = replace(LIMITS, allowed_hosts=(NAME,))
    refused("invalid_request", "a.cdn.example", lambda: fetcher(f"https://{NAME}/a.png", limits))
    assert server.connections == 1


# ---- https: answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "answered 500"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 0\r\n\r\n", "answered 206"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "broke off"),
        (b"", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nfew", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000, "broke off"),
        (ok(b""), "empty"),
        (ok(zlib.compress(PNG), "Content-Encoding: deflate"), "compressed"),
        (ok(PNG, "Content-Encoding: br"), "compressed"),
    ],
)
def test_answers_that_are_no_picture(answer: bytes, words: str, server: Server, fetcher: Fetcher) -> None:
    server.answers["/a.png?token=secret"] = answer
    url = f"https://{NAME}/a.png?token=secret"
    assert "secret" not in refused("invalid_request", words, lambda: load_path(url, LIMITS, fetcher)).message


def test_an_html_page_is_no_picture(server: Server, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(b"<!doctype html><title>Log in</title>")
    refused("unsupported_media", "PNG", lambda: load_path(f"https://{NAME}/a.png", LIMITS, fetcher))


def test_a_body_without_a_length(server: Server, fetcher: Fetcher) -> None:
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(PNG[i : i + 50]), PNG[i : i + 50]) for i in range(0, len(PNG), 50))
    server.answers["/chunked"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n"
    server.answers["/closed"] = b"HTTP/1.0 200 OK\r\n\r\n" + PNG
    for path in ("/chunked", "/closed"):
        assert fetcher(f"https://{NAME}{path}", LIMITS) == PNG


def endless(connection: ssl.SSLSocket, head: bytes, sent: list[int]) -> None:
    connection.sendall(head)
    while True:
        connection.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")
        sent.append(65_536)


def test_a_body_too_long_is_cut_while_it_streams(server: Server, fetcher: Fetcher) -> None:
    sent: list[int] = []
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    server.answers["/a.png"] = lambda connection: endless(connection, head, sent)
    limits = replace(LIMITS, max_bytes=200_000)
    refused("too_large", "200000 bytes", lambda: fetcher(f"https://{NAME}/a.png", limits))
    time.sleep(0.1)
    taken = sum(sent)
    time.sleep(0.2)
    assert sum(sent) == taken, "the server could go on sending"


def test_a_declared_length_is_believed_only_when_it_is_too_much(server: Server, fetcher: Fetcher) -> None:
    limits = replace(LIMITS, max_bytes=1000)
    server.answers["/much"] = b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n"  # and then nothing
    started = time.perf_counter()
    refused("too_large", "1000 bytes", lambda: fetcher(f"https://{NAME}/much", limits))
    assert time.perf_counter() - started < PATIENCE_S
    server.answers["/huge"] = b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 19 + b"\r\n\r\n"
    refused("too_large", "1000 bytes", lambda: fetcher(f"https://{NAME}/huge", limits))
    # Says less than it sends: what is beyond the length is not part of the answer.
    server.answers["/less"] = b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + PNG
    assert fetcher(f"https://{NAME}/less", limits) == PNG[:40]
    refused("invalid_request", "damaged", lambda: load_path(f"https://{NAME}/less", limits, fetcher))
    server.answers["/exact"] = ok(bytes(1000))
    assert len(fetcher(f"https://{NAME}/exact", limits)) == 1000


# ---- https: time -----------------------------------------------------------------------------------------------------


def drip(connection: ssl.SSLSocket, head: bytes, piece: bytes) -> None:
    """Never silent for long enough to hit a timeout per read."""
    connection.sendall(head)
    while True:
        connection.sendall(piece)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X-More: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "headers", "chunks", "interim answers"],
)
def test_a_dripping_server_hits_the_deadline(head: bytes, piece: bytes, server: Server, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = lambda connection: drip(connection, head, piece)
    limits = replace(LIMITS, fetch_timeout_s=0.6)
    started = time.perf_counter()
    refused("invalid_request", "within 0.6 s", lambda: fetcher(f"https://{NAME}/a.png", limits))
    assert 0.5 < time.perf_counter() - started < PATIENCE_S


def test_a_silent_server_and_redirects_share_one_deadline(server: Server, fetcher: Fetcher) -> None:
    def slowly(connection: ssl.SSLSocket) -> None:
        time.sleep(0.35)
        connection.sendall(redirect("/a.png"))

    server.answers["/a.png"] = slowly
    limits = replace(LIMITS, fetch_timeout_s=0.8)
    started = time.perf_counter()
    refused("invalid_request", "within 0.8 s", lambda: fetcher(f"https://{NAME}/a.png", limits))
    assert 0.7 < time.perf_counter() - started < PATIENCE_S
    assert server.connections in (2, 3)  # so the redirects were followed, and did not start the clock anew


def test_a_handshake_that_never_comes(fetcher: Fetcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = replace(fetcher, backend=Rerouted(mute.getsockname()[1]))
        limits = replace(LIMITS, fetch_timeout_s=0.5)
        started = time.perf_counter()
        refused("invalid_request", "within 0.5 s", lambda: silent(f"https://{NAME}/a.png", limits))
        assert 0.4 < time.perf_counter() - started < PATIENCE_S


def test_a_name_server_that_never_answers(fetcher: Fetcher) -> None:
    release = threading.Event()

    def stuck(_host: str, _port: int) -> list[str]:
        release.wait(2 * PATIENCE_S)
        return [PUBLIC]

    limits = replace(LIMITS, fetch_timeout_s=0.4)
    started = time.perf_counter()
    refused("invalid_request", "within 0.4 s", lambda: replace(fetcher, resolve=stuck)(f"https://{NAME}/a", limits))
    assert 0.3 < time.perf_counter() - started < PATIENCE_S
    release.set()


# ---- s3: botocore's own stub -----------------------------------------------------------------------------------------

S3_LIMITS = MediaLimits(s3_buckets=("my-pictures",))


@pytest.fixture
def s3() -> Iterator[tuple[object, Fetcher]]:
    """A stub of S3, which fails on any call it was not told of, and a Fetcher that uses it."""
    boto3 = pytest.importorskip("boto3")
    from botocore.stub import Stubber

    session = boto3.session.Session(aws_access_key_id="id", aws_secret_access_key="not-a-key", region_name="us-east-1")
    client = session.client("s3")
    with Stubber(client) as stub:
        yield stub, Fetcher(s3_client=lambda: client)
        stub.assert_no_pending_responses()


def s3_object(data: bytes, declared: int | None = None) -> dict:
    from botocore.response import StreamingBody

    length = len(data) if declared is None else declared
    return {"Body": StreamingBody(io.BytesIO(data), length), "ContentLength": length}


@pytest.mark.parametrize("key", ["a.png", "a b/ä?x#y.png", "a%20b.png"])
def test_an_s3_picture(key: str, s3) -> None:
    stub, fetcher = s3
    stub.add_response("get_object", s3_object(PNG), {"Bucket": "my-pictures", "Key": key})
    assert load_path(f"s3://my-pictures/{key}", S3_LIMITS, fetcher).width == 24


def test_s3_is_refused_unless_the_bucket_is_named(s3) -> None:
    _, fetcher = s3
    refused("invalid_request", "not served", lambda: load_path("s3://my-pictures/a.png", LIMITS, fetcher))
    for url in ("s3://other/a.png", "s3://my-pictures.evil/a.png", "s3://my-picture/a.png"):
        refused("invalid_request", "not served", lambda url=url: load_path(url, S3_LIMITS, fetcher))
    for url in ("s3://my-pictures", "s3://my-pictures/", "s3://", "s3:my-pictures/a", "s3:///a", "s3://MY/a"):
        refused("invalid_request", "s3 URI", lambda url=url: load_path(url, S3_LIMITS, fetcher))


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("NoSuchKey", 404, "does not exist"),
        ("AccessDenied", 403, "not readable"),
        ("NoSuchBucket", 404, "NoSuchBucket"),
        ("InternalError", 400, "InternalError"),
    ],
)
def test_s3_errors_are_named(code: str, status: int, words: str, s3) -> None:
    stub, fetcher = s3
    stub.add_client_error("get_object", code, "secret detail", http_status_code=status)
    error = refused("invalid_request", words, lambda: load_path("s3://my-pictures/key-x", S3_LIMITS, fetcher))
    assert "secret" not in error.message
    assert "key-x" not in error.message


def test_s3_objects_too_large_by_their_word_or_in_fact(s3) -> None:
    stub, fetcher = s3
    limits = replace(S3_LIMITS, max_bytes=1000)
    stub.add_response("get_object", s3_object(bytes(1001)))
    refused("too_large", "1001 bytes", lambda: fetcher("s3://my-pictures/a", limits))
    lying = s3_object(bytes(5000))
    lying["ContentLength"] = 10
    stub.add_response("get_object", lying)
    refused("too_large", "1000 bytes", lambda: fetcher("s3://my-pictures/a", limits))
    stub.add_response("get_object", s3_object(bytes(10), declared=900))
    refused("invalid_request", "IncompleteRead", lambda: fetcher("s3://my-pictures/a", limits))
    stub.add_response("get_object", s3_object(b""))
    refused("invalid_request", "empty", lambda: fetcher("s3://my-pictures/a", limits))


def test_s3_is_held_to_the_deadline_and_may_be_missing() -> None:
    release = threading.Event()
    stuck = Fetcher(s3_client=lambda: release.wait(2 * PATIENCE_S))
    limits = replace(S3_LIMITS, fetch_timeout_s=0.3)
    started = time.perf_counter()
    refused("invalid_request", "within 0.3 s", lambda: stuck("s3://my-pictures/a", limits))
    assert time.perf_counter() - started < PATIENCE_S
    release.set()

    def no_boto3() -> object:
        raise ModuleNotFoundError("No module named 'boto3'")

    refused("invalid_request", "boto3", lambda: Fetcher(s3_client=no_boto3)("s3://my-pictures/a", S3_LIMITS))


def test_the_default_s3_client_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fetcher = Fetcher()
    assert fetcher.s3_client() is fetcher.s3_client()


# ---- the module itself -----------------------------------------------------------------------------------------------


def test_it_knows_nothing_of_torch_nor_of_the_rest_of_the_package() -> None:
    folder = str(Path(sources.__file__).parents[2])
    code = (
        f"import sys; sys.path.insert(0, {folder!r})\nimport llava_sessions.media.sources\n"
        "ours = {name for name in sys.modules if name.startswith('llava_sessions.')}\n"
        "unwanted = {name for name in ours if not name.startswith('llava_sessions.media')}\n"
        "unwanted |= {'torch', 'transformers', 'ts', 'boto3'} & set(sys.modules)\n"
        "assert not unwanted, unwanted\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)
