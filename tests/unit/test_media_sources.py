"""sources: base64, data URLs and local paths, and which sources are read over the network."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from llava_sessions.config import MediaLimits
from llava_sessions.media import sources
from llava_sessions.media.limits import clip_file_limits
from llava_sessions.media.sources import is_remote, read_base64, read_path
from tests.support.pictures import LIMITS, PNG, load_base64, load_path, rejected

# ---- base64 and data URLs
# ---------------------------------------------------------------------------------------------


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
        f"data:text/html;base64,{B64}",  # the media type is ignored
        "data:image/png;base64," + B64.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ],
)
def test_base64_is_accepted_in_every_usual_form(text: str) -> None:
    assert load_base64(text, LIMITS).sha256 == hashlib.sha256(PNG).hexdigest()
    if text.lower().startswith("data:"):
        assert load_path(text, LIMITS).sha256 == hashlib.sha256(PNG).hexdigest()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("====", "empty"),
        ("not base64!", "valid base64"),
        (B64[:20] + "=" + B64[20:], "valid base64"),
        (B64 + "ä", "valid base64"),
        ("A", "valid base64"),
        ("\ud800AAAA", "valid base64"),
        (None, "null"),
        (b"AAAA", "bytes"),
        (["AAAA"], "array"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png,%89PNG", "another encoding"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,%", "valid base64"),
        ("data:image/png;base64,%ff%fe", "valid base64"),
    ],
)
def test_other_text_is_not_base64(text: object, words: str) -> None:
    rejected("invalid_request", words, lambda: load_base64(text, LIMITS))


def test_urlsafe_digits_are_decoded_as_such() -> None:
    data = b"\xfb\xff\xbe" * 5
    assert read_base64("-_--" + "+/++", LIMITS) == base64.b64decode("+/++" * 2)
    assert read_base64(base64.urlsafe_b64encode(data).decode(), LIMITS) == data


def test_the_size_is_checked_before_base64_is_decoded() -> None:
    limits = MediaLimits(max_bytes=300)
    assert len(read_base64(base64.b64encode(bytes(300)).decode(), limits)) == 300
    for size, words in ((301, "301 bytes"), (3_000_000, "a string of length 4,000,0")):
        text = base64.b64encode(bytes(size)).decode()
        rejected("too_large", words, lambda text=text: read_base64(text, limits))
        rejected("too_large", words, lambda text=text: load_path(f"data:;base64,{text}", limits))
    # Invalid and too long: the length is checked first.
    rejected("too_large", "bytes", lambda: read_base64("!" * 5000, limits))


def test_a_clip_has_its_own_limit_and_word() -> None:
    limits = clip_file_limits(MediaLimits(max_bytes=1, max_clip_bytes=300))
    assert len(read_base64(base64.b64encode(bytes(300)).decode(), limits)) == 300
    text = base64.b64encode(bytes(301)).decode()
    rejected("too_large", "the clip must be at most 300 bytes, got 301 bytes", lambda: read_base64(text, limits))
    rejected("too_large", "the clip must be at most 8792 characters", lambda: read_base64("A" * 8793, limits))
    rejected("invalid_request", "the clip must not be empty", lambda: read_path("data:video/mp4;base64,", limits))
    rejected("invalid_request", "the clip must be valid base64", lambda: read_base64("data:video/mp4;base64,!", limits))
    rejected("invalid_request", "the clip must be base64", lambda: read_base64(1, limits))  # type: ignore[arg-type]


def test_a_clip_obeys_the_rules_of_local_paths(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.mp4").write_bytes(b"x" * 9)
    limits = MediaLimits(max_bytes=1, max_clip_bytes=9, local_roots=(str(tmp_path / "root"),))
    assert read_path(f"{tmp_path}/root/a.mp4", clip_file_limits(limits)) == b"x" * 9
    outside = "inside an allowed directory"
    rejected("invalid_request", outside, lambda: read_path(f"{tmp_path}/a.mp4", clip_file_limits(limits)))
    small = clip_file_limits(limits.model_copy(update={"max_clip_bytes": 8}))
    rejected("too_large", "the clip must be at most 8 bytes", lambda: read_path(f"{tmp_path}/root/a.mp4", small))


class _Unread(str):
    """Text of which only the length and a short beginning may be read."""

    def __getitem__(self, index: object) -> str:
        assert isinstance(index, slice)
        assert index.stop <= 10_000
        return super().__getitem__(index)

    def _read(self, *_: object) -> str:
        raise AssertionError("the whole text was read")

    strip = lstrip = split = encode = partition = replace = lower = _read


class _Pieces(str):
    """Text that notes the lengths of the pieces that are taken of it."""

    def __new__(cls, text: str) -> _Pieces:
        made = super().__new__(cls, text)
        made.taken = []
        return made

    def __getitem__(self, index: slice) -> str:
        piece = super().__getitem__(index)
        self.taken.append(len(piece))
        return piece

    def _read(self, *_: object) -> str:
        raise AssertionError("one call goes over the whole text")

    split = encode = replace = _read


def test_text_that_is_too_long_is_rejected_by_its_length_alone() -> None:
    spaced = _Unread("AA " * 1_000_000)
    limits = MediaLimits(max_bytes=300_000)
    rejected("too_large", "a string of length 3,000,000", lambda: read_base64(spaced, limits))
    for path in ("a" * 40_000, " " * 40_000, "https://x.example/" + "a" * 40_000):
        assert is_remote(_Unread(path)) is path.startswith("https")
        rejected("invalid_request", "at most 8192 characters", lambda path=path: load_path(_Unread(path), LIMITS))
    rejected("too_large", "characters of base64", lambda: load_path(_Unread("data:;base64," + spaced), limits))


# A call of C code over the whole text would hold the GIL to its end.
@pytest.mark.parametrize("pattern", ["AA ", "AAAA", "-_A\n"])
def test_base64_is_decoded_in_pieces(pattern: str) -> None:
    watched = _Pieces(pattern * 100_000)
    digits = "".join((pattern * 100_000).split())
    assert sources._decode_base64(watched, LIMITS) == base64.urlsafe_b64decode(digits + "=" * (-len(digits) % 4))
    assert sum(watched.taken) == len(watched)
    assert max(watched.taken) <= 2**16


@pytest.mark.parametrize("pattern", ["%41", "AAA%2B", "A%4", "%", "-_%2B/%0A%"])
def test_per_cent_escapes_are_decoded_in_pieces(pattern: str) -> None:
    watched = _Pieces(pattern * 100_000)
    assert "".join(sources._unquoted(watched)) == unquote(pattern * 100_000, "latin-1")
    assert sum(watched.taken) == len(watched)
    assert max(watched.taken) <= 2**16


def test_text_in_base64_is_no_picture() -> None:
    text = base64.b64encode(b"hello, I am a text").decode()
    rejected("unsupported_media", "PNG", lambda: load_base64(text, LIMITS))


# ---- kinds of sources
# -------------------------------------------------------------------------------------------------


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
def test_other_schemes_are_rejected(source: str) -> None:
    rejected("invalid_request", "scheme", lambda: load_path(source, LIMITS, fetch=None))


@pytest.mark.parametrize("source", ["", "  ", None, 7, {"url": "x"}, b"https://x.example"])
def test_other_values_are_no_source(source: object) -> None:
    rejected("invalid_request", "must", lambda: load_path(source, LIMITS))


def test_fetch_receives_the_remote_source_and_its_bytes_are_decoded() -> None:
    seen = []

    def fetch(source: str, limits: MediaLimits) -> bytes:
        seen.append((source, limits))
        return PNG

    assert load_path(" https://x.example/a ", LIMITS, fetch).width == 24
    assert seen == [("https://x.example/a", LIMITS)]


def test_an_overlong_source_is_rejected() -> None:
    rejected("invalid_request", "characters", lambda: load_path("https://x.example/" + "a" * 9000, LIMITS))


# ---- local paths
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Create root/ with pictures and links, outside/, and root-too/, whose name begins like the root's."""
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


