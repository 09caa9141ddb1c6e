"""Ask the handler that is packed whether it could load a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .errors import PackError

MODULE = "llava_sessions.engine.checkpoint"
_TIMEOUT_S = 600  # of a network file system; seconds are usual


def loading_problems(handler: Path, folder: Path, stage: str, system_prompt: str = "") -> list[str]:
    """Return the reasons why the code in `handler` can't load the checkpoint in `folder`.

    Stage "files" reads the small files only. Stage "load" makes the model without its weights, which takes seconds. A
    process of its own keeps torch and transformers out of this one. Raise `PackError` if it can't run.
    """
    env = {**os.environ, "PYTHONPATH": str(handler), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-W", "ignore", "-m", MODULE, stage, str(folder), system_prompt]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise PackError("the handler's check of the checkpoint failed", done.stderr.strip().splitlines()[-5:])
    problems: list[str] = json.loads(done.stdout)
    return problems
