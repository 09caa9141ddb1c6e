"""The choice of each turn's next token, for all turns of a step at once on the device of the logits.

Greedy decoding is the argmax of the logits, as in `generate(do_sample=False)`. Sampling uses the distribution of
transformers' warpers for temperature and top-p, and draws by its inverse cumulative distribution function with one
uniform number of the turn's own generator. Weights are rounded to whole numbers, whose sums are exact in any order of
addition. Therefore a seed gives the same answer in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..ipc.messages import Sampling
from .device import on_device

# Below this temperature sampling would choose the most likely token as well.
_MIN_TEMPERATURE = 1e-5

# Weight of a row's most likely token. The weights of 2**20 tokens have a sum below 2**53, where float64 is exact.
_LARGEST_WEIGHT = 2.0**32

# Sampled rows are drawn in groups of at most this many logits, which bounds the temporary tensors to about 80 MiB.
_MOST_LOGITS = 2**21

# Random numbers that a turn draws at once: one at a time takes 50 times as long.
_UNIFORMS = 64

# In place of the token of a row whose logits are not finite.
_NOT_FINITE = -1


class LogitsNotFinite(RuntimeError):
    """The model computed NaN or infinity. The argmax of such logits would be token 0 or any other, for ever."""

    def __init__(self, dtype: torch.dtype) -> None:
        kind = str(dtype).removeprefix("torch.")
        super().__init__(
            f"the logits are not finite: the model's activations overflow in {kind}; "
            "pack the checkpoint with --dtype bfloat16 or float32"
        )


class Sampler:
    """The sampling parameters of one turn, and its random numbers."""

    def __init__(self, sampling: Sampling) -> None:
        """Raises an error of torch for a seed that its generator does not take."""
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self._generator: torch.Generator | None = None
        self._uniforms: list[float] = []  # of the following tokens, the next one last
        if sampling.temperature >= _MIN_TEMPERATURE:
            # On the CPU, whose random numbers are the same on every machine.
            self._generator = torch.Generator("cpu")
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self._generator is None

    def uniform(self) -> float:
        """Return the random number of the next token, from 0 to below 1. It stays the same until `advance`."""
        if not self._uniforms:
            numbers = torch.empty(_UNIFORMS, dtype=torch.float64)
            self._uniforms = numbers.uniform_(generator=self._generator).tolist()[::-1]
        return self._uniforms[-1]

    def advance(self) -> None:
        """Discard the random number: its token is drawn."""
        if self._uniforms:
            self._uniforms.pop()


@dataclass(frozen=True)
class Ban:
    """Tokens that must not be chosen in some rows."""

    rows: list[int]
    token_ids: frozenset[int]

    @torch.inference_mode()
    def apply(self, logits: torch.Tensor) -> None:
        """Set the logits of the tokens to minus infinity, in place.

        IDs outside the vocabulary are ignored: configurations contain -1 for no token, and tokens without a logit.
        """
        known = [token for token in sorted(self.token_ids) if 0 <= token < logits.shape[-1]]
        if known:
            rows = on_device(torch.tensor(self.rows), logits.device)
            logits[rows[:, None], on_device(torch.tensor(known), logits.device)] = -torch.inf


@torch.inference_mode()
def next_tokens(
    logits: torch.Tensor, samplers: list[Sampler], ban: Ban | None = None, likeliest: torch.Tensor | None = None
) -> list[int | Exception]:
    """Return one token ID per row of `logits`, `[rows, vocabulary]`, which `ban` changes.

    `likeliest`: the argmax of each row, int64 `[rows]`, if it is known; it is not used with a `ban`. One transfer from
    the device has the tokens of all rows, and which rows are not finite: these get the error instead of a token. Raises
    an out-of-memory error; no sampler has then advanced.
    """
    if ban is not None:
        ban.apply(logits)
    if likeliest is None or ban is not None:
        likeliest = logits.argmax(-1)  # of a row that contains NaN: the place of a NaN
    largest = logits.gather(-1, likeliest[:, None])
    tokens = likeliest
    for rows in _groups(samplers, logits.shape[-1]):
        tokens = _draw(logits, largest, tokens, rows, samplers)
    chosen: list[int | Exception] = tokens.masked_fill(~largest[:, 0].isfinite(), _NOT_FINITE).tolist()
    for row, sampler in enumerate(samplers):
        sampler.advance()
        if chosen[row] == _NOT_FINITE:
            chosen[row] = LogitsNotFinite(logits.dtype)
    return chosen


def _groups(samplers: list[Sampler], vocabulary: int) -> Iterator[list[int]]:
    """Yield the sampled rows in groups. Only the groups of rows with a top-p are sorted."""
    sampled = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    count = max(_MOST_LOGITS // vocabulary, 1)
    for has_top_p in (False, True):
        rows = [row for row in sampled if (samplers[row].top_p < 1) == has_top_p]
        for start in range(0, len(rows), count):
            yield rows[start : start + count]


def _draw(
    logits: torch.Tensor, largest: torch.Tensor, tokens: torch.Tensor, rows: list[int], samplers: list[Sampler]
) -> torch.Tensor:
    """Return `tokens`, int64 `[all rows]`, with a drawn token in each of `rows`. `largest`: logits `[all rows, 1]`."""
    drawing = [samplers[row] for row in rows]
    table = [
        rows,
        [sampler.temperature for sampler in drawing],
        [1 - sampler.top_p for sampler in drawing],
        [sampler.uniform() for sampler in drawing],
    ]
    places, temperatures, removed, uniforms = on_device(torch.tensor(table, dtype=torch.float64), logits.device)
    places = places.long()
    scores = logits.index_select(0, places).float() - largest.index_select(0, places).float()
    weights = token_weights(scores / temperatures[:, None].float(), removed[:, None], sort=drawing[0].top_p < 1)
    mass = weights.cumsum(-1)
    # The first token with a larger mass. A row that is not finite may have none.
    drawn = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)[:, 0]
    return tokens.index_copy(0, places, drawn.clamp_(max=logits.shape[-1] - 1))


def token_weights(scores: torch.Tensor, removed: torch.Tensor, sort: bool) -> torch.Tensor:
    """Return the weight of each token, whole numbers in float64 `[rows, vocabulary]`, in proportion to its probability.

    `scores`: float32 of the same shape, logits divided by the temperature, of which the largest of a row is 0. With
    `sort` the least likely tokens, which have the part `removed` (float64 `[rows, 1]`) of the probability together,
    have no weight, as in transformers' `TopPLogitsWarper`. The most likely one always has.
    """
    weights = scores.exp().double().mul_(_LARGEST_WEIGHT).round_()
    if sort:
        order = scores.sort(stable=True, dim=-1).indices
        mass = weights.gather(-1, order).cumsum_(-1)
        is_removed = mass <= removed * mass[:, -1:]
        is_removed[:, -1] = False
        weights.masked_fill_(torch.empty_like(is_removed).scatter_(-1, order, is_removed), 0)
    return weights
