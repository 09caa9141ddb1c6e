"""docs/notebook.ipynb from its first cell to its last, as `make notebook` executes it, and the outputs that it has.

What the cells must print is judged here: the demo model's answers by the truth about the picture, the rest by what is
left in the account.
"""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass

import boto3
import nbformat
import pytest
from nbformat import NotebookNode

from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import Ask, Subject, make_scene, true_answer
from tests.notebook import NOTEBOOK, OUTPUT, execute, parse_args, rehearsal
from tests.support import cloud

from .conftest import ROOT

STAR = Subject(kind="star")
ASKS = {
    "How many shapes are there?": Ask("count"),
    "How many shapes are there in all?": Ask("count"),
    "Which ones are there?": Ask("list"),
    "Which shapes are there?": Ask("list"),
    "What colour is the star?": Ask("colour", STAR),
    "Where is the star?": Ask("where", STAR),
}


@dataclass(frozen=True)
class Told:
    """What the cells of a notebook ask and what they printed, by the cells' names."""

    notebook: NotebookNode

    def source(self, name: str) -> str:
        return self._cells[name].source

    def text(self, name: str) -> str:
        return "".join(output.get("text", "") for output in self._cells[name].outputs)

    def truths(self, name: str) -> list[tuple[str, str]]:
        """The questions that a cell asks, in its order, each with the right answer."""
        seed = int(re.search(r"make_scene\((.+?)\)", self.source("picture"))[1])
        asked = re.findall("|".join(map(re.escape, ASKS)), self.source(name))
        assert asked, f"{name} asks nothing that is known here"
        return [(question, true_answer(make_scene(seed), ASKS[question])) for question in asked]

    @property
    def _cells(self) -> dict[str, NotebookNode]:
        return {cell.id: cell for cell in self.notebook.cells}


@dataclass(frozen=True)
class Executed:
    told: Told
    left: dict[str, list]


@pytest.fixture(scope="module")
def executed(instances: list[TorchServe], tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """The notebook executed now, and what it left in the account."""
    folder = tmp_path_factory.mktemp("notebook")
    with rehearsal(instances, folder / "home") as where:
        told = Told(execute(folder, **where))
        return Executed(told, cloud.contents(functools.partial(boto3.client, region_name=cloud.REGION)))


@pytest.fixture(params=["executed", "committed"])
def told(request: pytest.FixtureRequest) -> Told:
    """The notebook executed now, and as it is committed: both must be right, so the committed one can't go stale."""
    if request.param == "executed":
        return request.getfixturevalue("executed").told
    return Told(nbformat.read(NOTEBOOK, as_version=4))


def test_every_cell_ran_once_and_in_order(told: Told) -> None:
    cells = [cell for cell in told.notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.id for cell in cells for output in cell.outputs if output.output_type == "error"] == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_make_notebook_changes_no_tracked_file() -> None:
    assert parse_args([]).output == OUTPUT
    done = subprocess.run(["git", "check-ignore", "-q", OUTPUT], cwd=ROOT, check=False)
    assert (done.returncode, parse_args(["--save"]).output) == (0, NOTEBOOK)


def test_the_commands_answers_are_right(told: Told) -> None:
    truths = told.truths("chat-command")
    wanted = [line for question, answer in truths for line in (f"> {question}", answer)]
    opened, *said, closed = told.text("chat-command").splitlines()
    assert opened.startswith("open until ")
    assert said == wanted
    assert closed == "closed"


def test_boto3s_answers_are_right_and_their_session_is_kept(told: Told) -> None:
    said = told.text("chat-turns").splitlines()
    assert said[::2] == [f"{question}  {answer}" for question, answer in told.truths("chat-turns")]
    assert all(int(re.search(r"'cached_tokens': (\d+)", usage)[1]) > 0 for usage in said[1::2])
    ((_, answer),) = told.truths("chat-stream")
    assert told.text("chat-stream") == answer


def test_a_closed_session_is_refused(told: Told) -> None:
    assert told.text("chat-close").splitlines() == ["closed: True", "ValidationError 400"]


def test_the_aws_clis_answer_is_right(told: Told) -> None:
    ((_, answer),) = told.truths("chat-cli")
    assert told.text("chat-cli").splitlines() == ["application/json", answer, "application/json"]


def test_it_was_up_and_nothing_is_left(told: Told, executed: Executed) -> None:
    assert "endpoint   InService" in told.text("watch").splitlines()
    assert told.text("down").splitlines()[-1] == "exit code 1: nothing is left"
    assert executed.left == {}


def test_what_is_committed_names_no_machine_and_no_hour() -> None:
    text = NOTEBOOK.read_text()
    assert not re.search(r"papermill|127\.0\.0\.1:|\d\d:\d\d:\d\d|/tmp/|/home/", text)
    assert str(ROOT) not in text
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
