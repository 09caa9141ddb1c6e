"""Linears with int8 weights on the kernel of CUDA, which Triton's interpreter runs on the CPU.

test_cuda_int8.py runs these tests in a process of their own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForImageTextToText

from llava_sessions.engine.attention import Segment
from llava_sessions.engine.cuda import int8_linear
from llava_sessions.engine.cuda.int8_linear import FEW_ROWS, Int8DeviceLinear, blocks, few_rows, kernel_works
from llava_sessions.engine.formats.int8 import dequantize, quantize
from llava_sessions.engine.fused.layer import FusedLayer
from llava_sessions.engine.fused.operations import Activation
from llava_sessions.engine.kv import SessionKV
from llava_sessions.engine.model import Model
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.processors import load_processor
from tests.engine.interpreted_layers import FAMILIES, Chats, worlds  # noqa: F401 - a fixture
from tests.support.family import Family
from tests.support.tiny_families import make_llava
from tests.support.two_worlds import CUDA, Worlds

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16)  # the interpreter computes products of bfloat16 wrong


class Example:
    """A linear with int8 weights on tensors that are parts of larger ones, whose other numbers are NaN."""

    def __init__(
        self, rows: int, columns: int, inputs: int, dtype: torch.dtype, is_gated: bool, has_bias: bool
    ) -> None:
        torch.manual_seed(rows * columns + inputs)
        width = columns * (2 if is_gated else 1)
        self.is_gated = is_gated
        self.numbers, scales = quantize(torch.randn(width, inputs) * torch.logspace(-2, 1, width)[:, None])
        self.scales = poisoned(scales / inputs**0.5)
        self.bias = poisoned(torch.randn(width).to(dtype)) if has_bias else None
        self.rows = poisoned(torch.randn(rows, inputs).to(dtype))
        self.added = poisoned(torch.randn(rows, columns).to(dtype))

    def expected(self, added: torch.Tensor | None) -> torch.Tensor:
        """Return the result in float64."""
        out = self.rows.double() @ (self.numbers.double() * self.scales.double()[:, None]).T
        if self.bias is not None:
            out += self.bias.double()
        if self.is_gated:
            gate, up = out.chunk(2, 1)
            out = silu(gate) * up
        return out if added is None else out + added.double()

    def run(self, added: torch.Tensor | None, has_tensor_cores: bool, start: int = 0, end: int | None = None):
        """Return the kernel's result for some of the rows."""
        rows = self.rows[start:end]
        size = blocks(len(rows), self.is_gated, has_tensor_cores)
        return few_rows(rows, self.numbers, self.scales, self.bias, added, self.is_gated, size)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in the middle of memory that is NaN."""
    memory = torch.full((tensor.numel() + 64,), math.nan, dtype=tensor.dtype)
    part = memory[32 : 32 + tensor.numel()].view(tensor.shape)
    return part.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_tensor_cores", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "inputs"), [(1, 33, 50), (3, 96, 272), (16, 33, 50), (33, 96, 272), (64, 33, 50)]
)
def test_the_result_is_that_of_the_dequantized_weights(
    rows: int, columns: int, inputs: int, has_tensor_cores: bool, dtype: torch.dtype
) -> None:
    example = Example(rows, columns, inputs, dtype, is_gated=rows % 2 == 1, has_bias=columns % 2 == 1)
    allowed = max(1e-5, 2 * torch.finfo(dtype).eps)
    expected = example.expected(None)
    got = example.run(None, has_tensor_cores)
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() <= allowed * expected.abs().max()
    expected = example.expected(example.added)
    got = example.run(example.added, has_tensor_cores)
    assert (got.double() - expected).abs().max() <= allowed * expected.abs().max()
    assert got.data_ptr() == example.added.data_ptr(), "the result is in the memory of `added`"
    around = torch.empty(0, dtype=dtype).set_(example.added.untyped_storage())
    assert around[:32].isnan().all()
    assert around[-32:].isnan().all()


@pytest.mark.parametrize("has_tensor_cores", [True, False])
@pytest.mark.parametrize(("few", "many"), [(5, 16), (17, 64), (33, 64)])
def test_the_numbers_of_a_row_do_not_depend_on_the_others(few: int, many: int, has_tensor_cores: bool) -> None:
    """Where both numbers of rows have the same blocks, exactly. Between blocks NumPy may add in another order."""
    assert blocks(few, False, has_tensor_cores) == blocks(many, False, has_tensor_cores)
    for is_gated in (False, True):
        example = Example(many, 64, 144, torch.float32, is_gated, has_bias=True)
        whole = example.run(None, has_tensor_cores)
        assert torch.equal(example.run(None, has_tensor_cores, end=few), whole[:few])


@torch.inference_mode()
@pytest.mark.parametrize("activation", Activation)
def test_a_linear_takes_the_kernel_for_few_rows_and_torch_for_more(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.nn.Linear(80, 64)
    packed = Int8DeviceLinear(plain, activation, device=CPU, has_kernel=True)
    torch_only = Int8DeviceLinear(plain, activation, device=CPU, has_kernel=False)
    calls: list[int] = []

    def counted(rows: torch.Tensor, *args: object) -> torch.Tensor:
        calls.append(len(rows))
        return few_rows(rows, *args)

    monkeypatch.setattr(int8_linear, "few_rows", counted)
    width = 32 if activation is Activation.GATED_SILU else 64
    for count in (0, 1, FEW_ROWS, FEW_ROWS + 1):
        rows = torch.randn(1, count, 80)
        added = torch.randn(1, count, width)
        torch.testing.assert_close(packed(rows, added.clone()), torch_only(rows, added), atol=1e-5, rtol=1e-5)
    has_kernel = activation in (Activation.NONE, Activation.GATED_SILU)
    assert calls == ([1, FEW_ROWS] if has_kernel else [])


def test_the_trial_accepts_the_kernel_and_refuses_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for dtype in DTYPES:
        assert kernel_works(CPU, dtype)
    monkeypatch.setattr(int8_linear, "few_rows", lambda *args: few_rows(*args) * 1.01)
    kernel_works.cache_clear()
    try:
        assert not kernel_works(CPU, torch.float32)
        assert "int8_kernel_wrong dtype=float32" in caplog.text
    finally:
        kernel_works.cache_clear()


def with_dequantized_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a transformers model with the weights that the int8 numbers stand for."""
    model = copy.deepcopy(model)
    for parent, name, child in list(int8_linear._linears(model)):
        exact = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
        exact.weight = torch.nn.Parameter(dequantize(*quantize(child.weight.detach()), torch.float32))
        exact.bias = child.bias
        setattr(parent, name, exact)  # a new module: the head's weight may be the table of embeddings
    return model


