"""No attention of the engine is computed in float32 with all scores in memory, which torch calls "math".

The models have the heads of published checkpoints and run on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from bench.gpu_day.models import LLAVA, MISTRAL, QWEN2, QWEN3, Shape, config_of, tokenizer_of
from llava_sessions.engine import attention
from llava_sessions.engine.attention import Segment
from llava_sessions.engine.cuda import layers
from llava_sessions.engine.device import takes_grouped_heads
from llava_sessions.engine.fused import head_norms
from llava_sessions.engine.fused import layer as fused_layer
from llava_sessions.engine.kv import SessionKV
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import PreparedPicture
from tests.support.meta_cuda import Card, meta_cuda
from tests.support.sdpa_backends import CUDNN, EFFICIENT, FLASH, MATH, Call, RecordedCalls, backend

CUDA = torch.device("cuda")
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("dtype", "heads", "has_mask", "kernels"),
    [
        (torch.float16, (32, 32), False, [EFFICIENT, FLASH, FLASH]),
        (torch.float16, (32, 8), False, [MATH, FLASH, FLASH]),
        (torch.float16, (32, 32), True, [EFFICIENT, EFFICIENT, EFFICIENT]),
        (torch.float16, (32, 8), True, [MATH, MATH, MATH]),
        (torch.bfloat16, (32, 32), False, [MATH, FLASH, FLASH]),
        (torch.float32, (32, 32), True, [EFFICIENT, EFFICIENT, EFFICIENT]),
        (torch.float32, (32, 8), False, [MATH, MATH, MATH]),
    ],
)
def test_the_rules(dtype: torch.dtype, heads: tuple[int, int], has_mask: bool, kernels: list[str]) -> None:
    """On T4, A10G and H100 without cuDNN."""
    call = Call(dtype, *heads, 128, has_mask, 1, 1000)
    assert [backend(call, capability) for capability in ((7, 5), (8, 6), (9, 0))] == kernels


def test_cudnn_comes_first_on_hopper_if_it_is_on() -> None:
    call = Call(torch.bfloat16, 32, 8, 128, False, 1, 1000)
    assert backend(call, (9, 0), cudnn=True) == CUDNN
    assert backend(call, (8, 0), cudnn=True) == FLASH


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Forget cached answers about the GPU."""
    yield
    takes_grouped_heads.cache_clear()


def calls_of(shape: Shape, dtype: torch.dtype, is_fused: bool, patch: pytest.MonkeyPatch) -> set[Call]:
    """Return the calls of a picture, of a prompt in two chunks, and of a token, in a batch with another session."""
    card = Card(2**40, 0)
    card.patch(patch)
    shape = replace(shape, vision={**shape.vision, "num_hidden_layers": 1})
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config_of(shape, tokenizer_of(shape), layers=1), dtype=dtype)
    model = Model(made)
    if is_fused:
        for module in (fused_layer, head_norms, layers):
            patch.setattr(module, "is_rms_norm", lambda _: True)  # it compares numbers, and meta tensors have none
        assert layers.fuse(model.text)
    model.device = CUDA
    model.kv_shape = replace(model.kv_shape, device=CUDA)
    with meta_cuda(card), RecordedCalls() as recorded:
        model.encode(picture(shape))
        one, other = SessionKV(model.kv_shape), SessionKV(model.kv_shape)
        for count in (300, 40, 1):
            segments = [Segment(one, [7] * count, None, [], True), Segment(other, [7], None, [], True)]
            model.forward(segments)
    return recorded.calls


def picture(shape: Shape) -> PreparedPicture:
    """Return a picture of one tile, and the whole picture where the family has tiles. InternVL's has the most tiles."""
    side = shape.picture_side
    if shape.kind == "internvl":
        return PreparedPicture("a", {"pixel_values": np.zeros((1, 13, 3, side, side), np.float32)})
    if shape.kind == "llava":
        return PreparedPicture("a", {"pixel_values": np.zeros((1, 3, side, side), np.float32)})
    inputs = {"pixel_values": np.zeros((1, 3, 3, side, side), np.float32), "image_sizes": np.array([[side, side]])}
    if shape.kind == "onevision":
        inputs = {"pixel_values": np.zeros((1, 2, 3, side, side), np.float32), "image_sizes": np.array([[side, side]])}
        inputs["batch_num_images"] = np.array([1])
    return PreparedPicture("a", inputs)


@pytest.mark.parametrize("is_fused", [False, True], ids=["transformers' layers", "fused layers"])
@pytest.mark.parametrize("shape", [LLAVA, MISTRAL, QWEN2, QWEN3], ids=lambda shape: shape.name)
def test_no_call_of_the_engine_is_math(shape: Shape, is_fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        calls: dict[bool, set[Call]] = {}
        for capability in CAPABILITIES:
            if dtype == torch.bfloat16 and capability < (8, 0):
                continue  # the engine chooses float16 there
            on_gpu(capability, monkeypatch)
            takes = takes_grouped_heads(CUDA, dtype)  # all that the engine asks about a GPU
            if takes not in calls:
                calls[takes] = calls_of(shape, dtype, is_fused, monkeypatch)
            rows = {(call.rows, call.tokens) for call in calls[takes] if call.head_dim == shape.head_dim}
            assert rows >= {(300, 300), (40, 340), (1, 341), (1, 3)}, "a chunk, a later chunk, and tokens"
            assert any(call.rows == call.tokens > 500 for call in calls[takes]), "a picture"
            assert [call for call in calls[takes] if backend(call, capability) == MATH] == []


def on_gpu(capability: tuple[int, int], patch: pytest.MonkeyPatch) -> None:
    """Make the engine run on a GPU of a compute capability. Its tensors are on the meta device."""
    patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    takes_grouped_heads.cache_clear()
    patch.setattr(attention, "takes_grouped_heads", lambda _, dtype: takes_grouped_heads(CUDA, dtype))


def test_a_bool_mask_would_be_math(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that the engine avoids by `causal_lower_right`."""
    on_gpu((8, 6), monkeypatch)
    monkeypatch.setattr(
        attention,
        "causal_mask",
        lambda stored, new, _: torch.ones((new, stored + new), dtype=torch.bool, device="meta").tril(stored),
    )
    calls = calls_of(MISTRAL, torch.float16, False, monkeypatch)
    assert {(call.rows, call.tokens) for call in calls if backend(call, (8, 6)) == MATH} == {(40, 340)}
