"""A first question about a clip that shows pictures: LLaVA's templates write them before the clip of the opening."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llava_sessions.journal.journal import Journal
from llava_sessions.journal.stores import DirectoryStore
from llava_sessions.text.pictures import Prepared, joined
from tests.support.family import Family, make_family
from tests.support.pump_frontend import QUESTIONS, Frontend, png
from tests.worker.test_clips import COLOURS, FILE, ask, check, clip_of, clip_of_frames, open_on_file, picture_of


@pytest.fixture(scope="module", params=["onevision", "next-video", "internvl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model only loses by more
    yield make_family(request.param, tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(threads)


def shown_first(family: Family) -> list[Prepared]:
    """Return the media of a question with a picture and a clip, in a session that was opened on another clip."""
    own = [picture_of(family, "red"), clip_of_frames(family)]
    opened = clip_of(family, FILE)
    return [joined([own[0], opened, own[1]] if not family.takes_flat_tiles else [opened, *own])]


def first_question(front: Frontend, session: str) -> None:
    ask(front, session, image=png("red"), video=[png(colour) for colour in COLOURS])


@pytest.mark.parametrize("lost", [False, True])
def test_a_picture_in_the_first_question_about_a_clip(family: Family, tmp_path: Path, lost: bool) -> None:
    """Then a later question, a crash and another instance. `lost`: the engine has lost the session before."""
    store = DirectoryStore(str(tmp_path))
    front = Frontend(family.model, family.tokens, journal=Journal([store]))
    session = open_on_file(front)
    if lost:
        front.lose_engine()
        front.bring_engine()
    first_question(front, session)
    shown = shown_first(family)
    check(family, front, session, *shown)
    assert len(front.table.get(session, front.now_s, None).known_transcript.turns) == 1
    ask(front, session, prompt_text=QUESTIONS[1], image=png("blue"))
    shown.append(picture_of(family, "blue"))
    check(family, front, session, *shown)
    front.lose_engine()
    front.bring_engine()
    ask(front, session, prompt_text=QUESTIONS[2])
    check(family, front, session, *shown)
    second = Frontend(family.model, family.tokens, journal=Journal([store]), first_row=100)
    ask(second, session)  # adopted
    check(family, second, session, *shown)


def test_the_first_question_is_asked_again_after_a_cancelled_one(family: Family) -> None:
    """A turn that is rolled back leaves a session that shows the clip of its opening."""
    front = Frontend(family.model, family.tokens)
    session = open_on_file(front)
    running = front.start(session, image=png("red"), ignore_eos=True)
    for _ in range(3):
        front.step()
    _, (cancelled,) = front.settle(running, front.cancel_row(session))
    assert json.loads(cancelled.body)["success"] is True
    ask(front, session, prompt_text=QUESTIONS[1])
    check(family, front, session, clip_of(family, FILE))
