"""On CUDA a decode step of any number of sessions waits for the device once, to read the tokens.

Runs on torch's meta device: any other read of a number of a tensor is an error there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.loading import load_weights
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import AskSession, Finished, OpenSession, Sampling
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.processors import load_processor
from tests.support.engine_chats import noise
from tests.support.meta_cuda import Card, meta_cuda
from tests.support.tiny_families import FAMILIES

CUDA = torch.device("cuda")
SAMPLINGS = [
    Sampling(8, ignore_eos=True),
    Sampling(8, ignore_eos=True, temperature=0.7),
    Sampling(8, ignore_eos=True, temperature=0.7, top_p=0.9, seed=1),
    Sampling(8, ignore_eos=True, min_tokens=8),
]


class Waits(TorchFunctionMode):
    """Counts the reads of tensors on the device, and the waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.waits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.Tensor.tolist and args[0].is_meta
        return func(*args, **(kwargs or {}))

    def synchronize(self, _: torch.device) -> None:
        """Stand for `torch.cuda.synchronize`."""
        self.waits += 1


@pytest.fixture(scope="module", params=["llava", "internvl", "internvl3.5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint. InternVL3's has dynamic RoPE, whose update in transformers reads the positions."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def template(folder: Path) -> ChatTemplate:
    return ChatTemplate(load_processor(folder))


@pytest.fixture
def engine(folder: Path, template: ChatTemplate) -> Engine:
    """An engine whose device is called CUDA."""
    model = Model(load_weights(folder, torch.float16, "meta"))
    model.device = CUDA
    model.kv_shape = replace(model.kv_shape, device=CUDA)
    model.eos_token_ids = frozenset({3})
    return Engine(model, template.answer_text, DeviceBudget(2**30, 2**30))


@pytest.mark.parametrize("sessions", [1, 4, 12])
def test_a_decode_step_reads_the_device_once(
    engine: Engine, template: ChatTemplate, sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Waits()
    card = Card(2**34, 0)
    card.patch(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.synchronize)
    opening = template.opening([("noise", noise(1))])
    prompt = template.prompt(opening.opened_on, "what?")
    with meta_cuda(card), waits:
        for number in range(sessions):
            engine.apply(OpenSession(str(number), opening.token_ids, opening.pictures))
        while engine.has_work:
            engine.step()
        assert (waits.reads, waits.waits > 0) == (0, True), "the end of a prefill is reported when it has ended"
        for number in range(sessions):
            engine.apply(AskSession(str(number), str(number), prompt, SAMPLINGS[-1 - number % len(SAMPLINGS)]))
        events = engine.step()
        waits.waits = 0
        steps = 0
        while engine.has_work:
            waits.reads = 0
            events += engine.step()
            steps += 1
            assert (waits.reads, waits.waits) == (1, 0)
    assert steps >= 7
    assert sum(isinstance(event, Finished) for event in events) == sessions