def on_device(plain: torch.nn.Module, worlds: Worlds) -> Model:  # noqa: F811
    """Return the engine's model, made from one on the host as `Model.load` does."""
    with worlds.active():
        int8_linear.move_others(plain, CUDA)
        return Model(plain, cuda_pack=int8_linear.pack_for(CUDA, torch.float32))


@pytest.mark.parametrize(
    "name",
    [
        "onevision",  # two query heads per KV head, biases, a head that is the table of embeddings
        "internvl3.5",  # head norms, and query heads that are together wider than the hidden size
    ],
)
def test_answers_equal_generate_with_the_dequantized_weights(name: str, tmp_path: Path, worlds: Worlds) -> None:  # noqa: F811
    folder = FAMILIES[name](tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    reference = with_dequantized_weights(plain)
    model = on_device(plain, worlds)
    assert model.device == CUDA
    assert all(isinstance(layer, FusedLayer) for layer in model.text.layers)
    int8 = [part for part in plain.modules() if isinstance(part, Int8DeviceLinear)]
    assert len(int8) == 4 * len(model.text.layers) + 1, "the vision tower keeps its precision"
    chats = Chats(Family(name, folder, ChatTemplate(load_processor(folder)), model, reference), worlds)
    for seed, session in enumerate("ab"):
        chats.open(session, seed)
    chats.ask("a", 1, 3)
    for _ in range(2):
        chats.step()
    chats.ask("b", 2, 3)  # its prefill is in a step with a token of the other session
    chats.check()


def test_a_decode_step_takes_eight_launches_a_layer_for_any_number_of_sessions(tmp_path: Path, worlds: Worlds) -> None:  # noqa: F811
    folder = make_llava(tmp_path, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=32)
    model = on_device(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), worlds)
    worlds.run_kernels = False  # they are counted only
    launches = []
    for count in (1, FEW_ROWS):
        with worlds.active():
            caches = [SessionKV(model.kv_shape) for _ in range(count)]
            for kv in caches:
                kv.reserve(140)
                kv.on_device.zero_()
                kv.length = 130
            before = worlds.labels.launches
            model.forward([Segment(kv, [300], None, [], True) for kv in caches])
            launches.append(worlds.labels.launches - before)
    assert launches[0] == launches[1]
    assert launches[0] // 32 == 8
