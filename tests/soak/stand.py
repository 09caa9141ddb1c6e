"""Owns what the soaks stand on: a packed demo model with settings of their own, the processes of a server, and results.

Must not know what a soak does to the server, nor anything of the handler's inside.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from deploy.serve import TorchServe

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
_ENGINE = "llava_sessions.engine.process"


def pack(folder: Path, sessions: int, **settings: Any) -> Path:
    """A model store with the demo model, in float32 on the CPU; `settings` are keys of the `llava:` section."""
    config = yaml.safe_load((ROOT / "handler" / "model-config.yaml").read_text())
    config["llava"] |= settings
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--model", ROOT / "models" / "shapes", "--dtype", "float32", "--device", "cpu", "--sessions", sessions]
    options += ["--config", folder / "config.yaml", "--output", folder / "store"]
    subprocess.run([ROOT / "build_mar.sh", *map(str, options)], check=True, capture_output=True, text=True)
    return folder / "store"


@dataclass(frozen=True)
class Processes:
    """A server's Java frontend, its one worker and that one's engine."""

    java: psutil.Process
    worker: psutil.Process
    engine: psutil.Process

    @classmethod
    def of(cls, server: TorchServe) -> Processes:
        """Those that run now."""
        (pid,) = server.worker_pids()
        worker = psutil.Process(pid)
        (engine,) = [child for child in worker.children() if _ENGINE in child.cmdline()]
        return cls(psutil.Process(server.pid), worker, engine)

    @property
    def pids(self) -> dict[str, int]:
        """By role."""
        return {role: process.pid for role, process in vars(self).items()}

    def sample(self) -> dict[str, dict[str, int]]:
        """Memory, threads and open files of each at this moment."""
        found = {}
        for role, process in vars(self).items():
            with process.oneshot():
                rss, threads = process.memory_info().rss, process.num_threads()
            found[role] = {"rss_bytes": rss, "threads": threads, "fds": process.num_fds()}
        return found


def write_results(path: Path, facts: dict[str, Any], document: dict[str, Any]) -> None:
    """Write what a soak found, under the facts of the machine as they were at its start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts, **document}, indent=1) + "\n")
