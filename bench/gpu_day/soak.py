"""Section "soak": random turns of many sessions to the end of the run, each answer compared with `generate`."""

from __future__ import annotations

import random
from typing import Any

import torch

from . import variants
from .day import Day, Findings
from .engines import Driver, engine_of
from .models import TINY, make, twin

_SESSIONS = 12
_USUAL_S = 20.0
# Two tokens whose logits differ by less may change places if sums have another order.
_TIE = 1e-3


def run(day: Day, found: Findings) -> None:
    """Ask sessions at random in the fastest variant of a tiny model in float32, and compare every answer."""
    made, template = make(TINY, torch.float32, day.device)
    reference = twin(made)
    model = variants.fastest(made)
    driver = Driver(engine_of(model, template, chunk=64), TINY.vocabulary)
    order = random.Random(2)
    history: dict[str, list[int]] = {}
    seconds = day.pick(max(_USUAL_S, day.section_left_s - 5), 1)
    turns = 0
    wrong = 0
    ties = 0
    until = day.section_left_s - seconds
    while day.section_left_s > max(until, 0):
        for name in [f"chat{number}" for number in range(day.pick(_SESSIONS, 3))]:
            if name in history and order.random() < 0.1:
                driver.close([name])
                del history[name]
            if name not in history:
                history[name] = []
                driver.open(name)
            prompt = driver.words(order.randint(1, 150))
            driver.ask(name, prompt, order.randint(1, day.pick(24, 4)))
            history[name] += prompt
            for _ in range(order.randint(0, 5)):  # the next one joins answers that run
                driver.step()
        driver.run()
        for name, tokens in history.items():
            answer = driver.answers[name][-1]
            turns += 1
            if answer != _generated(day, reference, tokens, len(answer)):
                is_tie = _is_tie(day, reference, tokens, answer)
                ties += is_tie
                wrong += not is_tie
            tokens += answer
        found.results |= {"turns": turns, "wrong": wrong, "ties": ties}
    found.check("all answers are those of generate, or ties", wrong == 0)
    found.check("some turns ran", turns > 0)
    day.say(f"{turns} turns, {wrong} wrong")


def _generated(day: Day, reference: Any, tokens: list[int], count: int) -> list[int]:
    """Return the greedy answer of transformers to a whole conversation."""
    ids = torch.tensor([tokens], device=day.device)
    out = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
    )
    return out[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def _is_tie(day: Day, reference: Any, tokens: list[int], answer: list[int]) -> bool:
    """Return whether each token of an answer is one of the most likely ones after those before it."""
    ids = torch.tensor([tokens + answer], device=day.device)
    logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(answer) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer, device=day.device)[:, None])[:, 0]
    return bool((logits.amax(1) - chosen <= _TIE).all())
