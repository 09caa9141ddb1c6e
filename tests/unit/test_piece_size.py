"""The size of a piece of a prompt in a step without running answers."""

from __future__ import annotations

from llava_sessions.engine.scheduler import PieceSize


def test_a_fast_machine_runs_the_largest_piece() -> None:
    size = PieceSize(256, 1024)
    assert size.tokens == 1024
    size.note(600, 0.3)
    assert size.tokens == 1024


def test_a_slow_machine_runs_smaller_pieces() -> None:
    size = PieceSize(256, 1024)
    size.note(600, 3.0)
    assert size.tokens == 400, "what takes two seconds"
    size.note(600, 60.0)
    assert size.tokens == 256, "never less than next to answers"
    size.note(1, 0.5)
    assert size.tokens == 256, "a decode says nothing about prompts"
    size.note(256, 0.1)
    assert size.tokens == 1024


def test_after_memory_ran_out_the_next_piece_is_small() -> None:
    size = PieceSize(256, 1024)
    size.shrink()
    assert size.tokens == 256


def test_on_a_gpu_no_prompt_runs_whole() -> None:
    size = PieceSize(256, 0)
    for taken_s in (0.1, 10.0):
        size.note(600, taken_s)
        assert size.tokens == 0
    size.shrink()
    assert size.tokens == 0
