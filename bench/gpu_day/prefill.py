"""Section "prefill and pictures": prompts in chunks of 256 to 2,048 tokens, and the vision tower."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_sessions.engine.attention import Segment
from llava_sessions.engine.kv import SessionKV
from llava_sessions.engine.model import Model
from llava_sessions.text.chat_template import ChatTemplate

from .day import Day, Findings
from .engines import load
from .models import LLAVA, MISTRAL, QWEN2, TINY, TINY_MISTRAL, TINY_QWEN2, Shape

CHUNKS = (256, 512, 1024, 2048)


def run(day: Day, found: Findings) -> None:
    """Measure the prompt of one largest picture of each family in all chunk sizes, and 1 and 8 pictures."""
    rows: list[dict[str, Any]] = []
    found.results["prefill"] = rows
    encodes: list[dict[str, Any]] = []
    found.results["pictures"] = encodes
    usual = ((LLAVA, 595), (MISTRAL, 2928), (QWEN2, 7371))
    for shape, tokens in day.pick(usual, ((TINY, 20), (TINY_MISTRAL, 20), (TINY_QWEN2, 20))):
        model, template = load(day, shape)
        prompts = _prompts(day, model, shape, tokens)
        rows += prompts
        encodes += [_encode(day, model, template, shape, pictures) for pictures in (1, 8)]
        best = min(prompts, key=lambda row: row["ms"])
        day.say(f"{shape.name}: chunk {best['chunk']} is fastest, {best['ms']} ms for {tokens} tokens")
        del model
        day.release()


def _prompts(day: Day, model: Model, shape: Shape, tokens: int) -> list[dict[str, Any]]:
    """Return the time of one prompt for each size of its chunks."""
    rows = []
    for chunk in day.pick(CHUNKS, (8, 16)):
        taken_ms = day.median_ms(functools.partial(prefill, model, tokens, chunk, shape), 5)
        row = {"shape": shape.name, "tokens": tokens, "chunk": chunk, "ms": round(taken_ms, 2)}
        rows.append(row | {"tokens_s": round(tokens / taken_ms * 1e3)})
    return rows


@torch.inference_mode()
def prefill(model: Model, tokens: int, chunk: int, shape: Shape) -> None:
    """Run a prompt of `tokens` tokens in chunks, with a new KV cache."""
    cache = SessionKV(model.kv_shape)
    cache.reserve(tokens)
    ids = [7 + number % (shape.vocabulary - 7) for number in range(tokens)]
    for start in range(0, tokens, chunk):
        part = ids[start : start + chunk]
        model.forward([Segment(cache, part, None, [], start + chunk >= tokens)])


def _encode(day: Day, model: Model, template: ChatTemplate, shape: Shape, pictures: int) -> dict[str, Any]:
    """Return the times to encode so many square pictures as large as a tile, in one batch and one by one."""
    inputs = [template.prepare([(str(number), _noise(shape, number))]).pictures[0] for number in range(pictures)]
    batch_ms = day.median_ms(lambda: model.encode_batch(inputs), 5)
    single_ms = day.median_ms(lambda: [model.encode(each) for each in inputs], 5)
    row = {"shape": shape.name, "pictures": pictures, "ms": round(batch_ms, 2), "one_by_one_ms": round(single_ms, 2)}
    return row | {"times_faster": round(single_ms / batch_ms, 2)}


def _noise(shape: Shape, number: int) -> Image.Image:
    side = shape.picture_side
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))
