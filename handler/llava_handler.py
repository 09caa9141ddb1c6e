"""The one entry class that TorchServe loads: TorchServe in, TorchServe out.

The only file that imports `ts`. It builds the parts from `model-config.yaml`, turns batches into rows and replies back
into TorchServe's terms; what is said to whom is the pump's business.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import tempfile
import threading
import time
from pathlib import Path

from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler

from llava_sessions import metrics
from llava_sessions.config import ConfigError, HandlerConfig, read_config
from llava_sessions.errors import reason_phrase
from llava_sessions.ipc.messages import EngineSettings
from llava_sessions.journal.journal import open_journal
from llava_sessions.protocol.constants import SESSION_HEADER
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.torchserve import headers
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.torchserve.sequences import EndRequestSender
from llava_sessions.worker.engines import EngineSupervisor
from llava_sessions.worker.pump import Pump
from llava_sessions.worker.sessions import SessionTable

log = logging.getLogger("llava_sessions")

SWEEP_S = 1.0


class LlavaHandler(BaseHandler):
    """Picture chats over TorchServe's stateful sequence batching with continuous batching (docs: "Stateful Inference").

    On SIGUSR1 it takes nothing new, ends what runs, and then makes the file `drained-<pid>` in $TEMP.

    One open session is one TorchServe sequence. `handle()` is a pump: it is called again and again while any request is
    active, with all of them, and answers each with a chunk, a whole answer, or nothing yet.
    """

    def initialize(self, context) -> None:
        """Load the checkpoint and start the engine. Raises RuntimeError, with every problem named, when that can't be
        done.
        """
        try:
            self._start(context)
        except Exception as error:
            for line in error.problems if isinstance(error, ConfigError) else [f"{type(error).__name__}: {error}"]:
                log.error("startup_error %s", line)
            raise RuntimeError(f"the model does not start: {error}") from error

    def _start(self, context) -> None:
        began = time.monotonic()
        config = read_config(context.model_yaml_config)
        properties = self._checked_properties()
        checkpoint = _checkpoint(config, Path(context.system_properties["model_dir"]))
        journal = open_journal(config.journal_dir, config.journal_s3_prefix)
        settings = EngineSettings(
            checkpoint=checkpoint,
            system_prompt=config.system_prompt,
            dtype=config.dtype,
            device=_device(config, context.system_properties.get("gpu_id")),
            prefill_chunk_tokens=config.prefill_chunk_tokens,
            device_bytes=config.device_bytes,
            host_bytes=config.host_bytes,
        )
        inbox: queue.SimpleQueue = queue.SimpleQueue()
        # Without an engine the worker is of no use: its end is what has the server restarted.
        self._supervisor = EngineSupervisor(settings, inbox, config.engine_hang_s, give_up=lambda: os._exit(1))
        self._supervisor.launch()
        tokens = _tokens(checkpoint, config.system_prompt)
        up = self._supervisor.wait()
        facts = up.facts
        table = SessionTable(config.max_sessions, config.session_ttl_s, config.session_idle_s)
        address = properties.get("inference_address", "http://127.0.0.1:8080")
        ender = EndRequestSender(address, context.model_name)
        limits = (facts.context_tokens, config.limits, config.media)
        self._pump = Pump(up.door, inbox, tokens, table, *limits, ender, journal)
        self._pump.recover()
        self._cache = context.metrics
        self._dimensions = [context.model_name, "Model"]
        self._metrics_lock = threading.Lock()
        self._told: metrics.MetricValues | None = None
        self._drained_file = Path(os.environ.get("TEMP") or tempfile.gettempdir()) / f"drained-{os.getpid()}"
        signal.signal(signal.SIGUSR1, lambda *_: self._pump.drain())
        threading.Thread(target=self._sweep, name="sweeper", daemon=True).start()
        self.initialized = True
        where = f"device={facts.device} dtype={facts.dtype} context={facts.context_tokens}"
        budget = f"device_bytes={facts.device_bytes} host_bytes={facts.host_bytes}"
        log.info("ready %s sessions=%d %s seconds=%.1f", where, config.max_sessions, budget, time.monotonic() - began)

    def _checked_properties(self) -> dict[str, str]:
        """The frontend's properties, once they are known to name the session headers as this worker does."""
        properties = headers.frontend_properties()
        if properties is None:
            log.warning("headers_unchecked reason=the frontend's command line is not visible")
            return {}
        problems = headers.header_problems(properties, os.environ)
        if problems:
            raise ConfigError(problems)
        return properties

    def handle(self, data: list[dict], context) -> list[str]:
        """One step of the pump over all active requests. Never raises: an exception would fail every one of them."""
        rows = [_row(context, index, data[index]) for index in range(len(data))]
        replies = self._pump.exchange(rows)
        context.stopping_criteria = [_stopping(reply) for reply in replies]
        bodies = []
        for index, reply in enumerate(replies):
            bodies.append("" if reply is None else reply.body)
            if reply is None:
                # `create_predict_response` answers the requests in this map; one left out stays open, and comes again.
                del context.request_ids[index]
            else:
                _set_head(context, index, reply)
        if not self._pump.busy:
            self._tell_figures()
        return bodies

    def _sweep(self) -> None:
        drained = False
        while True:
            time.sleep(SWEEP_S)
            try:
                self._pump.sweep()
                self._tell_figures()
                if drained and self._pump.drained and not self._drained_file.exists():
                    # A round later, so that the last replies are on their way. The launcher waits for this file.
                    log.info("drained")
                    self._drained_file.touch()
                drained = self._pump.drained
            except Exception:
                log.exception("sweep_failed")

    def _tell_figures(self) -> None:
        """Emit the metrics when a figure changed; each travels to the frontend as a line of this process's output."""
        with self._metrics_lock:
            figures, told = self._pump.figures(), self._told
            if figures == told:
                return
            for name, unit in metrics.GAUGES.items():
                self._metric(name, unit, MetricTypes.GAUGE).add_or_update(figures.value(name), self._dimensions)
            for name, unit in metrics.COUNTERS.items():
                increase = figures.value(name) - (told.value(name) if told else 0)
                if increase:
                    self._metric(name, unit, MetricTypes.COUNTER).add_or_update(increase, self._dimensions)
            self._told = figures

    def _metric(self, name: str, unit: str, kind: MetricTypes):
        """The metric as deploy/metrics.yaml declares it, or a new one where the operator's own file does not."""
        try:
            return self._cache.get_metric(name, kind)
        except MetricsCacheKeyError:
            return self._cache.add_metric_to_cache(name, unit, ["ModelName", "Level"], kind)


