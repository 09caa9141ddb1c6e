"""decoder: every format and mode, damaged and hostile files, and the limits."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from llava_sessions.config import MediaLimits
from llava_sessions.media import decoder
from llava_sessions.media.decoder import DecodedPicture, load_bytes
from llava_sessions.media.limits import MediaError
from tests.support.pictures import BLUE, LIMITS, PATIENCE_S, PNG, RED, WHITE, encode, png_of, rejected, two_colours


def near(got: object, want: tuple[int, int, int], tolerance: int = 12) -> bool:
    return isinstance(got, tuple) and all(abs(a - b) <= tolerance for a, b in zip(got, want, strict=True))


def tiff_of(entries: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    """Return a little-endian TIFF from (tag, type, count, value or offset). `rest` follows the directory."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + rest


# ---- formats and modes
# ------------------------------------------------------------------------------------------------


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
    image = Image.new("I;16", (16, 16))
    for value in range(256):
        image.putpixel((value % 16, value // 16), 257 * value)
    for picture_format in ("PNG", "TIFF"):
        picture = load_bytes(encode(image, picture_format), LIMITS).image
        assert [picture.getpixel((value % 16, value // 16))[0] for value in range(256)] == list(range(256))


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
    rejected("unsupported_media", f"mode {mode}", lambda: load_bytes(data, LIMITS))


@pytest.mark.parametrize("picture_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_only_the_first_frame_of_an_animation_is_decoded(picture_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if picture_format == "WEBP" else {}
    data = encode(frames[0], picture_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
    assert load_bytes(data, LIMITS).image.getpixel((8, 8)) == RED


def test_a_picture_is_independent_of_its_file_and_writable() -> None:
    image = load_bytes(PNG, LIMITS).image
    image.putpixel((0, 0), WHITE)
    assert type(image) is Image.Image
    assert image.getpixel((0, 0)) == WHITE


# EXIF 2.32: orientation -> position of the pixel that is stored at the top left of 12 x 8, and whether the sides swap.
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
def test_broken_exif_is_ignored(exif: bytes) -> None:
    for picture_format in ("JPEG", "PNG", "WEBP"):
        assert load_bytes(encode(two_colours(), picture_format, exif=exif), LIMITS).width == 24


# ---- damaged and unknown files
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_picture_is_damaged_or_whole(picture_format: str) -> None:
    noise = Image.frombytes("RGB", (40, 40), bytes((i * 37 + i // 7) % 256 for i in range(4800)))
    data = encode(noise, picture_format)
    half = rejected("invalid_request", "damaged", lambda: load_bytes(data[: len(data) // 2], LIMITS))
    assert picture_format in half.message
    for end in range(1, len(data), max(1, len(data) // 60)):
        # The first 20 bytes may not contain the whole signature.
        expected = {"invalid_request", "whole"} if end >= 20 else {"invalid_request", "unsupported_media"}
        assert outcome(data[:end]) in expected, end


def outcome(data: bytes) -> str:
    """Return the error code, or "whole"."""
    try:
        assert load_bytes(data, LIMITS).image.mode == "RGB"
    except MediaError as error:
        return error.code
    return "whole"


@pytest.mark.filterwarnings("ignore")  # Pillow's: pytest removes the filter that the decoder sets
def test_flipped_bytes_raise_only_media_errors() -> None:
    seed = 1
    for picture_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        good = encode(two_colours(), picture_format)
        for _ in range(150):
            data = bytearray(good)
            for _ in range(3):
                seed = seed * 1103515245 + 12345 & 0x7FFFFFFF
                data[(seed >> 8) % len(data)] = seed & 0xFF
            assert outcome(bytes(data)) in {"whole", "invalid_request", "too_large", "unsupported_media"}


def test_a_png_with_a_wrong_checksum_is_damaged() -> None:
    data = bytearray(PNG)
    data[29] ^= 0xFF  # in the checksum of IHDR
    rejected("invalid_request", "damaged", lambda: load_bytes(bytes(data), LIMITS))


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
def test_other_formats_are_unsupported(data: bytes) -> None:
    error = rejected("unsupported_media", "PNG, JPEG, WEBP, GIF, BMP or TIFF", lambda: load_bytes(data, LIMITS))
    assert "svg" not in error.message
    assert "BMW" not in error.message


# ---- limits
# -----------------------------------------------------------------------------------------------------------


def resident_peak_mib(code: str, data: bytes) -> float:
    """Return the MiB by which `code`, with `data` as a variable, raises the peak memory of a fresh process."""
    script = (
        "import re, sys\n"
        "from llava_sessions.config import MediaLimits\n"
        "from llava_sessions.media.decoder import load_bytes\n"
        "from llava_sessions.media.limits import MediaError\n"
        "from PIL import Image\n"
        "Image.init()\n"
        "data = sys.stdin.buffer.read()\n"
        "load_bytes(open(sys.argv[1], 'rb').read(), MediaLimits())\n"
        # Not ru_maxrss, which begins at the size of the process that started this one.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = peak()\n"
        f"{code}\nprint(peak() - before)\n"
    )
    good = Path(os.environ["PYTEST_MEDIA_GOOD"])
    done = subprocess.run([sys.executable, "-c", script, str(good)], input=data, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b"", "Pillow's warnings reached the log"
    return float(done.stdout)


EXPECT_REJECTION = (
    "try: load_bytes(data, MediaLimits())\n"
    "except MediaError as error: assert error.code == 'too_large', error\n"
    "else: raise SystemExit('was not rejected')"
)


@pytest.fixture
def good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "good.png"
    path.write_bytes(PNG)
    monkeypatch.setenv("PYTEST_MEDIA_GOOD", str(path))
    monkeypatch.setenv("PYTHONPATH", str(Path(decoder.__file__).parents[2]))
    return path


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (9, 9, 9, 99)), ("1", 1)])
def test_decoding_takes_at_most_2_5_times_the_decoded_picture(mode: str, colour: object, good_file: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encode(Image.new(mode, (4000, 4000), colour), "PNG", compress_level=1, exif=turned)
    decoded_mib = 4 * 4000 * 4000 / 2**20  # Pillow has 4 bytes per pixel
    peak_mib = resident_peak_mib("load_bytes(data, MediaLimits()).array()", data)
    assert decoded_mib < peak_mib < 2.5 * decoded_mib


def many_strips() -> bytes:
    count = 5_000_000
    entries = [
        *((256, 4, 1, 2), (257, 4, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)),
        *((273, 1, count, 200), (277, 3, 1, 1), (278, 4, 1, 1)),
    ]
    return tiff_of(entries, b"\x01" * count + b"\0" * 300)


def deflated_zeros(size: int) -> bytes:
    """Return `size` zero bytes, a multiple of 16 MiB, in zlib format, from one compressed block that is repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler32 = (size % 65_521 << 16) + 1
    return b"\x78\xda" + block * (size // 2**24) + b"\x03\0" + adler32.to_bytes(4, "big")


def huge_tile() -> bytes:
    side = 16_384
    packed = deflated_zeros(side * side)
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
def test_a_bomb_is_rejected_at_once_and_without_its_memory(name: str, good_file: Path) -> None:
    data = bomb(name)
    started = time.perf_counter()
    rejected("too_large", "picture", lambda: load_bytes(data, LIMITS))
    assert time.perf_counter() - started < PATIENCE_S
    assert resident_peak_mib(EXPECT_REJECTION, data) < 48 + len(data) / 2**20


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_too_large_even_if_warnings_are_errors() -> None:
    for side in (12_000, 50_000):  # Pillow warns of the first and raises an error for the second
        rejected("too_large", "pixels", lambda side=side: load_bytes(png_of(side, side), LIMITS))


def test_a_jpeg_with_very_many_scans_is_rejected_at_once() -> None:
    good = encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    last_scan = good[good.rindex(b"\xff\xda") : -2]
    assert load_bytes(good[:-2] + last_scan * 20 + b"\xff\xd9", LIMITS).width == 2000
    data = good[:-2] + last_scan * 50_000 + b"\xff\xd9"
    started = time.perf_counter()
    rejected("too_large", "scans", lambda: load_bytes(data, LIMITS))
    assert time.perf_counter() - started < PATIENCE_S


def test_scan_markers_in_comments_and_appended_data_are_not_counted() -> None:
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    good = encode(two_colours(), "JPEG")
    appended = b"\0\0" + b"\xff\xda\0\2" * 200  # phones append arbitrary data
    assert load_bytes(good[:2] + comment + good[2:] + appended, LIMITS).width == 24


def test_max_pixels_and_max_bytes_are_exact() -> None:
    assert load_bytes(PNG, MediaLimits(max_pixels=24 * 16, max_bytes=len(PNG))).width == 24
    rejected("too_large", "24 x 16", lambda: load_bytes(PNG, MediaLimits(max_pixels=24 * 16 - 1)))
    rejected("too_large", f"{len(PNG)} bytes", lambda: load_bytes(PNG, MediaLimits(max_bytes=len(PNG) - 1)))


def test_a_picture_with_an_extreme_aspect_ratio_is_too_large() -> None:
    strip = encode(Image.new("RGB", (1001, 10)), "PNG")
    rejected("too_large", "100:1", lambda: load_bytes(strip, LIMITS))
    assert load_bytes(encode(Image.new("RGB", (10, 1000)), "PNG"), LIMITS).height == 1000


def test_a_picture_without_pixels_or_bytes_is_invalid() -> None:
    rejected("invalid_request", "damaged", lambda: load_bytes(png_of(0, 5), LIMITS))
    rejected("invalid_request", "empty", lambda: load_bytes(b"", LIMITS))
