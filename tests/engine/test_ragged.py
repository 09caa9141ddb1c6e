"""Ragged attention without a GPU: numbers in Triton's interpreter, and machine code for each kind of GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llava_sessions.engine.cuda.ragged import RaggedAttention
from llava_sessions.engine.fused.head_norms import HeadNorms
from tests.support.interpreter import check_interpreted

pytest.importorskip("triton", reason="no wheel of Triton for this platform")
from tests.support.triton_driver import Cubin, absent_device  # it needs Triton

LLAVA_7B = (32, 32, 128)
MISTRAL_7B = (32, 8, 128)
QWEN2_7B = (28, 4, 128)
QWEN3_1B = (16, 8, 128)
QWEN3_8B = (32, 8, 128)
INT8 = torch.int8
# Compute capability of a GPU (T4, A100, A10G, L4 and L40S, H100, B200), heads of a model, precision of its KV cache.
TARGETS = [
    (75, LLAVA_7B, None),
    (75, MISTRAL_7B, INT8),
    (80, LLAVA_7B, INT8),
    (80, MISTRAL_7B, None),
    (86, QWEN2_7B, INT8),
    (89, LLAVA_7B, None),
    (90, LLAVA_7B, None),
    (90, QWEN2_7B, None),
    (100, LLAVA_7B, None),
    (100, QWEN2_7B, INT8),
]
# The same for models with norms of the heads.
NORMED_TARGETS = [(75, QWEN3_1B, None), (86, QWEN3_8B, INT8), (90, QWEN3_8B, None), (100, QWEN3_1B, INT8)]
# Of a multiprocessor: threads, KiB of shared memory, and its part of the card's bandwidth in KB per microsecond. From
# data sheets; 8.6 is an A10G, 8.9 an L40S.
MULTIPROCESSORS = {
    75: (1024, 64, 8.0),
    80: (2048, 164, 18.9),
    86: (1536, 100, 7.5),
    89: (1536, 100, 6.1),
    90: (2048, 228, 25.4),
    100: (2048, 228, 54.1),
}
# Microseconds from a load to its data when the memory is busy: an estimate.
LATENCY = 0.8
# Values that ptxas keeps in local memory around the loop, though it uses 96 of 255 registers.
SPILLS = {(100, LLAVA_7B, None): 2}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile in each test, and leave nothing in the user's folder."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def attend(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    lengths: tuple[int, ...] = (9,),
    normed: bool = False,
) -> RaggedAttention:
    """Launch attention in two layers. `normed`: with norms of the heads."""
    count, kv_heads, head_dim = heads
    attention = RaggedAttention(*heads, dtype, torch.device("cpu"), kv_dtype=kv_dtype, layers=2)
    qkv = torch.empty(len(lengths), (count + 2 * kv_heads) * head_dim, dtype=dtype)
    cos = torch.empty(len(lengths), head_dim, dtype=dtype)
    out = torch.empty(len(lengths), count * head_dim, dtype=dtype)
    task = attention.task([(row, 4096, 1024, stored) for row, stored in enumerate(lengths)])
    norms = HeadNorms(torch.empty(2, head_dim, dtype=dtype), 1e-6) if normed else None
    attention(task, 0, qkv, cos, cos, out, norms)
    attention(task, 1, qkv, cos, cos, out, norms)
    return attention


@pytest.mark.parametrize(
    ("capability", "heads", "kv_dtype", "normed"),
    [*((*target, False) for target in TARGETS), *((*target, True) for target in NORMED_TARGETS)],
)
def test_machine_code(capability: int, heads: tuple[int, int, int], kv_dtype: torch.dtype | None, normed: bool) -> None:
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    with absent_device(capability) as device:
        attend(heads, dtype, kv_dtype, normed=normed)
    attend_code, merge_code = device.cubins
    # Constants of a kernel without norms, which therefore has no instruction for them.
    are_constants = [device.launches[0].types[name] == "constexpr" for name in ("norm_weights", "epsilon")]
    assert are_constants == 2 * [not normed]
    has_tensor_cores = heads[0] > heads[1] and capability >= 80
    assert (attend_code.count("HMMA") > 0) == has_tensor_cores
    # One iteration loads keys and values of 32 tokens, or of 16 without tensor cores, with vectors of 16 bytes. The
    # values of an int8 group take two vectors of 8 bytes each. Without the alignment hint every number is a load.
    is_plain = heads[0] > heads[1] and not has_tensor_cores
    tokens, threads = (16, 256) if is_plain else (32, 128)
    tile_bytes = 2 * tokens * heads[2] * (1 if kv_dtype else 2)
    vectors = tile_bytes // (16 * threads)
    loads = attend_code.loads
    assert loads[128] + loads[64] // 2 >= vectors
    assert loads[128] >= max(vectors // 2, 1)
    assert sum(loads.values()) < 60
    assert merge_code.loads[128] >= 4
    spilled = attend_code.count("STL") + merge_code.count("STL")
    assert spilled <= SPILLS.get((capability, heads, kv_dtype), 0)
    assert attend_code.shared <= 48 << 10
    # Tensor cores read from shared memory, where the loads of the next two iterations are under way.
    under_way = resident_programs(capability, attend_code, threads) * tile_bytes * (2 if has_tensor_cores else 1)
    assert under_way >= 1000 * MULTIPROCESSORS[capability][2] * LATENCY


def resident_programs(capability: int, cubin: Cubin, threads: int) -> int:
    """Return the programs that run at a time on a multiprocessor of 65,536 registers.

    A warp of 32 threads takes registers in units of 256. A program takes 1 KiB of shared memory more than it uses.
    """
    most_threads, shared, _ = MULTIPROCESSORS[capability]
    warp_registers = -(-cubin.registers * 32 // 256) * 256
    by_registers = 65536 // warp_registers // (threads // 32)
    return min(by_registers, most_threads // threads, (shared << 10) // (cubin.shared + 1024))


def test_two_launches_a_layer_for_any_number_of_sessions() -> None:
    for lengths, normed in (((300,), False), (tuple(range(64)), False), ((300,), True)):
        with absent_device(80) as device:
            attend(LLAVA_7B, torch.bfloat16, lengths=lengths, normed=normed)
        pieces = sum(stored // 128 + 1 for stored in lengths)
        grids = [(launch.name, launch.grid) for launch in device.launches]
        assert grids == 2 * [("attend", (pieces, 32, 1)), ("merge", (len(lengths), 32, 1))]
        assert len(device.cubins) == 2


@pytest.mark.parametrize("normed", [False, True])
def test_the_compiled_form_of_the_first_launch_serves_all_launches(normed: bool) -> None:
    with absent_device(80) as device:
        attend(LLAVA_7B, torch.bfloat16, normed=normed)
    first, _, second, _ = device.launches
    assert (first.args[7], second.args[7]) == (0, 1)  # the layer
    assert len(first.args) == len(second.args)
    assert (first.args[10] is not None) == normed  # the layer's own weights of the norms
    assert first.args[11:] == second.args[11:]  # the constants are at the same places
    # Triton would otherwise compile for a multiple of 16 and for the number 1 (a step of one token) separately.
    assert {name: first.types[name] for name in ("tokens", "layer", "layers")} == {
        "tokens": "i32",
        "layer": "i32",
        "layers": "i32",
    }
    pointers = {"qkv", "cos", "sin", "mixed_parts", "softmax_parts", "out", *(["norm_weights"] if normed else [])}
    for launch in device.launches:
        assert launch.aligned == set(launch.types) & pointers


@pytest.mark.parametrize(
    ("heads", "dtype", "kv_dtype", "layers", "message"),
    [
        ((6, 4, 64), torch.float16, None, 1, "`heads` must be a multiple of `kv_heads`, got 6 and 4"),
        ((64, 1, 64), torch.float16, None, 1, "`heads` must be at most 32 for each KV head, got 64 for 1"),
        ((4, 4, 100), torch.float16, None, 1, "`head_dim` must be a multiple of 8 and at most 256, got 100"),
        ((4, 4, 264), torch.float16, None, 1, "`head_dim` must be a multiple of 8 and at most 256, got 264"),
        ((4, 4, 64), torch.float64, None, 1, "`dtype` must be float16, bfloat16 or float32, got torch.float64"),
        ((4, 4, 64), torch.float16, torch.bfloat16, 1, "`kv_dtype` must be int8 or torch.float16, got torch.bfloat16"),
        ((4, 4, 64), torch.float16, torch.int8, 0, "`layers` must be at least 1 with int8, got 0"),
    ],
)
def test_a_shape_without_kernels_is_rejected(
    heads: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype | None, layers: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RaggedAttention(*heads, dtype, torch.device("cpu"), kv_dtype=kv_dtype, layers=layers)


def test_a_machine_without_triton_has_no_ragged_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "llava_sessions.engine.cuda.ragged_kernels", raising=False)
    monkeypatch.delattr("llava_sessions.engine.cuda.ragged_kernels", raising=False)
    with pytest.raises(ImportError):
        RaggedAttention(*LLAVA_7B, torch.bfloat16, torch.device("cpu"))


def test_numbers_in_the_interpreter() -> None:
    check_interpreted("interpreted_ragged.py")
