"""A picture that a client sends again in each turn is neither decoded nor encoded again, however large it is."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from llava_sessions.config import MediaLimits
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import AskSession, OpenSession, PreparedPicture
from llava_sessions.media.decoder import DecodedPicture, load_bytes
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.worker import pictures
from tests.support.pump_frontend import QUESTIONS, Frontend, model, tokens

__all__ = ["model", "tokens"]  # fixtures
TURNS = 3


def noise(size: int) -> str:
    """Return a picture of random pixels, which PNG cannot compress, as base64."""
    pixels = np.random.default_rng(12).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return base64.b64encode(buffer.getvalue()).decode()


def with_arrays(front: Frontend) -> Iterator[PreparedPicture]:
    """Yield the pictures that the engine received decoded, which is all that it can encode."""
    for command in front.commands:
        if isinstance(command, OpenSession | AskSession):
            yield from (picture for picture in command.pictures if picture.inputs)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes in bytes of the pictures that are decoded during the test."""
    sizes: list[int] = []

    def noted(data: bytes, limits: MediaLimits) -> DecodedPicture:
        sizes.append(len(data))
        return load_bytes(data, limits)

    monkeypatch.setattr(pictures, "load_bytes", noted)
    return sizes


def test_a_picture_of_10_mib_is_decoded_and_encoded_once(
    model: Model, tokens: ChatTemplate, decoded: list[int]
) -> None:
    picture = noise(1865)
    assert 0.99 * MediaLimits().max_bytes < len(picture) * 3 // 4 < MediaLimits().max_bytes
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTIONS[0]}]}]
    with ThreadPoolExecutor(1) as pool:
        front = Frontend(model, tokens, parsing=pool)
        for turn in range(TURNS):
            body = json.dumps({"model": "m", "messages": messages, "max_tokens": 4}).encode()
            (replies,) = front.settle(front.row(body, None, {"url_path": "v1/chat/completions"}))
            completion = json.loads(replies[-1].body)
            assert "choices" in completion, completion
            cached = completion["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) == (turn > 0)
            messages.append({"role": "assistant", "content": completion["choices"][0]["message"]["content"]})
            messages.append({"role": "user", "content": QUESTIONS[1]})
    assert len(decoded) == 1
    assert len(list(with_arrays(front))) == 1
    assert front.engine.memory().pictures_encoded == 1
