"""Write frames of AWS's event stream (`application/vnd.amazon.eventstream`).

botocore only reads them, and no maintained library for Python 3.11 writes them without a second AWS runtime. Layout:
total length, length of the headers, checksum of both; headers; payload; checksum of the whole frame.
"""

from __future__ import annotations

import json
import struct
from binascii import crc32

CONTENT_TYPE = "application/vnd.amazon.eventstream"
_STRING = 7  # the header type


def payload_part(data: bytes) -> bytes:
    """Return the frame of one part of a streamed reply."""
    headers = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}
    return frame(headers, data)


def stream_error(body: dict[str, str]) -> bytes:
    """Return the last frame of a reply that broke off."""
    kind = {":message-type": "exception", ":exception-type": "ModelStreamError"}
    return frame({**kind, ":content-type": "application/json"}, json.dumps(body).encode())


def frame(headers: dict[str, str], payload: bytes) -> bytes:
    """Return one frame."""
    head = b"".join(_header(name.encode(), value.encode()) for name, value in headers.items())
    prelude = struct.pack("!II", 12 + len(head) + len(payload) + 4, len(head))
    message = prelude + struct.pack("!I", crc32(prelude)) + head + payload
    return message + struct.pack("!I", crc32(message))


def _header(name: bytes, value: bytes) -> bytes:
    return struct.pack("!B", len(name)) + name + struct.pack("!BH", _STRING, len(value)) + value
