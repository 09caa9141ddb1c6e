"""KV caches in int8: the stored numbers, their memory in all tiers, and the answers of an engine that uses them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.cpu import amx, attention
from llava_sessions.engine.cpu.amx_sessions import SessionAttention
from llava_sessions.engine.cpu.layers import compile_token_attention
from llava_sessions.engine.cpu.token_attention import TokenAttention
from llava_sessions.engine.formats.int8 import dequantize, quantize
from llava_sessions.engine.kv import GROWTH_TOKENS, KVShape, SessionKV
from llava_sessions.engine.kv_pool import KVPool
from llava_sessions.engine.model import Model
from llava_sessions.engine.process import load
from llava_sessions.ipc.messages import AskSession, EngineSettings, Event, Finished, Sampling
from tests.engine.test_layers import logits
from tests.support.engine_chats import QUESTIONS, Chats
from tests.support.meta_cuda import Card, meta_cuda
from tests.support.nan_pool import NanPool

CPU = torch.device("cpu")
SHAPE = KVShape(3, 2, 16, torch.float32, CPU, torch.int8)
MIB = 2**20
DTYPES = (torch.bfloat16, torch.float32)
FEATURES_BYTES = 16 * 64 * 4  # of the tiny checkpoint: image tokens, hidden, float32


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


# --- compiled attention of single tokens ---


def rotated(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, shape: KVShape) -> torch.Tensor:
    """Return queries, keys and values `[rows, heads + 2 * kv_heads, head_dim]` as torch rotates them."""
    numbers = qkv.clone().view(len(qkv), -1, shape.head_dim)
    attention.rotate(numbers[:, : heads + shape.kv_heads], cos, sin)
    return numbers


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (4, 4, 16, torch.bfloat16),
        (4, 1, 128, torch.bfloat16),
        (4, 2, 24, torch.float32),
        *((6, 2, 64, d) for d in DTYPES),
    ],
)
def test_compiled_attention_is_that_of_the_stored_numbers(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    allowed = 0.01 if dtype == torch.bfloat16 else 1e-5
    shape = KVShape(3, kv_heads, head_dim, dtype, CPU, torch.int8)
    attend = compile_token_attention(heads, kv_heads, head_dim, dtype, torch.int8, 3)
    assert attend is not None
    lengths = (0, 1, 2, 3, 250, 255, 1001)
    caches = [filled(keys_and_values(max(length, 1), shape), NanPool(), shape=shape) for length in lengths]
    for kv, length in zip(caches, lengths, strict=True):
        kv.crop(length)
        kv.reserve(length + 1)
    before = [stored(kv) for kv in caches]
    torch.manual_seed(0)
    qkv = 2 * torch.randn(len(lengths) + 1, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.rand(len(qkv), head_dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = torch.full((len(qkv), heads * head_dim), 7.0).to(dtype)
    rows = [*range(1, len(lengths)), 0]  # the last row belongs to another segment
    attend(
        attend.task([(row, kv.address, kv.capacity, kv.length) for row, kv in zip(rows, caches, strict=True)]),
        1,
        qkv,
        cos,
        sin,
        out,
    )
    numbers = rotated(qkv, cos, sin, heads, shape).float()
    for row, kv, old in zip(rows, caches, before, strict=True):
        kv.length += 1
        query, key, value = numbers[row].split((heads, kv_heads, kv_heads))
        keys, values = dequantize(*(part[1] for part in stored(kv)), torch.float32)
        for got, exact in ((keys[:, -1], key), (values[:, -1], value)):
            assert ((got - exact).abs() <= exact.abs().amax(-1, keepdim=True) * (0.51 / 127 + allowed)).all()
        exact = scaled_dot_product_attention(query[None, :, None], keys[None], values[None], enable_gqa=True)
        torch.testing.assert_close(out[row].float(), exact.flatten(), atol=2 * allowed, rtol=2 * allowed)
        kv.length -= 1
        assert equal(stored(kv), old), "an older token was written"
    assert (out[-1] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_attention_stores_the_bytes_that_a_chunk_stores(dtype: torch.dtype) -> None:
    shape = KVShape(3, 2, 64, dtype, CPU, torch.int8)
    attend = compile_token_attention(6, 2, 64, dtype, torch.int8, 3)
    assert attend is not None
    written = keys_and_values(40, shape)
    chunk = filled(written, NanPool(), shape=shape)
    single = SessionKV(shape, NanPool())
    single.reserve(40)
    cos = torch.ones(1, 64, dtype=dtype)  # no rotation, whose rounding differs
    for token in range(40):
        for layer, (keys, values) in enumerate(written[:, :, :, token]):
            qkv = torch.cat((torch.zeros(6, 64, dtype=dtype), keys, values)).view(1, -1)
            out = torch.empty(1, 384, dtype=dtype)
            attend(attend.task([(0, single.address, single.capacity, token)]), layer, qkv, cos, cos * 0, out)
        single.length += 1
    assert equal(stored(single), stored(chunk))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
@pytest.mark.parametrize("head", [6, 8], ids=["key", "value"])
def test_compiled_attention_does_not_hide_a_number_that_is_not_finite(
    head: int, wrong: float, dtype: torch.dtype
) -> None:
    attend = compile_token_attention(6, 2, 64, dtype, torch.int8, 3)
    assert attend is not None
    shape = KVShape(3, 2, 64, dtype, CPU, torch.int8)
    kv = filled(keys_and_values(40, shape), shape=shape)
    qkv = torch.ones(1, 10, 64, dtype=dtype)
    qkv[0, head, 20] = wrong  # of the first KV head
    cos = torch.ones(1, 64, dtype=dtype)
    out = torch.empty(1, 384, dtype=dtype)
    attend(attend.task([(0, kv.address, kv.capacity, kv.length)]), 0, qkv.view(1, -1), cos, cos * 0, out)
    assert not kv._parts[1][0, head // 2 - 3, 0, 40].isfinite()
    assert not out[0, :192].isfinite().any(), "the query heads of the KV head"
    assert out[0, 192:].isfinite().all()


def test_compiled_attention_with_wrong_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TokenAttention.__call__

    def wrong(self, task, layer, qkv, cos, sin, out, norms):
        right(self, task, layer, qkv, cos, sin, out, norms)
        out.add_(0.1)

    monkeypatch.setattr(TokenAttention, "__call__", wrong)
    assert compile_token_attention(4, 2, 16, torch.float32, torch.int8, 2) is None


# --- compiled attention of several tokens ---


def attended(
    attend: SessionAttention, kv: SessionKV, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Append rows to a cache in one call, layer 1; return their attention."""
    kv.reserve(kv.length + len(qkv))
    out = torch.empty(len(qkv), 6 * 64, dtype=torch.bfloat16)
    attend(attend.task([(0, len(qkv), kv.address, kv.capacity, kv.length)]), 1, qkv, cos, sin, out)
    kv.length += len(qkv)
    return out


