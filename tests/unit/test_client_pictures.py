"""Pictures of llava_sessions_client: what it accepts, and how it shrinks what is too large."""

from __future__ import annotations

import base64
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto import mock_aws
from PIL import Image

from llava_sessions_client import Endpoint, InvalidClip, InvalidPicture, NotConfigured, Turn, load_picture, sources
from llava_sessions_client.answers import Answer
from llava_sessions_client.clips import Clip, load_clip
from llava_sessions_client.conversation import Conversation
from llava_sessions_client.pictures import load_pictures, picture_of
from llava_sessions_client.settings import Settings
from llava_sessions_client.shrink import PictureLimits, fit, fit_together
from llava_sessions_client.targets import SAGEMAKER_BODY_BYTES, settings_of
from llava_sessions_client.terminal.picture import half_blocks
from tests.support.client_script import OPENED, Script, answer, refusal, settings
from tests.support.pictures import PNG, encode, two_colours

NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 300, 3), dtype=np.uint8))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serve a folder over HTTP."""
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "large.bin").write_bytes(bytes(3_000))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pixels(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_encoded_pictures_stay_byte_for_byte(tmp_path: Path, web: str) -> None:
    path = tmp_path / "a.png"
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    for source in (str(path), path, PNG, bytearray(PNG), memoryview(PNG), url, f"{web}/a.png?key=secret"):
        picture = load_picture(source)
        assert (picture.data, picture.width, picture.height) == (PNG, 24, 16)
        assert picture.media_type == "image/png"
        assert "secret" not in picture.name
        assert load_picture(picture) is picture


def test_pil_images_and_arrays_become_png() -> None:
    image = two_colours()
    array = np.asarray(image)
    for source in (image, array, array[::-1][::-1], np.asfortranarray(array), image.convert("CMYK")):
        picture = load_picture(source)
        assert picture.media_type == "image/png"
        assert pixels(picture.data).size == (24, 16)
    assert pixels(load_picture(array).data).tobytes() == image.tobytes()
    assert load_picture(array[:, :, 0]).image().mode == "L"
    assert load_picture(np.dstack([array, array[:, :, :1]])).image().mode == "RGBA"


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)])
def test_other_arrays_are_rejected(array: np.ndarray) -> None:
    with pytest.raises(InvalidPicture, match="an array must be uint8 of shape"):
        load_picture(array)


def test_objects_of_s3_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 2_000)
    monkeypatch.setattr(sources, "FETCH_TIMEOUT_S", 300)  # boto3 loads its tables first
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="pictures")
        client.put_object(Bucket="pictures", Key="a/b.png", Body=PNG)
        client.put_object(Bucket="pictures", Key="large", Body=bytes(2_001))
        assert load_picture("s3://pictures/a/b.png", region="us-east-1").data == PNG
        for key, words in (("none", "readable object"), ("large", "at most 2000 bytes")):
            with pytest.raises(InvalidPicture, match=words):
                load_picture(f"s3://pictures/{key}", region="us-east-1")


def test_what_is_no_picture_is_named(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 2_000)
    sources_and_words = [
        (str(tmp_path / "none.png"), "must be a readable file: No such file"),
        (tmp_path, "must be a readable file"),
        ("a\0b", "must be the path of a file"),
        ("~no-such-user-here/a.png", "must be the path of a file"),
        (b"no picture", "got 10 bytes of something else"),
        ("data:image/png;base64,!", "valid base64"),
        ("data:image/png", "valid base64"),
        ("s3://bucket", "s3://BUCKET/KEY"),
        (f"{web}/a.txt", "got 10 bytes of something else"),
        (f"{web}/none?secret", "must be available, got status 404"),
        (f"{web}/large.bin", "must have at most 2000 bytes"),
        ("http://127.0.0.1:9/a.png", "must be reachable"),
        ("https://", "must be reachable"),
        (5, "got int"),
    ]
    for source, words in sources_and_words:
        with pytest.raises(InvalidPicture, match=words) as raised:
            load_picture(source)
        assert "secret" not in str(raised.value)
    with pytest.raises(InvalidPicture, match="whole picture"):
        picture_of(encode(NOISE, "PNG")[:5_000], "a.png").image()


def test_none_one_or_several_pictures() -> None:
    assert load_pictures(None) == load_pictures(()) == ()
    assert [picture.width for picture in load_pictures([PNG, two_colours()])] == [24, 24]
    assert len(load_pictures(PNG)) == 1


# --- shrinking --------------------------------------------------------------------------------------------------------


def test_a_picture_within_the_limits_stays() -> None:
    picture = picture_of(PNG, "a.png")
    fitted = fit([picture], PictureLimits())
    assert fitted.pictures[0] is picture
    assert fitted.notices == ()


def test_a_picture_above_the_models_resolution_is_shrunk_and_named() -> None:
    picture = picture_of(encode(two_colours().resize((2400, 1600)), "PNG"), "photo.png")
    fitted = fit([picture], PictureLimits(max_side_px=300))
    assert (fitted.pictures[0].width, fitted.pictures[0].height) == (300, 200)
    [notice] = fitted.notices
    assert notice.startswith("photo.png was shrunk from 2400 x 1600 pixels (")
    assert "to 300 x 200" in notice
    shrunk = pixels(fitted.pictures[0].data)
    assert shrunk.getpixel((10, 10)) == (255, 0, 0)
    assert shrunk.getpixel((290, 10)) == (0, 0, 255)


def test_a_picture_that_is_encoded_again_is_upright_and_opaque() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: the left half, red, becomes the upper half
    turned = picture_of(encode(two_colours().resize((240, 160)), "JPEG", exif=exif, quality=95), "a.jpg")
    fitted = fit([turned], PictureLimits(max_side_px=120)).pictures[0]
    assert (fitted.width, fitted.height) == (80, 120)
    red, _, blue = fitted.image().getpixel((40, 5))
    assert red > 200 > 60 > blue
    clear = Image.new("RGBA", (400, 400), (0, 0, 0, 0))
    fitted = fit([picture_of(encode(clear, "PNG"), "a.png")], PictureLimits(max_side_px=100)).pictures[0]
    assert fitted.image().getpixel((50, 50)) == (255, 255, 255)
    grey = Image.fromarray(np.full((200, 200), 0x8000, np.uint16))
    fitted = fit([picture_of(encode(grey, "PNG"), "a.png")], PictureLimits(max_side_px=100)).pictures[0]
    assert fitted.image().getpixel((50, 50)) == (128, 128, 128)


def test_pictures_are_shrunk_until_a_request_can_carry_them() -> None:
    large = picture_of(encode(NOISE, "PNG"), "noise.png")
    small = picture_of(PNG, "small.png")
    room = large.encoded_bytes // 4
    fitted = fit_together([small, large], room)
    assert fitted.pictures[0] is small
    assert fitted.pictures[1].encoded_bytes <= room - small.encoded_bytes
    assert [notice.split()[0] for notice in fitted.notices] == ["noise.png"]
    assert fit_together([small], 1).pictures == (small,), "what cannot be shrunk is left to the server's error"


def test_an_open_shrinks_the_pictures_of_its_history_too() -> None:
    large = picture_of(encode(NOISE, "PNG"), "noise.png")
    history = (Turn("Which?", Answer("None."), (large,)), Turn("And here?", Answer("None."), (large,)))
    made = settings()
    limit = 120_000
    conversation = Conversation(Settings(made.timeouts, made.retries, made.limits, limit), (large,), history)
    script = Script(conversation, OPENED)
    script.run(conversation.open())
    [body] = script.bodies
    assert len(str(body)) < limit
    assert len(conversation.notices) == 3
    assert all(turn.pictures[0].encoded_bytes < large.encoded_bytes for turn in conversation.turns)


# --- clips ------------------------------------------------------------------------------------------------------------


def test_a_clip_is_a_file_or_frames(tmp_path: Path, web: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"clip")
    url = "data:video/mp4;base64,Y2xpcA=="
    for source in (path, str(path), b"clip", bytearray(b"clip"), f"{web}/a.mp4", url, Clip(b"clip", sampled_frames=2)):
        clip = load_clip(source, frames=3)
        assert (clip.file, clip.sampled_frames, clip.video, clip.data_url) == (b"clip", 3, url, url)
        assert (clip.size_bytes, clip.encoded_bytes) == (4, len("Y2xpcA=="))
    assert load_clip(path).sampled_frames is None
    assert load_clip(f"{web}/a.mp4?secret").name == f"{web}/a.mp4"
    frames = load_clip([PNG, two_colours()])
    assert frames.video == [frame.base64 for frame in frames.frames]
    assert frames.data_url == f"data:video/jpeg;base64,{','.join(frames.video)}"
    assert frames.encoded_bytes == sum(map(len, frames.video))


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    sources_and_words = [
        (str(tmp_path / "none.mp4"), None, "must be a readable file"),
        (tmp_path / "empty.mp4", None, "must be a video file, got 0 bytes"),
        ([], None, "one or more frames"),
        ([PNG], 2, "of which none is sampled"),
        ([b"no picture"], None, "got 10 bytes of something else"),
        (5, None, "got int"),
    ]
    for source, frames, words in sources_and_words:
        with pytest.raises(InvalidPicture, match=words):
            load_clip(source, frames=frames)
    with pytest.raises(InvalidPicture, match="absent without a `video`"):
        Endpoint("http://127.0.0.1:9").open(video_frames=3)


def limited(limit: int) -> Settings:
    """Return settings whose requests have at most `limit` bytes."""
    made = settings()
    return Settings(made.timeouts, made.retries, made.limits, limit)


def test_a_clip_stays_as_it_is_and_pictures_are_shrunk_into_the_rest() -> None:
    large = picture_of(encode(NOISE, "PNG"), "noise.png")
    frame = picture_of(encode(NOISE.resize((2100, 16)), "PNG"), "frame.png")
    clip = Clip(frames=(frame,))
    limit = clip.encoded_bytes + large.encoded_bytes // 2 + 16 * 1024
    conversation = Conversation(limited(limit), (), clip=clip)
    script = Script(conversation, OPENED, answer("Two."))
    script.run(conversation.open())
    script.run(conversation.ask("Which?", (large,), {}, stream=False, clip=clip))
    opening, body = script.bodies
    assert opening["video"] == body["video"] == [frame.base64]
    assert len(body["image"]) < large.encoded_bytes
    assert len(str(body)) < limit


def test_a_clip_that_no_request_can_carry_is_rejected_before_it_is_sent() -> None:
    clip = Clip(bytes(2**20), name="a.mp4")
    conversation = Conversation(limited(2**20), (), clip=clip)
    script = Script(conversation)
    with pytest.raises(InvalidClip, match=r"must have at most 0\.7 MiB together, got 1\.0 MiB"):
        script.run(conversation.open())
    conversation = Conversation(limited(3 * 2**20), (), clip=clip)
    script = Script(conversation, OPENED, refusal(503, "x"), answer("Two."))
    script.run(conversation.open())
    with pytest.raises(InvalidClip, match=r"at most 2\.\d MiB together, got 3\.0 MiB"):
        script.run(conversation.ask("Which?", (), {}, stream=False, clip=Clip(bytes(3 * 2**20))))
    assert len(script.bodies) == 1


def test_sagemaker_and_http_have_their_own_payload_limit() -> None:
    common = {"timeouts": settings().timeouts, "retries": settings().retries, "session_token": None, "max_side_px": 9}
    assert settings_of("llava", **common, max_body_bytes=None).max_body_bytes == SAGEMAKER_BODY_BYTES
    assert settings_of("http://h", **common, max_body_bytes=None).max_body_bytes > SAGEMAKER_BODY_BYTES
    assert settings_of("llava", **common, max_body_bytes=5).max_body_bytes == 5


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1:8080", "", "http://", "a_b", "ftp://host", "-a", "http://h:99999", "http://[::1", "http://a b"],
)
def test_what_is_neither_url_nor_name_is_rejected(target: str) -> None:
    with pytest.raises(NotConfigured):
        Endpoint(target)


@pytest.mark.parametrize("target", ["http://a_b:80", "https://bücher.example/base", "http://[fe80::1%25eth0]"])
def test_hosts_may_have_any_form_that_is_sent(target: str) -> None:
    Endpoint(target)


# --- half blocks ------------------------------------------------------------------------------------------------------


def test_half_blocks_have_the_upper_pixel_in_front_of_the_lower_one() -> None:
    image = Image.new("RGB", (2, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((0, 1), (0, 0, 255))
    text = half_blocks(image, max_columns=2)
    assert text.plain == "▀▀"
    style = text.spans[0].style
    assert (style.color.triplet, style.bgcolor.triplet) == ((255, 0, 0), (0, 0, 255))


@pytest.mark.parametrize("size", [(1, 1), (1000, 10), (10, 1000), (64, 48)])
def test_half_blocks_keep_the_shape_within_their_limits(size: tuple[int, int]) -> None:
    lines = half_blocks(Image.new("RGB", size), max_columns=40, max_rows=10).plain.split("\n")
    assert 1 <= len(lines) <= 10
    assert {len(line) for line in lines} == {len(lines[0])}
    assert 1 <= len(lines[0]) <= 40
