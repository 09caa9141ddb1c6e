"""CUDA's fused layers with one attention for all sessions are used if they pass their trial, else the plain layers.

The tests of interpreted_layers.py and interpreted_int8_kv.py run here, in a process in which Triton interprets its
kernels on the CPU.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaModel

from llava_sessions.engine import cuda_path
from llava_sessions.engine.attention import Segment, TokenAttention
from llava_sessions.engine.cpu.token_attention import TokenAttention as CompiledAttention
from llava_sessions.engine.cuda import layers
from llava_sessions.engine.cuda.layers import DeviceLinear, DeviceNorm
from llava_sessions.engine.fused.head_norms import HeadNorms
from llava_sessions.engine.fused.layer import FusedLayer, fuse_layers
from llava_sessions.engine.fused.operations import Activation
from llava_sessions.engine.kv import KVShape, SessionKV
from llava_sessions.engine.model import Model
from tests.support.interpreter import check_interpreted
from tests.support.meta_cuda import META, Card, meta_cuda
from tests.support.tiny_families import FAMILIES, make_internvl35, make_onevision


def test_in_tritons_interpreter() -> None:
    """Answers in all tiers, launches, devices, and caches in int8."""
    check_interpreted("interpreted_layers.py", "interpreted_int8_kv.py")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint of each family."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def plain_model(folder: Path) -> Model:
    """Return a model whose linears are not packed."""
    return Model(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))


def use_layers(model: Model, make: Callable[[int, KVShape], TokenAttention] | None) -> None:
    """Make the model use the layers of CUDA, for example with the attention of the CPU."""
    heads = model.text.config.num_attention_heads
    model.token_attention = cuda_path.use_fused_layers(model.text, heads, model.kv_shape, make=make)


def logits(model: Model) -> torch.Tensor:
    """Return the logits of three sessions: prompts, steps with both kinds of rows, single tokens."""
    caches = [SessionKV(model.kv_shape) for _ in range(3)]
    steps = [
        [list(range(200, 240)), [210, 220, 230], [7]],
        [[201], list(range(205, 225)), [8]],
        [[9], [10], [11]],
    ]
    return torch.cat(
        [
            model.forward([Segment(kv, ids, None, [], True) for kv, ids in zip(caches, step, strict=True)]).logits
            for step in steps
        ]
    )


def test_fused_layers_give_the_plain_models_logits(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = plain_model(folder)
    expected = logits(model)
    use_layers(model, of(CompiledAttention))
    assert "cuda_layers path=fused" in caplog.messages
    assert all(isinstance(layer, FusedLayer) for layer in model.text.layers)
    assert isinstance(model.text.norm, DeviceNorm)
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=2e-4)


class Wrong(CompiledAttention):
    """Attention that makes an error in one number of its result."""

    def __call__(
        self, task: Any, layer: int, qkv: Any, cos: Any, sin: Any, out: torch.Tensor, norms: HeadNorms | None = None
    ) -> None:
        super().__call__(task, layer, qkv, cos, sin, out, norms)
        out[0, 3] += 0.5


class Forgetful(CompiledAttention):
    """Attention whose new keys and values are stored in copies of the caches."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__(heads, kv_heads, head_dim, dtype)
        self._token_numbers = 2 * kv_heads * head_dim
        self._copies: list[torch.Tensor] = []

    def task(self, places: list[tuple[int, int, int, int]]) -> Any:
        moved = []
        for row, address, capacity, stored in places:
            memory = (ctypes.c_float * (self._token_numbers * capacity)).from_address(address)
            self._copies.append(torch.frombuffer(memory, dtype=torch.float32).clone())
            moved.append((row, self._copies[-1].data_ptr(), capacity, stored))
        return super().task(moved)


def of(kind: type[CompiledAttention]) -> Callable[[int, KVShape], TokenAttention]:
    """Return the maker of a kind of attention."""
    return lambda heads, shape: kind(heads, shape.kv_heads, shape.head_dim, shape.dtype)


def refuses(heads: int, shape: KVShape) -> TokenAttention:
    """Fail as Triton does."""
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


