"""A packing job and its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .model_config import CONFIG_FILE

REPO = Path(__file__).resolve().parents[2]
HANDLER_DIR = REPO / "handler"
SUFFIXES = {"no-archive": "", "default": ".mar", "tgz": ".tar.gz"}
# SageMaker unpacks an archive into /opt/ml/model without a folder around it. No --name contains the dot of this suffix.
SAGEMAKER_SUFFIX = ".sagemaker"


@dataclass(frozen=True)
class PackJob:
    """The options of one run of `build_mar.sh`; `handler` is the folder with the handler's code."""

    model: str
    name: str = "llava"
    format: str = "no-archive"
    dtype: str | None = None
    device: str | None = None
    weights: str = "inside"
    sessions: int | None = None
    config: Path = HANDLER_DIR / CONFIG_FILE
    output: Path = REPO / "model_store"
    version: str = "1.0"
    sagemaker: bool = False
    handler: Path = HANDLER_DIR
    try_loading: bool = True  # as a server would, without weights; takes seconds

    @property
    def archive(self) -> Path:
        """The path of the archive that this job writes."""
        return self.output / (self.name + (SAGEMAKER_SUFFIX if self.sagemaker else SUFFIXES[self.format]))

    @property
    def replaced(self) -> list[Path]:
        """Archives of the same name for the same server, in any format. This job's archive replaces them."""
        if self.sagemaker:
            return [self.archive]
        return [self.output / (self.name + suffix) for suffix in SUFFIXES.values()]


@dataclass(frozen=True)
class PackedModel:
    """An archive in the model store. `removed` are archives of its name in other formats, which it replaced."""

    archive: Path
    size_bytes: int
    sessions: int
    checkpoint: str
    removed: tuple[Path, ...]


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files below a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def format_mib(size: int) -> str:
    """Return a size in bytes as text in MiB."""
    return f"{size / 2**20:.1f} MiB"
