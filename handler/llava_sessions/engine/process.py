"""Owns the inside of the engine process: loads the checkpoint, answers a first question, and runs the loop on a pipe.

Started by `supervisor` as `python -m llava_sessions.engine.process FD`: FD is its end of the pipe. It ends when that
pipe does, since nobody could hear it any more, and it ends with an error where the engine's state can't be trusted.
Must not know sessions, payloads or TorchServe.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

import transformers

from ..ipc.messages import EngineFacts, EngineSettings, StartFailed
from ..ipc.pipe import receive, send
from ..text.chat_template import ChatTemplate
from ..text.processors import load_processor
from .engine import Engine
from .kv import choose_budget
from .loop import EngineLoop
from .model import Model

log = logging.getLogger("llava_sessions")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve one engine until the pipe ends."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    pipe = Connection(int(sys.argv[1]))
    die_with_parent()
    # Ctrl-C at a terminal reaches the whole group; the worker decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = receive(pipe)
    try:
        engine = load(settings)
    except Exception as error:
        log.debug("engine_start_failed", exc_info=error)
        send(pipe, StartFailed(f"{type(error).__name__}: {error}"))
        sys.exit(1)
    send(pipe, facts(engine))
    loop = EngineLoop(engine, lambda report: send(pipe, report))
    threading.Thread(target=_listen, args=(pipe, loop), name="pipe", daemon=True).start()
    try:
        loop.run()
    except Exception:
        log.exception("engine_broken")
        os._exit(1)  # at once: threads of a broken device may never end


def die_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends, even where this process is stopped.

    Elsewhere the end of the pipe has to do.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def load(settings: EngineSettings) -> Engine:
    """An engine that has answered a first question. Raises what keeps the checkpoint from that."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokens = ChatTemplate(load_processor(settings.checkpoint), settings.system_prompt)
    model = Model.load(settings.checkpoint, settings.dtype, settings.device)
    engine = Engine(model, tokens.answer_text, choose_budget(model.device), settings.prefill_chunk_tokens)
    sizes = (settings.device_bytes, settings.host_bytes)
    engine.budget = choose_budget(model.device, *sizes, working_bytes=engine.warm_up(tokens))
    return engine


def facts(engine: Engine) -> EngineFacts:
    """What the engine turned out to be."""
    model, budget = engine.model, engine.budget
    dtype = str(model.dtype).removeprefix("torch.")
    return EngineFacts(str(model.device), dtype, model.context_tokens, budget.device_bytes, budget.host_bytes)


def _listen(pipe: Connection, loop: EngineLoop) -> None:
    while True:
        try:
            loop.submit(receive(pipe))
        except (EOFError, OSError):
            os._exit(0)  # the worker is gone, and with it everybody who could be answered


if __name__ == "__main__":
    main()
