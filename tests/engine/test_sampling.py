"""Drawing the tokens of a step: each row as by the warpers of transformers, in any company, in one transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from llava_sessions.engine.sampling import Ban, LogitsNotFinite, Sampler, next_tokens, token_weights
from llava_sessions.ipc.messages import Sampling

LOGITS = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [7.0, 3.0, 1.0]])
VOCABULARY = 200
OPTIONS = [(0.7, 1.0), (0.0, 1.0), (1.3, 0.9), (1.0, 0.35), (0.2, 0.999), (2.0, 1.0), (1.0, 0.01)]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-310, 1e-40, 1e-9, 1e-5])
@pytest.mark.parametrize("top_p", [1.0, 0.5, 5e-324])
def test_a_tiny_temperature_chooses_the_most_likely_token(temperature: float, top_p: float) -> None:
    sampler = Sampler(Sampling(8, temperature=temperature, top_p=top_p, seed=1))
    assert next_tokens(LOGITS * 1000, [sampler] * 3) == [1, 1, 0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_of_logits_that_are_not_finite_gets_an_error_and_affects_no_other(
    value: str, temperature: float, top_p: float, dtype: torch.dtype
) -> None:
    logits = LOGITS.clone().to(dtype)
    logits[1] = float(value)
    hot = Sampler(Sampling(8, temperature=0.01, top_p=top_p, seed=1))
    greedy = Sampler(Sampling(8))
    middle = Sampler(Sampling(8, temperature=temperature, top_p=top_p, seed=1))
    first, broken, last = next_tokens(logits, [hot, middle, greedy])
    assert (first, last) == (1, 0)
    assert isinstance(broken, LogitsNotFinite)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_nan_among_the_logits_of_a_row_is_found(temperature: float) -> None:
    logits = LOGITS.clone()
    logits[0, 2] = float("nan")
    broken, *others = next_tokens(logits, [Sampler(Sampling(8, temperature=temperature)), *[Sampler(Sampling(8))] * 2])
    assert isinstance(broken, LogitsNotFinite)
    assert others == [1, 0]


def logits_of(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return logits in float32. Those of a 16-bit type have ties."""
    drawn = np.random.default_rng(5).normal(0, 2, (rows, VOCABULARY))
    return torch.from_numpy(drawn).to(dtype).float()


def samplers_of(count: int) -> list[Sampler]:
    """Return samplers with all options in turn, some of them greedy."""
    options = [OPTIONS[index % len(OPTIONS)] for index in range(count)]
    return [Sampler(Sampling(8, temperature=t, top_p=p, seed=seed)) for seed, (t, p) in enumerate(options)]


