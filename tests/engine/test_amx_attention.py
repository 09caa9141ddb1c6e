"""Attention with AMX has torch's numbers, and torch's own attention is used where AMX is missing or wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_sessions.engine.cpu import amx, amx_checks
from llava_sessions.engine.cpu import attention as attention_module
from llava_sessions.engine.cpu.amx_pictures import PictureAttention
from llava_sessions.engine.cpu.amx_sessions import SessionAttention
from llava_sessions.engine.cpu.example_cache import example_norms
from llava_sessions.engine.fused.head_norms import HeadNorms

needs_amx = pytest.mark.skipif(not amx.is_available(), reason="this CPU has no AMX with bfloat16")
HEADS = 4
HEAD_DIM = 32
CAPACITY = 800


def new_tokens(rows: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values of new tokens, and their angles' cosines and sines."""
    qkv = torch.randn(rows, (HEADS + 2 * kv_heads) * HEAD_DIM).bfloat16()
    angles = torch.rand(rows, HEAD_DIM // 2).mul(6).repeat(1, 2)
    return qkv, angles.cos().bfloat16(), angles.sin().bfloat16()


def stored_tokens(stored: int, kv_heads: int) -> torch.Tensor:
    """Return the KV of two layers. Memory behind the stored tokens is not a number."""
    kv = torch.randn(2, 2, kv_heads, CAPACITY, HEAD_DIM).bfloat16()
    kv[:, :, :, stored:] = float("nan")
    return kv


def expected_attention(
    kv: torch.Tensor,
    stored: int,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return layer 1's attention `[rows, heads * head_dim]` and KV by torch in float32."""
    rows = len(qkv)
    kv_heads = kv.shape[2]
    numbers = qkv.float().view(rows, -1, HEAD_DIM)
    if norms is not None:
        HeadNorms(norms.weights.float(), norms.epsilon)(numbers[:, : HEADS + kv_heads], HEADS)
    attention_module.rotate(numbers[:, : HEADS + kv_heads], cos.float(), sin.float())
    query, keys, values = numbers.bfloat16().float().transpose(0, 1).split((HEADS, kv_heads, kv_heads))
    known = kv[1, :, :, :stored].float()
    keys, values = torch.cat((known[0], keys), 1), torch.cat((known[1], values), 1)
    mask = torch.ones(rows, stored + rows, dtype=torch.bool).tril(stored)
    out = scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1), torch.stack((keys, values))


@needs_amx
@pytest.mark.parametrize(("kv_heads", "with_norms"), [(4, False), (2, False), (1, False), (2, True)])
def test_sessions_have_torchs_numbers(kv_heads: int, with_norms: bool) -> None:
    torch.manual_seed(0)
    norms = example_norms(HEAD_DIM, torch.bfloat16) if with_norms else None
    compiled = SessionAttention(HEADS, kv_heads, HEAD_DIM)
    for rows, stored in itertools.product((1, 2, 15, 16, 17, 33, 40), (0, 1, 31, 32, 127, 128, 300, 700)):
        kv = stored_tokens(stored, kv_heads)
        qkv, cos, sin = new_tokens(rows, kv_heads)
        expected, expected_kv = expected_attention(kv, stored, qkv, cos, sin, norms)
        out = torch.empty(rows, HEADS * HEAD_DIM, dtype=torch.bfloat16)
        compiled(compiled.task([(0, rows, kv.data_ptr(), CAPACITY, stored)]), 1, qkv, cos, sin, out, norms)
        torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
        torch.testing.assert_close(kv[1, :, :, : stored + rows].float(), expected_kv, atol=0.01, rtol=0.01)
        assert kv[1, :, :, stored + rows :].isnan().all()
        assert kv[0, :, :, stored:].isnan().all()


@needs_amx
def test_numbers_depend_neither_on_other_sessions_nor_on_how_a_prompt_is_cut() -> None:
    torch.manual_seed(0)
    compiled = SessionAttention(HEADS, 2, HEAD_DIM)
    qkv, cos, sin = new_tokens(200, 2)
    whole = stored_tokens(0, 2)
    alone = torch.empty(200, HEADS * HEAD_DIM, dtype=torch.bfloat16)
    compiled(compiled.task([(0, 200, whole.data_ptr(), CAPACITY, 0)]), 1, qkv, cos, sin, alone)
    cut, other = stored_tokens(0, 2), stored_tokens(50, 2)
    parts = torch.empty_like(alone)
    for start, end in ((0, 37), (37, 39), (39, 181), (181, 200)):
        rows = end - start
        more, more_cos, more_sin = new_tokens(9, 2)
        pack, pack_cos, pack_sin = (
            torch.cat(pair) for pair in ((more, qkv[start:end]), (more_cos, cos[start:end]), (more_sin, sin[start:end]))
        )
        out = torch.empty(9 + rows, HEADS * HEAD_DIM, dtype=torch.bfloat16)
        places = [(9, rows, cut.data_ptr(), CAPACITY, start), (0, 9, other.data_ptr(), CAPACITY, 50)]
        compiled(compiled.task(places), 1, pack, pack_cos, pack_sin, out)
        parts[start:end] = out[9:]
    assert torch.equal(parts, alone)
    assert torch.equal(cut[1, :, :, :200], whole[1, :, :, :200])


@needs_amx
def test_the_end_of_the_memory_and_any_alignment_are_allowed() -> None:
    torch.manual_seed(0)
    compiled = SessionAttention(HEADS, 2, HEAD_DIM)
    rows, stored = 5, 40
    qkv, cos, sin = new_tokens(rows, 2)
    kv = torch.randn(2, 2, 2, stored + rows, HEAD_DIM).bfloat16()
    expected, _ = expected_attention(kv, stored, qkv, cos, sin)
    for offset in (0, 1, 3, 17):
        parts = [torch.empty(part.numel() + offset, dtype=torch.bfloat16)[offset:] for part in (kv, qkv, cos, sin)]
        for part, source in zip(parts, (kv, qkv, cos, sin), strict=True):
            part.copy_(source.flatten())
        out = torch.empty(rows * HEADS * HEAD_DIM + offset, dtype=torch.bfloat16)[offset:]
        compiled(compiled.task([(0, rows, parts[0].data_ptr(), stored + rows, stored)]), 1, *parts[1:], out)
        torch.testing.assert_close(out.view(rows, -1).float(), expected, atol=0.02, rtol=0.02)


@needs_amx
@pytest.mark.parametrize("head_dim", [64, 72])
def test_pictures_have_torchs_numbers(head_dim: int) -> None:
    torch.manual_seed(0)
    compiled = PictureAttention(head_dim)
    for pictures, rows in ((1, 1), (2, 31), (1, 33), (3, 128), (1, 577)):
        query, keys, values = torch.randn(3, pictures, rows, 3, head_dim).bfloat16().transpose(2, 3)
        expected = scaled_dot_product_attention(query.float(), keys.float(), values.float(), scale=0.2)
        got = compiled(query, keys, values, 0.2)
        assert got.shape == query.shape
        torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.02)
        alone = compiled(query[-1:], keys[-1:], values[-1:], 0.2)
        assert torch.equal(alone, got[-1:])


