"""AIPerf, unmodified: conversations with a picture in each turn, of which no request fails (`make test-clients`).

`bench.load` is the program of `make load`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from bench import load
from tests.support.clients import ENVIRONMENTS, MODEL, TIMEOUT_S
from tests.support.serving import SHAPES, Served

AIPERF = ENVIRONMENTS / "aiperf" / "bin" / "aiperf"
CONVERSATIONS, TURNS, TOKENS = 8, 3, 12
pytestmark = pytest.mark.skipif(not AIPERF.exists(), reason="make test-clients installs AIPerf")


def test_no_request_fails(shapes_store: Path, tmp_path: Path) -> None:
    options = {
        "model": MODEL,
        "endpoint-type": "chat",
        "tokenizer": SHAPES,
        "conversation-num": CONVERSATIONS,
        "conversation-turn-mean": TURNS,
        "conversation-turn-stddev": 0,
        "image-width-mean": 64,
        "image-height-mean": 64,
        "image-format": "png",
        "isl": 12,
        "osl": TOKENS,
        "concurrency": 4,
        "random-seed": 1,
        "ui": "none",
        "artifact-dir": tmp_path,
    }
    with Served(shapes_store) as served:
        command = [AIPERF, "profile", "--url", served.url, "--streaming", "--use-server-token-count"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command += ["--extra-inputs", "ignore_eos:true"]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, cwd=tmp_path)
    assert run.returncode == os.EX_OK, run.stdout + run.stderr
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "profile_export.jsonl").read_text().splitlines()]
    assert report["request_count"]["avg"] == len(records) == CONVERSATIONS * TURNS
    assert report.get("error_request_count", {"avg": 0})["avg"] == 0
    assert not report.get("error_summary")
    assert [record for record in records if record.get("error")] == []
    assert report["output_sequence_length"]["min"] == report["output_sequence_length"]["max"] == TOKENS


def test_make_load_writes_its_record(shapes_store: Path, tmp_path: Path) -> None:
    with Served(shapes_store) as served:
        load.main(["--smoke", "--url", served.url, "--out", str(tmp_path)])
    document = json.loads((tmp_path / "load.json").read_text())
    assert {row["turns"]: (row["requests"], row["failed"]) for row in document["rows"]} == {
        "all turns": (4, 0),
        "first turns": (2, 0),
        "follow-ups": (2, 0),
    }
    assert document["ratios"]["prompt tokens from the cache"] > 0
    assert document["settings"]["aiperf"] == "0.13.0"
    assert (tmp_path / "load.png").is_file()
