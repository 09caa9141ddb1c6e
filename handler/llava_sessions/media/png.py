"""Remove the texts and the colour profile from a PNG file. Pure.

Pillow rejects a picture whose compressed texts unpack to more than 1 MiB, and unpacks them before the picture. Neither
is needed: the only text that changes how a picture is shown is its orientation. Layout: PNG 1.2, chapters 3 to 5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from .limits import TOO_LARGE, MediaError

_SIGNATURE_BYTES = 8
_FRAME_BYTES = 12  # length, type and checksum of a chunk
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PROFILE = b"iCCP"
_END = b"IEND"
# Keywords of texts that may have the EXIF orientation.
_WITH_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MAX_TEXT_BYTES = 2**20  # as Pillow
_MAX_CHUNKS = 100_000  # encoders write one for 8 KiB or more


def without_texts(data: bytes) -> bytes:
    """Return the file without its texts and profile, or `data` itself if it has none. It may be cut off or damaged.

    Raise `MediaError` for very many chunks: Pillow takes 2 s for a million empty ones.
    """
    removed = [(start, end) for start, end, kind in _chunks(data) if _is_needless(kind, data, start, end)]
    if not removed:
        return data
    kept = []
    position = 0
    for start, end in removed:
        kept.append(memoryview(data)[position:start])
        position = end
    kept.append(memoryview(data)[position:])
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (start, end, type) of each chunk that is whole, up to the end of the picture. Padding may follow it."""
    start = _SIGNATURE_BYTES
    chunks = 0
    while start + _FRAME_BYTES <= len(data):
        chunks += 1
        if chunks > _MAX_CHUNKS:
            raise MediaError(TOO_LARGE, f"the PNG picture must have at most {_MAX_CHUNKS} chunks, got more")
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + _FRAME_BYTES + length
        if end > len(data):
            return
        yield start, end, kind
        if kind == _END:
            return
        start = end


def _is_needless(kind: bytes, data: bytes, start: int, end: int) -> bool:
    if kind == _PROFILE:
        return True
    if kind not in _TEXTS:
        return False
    body = start + 8
    return not data.startswith(_WITH_ORIENTATION, body) or _text_bytes(kind, data[body : end - 4]) > _MAX_TEXT_BYTES


def _text_bytes(kind: bytes, body: bytes) -> int:
    """Return the size of a text, at most about `_MAX_TEXT_BYTES` + 1."""
    after_keyword = body.partition(b"\0")[2]
    if kind == b"zTXt":
        packed = after_keyword[1:]
    elif kind == b"iTXt" and after_keyword[:1] == b"\1":
        packed = after_keyword[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        return len(body)
    try:
        return len(zlib.decompressobj().decompress(packed, _MAX_TEXT_BYTES + 1))
    except zlib.error:
        return 0