def _checkpoint(config: HandlerConfig, model_dir: Path) -> str:
    """The checkpoint's folder in the archive, else the path or hub id as it stands."""
    packed = model_dir / config.checkpoint
    return str(packed) if packed.is_dir() else config.checkpoint


def _tokens(checkpoint: str, system_prompt: str) -> ChatTemplate:
    import transformers  # here, because it takes seconds, in which the engine loads too

    from llava_sessions.text.processors import load_processor

    transformers.logging.set_verbosity_error()
    return ChatTemplate(load_processor(checkpoint), system_prompt)


def _device(config: HandlerConfig, gpu_id: int | None) -> str:
    return f"cuda:{gpu_id}" if config.device == "auto" and gpu_id is not None else config.device


def _row(context, index: int, data: dict) -> Row:
    """One request as the pump sees it.

    The frontend writes the id that it makes into the session header itself, in the spelling of its property, and marks
    the request with the start header; what the client sent under another spelling stands beside it.
    """
    all_headers = context.get_all_request_header(index)
    sequence_id = context.get_sequence_id(index) or ""
    fresh = all_headers.get(context.header_key_sequence_start) == "true"
    headers = {
        name.lower(): value
        for name, value in all_headers.items()
        if isinstance(value, str) and not (fresh and name == SESSION_HEADER)
    }
    body = data.get("body", data.get("data")) if isinstance(data, dict) else data
    return Row(context.get_request_id(index), sequence_id, fresh, headers, b"" if body is None else body)


def _stopping(reply: Reply | None):
    """TorchServe asks per response: None ends a whole answer, False keeps the stream open, True ends it."""
    stop = None if reply is None or reply.more is None else not reply.more
    return lambda _: stop


def _set_head(context, index: int, reply: Reply) -> None:
    context.set_response_content_type(index, reply.content_type)
    context.set_response_status(reply.status, reason_phrase(reply.status), index)
    for name, value in reply.headers.items():
        context.set_response_header(index, name, value)
