"""Check that the checkpoint is complete, and that the handler can serve its kind."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from deploy.pack import PackError, checkpoint_problems
from deploy.pack.families import families
from deploy.pack.job import HANDLER_DIR
from deploy.pack.loading import loading_problems

from . import machine, settings
from .findings import HUB_ID, MIB, Finding, Subject, error, ok, warning
from .sizes import Sizes, SizesError


def check_checkpoint(subject: Subject) -> Iterator[Finding]:
    """Check family, weights, tokenizer, picture processor and chat template."""
    folder = subject.folder
    if not subject.model.strip():
        found = f"the checkpoint must be a folder or an ID on the hub, got {subject.model!r}"
        yield error("checkpoint", found, "give --model (MODEL=)")
        return
    if folder is None:
        remedy = f"download it first to have it checked: hf download {subject.model}"
        yield warning("checkpoint", f"{subject.model} is an ID on the hub: packing downloads and checks it", remedy)
        return
    if not os.path.isdir(folder):
        yield _without_folder(folder, subject.model)
        return
    if not (folder / "config.json").exists() and (inner := _checkpoints(folder)):
        found = f"{folder} has folders of checkpoints, and is none itself"
        yield error("checkpoint", found, f"give --model (MODEL=) one of them: {', '.join(inner)}")
        return
    try:  # in the order of packing: a kind that is not served is named, and not the files that it does not have
        problems = loading_problems(HANDLER_DIR, folder, "files") or checkpoint_problems(folder)
    except PackError as failure:
        problems = [str(failure)]
    if problems:
        for problem in problems:
            yield error("checkpoint", problem, _remedy(problem, subject.model))
        return
    try:
        sizes = Sizes.read(folder)
    except SizesError as failure:
        yield error("checkpoint", str(failure), _remedy("lacks a size", subject.model))
        return
    found = f"{sizes.family}, weights of {sizes.stored_bytes / MIB:.1f} MiB in {sizes.stored_dtype}"
    yield ok("checkpoint", f"{folder} is complete: {found}, {sizes.context_tokens} tokens of context")


def _without_folder(folder: Path, model: str) -> Finding:
    """Return the finding for a folder that does not exist. A name that is also an ID on the hub may be correct."""
    if os.path.exists(folder):
        return error("checkpoint", f"{folder} is not a folder", _folder_remedy(folder))
    found = f"there is no folder {folder}"
    if HUB_ID.fullmatch(model):
        return warning("checkpoint", f"{found}: packing looks for {model} on the hub", _folder_remedy(folder))
    return error("checkpoint", found, _folder_remedy(folder))


def _folder_remedy(folder: Path) -> str:
    """Return the remedy for a folder that does not exist, with a name that is similar to it."""
    give = "give --model (MODEL=) the folder of a checkpoint"
    names = _checkpoints(folder.parent) if os.path.isdir(folder.parent) else []
    close = difflib.get_close_matches(folder.name, names, 1)
    return f"{give}, such as {folder.parent / close[0]}" if close else f"{give}, or an ID on the hub"


def _checkpoints(folder: Path) -> list[str]:
    """Return the names of the folders in a folder that have a config.json."""
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def _remedy(problem: str, model: str) -> str:
    if "git-lfs" in problem:
        return "run in its folder: git lfs pull"
    if "truncated" in problem or "missing" in problem or "lacks" in problem or problem.startswith("no "):
        return "copy or download the checkpoint again, all of its files"
    if "pack its twin" in problem:
        return "give --model (MODEL=) the twin: its ID on the hub, or its folder"
    titles = ", ".join(family.title for family in families().values())
    return f"choose a checkpoint of a served family in place of {model}: {titles}"


def check_dtype(subject: Subject) -> Iterator[Finding]:
    """Check that the device is fast in the chosen dtype."""
    chosen = settings.read(subject)
    sizes = settings.sizes(subject)
    if chosen is None or sizes is None:
        return
    on_cuda = bool(settings.cards(subject, chosen))
    dtype = settings.dtype(chosen, sizes, on_cuda)
    if not on_cuda and dtype == "bfloat16" and not machine.has_bfloat16():
        found = "bfloat16 is chosen, and this CPU has no instructions for it: many times slower"
        yield warning("dtype", found, "choose --dtype auto or float32 (DTYPE=)")
    elif not on_cuda and dtype == "float16":
        found = "float16 is chosen for a CPU: slow, and long answers may overflow"
        yield warning("dtype", found, "choose --dtype auto (DTYPE=)")
    elif sizes.stored_dtype != "float32" and chosen.dtype == "float32" and on_cuda:
        found = f"float32 is chosen for a {sizes.stored_dtype} checkpoint: twice the memory, half the speed"
        yield warning("dtype", found, "choose --dtype auto (DTYPE=)")
    else:
        yield ok("dtype", f"{dtype} ({'chosen' if chosen.dtype != 'auto' else 'auto'})")
