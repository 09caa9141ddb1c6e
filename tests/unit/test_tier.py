"""The unit tests load no torch, so that they start at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

UNIT = Path(__file__).parent
REPO = UNIT.parents[1]

IMPORT_ALL = (
    "import importlib, sys\n"
    "for name in sys.argv[1:]: importlib.import_module(f'tests.unit.{name}')\n"
    "heavy = {'torch', 'transformers', 'ts'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
)


def test_unit_tests_import_neither_torch_nor_transformers_nor_torchserve() -> None:
    names = sorted(path.stem for path in UNIT.glob("test_*.py"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], env=environment, cwd=REPO, check=True, timeout=120)
