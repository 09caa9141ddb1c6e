"""A row without usable logits affects no other row, and a tiny temperature is greedy."""

from __future__ import annotations

import pytest
import torch

from llava_sessions.engine.sampling import LogitsNotFinite, Sampler, next_tokens
from llava_sessions.ipc.messages import Sampling

LOGITS = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [7.0, 3.0, 1.0]])


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-310, 1e-40, 1e-9, 1e-5])
@pytest.mark.parametrize("top_p", [1.0, 0.5, 5e-324])
def test_a_tiny_temperature_chooses_the_most_likely_token(temperature: float, top_p: float) -> None:
    sampler = Sampler(Sampling(8, temperature=temperature, top_p=top_p, seed=1))
    assert next_tokens(LOGITS * 1000, [sampler] * 3) == [1, 1, 0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_of_logits_that_are_not_finite_gets_an_error_and_affects_no_other(
    value: str, temperature: float, dtype: torch.dtype
) -> None:
    logits = LOGITS.clone().to(dtype)
    logits[1] = float(value)
    hot = Sampler(Sampling(8, temperature=0.01, seed=1))
    greedy = Sampler(Sampling(8))
    first, broken, last = next_tokens(logits, [hot, Sampler(Sampling(8, temperature=temperature, seed=1)), greedy])
    assert (first, last) == (1, 0)
    assert isinstance(broken, LogitsNotFinite)


def test_one_nan_among_the_logits_of_a_row_is_found() -> None:
    logits = LOGITS.clone()
    logits[0, 2] = float("nan")
    broken, *others = next_tokens(logits, [Sampler(Sampling(8))] * 3)
    assert isinstance(broken, LogitsNotFinite)
    assert others == [1, 0]
