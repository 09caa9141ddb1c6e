"""The choice of a turn's next token.

Greedy decoding is the argmax of the logits, as in `generate(do_sample=False)`. Sampling uses transformers' warpers and
one random generator per turn, so a seed gives the same answer in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ..ipc.messages import Sampling
from .faults import is_out_of_memory

# Below this temperature sampling would choose the most likely token as well; logits divided by a much smaller number
# overflow.
_MIN_TEMPERATURE = 1e-5


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
    """Draws the tokens of one turn."""

    def __init__(self, sampling: Sampling) -> None:
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if sampling.temperature >= _MIN_TEMPERATURE:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
            # On the CPU, whose random numbers are the same on every machine; a row of logits is small.
            self._generator = torch.Generator("cpu")
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self._generator is None

    @property
    def generator_state(self) -> torch.Tensor | None:
        """State of the random generator. A draw after setting it is repeated."""
        return None if self._generator is None else self._generator.get_state()

    @generator_state.setter
    def generator_state(self, state: torch.Tensor | None) -> None:
        if self._generator is not None and state is not None:
            self._generator.set_state(state)

    def draw(self, logits: torch.Tensor) -> int:
        """Return a token ID from logits `[vocabulary]`, float32 on the CPU, of which the largest is finite."""
        scores = self._warpers(None, logits[None])  # type: ignore[arg-type]  # these warpers ignore the token IDs
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


@dataclass(frozen=True)
class Ban:
    """Tokens that must not be chosen in some rows."""

    rows: list[int]
    token_ids: frozenset[int]

    @torch.inference_mode()
    def apply(self, logits: torch.Tensor) -> None:
        """Set the logits of the tokens to minus infinity, in place."""
        rows = torch.tensor(self.rows, device=logits.device)
        token_ids = torch.tensor(sorted(self.token_ids), device=logits.device)
        logits[rows[:, None], token_ids] = -torch.inf


def next_tokens(logits: torch.Tensor, samplers: list[Sampler], ban: Ban | None = None) -> list[int | Exception]:
    """Return one token ID per row of `logits`, `[rows, vocabulary]`, which `ban` changes.

    All greedy rows take one transfer from the device, which also has the rows that are not finite. A row from which no
    token can be drawn gets the error instead; the other rows are not affected. Raises an out-of-memory error; no
    sampler has then advanced.
    """
    states = [sampler.generator_state for sampler in samplers]
    try:
        if ban is not None:
            ban.apply(logits)
        return _draw_all(logits, samplers)
    except Exception:
        for sampler, state in zip(samplers, states, strict=True):
            sampler.generator_state = state
        raise


def _draw_all(logits: torch.Tensor, samplers: list[Sampler]) -> list[int | Exception]:
    likeliest = logits.argmax(-1, keepdim=True)  # of a row that contains NaN: the place of a NaN
    is_finite = logits.gather(-1, likeliest).isfinite()
    tokens: list[int | Exception] = likeliest.masked_fill(~is_finite, _NOT_FINITE).squeeze(-1).tolist()
    for row, sampler in enumerate(samplers):
        if tokens[row] == _NOT_FINITE:
            tokens[row] = LogitsNotFinite(logits.dtype)
        elif not sampler.greedy:
            scores = logits[row].float().cpu()
            try:
                tokens[row] = sampler.draw(scores)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                tokens[row] = error
    return tokens
