"""`bench.gpu_day` runs all sections on tiny shapes, and its checks find what they are for. No test checks a time."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_day import kernels, models, sections, soak, variants
from bench.gpu_day.__main__ import NAMES, main
from bench.gpu_day.attention import Batch, Heads, kernel
from bench.gpu_day.day import Day, Findings, Section
from bench.gpu_day.suite import ROOT, TESTS, command

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 16)
# What the measured machine must have. psutil is for `bench.machine`.
PACKAGES = {"torch", "transformers", "tokenizers", "numpy", "PIL", "tqdm", "psutil"}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of one smoke run."""
    folder = tmp_path_factory.mktemp("gpu_day")
    assert main(["--smoke", "--device", "cpu", "--out", str(folder)]) == 0
    return json.loads((folder / "gpu_day.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_section_runs_and_is_recorded(record: dict[str, Any], name: str) -> None:
    entry = record["sections"][name]
    assert entry["status"] == "passed"
    assert entry["results"] or entry["notes"]


def test_the_triton_kernels_and_graphs_run_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    path = os.pathsep.join([".", "handler", "client"])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    asked = [sys.executable, "-m", "tests.engine.interpreted_gpu_day", str(tmp_path)]
    done = subprocess.run(asked, cwd=ROOT, env=environment, timeout=120, check=False)
    assert done.returncode == 0
    rows = json.loads((tmp_path / "gpu_day.json").read_text())["sections"]["decode"]["results"]["rows"]
    assert [row["variant"] for row in rows] == [variants.PLAIN, variants.FUSED, variants.GRAPHS]
    assert [row["replays"] > 0 for row in rows] == [False, False, True]


def test_the_options_name_all_sections() -> None:
    assert tuple(section.name for section in sections.SECTIONS) == NAMES


def test_the_sections_fit_into_the_time_of_a_run() -> None:
    assert sum(section.usual_s for section in sections.SECTIONS) <= 540


def test_an_error_ends_its_section_only(tmp_path: Path) -> None:
    def broken(day: Day, found: Findings) -> None:
        found.results["before"] = 1
        raise ValueError("this section is broken")

    def wrong(day: Day, found: Findings) -> None:
        found.check("all numbers", True)
        found.check("all numbers", False)
        found.check("all numbers", True)

    def fine(day: Day, found: Findings) -> None:
        found.results["seen"] = list(json.loads((tmp_path / "gpu_day.json").read_text())["sections"])

    parts = [Section(run.__name__, run, 1, 0) for run in (broken, wrong, fine)]
    assert Day(CPU, tmp_path, 60).run(parts) == 2
    found = json.loads((tmp_path / "gpu_day.json").read_text())["sections"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "broken": "error",
        "wrong": "failed",
        "fine": "passed",
    }
    assert found["broken"]["results"] == {"before": 1}
    assert "this section is broken" in found["broken"]["error"]
    assert found["fine"]["results"]["seen"] == ["broken", "wrong"], "the file is complete after each section"


def test_a_section_is_skipped_if_too_little_time_is_left(tmp_path: Path) -> None:
    def fine(day: Day, found: Findings) -> None:
        found.results["ran"] = True

    day = Day(CPU, tmp_path, limit_s=30)
    assert day.run([Section("long", fine, 100, 50), Section("short", fine, 1, 1)]) == 0
    found = json.loads((tmp_path / "gpu_day.json").read_text())["sections"]
    assert found["long"]["status"] == "skipped"
    assert "50 s are needed" in found["long"]["notes"][0]
    assert found["short"]["status"] == "passed"


def test_a_section_that_hangs_is_ended(tmp_path: Path) -> None:
    def hangs(day: Day, found: Findings) -> None:
        time.sleep(60)

    assert Day(CPU, tmp_path, limit_s=60).run([Section("hangs", hangs, 0.05, 0)]) == 1
    assert "OutOfTime" in json.loads((tmp_path / "gpu_day.json").read_text())["sections"]["hangs"]["error"]


class Wrong:
    """The kernel with one fault."""

    def __init__(self, fault: str) -> None:
        self._right = kernel(HEADS, torch.float32, CPU)
        self._fault = fault
        self._places: list[tuple[int, int, int, int]] = []

    def task(self, places: list[tuple[int, int, int, int]]) -> Any:
        self._places = places
        return self._right.task(places)

    def __call__(self, task: Any, layer: int, *tensors: torch.Tensor) -> None:
        qkv, cos, sin, out, norms = tensors
        self._right(task, layer, qkv, cos, sin if self._fault != "rotation" else -sin, out, norms)
        if self._fault == "company" and len(self._places) > 1:
            out[0] *= 1 + 2e-7
        if self._fault == "one row":
            out[0] = 0


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("rotation", "error, float32"),
        ("one row", "error, float32"),
        ("company", "alone equals in company, bitwise"),
    ],
)
def test_a_fault_of_the_kernel_fails_a_check(
    fault: str, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernel", lambda *_: Wrong(fault))
    found = Findings()
    kernels.numbers(Day(CPU, tmp_path, 60, smoke=True), found)
    assert [name for name, holds in found.checks.items() if not holds] == [check]


def test_a_write_behind_the_new_token_is_found() -> None:
    batch = Batch(HEADS, [5, 9], torch.float32, CPU)
    assert batch.is_untouched(0)
    batch.caches[0][0, 1, 1, 6] = 1.0
    assert not batch.is_untouched(0)
    assert batch.is_untouched(1)


def test_the_loop_over_sessions_computes_attention() -> None:
    """Without rotation it is the kernel's attention."""
    batch = Batch(HEADS, [5, 9], torch.float32, CPU)
    batch.cos.fill_(1)
    batch.sin.fill_(0)
    batch.loop(0)
    for row in range(2):
        torch.testing.assert_close(batch.out[row].double(), batch.expected(row)[0], atol=1e-6, rtol=1e-5)


def test_a_wrong_answer_is_no_tie(tmp_path: Path) -> None:
    day = Day(CPU, tmp_path, 60, smoke=True)
    reference, _ = models.make(models.TINY, torch.float32, CPU)
    conversation = [400, 401, 402]
    answer = soak._generated(day, reference, conversation, 3)
    assert soak._is_tie(day, reference, conversation, answer)
    for place in range(3):
        wrong = [token + (at == place) for at, token in enumerate(answer)]
        assert not soak._is_tie(day, reference, conversation, wrong)


def test_it_imports_few_packages() -> None:
    files = [*(ROOT / "bench/gpu_day").glob("*.py"), ROOT / "bench/machine.py", ROOT / "bench/make_checkpoint.py"]
    found = {name.split(".")[0] for path in files for name in top_imports(path)}
    assert found - PACKAGES <= {"bench", "deploy", "llava_sessions"}


def top_imports(path: Path) -> list[str]:
    """Return the packages that a file imports when it is imported, without those of the standard library."""
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]


def test_the_section_of_tests_names_a_file() -> None:
    assert (ROOT / TESTS).is_file()
    assert TESTS in command()


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_help_lists_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name.split()[-1] in out for name in NAMES)
