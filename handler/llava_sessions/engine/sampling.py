"""Owns the choice of a turn's next token. Must not know sessions, text or batches.

Greedy is the argmax of the logits, as `generate(do_sample=False)`. Sampling uses transformers' own warpers and a
generator of the turn, so a seed gives the same answer whoever shares the batch.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ..ipc.messages import Sampling

# Below it, the most likely token is taken anyway; far below it, logits divided by it are no numbers any more.
_LEAST_TEMPERATURE = 1e-5


class Sampler:
    """Chooses the tokens of one turn."""

    def __init__(self, sampling: Sampling) -> None:
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if sampling.temperature >= _LEAST_TEMPERATURE:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
            # On the CPU: its stream of numbers is the same on every machine, and a row of logits is small.
            self._generator = torch.Generator("cpu")
            self._generator.manual_seed(sampling.seed) if sampling.seed is not None else self._generator.seed()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self._generator is None

    def draw(self, logits: torch.Tensor) -> int:
        """A token id from one row of logits in float32 on the CPU, `[vocabulary]`."""
        scores = self._warpers(None, logits[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def next_tokens(logits: torch.Tensor, samplers: list[Sampler]) -> list[int | Exception]:
    """One token id for each row of `logits`, `[rows, vocabulary]`; the greedy rows cost one transfer in all.

    Where a row is such that nothing can be drawn from it: why. It is no other row's fault.
    """
    tokens: list[int | Exception] = logits.argmax(-1).tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            scores = logits[row].float().cpu()
            try:
                tokens[row] = sampler.draw(scores)
            except Exception as error:
                tokens[row] = error
    return tokens
