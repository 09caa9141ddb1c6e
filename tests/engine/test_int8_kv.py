"""KV caches in int8: the stored numbers, their memory in all tiers, and the answers of an engine that uses them."""

from __future__ import annotations

import pytest
import torch

from llava_sessions.engine.formats.int8 import quantize
from llava_sessions.engine.kv import GROWTH_TOKENS, KVShape, SessionKV
from llava_sessions.engine.kv_pool import KVPool
from tests.support.meta_cuda import Card, meta_cuda
from tests.support.nan_pool import NanPool

CPU = torch.device("cpu")
SHAPE = KVShape(3, 2, 16, torch.float32, CPU, torch.int8)
MIB = 2**20


def keys_and_values(tokens: int, shape: KVShape = SHAPE) -> torch.Tensor:
    """Return `[layers, 2, kv_heads, tokens, head_dim]` with amounts from tiny to large, and a key of zeros."""
    torch.manual_seed(tokens)
    numbers = torch.randn(shape.layers, 2, shape.kv_heads, tokens, shape.head_dim)
    numbers *= torch.logspace(-6, 3, tokens)[:, None]
    numbers[0, 0, 0, 0] = 0
    return numbers.to(shape.dtype)


def filled(numbers: torch.Tensor, pool: KVPool | None = None, pieces: int = 1, shape: KVShape = SHAPE) -> SessionKV:
    """Return a cache to which the numbers were written in pieces."""
    kv = SessionKV(shape, pool)
    for piece in torch.arange(numbers.shape[3]).chunk(pieces):
        start = kv.length
        kv.reserve(start + len(piece))
        for layer, (keys, values) in enumerate(numbers[:, :, :, piece]):
            kv.write(layer, start, keys, values)
        kv.length += len(piece)
    return kv


def stored(kv: SessionKV) -> list[torch.Tensor]:
    """Return copies of the int8 numbers and the scales of all tokens of a resident cache."""
    return [part[:, :, :, : kv.length].clone() for part in kv._parts]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


# --- the numbers ---


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_bytes_hold_1_8_times_the_tokens_of_a_16_bit_cache(head_dim: int, dtype: torch.dtype) -> None:
    plain = KVShape(32, 8, head_dim, dtype, CPU)
    int8 = KVShape(32, 8, head_dim, dtype, CPU, torch.int8)
    room = plain.device_bytes(100 * GROWTH_TOKENS)
    assert room // int8.device_bytes(1) >= 1.8 * room // plain.device_bytes(1)
    assert int8.token_bytes == 32 * 2 * 8 * (head_dim + 4)
    kv = SessionKV(int8)
    kv.reserve(300)
    assert kv.device_bytes == int8.device_bytes(300) == sum(part.nbytes for part in kv._parts)


def test_the_scales_follow_the_numbers_in_one_block() -> None:
    kv = filled(keys_and_values(5))
    numbers, scales = kv._parts
    assert (numbers.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (numbers.shape, scales.shape) == ((3, 2, 2, 256, 16), (3, 2, 2, 256))
    assert numbers.is_contiguous()
    assert scales.is_contiguous()
    assert (kv.address, kv.address + numbers.nbytes) == (numbers.data_ptr(), scales.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_reads_what_its_numbers_and_scales_stand_for(dtype: torch.dtype) -> None:
    shape = KVShape(3, 2, 16, dtype, CPU, torch.int8)
    written = keys_and_values(40, shape)
    kv = filled(written, NanPool(), shape=shape)
    for layer, (keys, values) in enumerate(written):
        for got, original in zip(kv.read(layer, 40), (keys, values), strict=True):
            assert (got.shape, got.dtype) == ((1, 2, 40, 16), dtype)
            numbers, scales = quantize(original)
            assert torch.equal(got[0], (numbers.float() * scales[..., None]).to(dtype))
            steps = original.float().abs().amax(-1, keepdim=True) / 127
            assert ((got[0].float() - original.float()).abs() <= (0.5 + 127 * torch.finfo(dtype).eps) * steps).all()


@pytest.mark.parametrize("pieces", [2, 7, 300])
def test_a_token_is_stored_the_same_whatever_it_is_written_with(pieces: int) -> None:
    written = keys_and_values(300)
    assert equal(stored(filled(written, pieces=pieces)), stored(filled(written)))


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_not_finite_is_not_hidden(wrong: float) -> None:
    written = keys_and_values(3)
    written[1, 0, 1, 2, 5] = wrong
    kv = filled(written)
    keys, values = kv.read(1, 3)
    assert not keys[0, 1, 2].isfinite().any()
    assert keys[0, 1, :2].isfinite().all()
    assert values.isfinite().all()


# --- the tiers ---


@pytest.mark.parametrize("with_pool", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 256, 600])
def test_no_move_changes_a_stored_number(tokens: int, with_pool: bool) -> None:
    pool = NanPool() if with_pool else None
    written = keys_and_values(tokens)
    kv = filled(written, pool, pieces=min(tokens, 3))
    expected = stored(filled(written))
    kv.reserve(tokens + 256)
    assert equal(stored(kv), expected), "growth"
    kept = max(tokens - 3, 1)
    for donor_moves in (lambda: None, kv.offload):
        donor_moves()
        copy = SessionKV(SHAPE, pool)
        copy.fork(kv, kept)
        assert equal(stored(copy), [part[:, :, :, :kept] for part in expected]), "fork"
    assert (kv.tier, kv.device_bytes) == ("offloaded", 0)
    assert (
        kv.host_bytes == tokens * SHAPE.token_bytes == sum(part.nbytes for block in kv.on_host or [] for part in block)
    )
    kv.crop(kept)
    kv.restore(kept + 300)
    assert kv.capacity >= kept + 300
    assert equal(stored(kv), [part[:, :, :, :kept] for part in expected]), "restore"
    kv.drop()
    assert (kv.tier, kv.device_bytes, kv.host_bytes) == ("cold", 0, 0)


def test_a_crop_frees_whole_blocks_on_the_host() -> None:
    kv = filled(keys_and_values(600))
    kv.offload()
    kv.crop(257)
    assert kv.host_bytes == 512 * SHAPE.token_bytes == sum(part.nbytes for block in kv.on_host or [] for part in block)
    kv.crop(0)
    assert (kv.tier, kv.host_bytes) == ("cold", 0)


def test_pinned_memory_and_moves_on_a_gpu_take_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KVShape(32, 8, 128, torch.float16, torch.device("cuda"), torch.int8)  # 66 KiB a token, 16.5 MiB a step
    card = Card(1024 * MIB, 0)
    card.patch(monkeypatch)
    with meta_cuda(card):
        kv = SessionKV(shape)
        kv.reserve(2900)
        kv.length = 2900
        assert kv.device_bytes == card.live_bytes == 12 * 16.5 * MIB
        for move in (kv.offload, kv.restore):
            move()
            assert kv.shape.device_bytes(2900) < card.peak_bytes <= kv.shape.device_bytes(2900) * (1 + 1 / 32)
        kv.offload()
    assert kv.host_bytes == shape.host_bytes(2900) == 12 * (16 + 0.5) * MIB, "no part is rounded up"
    assert card.pinned_bytes == 2 * kv.host_bytes, "the first blocks were freed, and torch keeps them for reuse"
