"""Memory runs out at every place that allocates: no engine ends, no session is lost, and the answers stay the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.cuda import layers
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import (
    AskSession,
    CloseSession,
    Event,
    Finished,
    Memory,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    Sampling,
)
from llava_sessions.text.chat_template import ChatTemplate
from tests.support.engine_chats import noise

STEP_BYTES = 256 * 4 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, KV heads, head dim, float32
FEATURES_BYTES = 16 * 64 * 4  # image tokens, hidden, float32
LONG_QUESTION = "and the blue square near it? " * 26  # the cache of its session takes two steps

Site = tuple[str, int]  # function and line


class Allocations(TorchDispatchMode):
    """Counts what allocates memory, by its place in the engine's code, and raises out-of-memory errors there.

    On CUDA a copy allocates too if it makes a temporary tensor.
    """

    def __init__(
        self,
        site: Site | None = None,
        first: int = 0,
        failures: int = 0,
        error: type[RuntimeError] = torch.OutOfMemoryError,
        message: str = "CUDA out of memory",
    ) -> None:
        """Raise `failures` errors in a row at `site`, from its call number `first` on."""
        super().__init__()
        self._error = error
        self._message = message
        self.calls: Counter[Site] = Counter()
        self.site = site
        self._first = first
        self.failures = failures

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = func._schema.returns
        makes_tensor = bool(results) and all(result.alias_info is None for result in results)
        if (makes_tensor or func is torch.ops.aten.copy_.default) and nbytes(out):
            site = engine_site()
            self.calls[site] += 1
            if site == self.site and self.calls[site] >= self._first and self.failures:
                self.failures -= 1
                raise self._error(f"{self._message}. Injected in {site}")
        return out


def nbytes(out: Any) -> int:
    """Return the bytes of all tensors of a result."""
    parts = out if isinstance(out, tuple | list) else [out]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def engine_site() -> Site:
    """Return the innermost line of the engine's package that is running; for a shared copy, the line that calls it."""
    frame = sys._getframe(1)
    while "llava_sessions/engine/" not in frame.f_code.co_filename or frame.f_code.co_name == "_copy_on_device":
        assert frame.f_back is not None, "nothing but the engine allocates"
        frame = frame.f_back
    return frame.f_code.co_qualname, frame.f_lineno


class Chat:
    """An engine that places caches as on a GPU, and a client that sends a rejected request again."""

    def __init__(self, model: Model, template: ChatTemplate, faults: Allocations) -> None:
        self.engine = Engine(model, template.answer_text, DeviceBudget(3 * STEP_BYTES + 2 * FEATURES_BYTES, 2**30))
        self.engine.device_memory.pool = None
        self.template = template
        self.faults = faults
        self.conversations: dict[str, Conversation] = {}
        self.rejected = 0

    def open(self, *names: str, seed: int) -> None:
        """Open sessions with the same picture."""
        for name in names:
            self.conversations[name] = Conversation(self.template.opening([(f"noise {seed}", noise(seed))]))
        waiting = set(names)
        while waiting:
            for name in sorted(waiting - self.engine.sessions.keys()):
                opening = self.conversations[name].opening
                self.engine.apply(OpenSession(name, opening.token_ids, opening.pictures))
            waiting -= {event.session_id for event in self.run() if isinstance(event, Prefilled)}

    def ask(self, name: str, text: str, sampling: Sampling) -> tuple[list[int], list[int]]:
        """Return the whole conversation before the answer, and the answer."""
        conversation = self.conversations[name]
        prompt = self.template.prompt(conversation.opened_on, text)
        before = conversation.token_ids + prompt
        while True:
            with self.injected():
                self.engine.apply(AskSession(name, "turn", prompt, sampling))
            for event in self.run():
                if isinstance(event, Finished):
                    conversation.commit(prompt, event.kept_ids)
                    return before, event.answer_ids

    def injected(self) -> AbstractContextManager[Any]:
        """Return the context in which the engine runs. Without the mode torch is several times faster."""
        done = self.faults.site is not None and not self.faults.failures
        return nullcontext() if done else self.faults

    def run(self) -> list[Event]:
        """Step until the engine has no work. A request may be rejected, but it must not fail."""
        events: list[Event] = []
        for _ in range(50):
            if not self.engine.has_work:
                self.rejected += sum(isinstance(event, OutOfCapacity) for event in events)
                return events
            with self.injected():
                events += self.engine.step()
            failed = [event for event in events if "Failed" in type(event).__name__]
            assert not failed
        raise AssertionError("the engine makes no progress")

    def talk(self) -> list[tuple[list[int], list[int]]]:
        """Run all that allocates: encode, prefill, copy a prefix, offload, restore, grow in two ways, decode, draw."""
        self.open("a", "b", seed=1)
        self.open("c", seed=2)
        answers = [
            self.ask("c", LONG_QUESTION, Sampling(2)),
            self.ask("a", "why?", Sampling(3, temperature=0.8, seed=7, min_tokens=2)),
            self.ask("b", "two green stars?", Sampling(2)),
        ]
        assert self.engine.sessions.keys() == {"a", "b", "c"}
        for name in "ac":  # leaves room for the old and the grown cache of b
            self.engine.apply(CloseSession(name))
        answers.append(self.ask("b", LONG_QUESTION, Sampling(2)))
        self.engine.apply(CloseSession("b"))
        assert self.engine.memory() == Memory()
        return answers


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Model, ChatTemplate]:
    """Transformers' model, the engine's model with transformers' layers as on CUDA, and the chat template."""
    reference, engine = (
        AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32, device_map={"": "cpu"}) for _ in "ab"
    )
    return reference, Model(engine), ChatTemplate(AutoProcessor.from_pretrained(tiny))