@pytest.mark.skipif(not amx.is_available(), reason="this CPU has no AMX")
def test_chunks_store_and_read_the_quantized_numbers_wherever_they_are_cut() -> None:
    shape = KVShape(3, 2, 64, torch.bfloat16, CPU, torch.int8)
    attend = attention.session_attention(6, 2, 64, torch.bfloat16, torch.int8, 3)
    assert attend is not None
    torch.manual_seed(0)
    qkv = 2 * torch.randn(300, 10 * 64).bfloat16()
    cos, sin = torch.ones(300, 64).bfloat16(), torch.zeros(300, 64).bfloat16()
    whole, cut = SessionKV(shape, NanPool()), SessionKV(shape, NanPool())
    out = attended(attend, whole, qkv, cos, sin)
    cuts = itertools.pairwise((0, 1, 31, 64, 190, 300))
    parts = [attended(attend, cut, qkv[start:end], cos[start:end], sin[start:end]) for start, end in cuts]
    assert torch.equal(torch.cat(parts), out)
    query, new_keys, new_values = qkv.view(300, 10, 64).transpose(0, 1).split((6, 2, 2))
    for kv in (whole, cut):
        for part, expected in zip(stored(kv), quantize(torch.stack((new_keys, new_values))), strict=True):
            assert torch.equal(part[1], expected)
    keys, values = whole.read(1, 300)
    exact = scaled_dot_product_attention(
        query[None].float(), keys.float(), values.float(), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out.float(), exact[0].transpose(0, 1).flatten(1), atol=0.02, rtol=0.02)


# --- the engine ---


