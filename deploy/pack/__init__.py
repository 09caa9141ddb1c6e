"""Build the model archive: check a checkpoint, render its configuration, archive it with the handler.

`build_mar.sh` runs `python -m deploy.pack`.
"""

from .archive import pack_model, read_archive
from .checkpoint import checkpoint_files, checkpoint_problems
from .errors import PackError
from .job import PackedModel, PackJob
from .model_config import render_config

__all__ = [
    "PackError",
    "PackJob",
    "PackedModel",
    "checkpoint_files",
    "checkpoint_problems",
    "pack_model",
    "read_archive",
    "render_config",
]
