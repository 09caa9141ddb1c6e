"""Kinds of good files: each is decoded, to a picture of the expected size and mean colour."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from llava_sessions.config import MediaLimits
from llava_sessions.media import png
from llava_sessions.media.decoder import load_bytes, read_header
from tests.support.pictures import BLUE, LIMITS, PNG, RED, deep_grey_tiff, encode, png_with, rejected, two_colours

Colour = tuple[float, float, float]
HALF_RED_HALF_BLUE: Colour = (127.5, 0, 127.5)
GREY: Colour = (100, 100, 100)
STEPS = [number * 5 for number in range(50)]  # grey values, mean 122.5


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def packed(megabytes: float) -> bytes:
    """Return compressed text that unpacks to this size. Random letters, so that it is large when packed too."""
    return zlib.compress(random.Random(1).randbytes(int(megabytes * 2**19)).hex().encode(), 1)


def steps() -> Image.Image:
    """Return a grey picture of 50 x 2 pixels with the values of `STEPS`."""
    return Image.frombytes("L", (50, 2), bytes(STEPS) * 2)


def grey16_png() -> bytes:
    image = Image.new("I;16", (50, 2))
    for x, value in enumerate(STEPS):
        for y in range(2):
            image.putpixel((x, y), value * 257)
    return encode(image, "PNG")


def palette_png() -> bytes:
    """Half red, half transparent."""
    image = two_colours().quantize(4)
    return encode(image, "PNG", transparency=image.getpixel((20, 3)))


def animation(picture_format: str, **options: object) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, BLUE)]
    return encode(frames[0], picture_format, save_all=True, append_images=frames[1:], **options)


def xmp_png() -> bytes:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    return png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))


def raw_profile_png() -> bytes:
    raw = b"\nexif\n      26\n" + exif(6).hex().encode()
    return png_with((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)))


def text_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a red square, " * 200_000, zip=True)
    return encode(two_colours(), "PNG", pnginfo=info)


def flat(mode: str, colour: object, picture_format: str, size: tuple[int, int] = (8, 8), **options: object) -> bytes:
    return encode(Image.new(mode, size, colour), picture_format, **options)


CASES: dict[str, tuple[Callable[[], bytes], tuple[int, int], Colour]] = {
    # texts and profiles that unpack to more than 1 MiB
    "zTXt": (lambda: png_with((b"zTXt", b"workflow\0\0" + packed(2))), (24, 16), HALF_RED_HALF_BLUE),
    "iTXt": (lambda: png_with((b"iTXt", b"workflow\0\1\0\0\0" + packed(2))), (24, 16), HALF_RED_HALF_BLUE),
    "iCCP": (lambda: png_with((b"iCCP", b"a profile\0\0" + packed(1.5))), (24, 16), HALF_RED_HALF_BLUE),
    "zTXt bomb": (
        lambda: png_with((b"zTXt", b"bomb\0\0" + zlib.compress(bytes(2**26), 9))),
        (24, 16),
        HALF_RED_HALF_BLUE,
    ),
    "big exif text": (
        lambda: png_with((b"zTXt", b"Raw profile type exif\0\0" + packed(2))),
        (24, 16),
        HALF_RED_HALF_BLUE,
    ),
    "big xmp": (lambda: png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed(2))), (24, 16), HALF_RED_HALF_BLUE),
    "many texts": (
        lambda: png_with(*[(b"zTXt", b"t%d\0\0" % n + packed(0.9)) for n in range(3)]),
        (24, 16),
        HALF_RED_HALF_BLUE,
    ),
    "text of Pillow": (text_png, (24, 16), HALF_RED_HALF_BLUE),
    "text behind the pixels": (
        lambda: PNG[:-12] + png_with((b"zTXt", b"end\0\0" + packed(2)))[33 : -len(PNG) + 33] + PNG[-12:],
        (24, 16),
        HALF_RED_HALF_BLUE,
    ),
    "damaged text": (lambda: png_with((b"zTXt", b"broken\0\0no zlib")), (24, 16), HALF_RED_HALF_BLUE),
    # orientation
    "EXIF in PNG": (lambda: encode(two_colours(), "PNG", exif=exif(6)), (16, 24), HALF_RED_HALF_BLUE),
    "EXIF in a PNG text": (raw_profile_png, (16, 24), HALF_RED_HALF_BLUE),
    "XMP in a PNG text": (xmp_png, (16, 24), HALF_RED_HALF_BLUE),
    "EXIF in JPEG": (lambda: flat("RGB", RED, "JPEG", (24, 16), exif=exif(6)), (16, 24), RED),
    "EXIF in WEBP": (lambda: flat("RGB", RED, "WEBP", (24, 16), exif=exif(8)), (16, 24), RED),
    # depth
    "16-bit PNG": (grey16_png, (50, 2), (122.5,) * 3),
    "16-bit TIFF": (lambda: deep_grey_tiff(steps(), 16), (50, 2), (122.5,) * 3),
    "16-bit TIFF, big-endian": (lambda: deep_grey_tiff(steps(), 16, order=">"), (50, 2), (122.5,) * 3),
    "16-bit TIFF, white is zero": (lambda: deep_grey_tiff(steps(), 16, white_is_zero=True), (50, 2), (122.5,) * 3),
    "12-bit TIFF": (lambda: deep_grey_tiff(steps(), 12), (50, 2), (122.5,) * 3),
    "1-bit PNG": (lambda: flat("1", 1, "PNG"), (8, 8), (255, 255, 255)),
    "1-bit TIFF, group 4": (lambda: flat("1", 1, "TIFF", compression="group4"), (8, 8), (255, 255, 255)),
    "1-bit BMP": (lambda: flat("1", 0, "BMP"), (8, 8), (0, 0, 0)),
    "8-bit grey": (lambda: flat("L", 100, "PNG"), (8, 8), GREY),
    # colours
    "CMYK JPEG": (lambda: flat("CMYK", (0, 255, 255, 0), "JPEG", quality=95), (8, 8), RED),
    "CMYK TIFF": (lambda: flat("CMYK", (0, 255, 255, 0), "TIFF"), (8, 8), RED),
    "YCbCr JPEG": (lambda: flat("YCbCr", (76, 85, 255), "JPEG", quality=95), (8, 8), RED),
    "palette": (lambda: encode(two_colours().quantize(4), "PNG"), (24, 16), HALF_RED_HALF_BLUE),
    "palette with transparency": (palette_png, (24, 16), (255, 127.5, 127.5)),
    "RGBA": (lambda: flat("RGBA", (255, 0, 0, 128), "PNG"), (8, 8), (255, 127, 127)),
    "grey with alpha": (lambda: flat("LA", (0, 128), "PNG"), (8, 8), (127, 127, 127)),
    "progressive JPEG": (lambda: flat("RGB", BLUE, "JPEG", progressive=True, quality=95), (8, 8), BLUE),
    # several pictures in a file
    "GIF animation": (lambda: animation("GIF"), (8, 8), RED),
    "WEBP animation": (lambda: animation("WEBP", lossless=True), (8, 8), RED),
    "PNG animation": (lambda: animation("PNG"), (8, 8), RED),
    "TIFF pages": (lambda: animation("TIFF"), (8, 8), RED),
    "MPO": (lambda: animation("MPO", quality=95), (8, 8), RED),
    # sides
    "1 x 1": (lambda: flat("RGB", RED, "PNG", (1, 1)), (1, 1), RED),
    "1 x 100": (lambda: flat("RGB", RED, "PNG", (1, 100)), (1, 100), RED),
    "100 x 1": (lambda: flat("RGB", RED, "GIF", (100, 1)), (100, 1), RED),
    "3 x 4": (lambda: flat("RGB", BLUE, "BMP", (3, 4)), (3, 4), BLUE),
}


@pytest.mark.parametrize("name", CASES)
def test_a_good_file_is_decoded_to_its_size_and_colour(name: str) -> None:
    make, size, colour = CASES[name]
    data = make()
    picture = load_bytes(data, LIMITS)
    assert (picture.width, picture.height) == size
    header = read_header(data, LIMITS)
    assert sorted((header.width, header.height)) == sorted(size)
    pixels = picture.array()
    assert pixels.shape == (size[1], size[0], 3)
    np.testing.assert_array_equal(pixels, np.asarray(picture.image))
    assert np.abs(pixels.mean(axis=(0, 1)) - colour).max() <= 2.0, pixels.mean(axis=(0, 1))


@pytest.mark.parametrize("bits", [12, 16])
def test_deep_grey_equals_8_bit_grey(bits: int) -> None:
    assert load_bytes(deep_grey_tiff(steps(), bits), LIMITS).array()[0, :, 0].tolist() == STEPS


def test_the_orientation_of_a_png_text_is_applied() -> None:
    for data in (xmp_png(), raw_profile_png(), encode(two_colours(), "PNG", exif=exif(6))):
        pixels = load_bytes(data, LIMITS).array()
        assert (tuple(pixels[0, 0]), tuple(pixels[-1, 0])) == (RED, BLUE)


@pytest.mark.parametrize("data", [deep_grey_tiff(steps(), 12, order=">"), encode(Image.new("F", (8, 8)), "TIFF")])
def test_a_good_file_of_a_rare_kind_is_unsupported_and_not_damaged(data: bytes) -> None:
    error = rejected("unsupported_media", "picture must", lambda: load_bytes(data, LIMITS))
    assert "damaged" not in error.message


def test_a_12_bit_jpeg_is_unsupported_and_not_damaged() -> None:
    data = bytearray(encode(two_colours(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 4] = 12
    error = rejected("unsupported_media", "usual JPEG", lambda: load_bytes(bytes(data), LIMITS))
    assert "damaged" not in error.message


def test_very_many_parts_of_a_file_are_too_large() -> None:
    chunk = struct.pack(">I", 0) + b"prIv" + struct.pack(">I", zlib.crc32(b"prIv"))
    rejected("too_large", "chunks", lambda: read_header(PNG[:33] + chunk * 100_001 + PNG[33:], LIMITS))
    assert read_header(PNG[:33] + chunk * 1_000 + PNG[33:], LIMITS).width == 24
    rejected("too_large", "markers", lambda: read_header(b"\xff\xd8" + b"\xff\x01" * 100_001, LIMITS))


def test_a_few_texts_of_a_png_are_unpacked_however_many_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[int] = []
    whole = png._text_bytes
    monkeypatch.setattr(png, "_text_bytes", lambda kind, body: unpacked.append(len(body)) or whole(kind, body))
    text = (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**19)))
    assert load_bytes(png_with(*[text] * 200), LIMITS).width == 24
    assert len(unpacked) == png._MAX_UNPACKED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("more", [b"\0", b"\xff"])
def test_padding_after_a_picture_is_no_part_of_it(kind: str, more: bytes) -> None:
    padded = encode(two_colours(), kind) + more * 1_500_000
    assert load_bytes(padded, LIMITS).width == two_colours().width


def test_a_header_is_read_without_its_pixels() -> None:
    data = encode(Image.effect_noise((300, 200), 50), "PNG")
    header = read_header(data[:200], LIMITS)
    assert (header.format, header.width, header.height, header.pixels) == ("PNG", 300, 200, 60_000)
    rejected("invalid_request", "damaged", lambda: load_bytes(data[:200], LIMITS))
    rejected("too_large", "300 x 200", lambda: read_header(data, MediaLimits(max_pixels=59_999)))


def test_a_large_picture_is_converted_strip_by_strip() -> None:
    image = Image.merge("RGBA", [Image.effect_noise((1100, 1000), 99) for _ in range(4)])
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image.getchannel("A"))
    with io.BytesIO() as file:
        image.save(file, "PNG", compress_level=1)
        picture = load_bytes(file.getvalue(), LIMITS)
    np.testing.assert_array_equal(picture.array(), np.asarray(paper))
