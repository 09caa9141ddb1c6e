"""The prefill chunk of a GPU is measured. A clock that counts tokens stands for the GPU's speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_sessions.engine.attention import Segment
from llava_sessions.engine.chunks import measure_pieces
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import Sampling
from tests.support.engine_chats import QUESTIONS, Chats
from tests.support.tiny_llava import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small model with a long context."""
    return Model.load(make_checkpoint(tmp_path_factory.mktemp("tiny"), context_tokens=4096), "float32", "cpu")


class Device:
    """Counts forwards, and the time that they would take. With more than `most_tokens` tokens memory runs out."""

    def __init__(self, model: Model, tokens_per_s: float, most_tokens: int = 2**20) -> None:
        self.now_s = 0.0
        self.tokens: list[int] = []
        self._forward: Callable[[list[Segment]], torch.Tensor] = model.forward
        self._tokens_per_s = tokens_per_s
        self._most_tokens = most_tokens

    def forward(self, segments: list[Segment]) -> torch.Tensor:
        tokens = sum(len(segment.token_ids) for segment in segments)
        if tokens > self._most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.tokens.append(tokens)
        self.now_s += tokens / self._tokens_per_s
        return self._forward(segments)


@pytest.mark.parametrize(
    ("tokens_per_s", "chunk", "piece"),
    [(1_000, 256, 1024), (5_120, 256, 1024), (10_239, 256, 1024), (10_241, 512, 2048), (1e6, 2048, 2048)],
)
def test_the_chunk_takes_at_most_50_ms(
    model: Model, tokens_per_s: float, chunk: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(model, tokens_per_s)
    monkeypatch.setattr(model, "forward", device.forward)
    pieces, _ = measure_pieces(model, None, lambda: device.now_s)
    assert (pieces.chunk_tokens, pieces.tokens) == (chunk, piece)
    assert device.tokens[-1] == piece, "the memory of the longest piece is measured"


@pytest.mark.parametrize(("most_tokens", "chunk", "tokens"), [(600, 512, 512), (100, 256, 256), (2048, 2048, 2048)])
def test_memory_that_runs_out_ends_the_search_and_limits_the_pieces(
    model: Model, most_tokens: int, chunk: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(model, 1e6, most_tokens)
    monkeypatch.setattr(model, "forward", device.forward)
    pieces, _ = measure_pieces(model, None, lambda: device.now_s)
    pieces.note(256, 1e-3)
    assert (pieces.chunk_tokens, pieces.tokens, pieces.most_tokens) == (chunk, tokens, tokens)


def test_the_longest_piece_is_halved_until_it_fits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(model, 1e6, 600)
    monkeypatch.setattr(model, "forward", device.forward)
    pieces, _ = measure_pieces(model, 300, lambda: device.now_s)
    assert (pieces.chunk_tokens, pieces.tokens) == (300, 600)
    assert device.tokens == [600], "the memory of the longest piece is measured"


def test_a_prompt_whose_long_pieces_do_not_fit_runs_in_chunks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rejected only if memory runs out for a chunk: all its pieces after the first error are chunks."""
    monkeypatch.setattr("llava_sessions.engine.scheduler._LEAST_TOKENS", 1)
    answers = []
    for most_tokens in (2**20, 8):
        chats = Chats(tiny, chunk_tokens=8)
        chats.open("a", 1)
        chats.run()
        device = Device(chats.engine.model, 1e6, most_tokens)
        monkeypatch.setattr(chats.engine.model, "forward", device.forward)
        for question in (QUESTIONS[0] * 6, QUESTIONS[2] * 6):
            chats.ask("a", question, Sampling(4))
            answers.append(chats.run()["a"].answer_ids)
        assert max(device.tokens) == min(most_tokens, 32)
    assert answers[:2] == answers[2:]


def test_a_configured_chunk_is_kept_and_only_its_memory_is_measured(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(model, 10.0)
    monkeypatch.setattr(model, "forward", device.forward)
    assert measure_pieces(model, 100, lambda: device.now_s)[0].chunk_tokens == 100
    assert device.tokens == [400]


def test_no_forward_is_longer_than_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Model.load(make_checkpoint(tmp_path, context_tokens=300), "float32", "cpu")
    device = Device(small, 1e6)
    monkeypatch.setattr(small, "forward", device.forward)
    assert measure_pieces(small, None, lambda: device.now_s)[0].chunk_tokens == 256
    assert max(device.tokens) == 300


def test_an_error_that_is_not_of_memory_is_raised(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(model, "forward", fail)
    for chunk_tokens in (None, 256):
        with pytest.raises(RuntimeError, match="no kernel image"):
            measure_pieces(model, chunk_tokens)