# What must be among the places of the engine that allocate during `Chat.talk`.
EXPECTED = {
    "encode",
    "Model.forward",
    "Model._embed",
    "KVShape.empty",
    "SessionKV.fork",
    "SessionKV.offload",
    "SessionKV.reserve",
    "SessionKV.write",
    "_copy_to_device",
    "_draw",
    "_packed_attention",
    "causal_mask",
    "next_tokens",
    "token_weights",
}


def test_memory_may_run_out_at_every_place_that_allocates(loaded: tuple[Any, Model, ChatTemplate]) -> None:
    reference, model, template = loaded
    seen = Allocations()
    answers = Chat(model, template, seen).talk()
    assert {function for function, _ in seen.calls} >= EXPECTED
    assert run_out(model, template, seen.calls, answers), "no request ran out of memory twice"
    for (before, answer), seed in zip((answers[0], *answers[2:]), (2, 1, 1), strict=True):  # the greedy ones
        assert answer == generate(reference, template, before, seed, len(answer))


# What must be among the places of fused layers that allocate.
EXPECTED_FUSED = {
    "DeviceLinear._product",
    "PackedKV._attend_span",
    "PackedKV.attend",
    "RowNorm.__call__",
    "activate",
    "rotate",
}


def test_memory_may_run_out_in_fused_layers(tiny: Path, loaded: tuple[Any, Model, ChatTemplate]) -> None:
    """With the layers of CUDA, at the places that the layers of transformers do not have, reported by cuBLAS."""
    _, plain, template = loaded
    model = Model(AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32, device_map={"": "cpu"}))
    assert layers.fuse(model.text)
    seen = Allocations()
    answers = Chat(model, template, seen).talk()
    known = Allocations()
    assert Chat(plain, template, known).talk() == answers
    added = Counter({site: calls for site, calls in seen.calls.items() if site not in known.calls})
    assert {function for function, _ in added} >= EXPECTED_FUSED
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert run_out(model, template, added, answers, error=RuntimeError, message=cublas)


def run_out(model: Model, template: ChatTemplate, sites: Counter[Site], answers: list[Any], **error: Any) -> int:
    """Run out of memory once and twice in a row at each of the sites; return the number of rejected requests.

    `error`: as in `Allocations`.
    """
    rejected = 0
    for site, calls in sites.items():
        once = Chat(model, template, Allocations(site, first=calls // 2 + 1, failures=1, **error))
        assert once.talk() == answers, site
        assert (once.faults.failures, once.rejected) == (0, 0), site
        twice = Chat(model, template, Allocations(site, first=1, failures=2, **error))
        assert twice.talk() == answers, site
        rejected += twice.rejected
    return rejected


def generate(reference: Any, template: ChatTemplate, before: list[int], seed: int, tokens: int) -> list[int]:
    """Return the answer of transformers to the whole conversation of a session with one picture."""
    ids = torch.tensor([before])
    out = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.from_numpy(template.opening([("", noise(seed))]).pictures[0].inputs["pixel_values"]),
        do_sample=False,
        max_new_tokens=tokens,
    )
    return out[0, ids.shape[1] :].tolist()
