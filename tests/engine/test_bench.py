"""Every benchmark runs on a very small model and writes its complete record. No test checks a time."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from bench import cuda, harness, report
from bench.bar import BAR, PEERS_BAR, Measure
from bench.make_checkpoint import PRESETS, WORDS, make_checkpoint


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all benchmarks, from one smoke run each."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    for name in report.BENCHES:
        importlib.import_module(f"bench.{name}").main(["--smoke", "--threads", "1", "--out", str(folder)])
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("name", report.BENCHES)
def test_a_bench_writes_its_machine_its_table_and_its_plot(results: Path, name: str) -> None:
    document = json.loads((results / f"{name}.json").read_text())
    assert document["bench"] == name
    assert {"date", "cpu", "cores", "torch", "torch_threads", "omp", "load_average"} <= set(document["facts"])
    assert document["model"] == {"preset": "tiny", "dtype": "float32"}
    assert document["rows"]
    assert all(set(row) <= set(document["columns"]) for row in document["rows"])
    assert document["ratios"]
    assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "measure", [*BAR, *(one for one in PEERS_BAR if one.bench != "peers")], ids=lambda measure: measure.what
)
def test_every_target_has_a_measured_ratio(results: Path, measure: Measure) -> None:
    assert measure.ratio in json.loads((results / f"{measure.bench}.json").read_text())["ratios"]


def test_the_engine_and_all_baselines_give_the_same_answers(results: Path) -> None:
    rows = json.loads((results / "turns.json").read_text())["rows"]
    assert {row["side"] for row in rows} == {"stateless", "pixels cached", "features cached", "KV kept", "engine"}
    assert {row["same answer"] for row in rows} == {"1/1"}


def test_sessions_beyond_the_budget_give_correct_answers(results: Path) -> None:
    document = json.loads((results / "memory.json").read_text())
    many = document["samples"]["many"]
    assert many["wrong"] == 0
    assert many["most_resident"] <= many["room"]
    assert all(document["samples"]["counts"][-1][tier] for tier in ("resident", "offloaded", "cold"))


def test_the_record_of_int8_caches_keeps_the_answers() -> None:
    document = json.loads((report.RESULTS / "quantized.json").read_text())
    ratios = document["ratios"]
    assert document["settings"]["questions"] >= 5000
    assert ratios["int8 KV: tokens that differ from bfloat16, %"] <= 1
    assert abs(ratios["int8 KV: right answers, points from bfloat16"]) <= 0.3


def test_the_readme_gets_its_figures_from_the_files(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bar -->\nold\n<!-- /bar -->\n<!-- open -->\n<!-- /open -->\nafter\n")
    report.write(readme, results)
    text = readme.read_text()
    assert text.startswith("before\n<!-- bar -->\n| measure |")
    assert text.endswith("<!-- /open -->\nafter\n")
    assert "first open" in text
    assert "old" not in text.splitlines()
    assert text.count("not run") == len(BAR) + 1, "in float32 nothing but smoke runs"


def test_a_verdict_respects_which_direction_is_better() -> None:
    more = Measure("", "", "", 10, 14)
    less = Measure("", "", "", 0.77, 0.55, less_is_better=True)
    assert [more.verdict(value) for value in (9, 10, 14)] == ["missed", "floor", "aim"]
    assert [less.verdict(value) for value in (0.8, 0.77, 0.5)] == ["missed", "floor", "aim"]


def test_the_same_seed_makes_the_same_checkpoint(tmp_path: Path) -> None:
    weights = [
        (make_checkpoint(tmp_path / name, PRESETS["tiny"], seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert weights[0] == weights[1] != weights[2]
    assert len(WORDS) == len(set(WORDS))


def test_the_cuda_benchmarks_print_that_there_is_no_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.main([]) == 0
    assert "no CUDA device" in capsys.readouterr().out


def test_numbers_are_printed_with_their_significant_digits() -> None:
    assert [harness.number(value) for value in (1234.5, 12.34, 0.01234, True, None)] == [
        "1,234",
        "12.3",
        "0.0123",
        "yes",
        "",
    ]


def test_a_percentile_is_the_smallest_value_with_that_share_at_or_below_it() -> None:
    assert [harness.percentile(range(1, 101), share) for share in (0.5, 0.9, 0.99)] == [50, 90, 99]
    assert [harness.percentile([2.5, 1.5], share) for share in (0.5, 0.99)] == [1.5, 2.5]
    assert harness.percentile([7.0], 0.5) == 7.0


def test_the_page_of_the_benchmarks_has_a_place_for_each_record() -> None:
    page = report.README.read_text()
    assert [name for name in report.read() if f"<!-- {name} -->\n" not in page] == []
    assert [name for name in report.SERVED if f"<!-- {name} -->\n" not in page] == []