def test_local_paths_below_a_root_are_read(shelf: Path) -> None:
    limits = MediaLimits(local_roots=("/nowhere", str(shelf / "root")))
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
    limits = MediaLimits(local_roots=(f"{shelf}/alias/",))
    assert load_path(f"{shelf}/alias/inner/a.png", limits).width == 24


def test_local_paths_outside_the_roots_are_rejected(shelf: Path) -> None:
    limits = MediaLimits(local_roots=(str(shelf / "root"),))
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
        error = rejected("invalid_request", "outside", lambda source=source: load_path(source, limits))
        assert str(shelf) not in error.message


def test_local_paths_are_rejected_by_default(shelf: Path) -> None:
    for source in (f"{shelf}/root/inner/a.png", f"file://{shelf}/root/inner/a.png"):
        rejected("invalid_request", "local path", lambda source=source: load_path(source, LIMITS))


def test_local_paths_that_are_no_readable_file_are_rejected(shelf: Path) -> None:
    limits = MediaLimits(local_roots=(str(shelf / "root"),))
    rejected("invalid_request", "regular file", lambda: load_path(f"{shelf}/root/inner", limits))
    rejected("invalid_request", "regular file", lambda: load_path(f"{shelf}/root/pipe", limits))
    rejected("invalid_request", "does not exist", lambda: load_path(f"{shelf}/root/none.png", limits))
    rejected("invalid_request", "cannot be read", lambda: load_path(f"{shelf}/root/loop", limits))
    rejected("invalid_request", "cannot be read", lambda: load_path(f"{shelf}/root/{'n' * 300}", limits))
    for url in (f"file://elsewhere{shelf}/root/inner/a.png", "file://", "file:relative.png", "file:///a.png?x=1"):
        rejected("invalid_request", "file URL", lambda url=url: load_path(url, limits))
    small = MediaLimits(local_roots=limits.local_roots, max_bytes=len(PNG) - 1)
    rejected("too_large", "bytes", lambda: load_path(f"{shelf}/root/inner/a.png", small))


# ---- imports
# ----------------------------------------------------------------------------------------------------------


def test_the_package_imports_only_config_and_its_own_modules() -> None:
    folder = str(Path(sources.__file__).parents[2])
    code = (
        f"import sys; sys.path.insert(0, {folder!r})\nimport llava_sessions.media.sources, llava_sessions.media.clips\n"
        "ours = {name for name in sys.modules if name.startswith('llava_sessions.')}\n"
        "others = {name for name in ours if name.split('.')[1] not in ('media', 'config', 'errors')}\n"
        "others |= {'torch', 'transformers', 'ts', 'boto3', 'av'} & set(sys.modules)\n"
        "assert not others, others\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)