def warped(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Return transformers' distribution of one row, `[vocabulary]` in float64."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores[0].double().softmax(-1)


@pytest.mark.parametrize(("temperature", "top_p"), [option for option in OPTIONS if option[0]])
def test_the_distribution_is_that_of_transformers(temperature: float, top_p: float) -> None:
    """Of equally likely tokens at the limit of top-p, transformers removes any: its sort is not stable."""
    for logits in [*logits_of(20), *logits_of(20, torch.bfloat16)]:
        expected = warped(logits, temperature, top_p)
        scores = ((logits - logits.max()) / temperature)[None]
        weights = token_weights(scores, torch.tensor([[1 - top_p]], dtype=torch.float64), sort=top_p < 1)[0]
        assert torch.equal(weights, weights.round()), "sums of whole numbers do not depend on their order"
        if logits.unique().numel() == VOCABULARY:
            assert torch.equal(weights > 0, expected > 1e-10)
        found = (weights / weights.sum()).sort().values
        assert torch.allclose(found, expected.sort().values, rtol=1e-5, atol=1e-9)


def test_a_token_is_kept_or_removed_at_the_exact_limit_of_top_p() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: a token is removed if it and the less likely ones have at most 1 - top_p."""
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125]).log()
    for top_p, kept in ((0.5, [0]), (0.75, [0, 2]), (0.7501, [0, 2, 3]), (0.875, [0, 2, 3]), (0.9, [0, 1, 2, 3])):
        assert warped(logits, 1.0, top_p).nonzero()[:, 0].tolist() == kept
        scores = (logits - logits.max())[None]
        weights = token_weights(scores, torch.tensor([[1 - top_p]], dtype=torch.float64), sort=True)[0]
        assert weights.nonzero()[:, 0].tolist() == kept


def test_a_drawn_token_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = logits_of(40)
    for step in range(5):
        samplers = samplers_of(40)
        uniforms = []
        for sampler in samplers:
            for _ in range(step):
                sampler.uniform()
                sampler.advance()
            uniforms.append(0.0 if sampler.greedy else sampler.uniform())
        tokens = next_tokens(logits, samplers)
        for row, (sampler, uniform) in enumerate(zip(samplers, uniforms, strict=True)):
            if sampler.greedy:
                assert tokens[row] == int(logits[row].argmax())
                continue
            cumulative = warped(logits[row], sampler.temperature, sampler.top_p).cumsum(-1)
            before = cumulative[tokens[row] - 1] if tokens[row] else 0.0
            assert before - 1e-6 <= uniform <= cumulative[tokens[row]] + 1e-6


@pytest.mark.parametrize("most_logits", [2**21, 3 * VOCABULARY, 1])
def test_a_row_does_not_depend_on_its_company(most_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_sessions.engine.sampling._MOST_LOGITS", most_logits)
    logits = logits_of(35, torch.bfloat16)
    together = next_tokens(logits, samplers_of(35))
    alone = [next_tokens(row[None], [sampler])[0] for row, sampler in zip(logits, samplers_of(35), strict=True)]
    pairs = [next_tokens(logits[[3, row]], [samplers_of(35)[3], samplers_of(35)[row]])[1] for row in range(35)]
    assert together == alone == pairs


def test_a_failed_draw_is_repeated_with_the_same_numbers() -> None:
    logits = logits_of(4)
    samplers = samplers_of(4)
    expected = [next_tokens(logits, samplers_of(4))]
    failing = Failing()
    with failing, pytest.raises(torch.OutOfMemoryError):
        next_tokens(logits, samplers)
    assert next_tokens(logits, samplers) == expected[0]


class Failing(TorchFunctionMode):
    """Memory runs out in the last group of rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.sort:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


def test_a_known_argmax_is_used_unless_tokens_are_banned() -> None:
    samplers = [Sampler(Sampling(8))] * 3
    known = torch.tensor([2, 2, 2])
    assert next_tokens(LOGITS.clone(), samplers, likeliest=known) == [2, 2, 2]
    assert next_tokens(LOGITS.clone(), samplers, Ban([0, 2], frozenset({0, 1})), known) == [2, 1, 2]


class Transfers(TorchFunctionMode):
    """Counts the transfers from the meta device, in place of a GPU, and to it. Any other transfer is an error there."""

    def __init__(self) -> None:
        super().__init__()
        self.from_device = 0
        self.to_device = 0
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if func is torch.Tensor.tolist and args[0].is_meta:
            self.from_device += 1
            return [0] * len(args[0])
        if func is torch.Tensor.to and not args[0].is_meta:
            self.to_device += 1
        return func(*args, **(kwargs or {}))


def transfers(samplers: list[Sampler], ban: Ban | None = None) -> Transfers:
    """Return the transfers of one draw."""
    logits = torch.empty((len(samplers), 32064), dtype=torch.bfloat16, device="meta")
    with Transfers() as counted:
        assert next_tokens(logits, samplers, ban) == [0] * len(samplers)
    return counted


@pytest.mark.parametrize("options", [(1.0, 1.0), (0.7, 0.9)])
def test_a_step_has_one_transfer_from_the_device(options: tuple[float, float]) -> None:
    counts = []
    for rows in (1, 32):
        samplers = [Sampler(Sampling(8, temperature=options[0], top_p=options[1])) for _ in range(rows)]
        counted = transfers(samplers)
        assert counted.from_device == 1
        assert counted.to_device == 1
        counts.append(counted.calls - rows * 4)  # each random number takes less
    assert counts[1] <= counts[0], "as many launches for 32 rows as for one"
    assert transfers(samplers_of(32), Ban([1, 2], frozenset({5, 7}))).from_device == 1


def test_a_greedy_step_sends_nothing_to_the_device_and_draws_nothing() -> None:
    counted = transfers([Sampler(Sampling(8))] * 32)
    assert (counted.from_device, counted.to_device) == (1, 0)
    assert counted.calls <= 10


@pytest.mark.parametrize(("ids", "expected"), [((), 1), ((-1,), 1), ((3, 99), 1), ((-1, 1, 3), 2)])
def test_a_ban_ignores_tokens_outside_the_vocabulary(ids: tuple[int, ...], expected: int) -> None:
    """An error of one turn's ban would end the turns of all sessions of the step, on CUDA the engine."""
    logits = LOGITS.clone()
    logits[0, 2] = 2.0
    samplers = [Sampler(Sampling(8))] * 3
    assert next_tokens(logits, samplers, Ban([0], frozenset(ids))) == [expected, 1, 0]
    assert logits[0, 2].isfinite()
