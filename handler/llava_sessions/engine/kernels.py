"""Owns what computes faster on a CPU than the usual calls; each has a feature test and the usual call beside it.

Must not know sessions, scheduling or transformers' classes. On other devices it does what torch's own functions do.
Packed linears compute in float32 too, and give what torch's own give up to the last bits; attention by products is
for bfloat16 alone.

Where it comes from. The packed weight is what torch's inductor makes of frozen linears on CPUs (in torch:
`torch/_inductor/fx_passes/mkldnn_fusion.py`, `aten/src/ATen/native/mkldnn/Linear.cpp`). These ops are private, so they
are tried on a small example before they are used. The order of the products in `attention` is plain algebra: oneDNN's
bfloat16 `K @ q` reads K as it lies in memory, while flash attention copies it into another layout for every call.

What it gains (bench model, 2 cores of an AMD EPYC with avx512_bf16, best of a run; plain, packed, packed and products):
decode of 1 chat 47, 30, 21 ms; of 16 chats 269, 247, 117 ms; a follow-up of 45 tokens 95, 70, 58 ms; vision tower and
projector (plain, packed, packed and `full_attention`) 731, 625, 514 ms. In float32 on 2 cores without AVX-512, where
the usual product of a few rows is slow, the linears of 20 layers (plain, packed): 1 row 103, 96 ms; 4 rows 334, 109; 16
rows 320, 162; 45 rows 454, 235; 256 rows 1,278, 1,323. Further gains: `fused.py`.
"""

from __future__ import annotations

import functools
import os

import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention

# Torch's allocator asks the kernel for huge pages: a grown KV takes half as long to be touched for the first time.
# Torch looks once, when it first allocates much, so this stands where the module is loaded.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Of new tokens a call; above that the scores leave the cache.
_MOST_ROWS = 512
# From so many rows on, softmax runs across rows, over scores as they come out of the first product; it is fast where
# their number is a multiple of the vector's length.
_MANY_ROWS = 64
_VECTOR = 32
# Rows of a picture whose scores are made at once.
_PICTURE_ROWS = 192
# A hint at how many rows a linear mostly sees; the layouts for 1, 16 and 256 measured the same.
_ROWS_HINT = 16


class PackedLinear(torch.nn.Module):
    """A linear whose weight lies in the layout that oneDNN computes in; gives the numbers of `nn.Linear`."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        # Neither a parameter nor a buffer: the opaque tensor can't be moved, cast or saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), _ROWS_HINT)
        self._bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, rows: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`; `added`, of that shape, is added before it is rounded."""
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(rows, added, self._packed, self._bias, "add")

    def extra_repr(self) -> str:
        """What `print` shows of it, as for `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


@torch.inference_mode()
def prepack_linears(module: torch.nn.Module) -> int:
    """Replace every `packable` linear below `module` by a `PackedLinear`; returns how many.

    Plain weights are freed one by one; one that something else holds too (a tied head) stays there as well. Returns 0,
    with nothing changed, where there is none.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if packable(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)


def packable(module: torch.nn.Module) -> bool:
    """Whether it is a plain linear on the CPU, in a precision in which this torch packs linears."""
    found = type(module) is torch.nn.Linear
    return found and module.weight.device.type == "cpu" and can_prepack(module.weight.dtype)


@functools.cache
@torch.inference_mode()
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's packed linears for `dtype`, bfloat16 or float32, and they compute what `linear`
    computes.
    """
    try:
        fits = torch.backends.mkldnn.is_available() and dtype in (torch.bfloat16, torch.float32)
        if not fits or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return False
        plain = torch.nn.Linear(32, 64, dtype=dtype)
        plain.weight.copy_(torch.linspace(-1, 1, 64 * 32).reshape(64, 32))
        plain.bias.copy_(torch.linspace(1, -1, 64))
        rows = torch.linspace(-1, 1, 3 * 32).reshape(1, 3, 32).to(dtype)
        wanted, packed = linear(rows, plain.weight, plain.bias).float(), PackedLinear(plain)
        got = packed(rows).float(), packed(rows, torch.ones_like(wanted).to(dtype)).float() - 1
        allowed = {"atol": 0.05, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
        return all(torch.allclose(one, wanted, **allowed) for one in got)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def products_win() -> bool:
    """Whether this CPU is of the kind on which `attention` by products is faster: AVX-512 with bfloat16, but no AMX."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16")) and not found.get("amx_tile")


_PRODUCTS_WIN = products_win()


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention of one session's new tokens, by two products where that is faster and by torch's own function else.

    `query`: `[1, heads, new, head_dim]`; `keys` and `values`: `[1, kv_heads, stored + new, head_dim]`; `mask`: `[new,
    stored + new]`, true where a token is seen: all but, among the last `new` columns, what comes after it. `is_causal`:
    the same with nothing stored. Returns `[1, heads, new, head_dim]`.
    """
    fits = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[2] <= _MOST_ROWS
    if _PRODUCTS_WIN and fits:
        return _attention_by_products(query, keys[0], values[0], scaling)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _attention_by_products(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Scores as `K @ q` for each KV head, its group of query heads side by side; every new token sees what is stored,
    itself and the new ones before it. Scores are rounded to bfloat16, as in transformers' eager attention.
    """
    _, heads, new, head_dim = query.shape
    kv_heads, tokens, _ = keys.shape
    rows = query[0].reshape(kv_heads, -1, head_dim) * scaling
    count = rows.shape[1]
    across = count >= _MANY_ROWS
    if across and count % _VECTOR:
        rows = pad(rows, (0, 0, 0, -count % _VECTOR))
    scores = torch.bmm(keys, rows.transpose(1, 2))  # [kv_heads, tokens, rows]
    if not across:
        scores = scores.transpose(1, 2).contiguous().transpose(1, 2)
    if new > 1:
        after = torch.ones((new, new), dtype=torch.bool).tril(-1)  # [token, row]: the token comes after the row's own
        for start in range(0, count, new):
            scores[:, tokens - new :, start : start + new].masked_fill_(after, float("-inf"))
    weights = scores.softmax(1).transpose(1, 2) if across else scores.transpose(1, 2).softmax(-1)
    return torch.bmm(weights, values)[:, :count].reshape(1, heads, new, head_dim)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding in place: `[rows, heads, head_dim]` by the rows' `cos` and `sin`, `[rows, head_dim]`."""
    low, high = heads.chunk(2, -1)
    turned = torch.cat((-high, low), -1)
    heads.mul_(cos[:, None]).addcmul_(turned, sin[:, None])


def full_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention where everything sees everything, as in a vision tower: `[pictures, heads, rows, head_dim]` each.

    By products where those are faster, block by block of rows so that the scores stay in cache.
    """
    fits = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if not (_PRODUCTS_WIN and fits):
        return scaled_dot_product_attention(query, keys, values, scale=scaling)
    rows, keys, values = (part.flatten(0, 1).contiguous() for part in (query * scaling, keys, values))
    out = torch.empty_like(rows)
    for start in range(0, rows.shape[1], _PICTURE_ROWS):
        block = rows[:, start : start + _PICTURE_ROWS]
        count = block.shape[1]
        scores = torch.bmm(keys, pad(block, (0, 0, 0, -count % _VECTOR)).transpose(1, 2))
        out[:, start : start + count] = torch.bmm(scores.softmax(1).transpose(1, 2), values)[:, :count]
    return out.view(query.shape)