@needs_amx
def test_large_scores_of_late_tokens_raise_the_reference() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, 1, 400, 2, 64).bfloat16().transpose(2, 3)
    keys = keys * torch.linspace(0, 12, 400)[:, None].bfloat16()
    expected = scaled_dot_product_attention(query.float(), keys.float(), values.float(), scale=1.0)
    got = PictureAttention(64)(query, keys, values, 1.0)
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.02)


@needs_amx
def test_full_attention_uses_the_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(3, 1, 256, 2, 64).bfloat16().transpose(2, 3)
    compiled = attention_module.picture_attention(64)
    assert compiled is not None
    assert torch.equal(attention_module.full_attention(*inputs, 0.2), compiled(*inputs, 0.2))


@needs_amx
def test_a_wrong_example_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_module.picture_attention.cache_clear()
    monkeypatch.setattr(amx_checks, "pictures_match", lambda *_: False)
    monkeypatch.setattr(amx_checks, "sessions_match", lambda *_: False)
    inputs = torch.randn(3, 1, 256, 2, 64).bfloat16().transpose(2, 3)
    got = attention_module.full_attention(*inputs, 0.2)
    attention_module.picture_attention.cache_clear()
    assert torch.equal(got, scaled_dot_product_attention(*inputs, scale=0.2))
    assert attention_module.session_attention(HEADS, 2, HEAD_DIM, torch.bfloat16) is None


def test_without_amx_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_module.picture_attention.cache_clear()
    monkeypatch.setattr(amx, "is_available", lambda: False)
    assert attention_module.picture_attention(64) is None
    assert attention_module.session_attention(HEADS, 2, HEAD_DIM, torch.bfloat16) is None
    attention_module.picture_attention.cache_clear()


def test_float32_and_other_sizes_of_heads_are_left_to_torch() -> None:
    assert attention_module.session_attention(HEADS, 2, HEAD_DIM, torch.float32) is None
    assert attention_module.session_attention(HEADS, 2, 48, torch.bfloat16) is None
