"""Find the checkpoint that `--model` names: a folder, or an ID on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from .checkpoint import SMALL_FILES, checkpoint_problems
from .errors import PackError, say
from .job import PackJob
from .loading import loading_problems

_WEIGHT_FILES = "*.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_checkpoint(job: PackJob, system_prompt: str) -> Path | None:
    """Return the checked folder of the job's model, or None for a hub ID that the server loads itself.

    A hub ID is downloaded, except with `weights` "beside". `system_prompt`: the chat template must take it. Raise
    `PackError` for a checkpoint that can't be served.
    """
    model = job.model
    path = Path(model).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(model):
        folder = path.resolve()
    elif job.weights == "beside":
        say(f"{model} is no folder: it is used as a hub ID, which the server loads when it starts")
        return None
    else:
        # The weights are large: they are fetched only for a kind that is served.
        _refuse(model, loading_problems(job.handler, _download(model), "files"))
        folder = _download(model, _WEIGHT_FILES)
    say(f"checking {folder} ...")
    # In this order: a kind that is not served is named, and not the files that it does not have.
    problems = loading_problems(job.handler, folder, "files") or checkpoint_problems(folder)
    if not problems and job.try_loading:
        problems = loading_problems(job.handler, folder, "load", system_prompt)
    _refuse(model, problems)
    return folder


def _refuse(model: str, problems: list[str]) -> None:
    if problems:
        raise PackError(f"{model} is not a checkpoint that can be served", problems)


def _download(hub_id: str, *more: str) -> Path:
    """Return the folder of a hub checkpoint in the local cache. Download missing files, with progress bars.

    These are the small ones, and those whose names match a pattern of `more`.
    """
    from huggingface_hub import snapshot_download  # imported here: it takes half a second, and few runs need it

    say(f"fetching {' and '.join(['small files', *more])} of {hub_id} from the hub, or from its cache ...")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, "*.json", *more]))
    except Exception as err:  # offline, gated, misspelt, disk full: the hub's client raises many kinds
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise PackError(
            f"{hub_id} is neither a folder nor a checkpoint that could be fetched from the hub",
            [reason, "offline? download it elsewhere and give --model the folder"],
        ) from err
