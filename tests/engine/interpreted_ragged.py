"""Ragged attention in Triton's interpreter: numbers, memory that is written, and independence of the other sessions.

test_ragged.py runs these tests in a process of their own: Triton reads TRITON_INTERPRET when it is imported.
In Triton 3.7's interpreter matrix products of bfloat16 are wrong, so a group of query heads is tested in float16 and
float32. It also rounds float32 to bfloat16 towards zero; the compiled kernels round to nearest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from llava_sessions.engine.cuda.ragged import PIECE, RaggedAttention, RaggedTask, count_pieces, table_size
from llava_sessions.engine.fused.head_norms import HeadNorms

CPU = torch.device("cpu")
LAYERS = 2
LAYER = 1
EPSILON = 0.01  # of the norms of heads: so large that its absence is found
# Bytes in front of and behind each cache.
MARGIN = 256
# Stored tokens: none, inside a piece, the last place of a piece, the first of the next one, three pieces.
LENGTHS = (0, 5, PIECE - 1, PIECE, 2 * PIECE + 44)


@dataclass(frozen=True)
class Shape:
    """Heads and precisions of a model. `allowed`: largest error of attention. `normed`: as in Qwen3."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    allowed: float
    kv_dtype: torch.dtype | None = None
    normed: bool = False

    def attention(self) -> RaggedAttention:
        return RaggedAttention(
            self.heads, self.kv_heads, self.head_dim, self.dtype, CPU, kv_dtype=self.kv_dtype, layers=LAYERS
        )

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values of new tokens, and cosines and sines."""
        angles = torch.rand(count, self.head_dim // 2).mul(6).repeat(1, 2)
        numbers = torch.randn(count, (self.heads + 2 * self.kv_heads) * self.head_dim)
        return numbers.to(self.dtype), angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    @functools.cached_property
    def norms(self) -> list[Qwen3RMSNorm]:
        """The norms of a query's and of a key's head, or none."""
        made = [Qwen3RMSNorm(self.head_dim, eps=EPSILON) for _ in range(2 if self.normed else 0)]
        for number, norm in enumerate(made):
            torch.nn.init.normal_(norm.weight, 1 + number, 0.5)
        return [norm.to(self.dtype) for norm in made]


class Cache:
    """A session's KV cache with a margin on both sides. Everything but the stored tokens is poisoned."""

    def __init__(self, shape: Shape, stored: int) -> None:
        self.stored = stored
        self.capacity = (stored // 64 + 1) * 64
        heads = (LAYERS, 2, shape.kv_heads, self.capacity)
        count = torch.Size(heads).numel()
        kind = shape.kv_dtype or shape.dtype
        number_bytes = count * shape.head_dim * kind.itemsize
        scale_bytes = 4 * count if kind == torch.int8 else 0
        self.memory = torch.full((MARGIN + number_bytes + scale_bytes + MARGIN,), 0xFF, dtype=torch.uint8)  # NaN
        number_memory, scale_memory = self.memory[MARGIN:-MARGIN].split((number_bytes, scale_bytes))
        self.numbers = number_memory.view(kind).view(*heads, shape.head_dim)
        self.scales = scale_memory.view(torch.float32).view(heads) if scale_bytes else None
        new = torch.randn(*heads[:-1], stored, shape.head_dim)
        if self.scales is None:
            self.numbers[:, :, :, :stored] = new
        else:
            self.numbers[:, :, :, :stored], self.scales[:, :, :, :stored] = quantized(new)

    @property
    def place(self) -> tuple[int, int, int]:
        """Address, capacity and stored tokens."""
        return (self.memory.data_ptr() + MARGIN, self.capacity, self.stored)

    def tokens(self, count: int) -> torch.Tensor:
        """Return keys and values of the first tokens of `LAYER`, float64 `[2, kv_heads, count, head_dim]`."""
        numbers = self.numbers[LAYER, :, :, :count].double()
        return numbers if self.scales is None else numbers * self.scales[LAYER, :, :, :count, None].double()

    def parts(self) -> list[torch.Tensor]:
        return [self.numbers] if self.scales is None else [self.numbers, self.scales]


def quantized(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 numbers and their scales, as the engine's other int8 formats compute them."""
    scales = numbers.float().abs().amax(-1).clamp_min(1e-30) / 127
    return (numbers.float() / scales[..., None]).round().to(torch.int8), scales


def rotated(shape: Shape, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one row's query, float32 `[heads, head_dim]`, and its key and value, `[2, kv_heads, head_dim]`."""
    query, key, value = qkv.view(-1, shape.head_dim).split((shape.heads, shape.kv_heads, shape.kv_heads))
    if shape.norms:
        query, key = (norm(part) for norm, part in zip(shape.norms, (query, key), strict=True))
    turned, value = torch.cat((query, key)).float(), value.float()
    half = shape.head_dim // 2
    other = torch.cat((-turned[:, half:], turned[:, :half]), -1)
    turned = turned * cos.float() + other * sin.float()
    return turned[: shape.heads], torch.stack((turned[shape.heads :], value)).to(shape.dtype)


def run(
    shape: Shape, caches: Sequence[Cache], qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spare: int = 0
) -> torch.Tensor:
    """Attend with one row per cache. All memory for results is poisoned. `spare`: rows and pieces without work."""
    attention = shape.attention()
    places = [(row, *cache.place) for row, cache in enumerate(caches)]
    if spare:
        task = owned_task(attention, places, len(places) + spare, count_pieces(places) + spare)
    else:
        task = attention.task(places)
    task.mixed.fill_(torch.nan)
    task.softmax.fill_(torch.nan)
    out = torch.full((len(qkv), shape.heads * shape.head_dim), torch.nan, dtype=shape.dtype)
    norms = HeadNorms(torch.stack([norm.weight.detach() for norm in shape.norms]), EPSILON) if shape.norms else None
    attention(task, LAYER, qkv, cos, sin, out, norms)
    return out


def owned_task(
    attention: RaggedAttention, places: list[tuple[int, int, int, int]], tokens: int, pieces: int
) -> RaggedTask:
    """Return a task in memory of the caller, which had another task before."""
    table = torch.full((table_size(tokens, pieces),), 99)
    attention.fill(table, places, tokens, pieces)
    scratch = torch.empty(attention.scratch_size(pieces) + 8)
    return attention.task_in(table, tokens, pieces, scratch)


F32 = torch.float32
F16 = torch.float16
SHAPES = [
    pytest.param(Shape(2, 2, 16, F32, 1e-6), id="own-keys-float32"),
    pytest.param(Shape(1, 1, 128, torch.bfloat16, 0.02), id="own-keys-bfloat16"),
    pytest.param(Shape(8, 2, 16, F32, 1e-6), id="group-of-4-float32"),
    pytest.param(Shape(7, 1, 128, F16, 2e-3), id="group-of-7-float16"),
    pytest.param(Shape(2, 1, 96, F16, 2e-3), id="96-numbers"),
    pytest.param(Shape(1, 1, 8, F16, 2e-3), id="8-numbers"),
    pytest.param(Shape(2, 2, 16, F32, 1e-6, torch.int8), id="own-keys-int8"),
    pytest.param(Shape(4, 1, 96, F16, 2e-3, torch.int8), id="group-of-4-int8"),
    pytest.param(Shape(2, 2, 16, F32, 2e-6, normed=True), id="own-keys-normed"),
    pytest.param(Shape(4, 2, 96, F16, 4e-3, normed=True), id="group-of-2-normed"),
    pytest.param(Shape(4, 2, 16, F32, 2e-6, torch.int8, normed=True), id="group-of-2-int8-normed"),
]


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_attention_in_float64(shape: Shape) -> None:
    torch.manual_seed(0)
    caches = [Cache(shape, stored) for stored in LENGTHS]
    qkv, cos, sin = shape.rows(len(caches) + 1)  # the last row belongs to no place
    before = [cache.memory.clone() for cache in caches]
    qkv_before = qkv.clone()
    out = run(shape, caches, qkv, cos, sin)
    assert torch.equal(qkv, qkv_before)
    assert out[-1].isnan().all()
    for row, cache in enumerate(caches):
        query, new = rotated(shape, qkv[row], cos[row], sin[row])
        expected_parts = [new] if cache.scales is None else quantized(new)
        allowed = 2**-7 if shape.dtype == torch.bfloat16 else 1e-6
        for part, expected in zip(cache.parts(), expected_parts, strict=True):
            torch.testing.assert_close(part[LAYER, :, :, cache.stored], expected, rtol=allowed, atol=1e-6)
        keys, values = cache.tokens(cache.stored + 1)
        exact = scaled_dot_product_attention(
            query.double()[None, :, None], keys[None], values[None], enable_gqa=True
        ).flatten()
        assert (out[row].double() - exact).abs().max() < shape.allowed
        for part, unused in zip(cache.parts(), _views(shape, before[row], cache), strict=True):
            part[LAYER, :, :, cache.stored] = unused[LAYER, :, :, cache.stored]
        assert torch.equal(cache.memory, before[row]), "more than the new token was written"


def _views(shape: Shape, memory: torch.Tensor, cache: Cache) -> list[torch.Tensor]:
    """Return the parts of a copy of a cache's memory."""
    inner = memory[MARGIN:-MARGIN]
    parts = []
    for part in cache.parts():
        parts.append(inner[: part.nbytes].view(part.dtype).view(part.shape))
        inner = inner[part.nbytes :]
    return parts


@pytest.mark.parametrize(
    "shape",
    [Shape(1, 1, 64, F32, 0), Shape(4, 1, 64, F16, 0), Shape(4, 1, 64, F16, 0, torch.int8)],
    ids=["own-keys", "group", "group-int8"],
)
def test_numbers_do_not_depend_on_the_other_rows(shape: Shape) -> None:
    torch.manual_seed(1)
    caches = [Cache(shape, stored) for stored in (3, PIECE + 9)]
    qkv, cos, sin = shape.rows(len(caches) + 3)
    alone = [run(shape, [cache], qkv[row:], cos[row:], sin[row:])[0] for row, cache in enumerate(caches)]
    memory = [cache.memory.clone() for cache in caches]
    for spare in (0, 3):
        together = run(shape, caches, qkv, cos, sin, spare)
        assert torch.equal(together[: len(caches)], torch.stack(alone))
        assert all(torch.equal(cache.memory, one) for cache, one in zip(caches, memory, strict=True))
        if spare:
            assert not together[len(caches) :].any()  # zeros, and no NaN


def test_a_table_serves_steps_of_different_sessions() -> None:
    """A captured step has one table: rows and pieces of an earlier step must not remain in it."""
    torch.manual_seed(2)
    shape = Shape(2, 1, 16, F32, 0)
    attention = shape.attention()
    qkv, cos, sin = shape.rows(4)
    caches = [Cache(shape, stored) for stored in (PIECE, 7, 2 * PIECE)]
    task = owned_task(attention, [(row, *cache.place) for row, cache in enumerate(caches)], 4, 8)
    out = torch.full((4, 32), torch.nan)
    attention(task, LAYER, qkv, cos, sin, out)
    memory = [cache.memory.clone() for cache in caches]
    attention.fill(task.table, [(2, *caches[1].place)], 4, 8)
    out.fill_(torch.nan)
    attention(task, LAYER, qkv, cos, sin, out)
    assert out[2].any()
    assert not out[[0, 1, 3]].any()
    assert torch.equal(caches[0].memory, memory[0])
    assert torch.equal(caches[2].memory, memory[2])
    attention.fill(task.table, [], 4, 8)
    attention(task, LAYER, qkv, cos, sin, out)
    assert not out.any()


def test_many_pieces_are_merged() -> None:
    """More pieces than one iteration of the second kernel takes."""
    torch.manual_seed(3)
    shape = Shape(1, 1, 16, F32, 1e-6)
    cache = Cache(shape, 20 * PIECE + 1)
    qkv, cos, sin = shape.rows(1)
    out = run(shape, [cache], qkv, cos, sin)
    query, _ = rotated(shape, qkv[0], cos[0], sin[0])
    keys, values = cache.tokens(cache.stored + 1)
    exact = scaled_dot_product_attention(query.double()[None, :, None], keys[None], values[None]).flatten()
    assert (out[0].double() - exact).abs().max() < shape.allowed


def test_a_zero_key_is_stored_as_zeros() -> None:
    shape = Shape(1, 1, 16, F32, 0, torch.int8)
    cache = Cache(shape, 0)
    qkv = torch.zeros(1, 48)
    out = run(shape, [cache], qkv, torch.ones(1, 16), torch.zeros(1, 16))
    assert not out.any()
    assert not cache.numbers[LAYER, :, :, 0].any()
    assert cache.scales is not None
    assert cache.scales[LAYER, :, :, 0].max() < 1e-30


def test_places_that_would_write_outside_a_cache_are_rejected() -> None:
    attention = Shape(2, 2, 64, F16, 0).attention()
    with pytest.raises(ValueError, match="`capacity` of each place must be above `stored`"):
        attention.task([(0, 4096, 64, 64)])
    with pytest.raises(ValueError, match="`address` of each place must be a multiple of 16"):
        attention.task([(0, 4100, 64, 3)])
    table = torch.empty(table_size(1, 1), dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 1 tokens and 1 pieces, got 1 and 2"):
        attention.fill(table, [(0, 4096, 256, PIECE)], 1, 1)
    with pytest.raises(ValueError, match="`scratch` must be aligned"):
        attention.task_in(table, 1, 1, torch.empty(attention.scratch_size(1) + 1)[1:])
    qkv, cos, sin = Shape(2, 2, 64, F16, 0).rows(2)
    with pytest.raises(ValueError, match="must be aligned to 16 bytes"):
        attention(attention.task_in(table, 1, 1), 0, qkv.flatten()[1:], cos, sin, torch.empty(1, 128))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("heads", [2, 4], ids=["own-keys", "group"])
def test_a_token_that_is_not_finite_has_a_scale_that_is_not_finite(value: float, heads: int) -> None:
    """Else later tokens would read it as finite numbers: the answer would be wrong instead of an error."""
    shape = Shape(heads, 2, 16, F32, 1e-6, torch.int8)
    cache = Cache(shape, 5)
    qkv, cos, sin = shape.rows(1)
    numbers = qkv.view(-1, shape.head_dim)
    numbers[heads, 3] = numbers[-1, 3] = value  # the key of the first head, the value of the last one
    out = run(shape, [cache], qkv, cos, sin)
    assert not out.isfinite().any()
    assert cache.scales is not None
    assert cache.scales[LAYER, :, :, 5].isfinite().tolist() == [[False, True], [True, False]]
