"""Decode steps of `bench.gpu_day` with recorded graphs: python -m tests.engine.interpreted_gpu_day DIR

Run by test_gpu_day.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.gpu_day import variants
from bench.gpu_day.__main__ import main
from tests.support.recorded_graph import RecordedGraph


class Recorded(variants.FusedModel):
    """Fused layers with the graphs of a test."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.use_graphs(RecordedGraph)


if __name__ == "__main__":
    variants.FusedModel = Recorded  # type: ignore[misc]
    sections = ["kernel numbers", "decode"]
    sys.exit(main(["--smoke", "--device", "cpu", "--out", sys.argv[1], "--sections", *sections]))