@pytest.fixture(params=["torch", "compiled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the engine with torch's attention and with compiled attention of single tokens."""
    if request.param == "compiled":
        monkeypatch.setattr("llava_sessions.engine.model.COMPILE_FROM_BYTES", 0)


def chats_of(folder: Path, budget: DeviceBudget | None = None) -> Chats:
    chats = Chats(folder, budget=budget, kv_dtype="int8")
    chats.engine.device_memory.pool = NanPool()
    return chats


def talk(chats: Chats, names: str, together: bool) -> dict[str, list[list[int]]]:
    """Run three turns with each session, all together or one after another; return the answers by session."""
    answers: dict[str, list[list[int]]] = {name: [] for name in names}
    for name in names:
        chats.open(name, ord(name) // 2)  # two sessions share a picture, and the prefix of one is copied
        chats.run()
    for turn, question in enumerate((QUESTIONS[0], QUESTIONS[1] * 22, QUESTIONS[2])):
        for name in names if turn % 2 else reversed(names):
            chats.ask(name, f"{question} {name}", Sampling(5))
            if not together:
                answers[name].append(chats.run()[name].answer_ids)
        for name, finished in chats.run().items():
            answers[name].append(finished.answer_ids)
    return answers


def test_answers_do_not_depend_on_company_or_on_moves(tiny: Path, path: None) -> None:
    alone: dict[str, list[list[int]]] = {}
    for name in "abcd":
        alone |= talk(chats_of(tiny), name, together=False)
    together = chats_of(tiny)
    assert talk(together, "abcd", together=True) == alone
    step = together.engine.model.kv_shape.device_bytes(1)
    assert step == GROWTH_TOKENS * 4 * 2 * 2 * (16 + 4)  # layers, keys and values, kv heads, head dim and scale
    moved = chats_of(tiny, DeviceBudget(3 * step + 4 * FEATURES_BYTES, 2**30))
    assert talk(moved, "abcd", together=False) == alone
    assert moved.engine.memory().restores > 0
    rebuilt = chats_of(tiny, DeviceBudget(3 * step + 4 * FEATURES_BYTES, 0))
    assert talk(rebuilt, "abcd", together=False) == alone
    assert rebuilt.engine.memory().drops > 0


def test_int8_changes_the_logits_little(tiny: Path, path: None) -> None:
    plain, int8 = (Model.load(tiny, "float32", "cpu", kv_dtype=kv_dtype) for kv_dtype in ("auto", "int8"))
    expected, got = (torch.cat(logits(model)) for model in (plain, int8))
    assert 0 < (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_crop_answers_as_a_session_without_the_cropped_tokens(tiny: Path, path: None) -> None:
    chats = chats_of(tiny)
    for name in "ab":
        chats.open(name, 1)
    chats.run()
    kept = chats.engine.sessions["a"].kv.length
    chats.ask("a", QUESTIONS[1], Sampling(4))
    chats.run()
    chats.ask("b", QUESTIONS[0], Sampling(6))
    expected = chats.run()["b"].answer_ids
    prompt = chats.prompts["b"]
    chats.engine.apply(AskSession("a", "turn-a", prompt, Sampling(6), kept_tokens=kept))
    assert [event.answer_ids for event in run_events(chats) if isinstance(event, Finished)] == [expected]


def run_events(chats: Chats) -> list[Event]:
    events: list[Event] = []
    while chats.engine.has_work:
        events += chats.engine.step()
    return events


def test_the_engines_memory_is_counted_in_int8(tiny: Path) -> None:
    chats = chats_of(tiny, DeviceBudget(2**30, 2**30))
    for name in "ab":
        chats.open(name, ord(name))
    chats.run()
    shape = chats.engine.model.kv_shape
    memory = chats.engine.memory()
    assert memory.kv_bytes == 2 * GROWTH_TOKENS * shape.token_bytes
    session = chats.engine.sessions["a"]
    chats.engine.device_memory._offload(session)
    memory = chats.engine.memory()
    assert memory.kv_bytes == GROWTH_TOKENS * shape.token_bytes
    assert memory.offloaded_bytes == session.kv.length * shape.token_bytes


def test_the_settings_of_an_engine_process_choose_int8(tiny: Path) -> None:
    settings = EngineSettings(str(tiny), "", "float32", "cpu", 256, kv_dtype="int8")
    assert load(settings).model.kv_shape.is_int8
    assert not load(replace(settings, kv_dtype="auto")).model.kv_shape.is_int8
