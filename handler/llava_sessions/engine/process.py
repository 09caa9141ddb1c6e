"""The engine process: load the checkpoint, answer one question, then serve commands from a pipe.

Started by the worker's supervisor as `python -m llava_sessions.engine.process FD`, where FD is this process's end of
the pipe. The process exits when the pipe closes, and with status 1 after an error that leaves the engine's state
unreliable.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
from PIL import Image

from ..errors import error_line
from ..ipc.messages import (
    AskSession,
    CloseSession,
    EngineFacts,
    EngineSettings,
    Event,
    Finished,
    OpenSession,
    OutOfCapacity,
    Sampling,
    StartFailed,
)
from ..ipc.pipe import receive, send
from ..machine_memory import memory_bytes
from ..text.chat_template import ChatTemplate
from ..text.checkpoint import end_token_ids
from ..text.processors import load_processor
from ..text.tiles import largest_picture
from .budget import DeviceBudget, InsufficientMemory, choose_budget, graphs_limit
from .checkpoint import check_clips
from .chunks import measure_pieces
from .device import check_exists, share_cores
from .engine import Engine
from .loop import EngineLoop
from .model import Model
from .scheduler import DEFAULT_CHUNK_TOKENS
from .weight_files import remedy

log = logging.getLogger("llava_sessions")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve one engine until the pipe closes."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    pipe = Connection(int(sys.argv[1]))
    die_with_parent()
    # Ctrl-C in a terminal signals the whole process group; the worker decides when the engine exits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = receive(pipe)
    try:
        engine = load(settings)
    except Exception as error:
        log.debug("engine_start_failed", exc_info=error)
        send(pipe, StartFailed(error_line(error)))
        sys.exit(1)
    send(pipe, facts(engine))
    loop = EngineLoop(engine, lambda report: send(pipe, report))
    threading.Thread(target=_read_commands, args=(pipe, loop), name="pipe", daemon=True).start()
    try:
        loop.run()
    except Exception:
        log.exception("engine_broken")
        os._exit(1)  # without cleanup, because threads of a broken device may never end


def die_with_parent() -> None:
    """Make Linux kill this process when the thread that started it ends, even if this process is stopped.

    On other systems the process exits when the pipe closes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def load(settings: EngineSettings) -> Engine:
    """Return an engine that has answered one question. Raises the error that prevents it."""
    check_exists(settings.device)
    share_cores(settings.engines)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    template = ChatTemplate(load_processor(settings.checkpoint), settings.system_prompt)
    end_ids = end_token_ids(Path(settings.checkpoint), template.tokenizer.eos_token_id)
    model = Model.load(
        settings.checkpoint, settings.dtype, settings.device, end_ids, settings.weights, settings.kv_dtype
    )
    # Packing does not load a hub ID. The first chat below shows a picture only.
    check_clips(template, model.encode)
    return start(model, template, settings)


def start(model: Model, template: ChatTemplate, settings: EngineSettings) -> Engine:
    """Return an engine on a loaded model that has answered one question. Of `settings` only the sizes are used."""
    chunk_tokens = settings.prefill_chunk_tokens
    engine = Engine(model, template.answer_text, choose_budget(model.device), chunk_tokens or DEFAULT_CHUNK_TOKENS)
    found = warm_up(engine, template)
    if model.device.type == "cuda":
        found = measure(engine, found, chunk_tokens)
    if model.graphs is not None:
        limit_bytes = graphs_limit(model.device, model.allocated_bytes())
        found = replace(found, graphs_bytes=model.graphs.prepare(limit_bytes, found.chat_tokens))
    engine.device_memory.budget = final_budget(
        model.device, settings.device_bytes, settings.host_bytes, found, settings.engines
    )
    engine.device_memory.bound_pool()
    return engine


@dataclass(frozen=True)
class WarmUp:
    """Device bytes of a first chat: `working_bytes` of temporary tensors, `session_bytes` of features and KV cache.

    On a CPU `working_bytes` is 0. `graphs_bytes`: that CUDA graphs may still take. `chat_tokens`: of the conversation.
    `int8_frees_bytes`: what `weights: int8` would free, 0 if it is set.
    """

    working_bytes: int
    session_bytes: int
    graphs_bytes: int = 0
    chat_tokens: int = 0
    int8_frees_bytes: int = 0