@pytest.mark.parametrize(
    ("make", "event"),
    [
        (None, "ragged_attention_missing"),  # Triton itself, without a GPU
        (refuses, "ragged_attention_missing"),
        (of(Wrong), "ragged_attention_wrong"),
        (of(Forgetful), "ragged_attention_wrong"),
    ],
)
def test_the_plain_layers_stay_if_the_trial_fails(
    make: Any, event: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = plain_model(folder)
    before = list(model.text.layers)
    expected = logits(model)
    use_layers(model, make)
    assert [message.partition(" ")[0] for message in caplog.messages] == [event, "cuda_layers"]
    assert "cuda_layers path=plain" in caplog.messages
    assert list(model.text.layers) == before
    assert model.token_attention is None
    assert torch.equal(logits(model), expected)


def test_the_plain_layers_stay_if_a_fused_layer_is_wrong(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DeviceLinear._product

    def product(self: DeviceLinear, rows: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        return right(self, rows, None) if added is not None else right(self, rows, added)  # without the residual

    monkeypatch.setattr(DeviceLinear, "_product", product)
    model = plain_model(folder)
    use_layers(model, of(CompiledAttention))
    assert [message.partition(" ")[0] for message in caplog.messages] == ["fused_layer_wrong"]
    assert model.token_attention is None


class Unnormed(CompiledAttention):
    """Attention that computes no head norms."""

    def __call__(
        self, task: Any, layer: int, qkv: Any, cos: Any, sin: Any, out: torch.Tensor, norms: HeadNorms | None = None
    ) -> None:
        super().__call__(task, layer, qkv, cos, sin, out, None)


def test_the_plain_layers_stay_if_head_norms_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = plain_model(make_internvl35(tmp_path))
    use_layers(model, of(Unnormed))
    assert [message.partition(" ")[0] for message in caplog.messages] == ["ragged_attention_wrong"]
    assert model.token_attention is None


def test_the_plain_layers_stay_without_triton(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "llava_sessions.engine.cuda.ragged_kernels", raising=False)
    model = plain_model(make_onevision(tmp_path))
    model.use_cuda_layers()
    assert caplog.messages == ["ragged_attention_missing"]
    assert model.token_attention is None


def test_layers_of_another_kind_are_not_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = plain_model(make_onevision(tmp_path))
    model.text.layers[1].mlp.act_fn = torch.nn.GELU()
    use_layers(model, refuses)
    assert caplog.messages == ["cuda_layers path=plain"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_addition_is_written_into_the_residual(bias: bool) -> None:
    plain = torch.nn.Linear(8, 8, bias=bias)
    rows, added = torch.randn(3, 8), torch.randn(3, 8)
    with torch.inference_mode():
        expected = plain(rows) + added
        out = DeviceLinear(plain)(rows, added)
        assert out.data_ptr() == added.data_ptr()
        torch.testing.assert_close(out, expected)
        gate_up = DeviceLinear(plain, Activation.GATED_SILU)(rows)
        gate, up = plain(rows).chunk(2, -1)
        torch.testing.assert_close(gate_up, torch.nn.functional.silu(gate) * up)


def test_fusing_takes_memory_for_one_layer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes of LLaVA-1.5-7B. The joined weights replace those of a layer before the next one is joined."""
    monkeypatch.setattr("llava_sessions.engine.fused.layer.is_rms_norm", lambda norm: True)  # no numbers on meta
    card = Card(2**40, 0)
    card.patch(monkeypatch)
    with meta_cuda(card):
        with META:
            text = LlamaModel(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)).half()
        weights_bytes = card.live_bytes
        torch.cuda.reset_peak_memory_stats()
        assert fuse_layers(text.layers, layers.pack, layers.packable)
    joined_bytes = (3 * 4096 + 2 * 11008) * 4096 * 2
    # `side_by_side` makes a linear without memory on the meta device, which is counted here.
    empty_bytes = 2 * 11008 * 4096 * 4
    assert weights_bytes > 12 * 2**30
    assert card.live_bytes == weights_bytes
    assert card.peak_bytes <= weights_bytes + joined_bytes + empty_bytes
