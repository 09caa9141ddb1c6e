"""What is measured, and how: the engine beside `transformers` on a checkpoint of LLaVA-1.5's shape.

Each bench runs by itself (`python -m bench.turns --help`), prints a table and writes `bench/results/NAME.json`. The
engine is driven in-process, so what is timed is the engine, not TorchServe or the network.
"""

import sys
from pathlib import Path

# The handler's package is not installed: it travels in the archive. Its folder is the top of what it imports.
sys.path.insert(0, str(Path(__file__).parents[1] / "handler"))
