"""KV caches in int8 on CUDA's layers, whose attention Triton's interpreter runs on the CPU.

test_cuda_layers.py runs this test in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from llava_sessions.engine.attention import Segment
from llava_sessions.engine.cuda.ragged import RaggedAttention
from llava_sessions.engine.kv import SessionKV
from llava_sessions.engine.model import Model
from tests.support.nan_pool import NanPool
from tests.support.tiny_families import make_internvl35


def test_ragged_attention_stores_and_reads_the_numbers_of_torchs_path(tmp_path: Path) -> None:
    """With head norms: the numbers that are quantized are those after the norm and the rotation."""
    folder = make_internvl35(tmp_path)
    plain, ragged = (
        Model(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), kv_dtype=torch.int8)
        for _ in range(2)
    )
    ragged.use_cuda_layers()
    assert isinstance(ragged.token_attention, RaggedAttention)
    results = []
    for model in (plain, ragged):
        first, second = (SessionKV(model.kv_shape, NanPool()) for _ in range(2))
        steps = [[(first, list(range(20, 60))), (second, [70])]]
        steps += [[(first, [token]), (second, [token + 5])] for token in (80, 81, 82)]
        given = ([Segment(kv, ids, None, [], True) for kv, ids in step] for step in steps)
        logits = torch.cat([model.forward(segments).logits for segments in given])
        results.append((logits, *(part[:, :, :, : kv.length] for kv in (first, second) for part in kv._parts)))
    (expected, *caches), (got, *others) = results
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    for one, other in zip(others, caches, strict=True):
        if one.dtype == torch.int8:
            difference = (one.int() - other.int()).abs()
            assert difference.max() <= 1
            assert difference.count_nonzero() <= 0.001 * difference.numel(), "a number at the edge of two steps"
        else:
            torch.testing.assert_close(one, other, atol=0, rtol=1e-5)
