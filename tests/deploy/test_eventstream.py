"""The frames of a streamed answer are what botocore's own parser reads, however they are cut on the way."""

from __future__ import annotations

import json
import random

import pytest
from botocore.eventstream import ChecksumMismatch, EventStreamBuffer

from deploy.local_endpoint.eventstream import frame, payload_part, stream_error


def test_botocore_reads_what_was_written():
    rng = random.Random(1)
    parts = [rng.randbytes(size) for size in (0, 1, 17, 1_000, 200_000)]
    wire = b"".join(map(payload_part, parts)) + stream_error({"ErrorCode": "StreamBroken", "Message": "gone: ü"})
    buffer, messages = EventStreamBuffer(), []
    while wire:
        cut = rng.randint(1, 5_000)
        buffer.add_data(wire[:cut])
        wire = wire[cut:]
        messages += list(buffer)
    assert [message.payload for message in messages[:-1]] == parts
    for message in messages[:-1]:
        assert message.headers[":message-type"] == "event"
        assert message.headers[":event-type"] == "PayloadPart"
    last = messages[-1].to_response_dict()
    assert last["status_code"] == 400
    assert last["headers"][":exception-type"] == "ModelStreamError"
    assert json.loads(last["body"]) == {"ErrorCode": "StreamBroken", "Message": "gone: ü"}


def test_a_changed_byte_is_noticed():
    wire = bytearray(frame({"name": "value"}, b"payload"))
    wire[-6] ^= 1
    buffer = EventStreamBuffer()
    buffer.add_data(bytes(wire))
    with pytest.raises(ChecksumMismatch):
        list(buffer)
