"""Pictures and clips that were prepared before, without their arrays, and headers of files. Thread-safe."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ..ipc.messages import PreparedPicture
from ..media.clips import ClipHeader
from ..text.pictures import Prepared

# Characters of the tokens of pictures that are remembered: about 1,000 pictures of 2,880 tokens.
_KNOWN_CHARS = 20_000_000
_KNOWN_TEXTS = 10_000
_KNOWN_HEADERS = 1_000


@dataclass(frozen=True)
class KnownMedium:
    """A picture or clip without arrays. `digest`: as in `StoredClip`; "" for pictures and for frames."""

    prepared: Prepared
    digest: str = ""


def picture_key(sha256: str, scope: str | None) -> str:
    """Return the key by which sessions share a picture's features and prefix: only sessions of the same scope do.

    The scope is the digest of the session's token. Otherwise the time of an open would show a caller whether another
    caller has shown the same picture.
    """
    return sha256 if scope is None else hashlib.sha256(f"{scope} {sha256}".encode()).hexdigest()


class KnownMedia:
    """The keys and tokens of pictures and clips.

    A picture that arrives as the same text again is found by the digest of the text: that takes a sixth of the time of
    decoding base64.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, bool], KnownMedium] = OrderedDict()  # by key, and whether it is alone
        self._chars = 0
        self._by_text: OrderedDict[bytes, str] = OrderedDict()  # sha256 of a data URL: sha256 of its picture
        self._headers: OrderedDict[str, ClipHeader] = OrderedDict()  # by the key of the file
        self._lock = threading.Lock()

    def header_of(self, key: str, read: Callable[[], ClipHeader]) -> ClipHeader:
        """Return the header of a clip's file. `read` takes a child process: its result is kept.

        `key`: of the file within its scope, as `picture_key`.
        """
        with self._lock:
            found = self._headers.get(key)
        if found is not None:
            return found
        header = read()
        with self._lock:
            self._headers[key] = header
            while len(self._headers) > _KNOWN_HEADERS:
                self._headers.popitem(last=False)
        return header

    def sha256_of(self, text: bytes) -> str | None:
        """Return the sha256 of the picture or file that the text with this digest encodes, or None if unknown."""
        with self._lock:
            return self._by_text.get(text)

    def add_text(self, text: bytes, sha256: str) -> None:
        """Remember the picture or file of a text by its digest."""
        with self._lock:
            self._by_text[text] = sha256
            self._by_text.move_to_end(text)
            while len(self._by_text) > _KNOWN_TEXTS:
                self._by_text.popitem(last=False)

    def get(self, key: str, alone: bool = True) -> KnownMedium | None:
        """Return a picture or clip without arrays, or None if unknown. `alone`: no other picture is in its message."""
        with self._lock:
            found = self._known.get((key, alone))
            if found is not None:
                self._known.move_to_end((key, alone))
            return found

    def add(self, key: str, prepared: Prepared, alone: bool = True, digest: str = "") -> None:
        """Remember a prepared picture or clip."""
        pictures = tuple(PreparedPicture(picture.key, {}) for picture in prepared.pictures)
        with self._lock:
            if (key, alone) in self._known:
                return
            self._known[key, alone] = KnownMedium(Prepared(pictures, prepared.tokens, prepared.kinds), digest)
            self._chars += _chars(prepared)
            while self._chars > _KNOWN_CHARS:
                self._chars -= _chars(self._known.popitem(last=False)[1].prepared)


def _chars(prepared: Prepared) -> int:
    return sum(len(tokens) for tokens in prepared.tokens)