def warm_up(engine: Engine, template: ChatTemplate) -> WarmUp:
    """Run one short chat, so that the first user waits for no initialization and a broken checkpoint is found at start.

    Raises `InsufficientMemory` if the device can't hold the chat, and RuntimeError if the chat gets no answer.
    """
    model = engine.model
    held_bytes = model.allocated_bytes()
    # On CUDA the peak of the largest picture sizes the budget. On a CPU it is not measured, and a small one is faster.
    size = largest_picture(template.processor) if model.device.type == "cuda" else (64, 64)
    opening = template.opening([("warm-up", Image.new("RGB", size))])
    prompt_ids = template.prompt(opening.opened_on, "What is this?")
    engine.apply(OpenSession("warm-up", opening.token_ids, opening.pictures))
    engine.apply(AskSession("warm-up", "warm-up", prompt_ids, Sampling(max_new_tokens=4)))
    events: list[Event] = []
    working_bytes = 0
    model.peak_bytes()
    while engine.has_work:
        features_bytes = engine.memory().features_bytes
        events += engine.step()
        # A step allocates the cache before the forward, and features after it.
        memory = engine.memory()
        working_bytes = max(working_bytes, model.peak_bytes() - held_bytes - memory.kv_bytes - features_bytes)
    engine.apply(CloseSession("warm-up"))
    engine.step()
    for event in events:
        if isinstance(event, OutOfCapacity):
            missing = _too_small(model.device, event.free_bytes, event.needed_bytes, model.int8_frees_bytes)
            raise InsufficientMemory(missing)
    if not any(isinstance(event, Finished) for event in events):
        raise RuntimeError(f"the checkpoint does not answer a first question: {events}")
    return WarmUp(
        working_bytes,
        session_bytes=memory.kv_bytes + memory.features_bytes,
        chat_tokens=len(opening.token_ids) + len(prompt_ids),
        int8_frees_bytes=model.int8_frees_bytes,
    )


def measure(
    engine: Engine, found: WarmUp, chunk_tokens: int | None, clock: Callable[[], float] = time.perf_counter
) -> WarmUp:
    """Set the pieces of prompts on a GPU, see `measure_pieces`; return `found` with room for the longest one."""
    engine.piece_size, working_bytes = measure_pieces(engine.model, chunk_tokens, clock)
    return replace(found, working_bytes=max(found.working_bytes, working_bytes))


def final_budget(
    device: torch.device, device_bytes: int | None, host_bytes: int | None, found: WarmUp, engines: int = 1
) -> DeviceBudget:
    """Return the budget after the warm-up. Raises `InsufficientMemory` if a derived one holds no session."""
    budget = choose_budget(device, device_bytes, host_bytes, found.working_bytes, found.graphs_bytes, engines)
    if device_bytes is None and budget.device_bytes < found.session_bytes:
        missing = _too_small(device, budget.device_bytes, found.session_bytes, found.int8_frees_bytes)
        raise InsufficientMemory(missing)
    return budget


def _too_small(device: torch.device, free_bytes: int, needed_bytes: int, int8_frees_bytes: int) -> str:
    on_cuda = device.type == "cuda"
    total_bytes = torch.cuda.mem_get_info(device)[1] if on_cuda else memory_bytes()
    return (
        f"the device has {free_bytes} bytes for sessions after the weights and a reserve, but a session with the "
        f"largest picture needs {needed_bytes}: {remedy(needed_bytes - free_bytes, int8_frees_bytes, total_bytes)}"
    )


def facts(engine: Engine) -> EngineFacts:
    """Return the properties of a loaded engine that the worker needs."""
    model = engine.model
    budget = engine.device_memory.budget
    dtype = str(model.dtype).removeprefix("torch.")
    return EngineFacts(
        device=str(model.device),
        dtype=dtype,
        context_tokens=model.context_tokens,
        device_bytes=budget.device_bytes,
        host_bytes=budget.host_bytes,
        token_bytes=model.kv_shape.token_bytes,
    )


def _read_commands(pipe: Connection, loop: EngineLoop) -> None:
    """Submit commands from the pipe to the loop; exit when the pipe closes. Runs in a thread of its own."""
    while True:
        try:
            loop.submit(receive(pipe))
        except (EOFError, OSError):
            os._exit(0)  # the worker has exited


if __name__ == "__main__":
    main()
