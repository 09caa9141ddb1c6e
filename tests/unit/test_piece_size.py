"""The size of a piece of a prompt in a step without running answers."""

from __future__ import annotations

import pytest

from llava_sessions.engine.scheduler import PieceSize


def test_a_fast_machine_runs_the_largest_piece() -> None:
    size = PieceSize(256, on_gpu=False)
    assert size.tokens == 1024
    size.note(600, 0.3)
    assert size.tokens == 1024


def test_a_slow_machine_runs_smaller_pieces() -> None:
    size = PieceSize(256, on_gpu=False)
    size.note(600, 3.0)
    assert size.tokens == 400, "what takes two seconds"
    size.note(600, 60.0)
    assert size.tokens == 256, "never less than next to answers"
    size.note(1, 0.5)
    assert size.tokens == 256, "a decode says nothing about prompts"
    size.note(256, 0.1)
    assert size.tokens == 1024


def test_a_limit_holds_after_a_fast_forward_and_is_at_least_a_chunk() -> None:
    size = PieceSize(256, on_gpu=False)
    for limit, longest in ((2048, 1024), (512, 512), (1024, 512), (100, 256)):
        size.limit(limit)
        size.note(256, 0.001)
        assert (size.tokens, size.most_tokens, size.chunk_tokens) == (longest, longest, 256)


@pytest.mark.parametrize(("chunk", "piece"), [(1, 4), (256, 1024), (512, 2048), (2048, 2048), (8192, 8192)])
def test_on_a_gpu_a_piece_is_bounded(chunk: int, piece: int) -> None:
    size = PieceSize(chunk, on_gpu=True)
    assert (size.chunk_tokens, size.tokens, size.most_tokens) == (chunk, piece, piece)
