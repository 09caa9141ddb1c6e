"""Int8 weights on CUDA without a GPU: numerics in Triton's interpreter, the way without Triton, and memory at load."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from deploy.sagemaker.capacity import GIB, SHAPES
from llava_sessions.engine.cuda import int8_linear
from llava_sessions.engine.cuda.int8_linear import (
    SCRATCH_BYTES,
    Blocks,
    Int8DeviceLinear,
    blocks,
    few_rows,
    kernel_works,
    pack_for,
)
from llava_sessions.engine.cuda.layers import DeviceLinear
from llava_sessions.engine.formats.int8 import dequantize, quantize
from llava_sessions.engine.fused.layer import FusedLayer
from llava_sessions.engine.fused.operations import Activation, activate
from tests.engine.test_budget import CUDA, config_of
from tests.support.interpreter import check_interpreted
from tests.support.meta_cuda import Card, meta_cuda

triton_driver = pytest.importorskip("tests.support.triton_driver", reason="no wheel of Triton for this platform")
CPU = torch.device("cpu")
# Compute capabilities of T4, A100 (twice), A10G, L4 and L40S, H100, B200, and a precision of the rows.
TARGETS = [
    (75, torch.float16),
    (80, torch.float16),
    (80, torch.float32),
    (86, torch.bfloat16),
    (89, torch.float16),
    (90, torch.bfloat16),
    (100, torch.bfloat16),
]


def test_the_kernel_in_the_interpreter() -> None:
    check_interpreted("interpreted_int8.py")


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_machine_code(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights are read with 16 bytes a load, nothing is spilled, and each size of block has the same instructions."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    has_tensor_cores = capability >= 80 and dtype != torch.float32
    for count, is_gated in ((1, False), (33, True)):
        size = blocks(count, is_gated, has_tensor_cores)
        with triton_driver.absent_device(capability) as device:
            launch(count, is_gated, dtype, size)
        (cubin,) = device.cubins
        # An iteration's block of weights: at least as many loads of 16 bytes as its 128 threads need for it.
        weights = (2 if is_gated else 1) * size.columns * size.inputs
        assert cubin.loads[128] >= weights // (16 * 128)
        assert cubin.count("STL") == 0
        assert cubin.shared <= 48 << 10
        # Tensor cores take 16 rows with one instruction: the sums of a row are the same for any number of rows.
        products = {text.split()[0] for text in cubin.instructions if text.startswith(("HMMA", "HGMMA", "UTC"))}
        kind = ".BF16" if dtype == torch.bfloat16 else ""
        assert products == ({f"HMMA.16816.F32{kind}"} if has_tensor_cores else set())


def launch(count: int, is_gated: bool, dtype: torch.dtype, size: Blocks) -> None:
    """Launch the kernel for a linear of LLaVA-1.5-7B, with tensors that are not read."""
    width = 2 * 11008 if is_gated else 4096
    rows = torch.empty(count, 4096, dtype=dtype)
    added = None if is_gated else torch.empty(count, 4096, dtype=dtype)
    few_rows(rows, torch.empty(width, 4096, dtype=torch.int8), torch.empty(width), None, added, is_gated, size)


def test_one_launch_for_any_number_of_rows() -> None:
    for count in (1, 16, 64):
        with triton_driver.absent_device(86) as device:
            launch(count, False, torch.float16, blocks(count, False, True))
        (found,) = device.launches
        assert found.grid == (-(-count // 32), 4096 // 32, 1)


@torch.inference_mode()
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("has_bias", [True, False])
def test_without_triton_parts_of_the_weight_are_widened(
    activation: Activation, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_linear, "SCRATCH_BYTES", 4 * 96 * 7)  # 10 parts of 7 rows
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 64, bias=has_bias)
    packed = Int8DeviceLinear(plain, activation, device=CPU, has_kernel=False)
    rows = torch.randn(3, 96)
    exact = dequantize(*quantize(plain.weight), torch.float32)
    expected = activate(torch.nn.functional.linear(rows, exact, plain.bias), activation)
    torch.testing.assert_close(packed(rows), expected)
    added = torch.randn(expected.shape)
    torch.testing.assert_close(packed(rows, added.clone()), expected + added)
    assert packed.weight_bytes == 64 * 96 + 64 * 4
    kept = [value for value in vars(packed).values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in kept) <= packed.weight_bytes + 64 * 4


def test_a_machine_without_triton_logs_it_and_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "llava_sessions.engine.cuda.int8_kernels", raising=False)
    kernel_works.cache_clear()
    try:
        packed = pack_for(CPU, torch.float32)(torch.nn.Linear(32, 32))
    finally:
        kernel_works.cache_clear()
    assert "int8_kernel_missing" in caplog.text
    assert packed(torch.ones(1, 32)).shape == (1, 32)


@torch.inference_mode()
def test_a_weight_that_is_not_finite_keeps_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_linear, "kernel_works", lambda *_: False)
    plain = torch.nn.Linear(32, 32)
    assert isinstance(pack_for(CPU, torch.float32)(plain), Int8DeviceLinear)
    for number in (torch.inf, -torch.inf, torch.nan):
        plain.weight[3, 4] = number
        assert isinstance(pack_for(CPU, torch.float32)(plain), DeviceLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_another_precision_than_16_bits_is_an_error_that_names_the_key(dtype: torch.dtype) -> None:
    for good in (torch.float16, torch.bfloat16):
        int8_linear.check(good)
    with pytest.raises(ValueError, match=r"^`llava.weights` int8 needs dtype .*got"):
        int8_linear.check(dtype)


def load(card: Card, layers: int) -> torch.nn.Module:
    """Load LLaVA-1.5-13B with fewer layers as `Model.load` does, the host's weights being on the CPU."""
    shape = next(shape for shape in SHAPES if shape.name == "LLaVA-1.5-13B")
    config = config_of(shape, layers)
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config, dtype=torch.float16)
    for parent in made.modules():  # on the host, in memory that is never written
        for name, parameter in parent.named_parameters(recurse=False):
            on_host = torch.empty(1, dtype=parameter.dtype).expand(parameter.shape)
            setattr(parent, name, torch.nn.Parameter(on_host, requires_grad=False))
        for name, buffer in parent.named_buffers(recurse=False):
            setattr(parent, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    with meta_cuda(card):
        int8_linear.move_others(made, CUDA)
        pack = pack_for(CUDA, torch.float16)
        text = made.model.language_model
        FusedLayer(text.layers[0].to(CUDA), lambda linear, *_: linear)  # the trial of the layers, in 16 bits
        for index, layer in enumerate(text.layers):
            text.layers[index] = FusedLayer(layer, pack)
        int8_linear.pack_all(made, pack)
    return made


def test_13b_loads_on_24_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device never holds all weights in 16 bits, which would be 24.9 GiB. Layers take equal memory."""
    monkeypatch.setattr(int8_linear, "kernel_works", lambda *_: False)
    peaks, kept = [], []
    for layers in (2, 4):
        card = Card(24 * GIB, 0)
        card.patch(monkeypatch)
        made = load(card, layers)
        peaks.append(card.peak_bytes)
        kept.append(card.live_bytes)
        del made
        assert card.live_bytes == 0
    a_layer = (kept[1] - kept[0]) // 2
    parameters = 4 * 5120**2 + 3 * 5120 * 13824
    assert parameters < a_layer < 1.001 * parameters, "nothing but int8 weights, scales and norms stays of a layer"
    assert peaks[1] - peaks[0] <= 2 * a_layer
    assert peaks[1] + 36 * a_layer < 15 * GIB


def test_a_product_of_many_rows_takes_one_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded by a constant, whatever the weight's size, also without a result in other memory."""
    card = Card(GIB, 0)
    card.patch(monkeypatch)
    with meta_cuda(card), torch.device("meta"):
        plain = torch.nn.Linear(5120, 27648, bias=False, dtype=torch.float16)
        packed = Int8DeviceLinear(plain, device=CUDA, has_kernel=False)
        rows = torch.empty(256, 5120, dtype=torch.float16)
        out = torch.empty(256, 27648, dtype=torch.float16)
        card._reset_peak()
        before = card.live_bytes
        packed(rows, out)
        assert 0.9 * SCRATCH_BYTES < card.peak_bytes - before <= SCRATCH_BYTES
