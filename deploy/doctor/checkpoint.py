"""Check that the checkpoint is complete, and that the handler can serve its kind."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.pack import PackError, checkpoint_problems
from deploy.pack.job import HANDLER_DIR
from deploy.pack.loading import loading_problems

from . import machine, settings
from .findings import MIB, Finding, Subject, error, ok, warning


def check_checkpoint(subject: Subject) -> Iterator[Finding]:
    """Check family, weights, tokenizer, picture processor and chat template."""
    folder = subject.folder
    if folder is None:
        remedy = f"download it first to have it checked: hf download {subject.model}"
        yield warning("checkpoint", f"{subject.model} is an ID on the hub: packing downloads and checks it", remedy)
        return
    if not folder.is_dir():
        yield error("checkpoint", f"{folder} is not a folder", "give --model (MODEL=) the folder of a checkpoint")
        return
    problems = checkpoint_problems(folder)
    if not problems:
        try:
            problems = loading_problems(HANDLER_DIR, folder, "files")
        except PackError as failure:
            problems = [str(failure)]
    if problems:
        for problem in problems:
            yield error("checkpoint", problem, _remedy(problem, subject.model))
        return
    sizes = settings.sizes(subject)
    assert sizes is not None
    found = f"{sizes.family}, weights of {sizes.stored_bytes / MIB:.1f} MiB in {sizes.stored_dtype}"
    yield ok("checkpoint", f"{folder} is complete: {found}, {sizes.context_tokens} tokens of context")


def _remedy(problem: str, model: str) -> str:
    if "git-lfs" in problem:
        return "run in its folder: git lfs pull"
    if "truncated" in problem or "missing" in problem or "lacks" in problem or problem.startswith("no "):
        return "copy or download the checkpoint again, all of its files"
    return f"choose a LLaVA, LLaVA-NeXT or LLaVA-OneVision checkpoint in place of {model}"


def check_dtype(subject: Subject) -> Iterator[Finding]:
    """Check that the device is fast in the chosen dtype."""
    chosen = settings.read(subject)
    sizes = settings.sizes(subject)
    if chosen is None or sizes is None:
        return
    on_cuda = settings.card(subject, chosen) is not None
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
