"""Follow-up turns of one conversation in the native protocol and on the OpenAI route, for `bench.route`.

The native client sends a question to its session. The OpenAI client sends the whole conversation, with its picture, in
every request. Both go through HAProxy over a persistent connection each, in alternating order.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

from . import harness
from .harness import Run

SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
QUESTION = "How many shapes are there?"
TOKENS = 8
SIDES = ("native", "/v1")
# Name -> width and height. Noise is not compressed: the second picture has the most bytes that the server accepts.
PICTURES = {"picture of 64 x 64": 64, "picture of 10 MiB": 1865}
FOLLOW_UPS = {"picture of 64 x 64": 7, "picture of 10 MiB": 3}


@dataclass
class Samples:
    """What was measured with one picture, in ms. `ttft` has a pair at each place of its two lists."""

    ttft: dict[str, list[float]]
    sha256: list[float]
    body: list[float]


class Conversation:
    """The same conversation on both sides, from a new picture on."""

    def __init__(self, http: dict[str, httpx.Client], size: int) -> None:
        self._http = http
        self.picture = _noise(size)
        encoded = base64.b64encode(self.picture).decode()
        url = f"data:image/png;base64,{encoded}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        self._messages: list[dict] = [{"role": "user", "content": content}]
        opened = http["native"].post("/invocations", json={"type": "start_session", "image": encoded})
        self._session = {SESSION_HEADER: opened.raise_for_status().json()["session_id"]}

    def turn(self, side: str) -> float:
        """Ask the next question on one side. Return the ms from the request to the first text."""
        return self._native() if side == "native" else self._openai()

    def refused(self) -> float:
        """Return the ms until the same conversation is rejected for an option, after its JSON was read."""
        body = json.dumps({"model": "llava", "messages": self._messages, "n": 2}).encode()
        began = time.perf_counter()
        reply = self._http["/v1"].post("/v1/chat/completions", content=body, headers=_JSON)
        assert reply.status_code == httpx.codes.BAD_REQUEST, reply.text
        return (time.perf_counter() - began) * 1e3

    def close(self) -> None:
        """Close the native session. The other one is closed when the server needs its place."""
        self._http["native"].post("/invocations", json={"type": "close_session"}, headers=self._session)

    def _native(self) -> float:
        body = {"type": "send_text_prompt", "prompt_text": QUESTION, "max_new_tokens": TOKENS, "stream": True}
        content = json.dumps(body).encode()
        began, first = time.perf_counter(), 0.0
        with self._http["native"].stream(
            "POST", "/invocations", content=content, headers=self._session | _JSON
        ) as reply:
            for line in reply.raise_for_status().iter_lines():
                if line and not first:
                    first = time.perf_counter()
        return (first - began) * 1e3

    def _openai(self) -> float:
        body = {"model": "llava", "messages": self._messages, "max_tokens": TOKENS, "stream": True}
        content = json.dumps(body).encode()
        began, first, text = time.perf_counter(), 0.0, ""
        with self._http["/v1"].stream("POST", "/v1/chat/completions", content=content, headers=_JSON) as reply:
            for chunk in _events(reply.raise_for_status()):
                text += chunk["choices"][0]["delta"].get("content") or ""
                if not first and (text or chunk["choices"][0]["finish_reason"]):
                    first = time.perf_counter()
        self._messages += [{"role": "assistant", "content": text}, {"role": "user", "content": QUESTION}]
        return (first - began) * 1e3


_JSON = {"Content-Type": "application/json"}


def measure(run: Run, url: str) -> dict[str, Samples]:
    """Return the samples of each picture."""
    options = run.options
    taken = {name: Samples({side: [] for side in SIDES}, [], []) for name in PICTURES}
    http = {side: httpx.Client(base_url=url, timeout=60, trust_env=False) for side in SIDES}
    for number in range(-1, options.rounds):  # the first round warms up
        run.say(f"conversations: round {number + 1} of {options.rounds}")
        for name, size in PICTURES.items():
            found = _one_round(Conversation(http, size), options.pick(FOLLOW_UPS[name], 1), number)
            if number >= 0:
                for side in SIDES:
                    taken[name].ttft[side] += found.ttft[side]
                taken[name].sha256 += found.sha256
                taken[name].body += found.body
    return taken


def _one_round(conversation: Conversation, follow_ups: int, number: int) -> Samples:
    samples = Samples({side: [] for side in SIDES}, [], [])
    for side in SIDES:
        conversation.turn(side)  # the first turn encodes the picture
    for turn in range(follow_ups):
        for side in harness.alternate(list(SIDES), turn + number):
            samples.ttft[side].append(conversation.turn(side))
        began = time.perf_counter()
        hashlib.sha256(conversation.picture).digest()
        samples.sha256.append((time.perf_counter() - began) * 1e3)
        samples.body.append(conversation.refused())
    conversation.close()
    return samples


def _noise(size: int) -> bytes:
    pixels = np.random.default_rng().integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _events(reply: httpx.Response) -> Iterator[dict]:
    for line in reply.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
