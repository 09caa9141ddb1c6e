"""Pictures that wait at the same time are encoded in one batch, as on a GPU, and fail alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_sessions.engine.device import Stopwatch
from llava_sessions.ipc.messages import OpenFailed, OpenSession, Prefilled, PreparedPicture, Sampling
from tests.support.engine_chats import QUESTIONS, Chats

Encode = Callable[[list[PreparedPicture]], list[torch.Tensor]]


@pytest.fixture
def chats(tiny: Path) -> Chats:
    """An engine that encodes up to four pictures at once."""
    made = Chats(tiny)
    made.engine.encoder.most_tiles = 4
    return made


@pytest.fixture
def batches(chats: Chats, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches."""
    sizes: list[int] = []
    encode = chats.engine.model.encode_batch

    def counted(pictures: list[PreparedPicture]) -> list[torch.Tensor]:
        sizes.append(len(pictures))
        return encode(pictures)

    monkeypatch.setattr(chats.engine.model, "encode_batch", counted)
    return sizes


def answers(chats: Chats, names: str) -> dict[str, list[int]]:
    """Ask one question in each session; return the answers."""
    for name in names:
        chats.ask(name, QUESTIONS[0], Sampling(6))
    return {name: event.answer_ids for name, event in chats.run().items()}


def test_a_batch_has_at_most_so_many_pictures_and_each_of_them_once(chats: Chats, batches: list[int]) -> None:
    for name, seed in zip("abcdefg", (1, 2, 3, 1, 4, 5, 6), strict=True):
        chats.open(name, seed)
    chats.run()
    assert batches == [4, 2]
    memory = chats.engine.memory()
    assert (memory.pictures_encoded, memory.features_bytes) == (6, 6 * 16 * 64 * 4)


def test_the_answers_do_not_depend_on_the_batch(chats: Chats, tiny: Path) -> None:
    alone = Chats(tiny)
    for one in (chats, alone):
        for seed, name in enumerate("abc"):
            one.open(name, seed)
            if one is alone:
                one.run()
    assert answers(chats, "abc") == answers(alone, "abc")


def test_on_a_cpu_pictures_are_encoded_one_by_one(tiny: Path) -> None:
    assert Chats(tiny).engine.encoder.most_tiles == 1


def test_a_broken_picture_fails_its_own_session_only(chats: Chats, batches: list[int]) -> None:
    opening = chats.tokens.opening([("bad", np.zeros((60, 80, 3), dtype=np.uint8))])
    inputs = {"pixel_values": np.zeros((1, 3, 20, 20), dtype=np.float32)}
    bad = replace(opening.pictures[0], inputs=inputs)
    for name in ("bad", "worse"):  # of one shape: they are a batch
        chats.engine.apply(OpenSession(name, opening.token_ids, (replace(bad, key=name),)))
    chats.open("a", 1)
    chats.open("b", 2)
    chats.run()
    assert batches == [2, 1, 1, 2]
    assert [event.session_id for event in chats.events if isinstance(event, OpenFailed)] == ["bad", "worse"]
    assert answers(chats, "ab").keys() == {"a", "b"}


def test_a_batch_for_which_memory_runs_out_is_encoded_one_by_one(
    chats: Chats, batches: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode: Encode = chats.engine.model.encode_batch

    def short(pictures: list[PreparedPicture]) -> list[torch.Tensor]:
        if len(pictures) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pictures)

    monkeypatch.setattr(chats.engine.model, "encode_batch", short)
    for seed, name in enumerate("abc"):
        chats.open(name, seed)
    assert answers(chats, "abc").keys() == {"a", "b", "c"}
    assert batches == [1, 1, 1]
    assert caplog.text.count("encode_batch_failed pictures=") == 2


def test_features_of_a_wrong_number_fail_their_session_only(chats: Chats) -> None:
    opening = chats.tokens.opening([("few", np.zeros((60, 80, 3), dtype=np.uint8))])
    image = chats.tokens.image_token_id
    token_ids = [image, *opening.token_ids]  # one image token too many
    chats.engine.apply(OpenSession("few", token_ids, opening.pictures))
    chats.open("a", 1)
    chats.run()
    failed = [event for event in chats.events if isinstance(event, OpenFailed)]
    assert [event.session_id for event in failed] == ["few"]
    assert "16 features for 17 image tokens" in failed[0].error
    assert answers(chats, "a").keys() == {"a"}


class Timeline:
    """CUDA's events on a device that runs behind the host. Work takes 7 ms."""

    launched = 0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.ms = -1

    def record(self) -> None:
        self.ms = 7 * Timeline.launched

    def synchronize(self) -> None:
        Timeline.waits += 1

    def elapsed_time(self, later: Any) -> float:
        assert Timeline.waits, "the work may not have ended"
        return later.ms - self.ms


def test_the_time_of_an_encoding_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Timeline)
    watch = Stopwatch(torch.device("cuda"))
    Timeline.launched += 1
    watch.stop()
    assert Timeline.waits == 0, "the host does not wait before the time is read"
    assert watch.ms == 7.0


def test_all_sessions_of_a_batch_report_its_time(chats: Chats) -> None:
    for seed, name in enumerate("ab"):
        chats.open(name, seed)
    chats.run()
    times = [event.encode_ms for event in chats.events if isinstance(event, Prefilled)]
    assert times[0] == times[1] > 0
