"""Benchmarks: the engine compared with `transformers` on a checkpoint of LLaVA-1.5's shape.

Each benchmark runs separately (`python -m bench.turns --help`), prints a table and writes `bench/results/NAME.json`.
The engine runs in the benchmark's process, so the times exclude TorchServe and the network.
"""

import sys
from pathlib import Path

# The handler's package is not installed, because it is shipped in the model archive. Its imports start at this folder.
sys.path.insert(0, str(Path(__file__).parents[1] / "handler"))
