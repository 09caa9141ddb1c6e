"""The class that TorchServe loads: batches become rows, and replies become TorchServe's responses.

The only file that imports `ts`. TorchServe accepts one class in it. All other code is in `llava_sessions`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler

from llava_sessions.config import HandlerConfig
from llava_sessions.config_file import ConfigError, read_config
from llava_sessions.errors import error_line, reason_phrase
from llava_sessions.ipc.messages import EngineSettings
from llava_sessions.journal.journal import open_journal
from llava_sessions.machine_memory import memory_bytes
from llava_sessions.metrics import COUNTERS, GAUGES, PORT_VARIABLE, MetricValues
from llava_sessions.protocol.constants import SESSION_HEADER
from llava_sessions.text.chat_template import ChatTemplate, Message
from llava_sessions.text.checkpoint import find_checkpoint, fingerprint
from llava_sessions.torchserve import headers, receiving
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.torchserve.sequences import EndRequestSender
from llava_sessions.worker.assembly import Policy, make_pump
from llava_sessions.worker.context import ServedModel
from llava_sessions.worker.devices import engine_devices
from llava_sessions.worker.engine_set import EngineSet
from llava_sessions.worker.exporter import Exporter, Histograms
from llava_sessions.worker.inbox import Inbox
from llava_sessions.worker.sessions import SessionTable
from llava_sessions.worker.supervisors import EngineSupervisors

log = logging.getLogger("llava_sessions")

SWEEP_S = 1.0
DEFAULT_ADDRESS = "http://127.0.0.1:8080"


class LlavaHandler(BaseHandler):
    """Picture chats over TorchServe's stateful sequence batching with continuous batching.

    One session is one TorchServe sequence. TorchServe calls `handle` again and again while any request is active, with
    all active requests. After SIGUSR1 the worker takes no new work, finishes what runs, and creates the file
    `drained-<pid>` in $TEMP.
    """

    def initialize(self, context: Any) -> None:
        """Load the checkpoint and start the engine. Raise RuntimeError, with every problem named, if that fails."""
        try:
            self._start(context)
        except Exception as error:
            for line in error.problems if isinstance(error, ConfigError) else [error_line(error)]:
                log.error("startup_error %s", line)
            raise RuntimeError(f"the model does not start: {error}") from error

    def _start(self, context: Any) -> None:
        began_s = time.monotonic()
        os.environ[receiving.DECODE_VARIABLE] = receiving.RAW_BODIES
        config = read_config(context.model_yaml_config)
        properties = _checked_properties()
        metrics_port = _metrics_port()
        model_dir = Path(context.system_properties["model_dir"])
        self._version_lock = _hold_version(model_dir)
        checkpoint = _checkpoint(config, model_dir)
        held_bytes = memory_bytes() // 10 if config.media.held_bytes is None else config.media.held_bytes
        journal = open_journal(config.journal_dir, config.journal_s3_prefix, held_bytes)
        inbox = Inbox()
        devices = engine_devices(config, context.system_properties.get("gpu_id"), _workers(context))
        self._supervisors = _engine_supervisors(_engine_settings(config, checkpoint, devices), inbox, config)
        self._supervisors.launch()
        template = _load_template(checkpoint, config.system_prompt)  # while the engines load
        engines = self._supervisors.wait()
        facts = engines[0].facts
        histograms = Histograms()
        self._pump = make_pump(
            engines=EngineSet(engines, self._supervisors.labels),
            inbox=inbox,
            template=template,
            table=_session_table(config),
            context_tokens=facts.context_tokens,
            limits=config.limits,
            media_limits=config.media,
            ender=EndRequestSender(properties.get("inference_address", DEFAULT_ADDRESS), context.model_name),
            journal=journal,
            histograms=histograms,
            policy=_policy(config, context, checkpoint),
        )
        self._pump.recover()
        self._start_metrics(context, Exporter(histograms, metrics_port, context.model_name, config.compat_metrics))
        self._drained_file = _announcement("drained")
        signal.signal(signal.SIGUSR1, lambda *_: self._pump.drain())
        threading.Thread(target=self._sweep, name="sweeper", daemon=True).start()
        self.initialized = True
        log.info(
            "ready device=%s dtype=%s context=%d sessions=%d device_bytes=%d host_bytes=%d held_bytes=%d seconds=%.1f",
            ",".join(self._supervisors.labels),
            facts.dtype,
            facts.context_tokens,
            config.max_sessions,
            facts.device_bytes,
            facts.host_bytes,
            held_bytes,
            time.monotonic() - began_s,
        )

    def _start_metrics(self, context: Any, exporter: Exporter) -> None:
        self._metric_cache = context.metrics
        self._dimensions = [context.model_name, "Model"]
        self._metrics_lock = threading.Lock()
        self._emitted: MetricValues | None = None
        self._exporter = exporter
        self._exporter.publish(self._pump.metric_values())
        self._exporter.serve()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Run one step over all active requests. Never raises: an exception would fail every one of them."""
        rows = [_row(context, index, data[index]) for index in range(len(data))]
        replies = self._pump.exchange(rows)
        context.stopping_criteria = [_stopping(reply) for reply in replies]
        bodies = []
        for index, reply in enumerate(replies):
            bodies.append("" if reply is None else reply.body)
            if reply is None:
                # `create_predict_response` replies to the requests in this map; the others are sent again.
                del context.request_ids[index]
            else:
                _set_head(context, index, reply)
        # In every step: published only by the sweep and when idle, the gauges of short turns would always read 0.
        self._publish_metrics(emits=not self._pump.busy)
        return bodies

    def _sweep(self) -> None:
        was_drained = False
        transfer = receiving.BatchTransfer(threading.main_thread(), psutil.Process().parent())
        while True:
            time.sleep(SWEEP_S)
            try:
                self._pump.sweep(is_receiving=transfer.is_active())
                self._publish_metrics(emits=True)
                self._exporter.serve()
                # One round later, so that the last replies have left. The launcher waits for this file.
                if was_drained and self._pump.drained and not self._drained_file.exists():
                    log.info("drained")
                    self._drained_file.touch()
                was_drained = self._pump.drained
            except Exception:
                log.exception("sweep_failed")

    def _publish_metrics(self, *, emits: bool) -> None:
        """Publish all values on the worker's page; with `emits`, emit TorchServe's if any has changed. Thread-safe.

        Emitted are the gauges, and the increase of each counter. Each metric travels to the frontend as a line of this
        process's output.
        """
        with self._metrics_lock:
            values = self._pump.metric_values()
            self._exporter.publish(values)
            before = self._emitted
            if not emits or values == before:
                return
            for name, unit in GAUGES.items():
                self._metric(name, unit, MetricTypes.GAUGE).add_or_update(values.value(name), self._dimensions)
            for name, unit in COUNTERS.items():
                increase = values.value(name) - (before.value(name) if before else 0)
                if increase:
                    self._metric(name, unit, MetricTypes.COUNTER).add_or_update(increase, self._dimensions)
            self._emitted = values

    def _metric(self, name: str, unit: str, kind: MetricTypes) -> Any:
        """Return the metric of metrics.yaml, or a new one if the operator's own file does not declare it."""
        try:
            return self._metric_cache.get_metric(name, kind)
        except MetricsCacheKeyError:
            return self._metric_cache.add_metric_to_cache(name, unit, ["ModelName", "Level"], kind)


def _checked_properties() -> dict[str, str]:
    """Return the frontend's properties. Raise `ConfigError` if it uses other session headers than this worker."""
    properties = headers.frontend_properties()
    if properties is None:
        log.warning("headers_unchecked reason=the frontend's command line is not visible")
        return {}
    problems = headers.header_problems(properties, os.environ)
    if problems:
        raise ConfigError(problems)
    return properties


def _announcement(name: str) -> Path:
    """Return the path of a file by which this worker announces its state to the launcher."""
    return Path(os.environ.get("TEMP") or tempfile.gettempdir()) / f"{name}-{os.getpid()}"


def _metrics_port() -> int | None:
    """Return the loopback port of the worker's metrics page, or None for no page. Raise `ConfigError`."""
    text = os.environ.get(PORT_VARIABLE)
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 65_535:
        raise ConfigError([f"`{PORT_VARIABLE}` must be a port from 1 to 65535, got {text!r}"])
    return int(text)


def _workers(context: Any) -> int:
    """Return the workers that TorchServe may start for this model."""
    workers = context.model_yaml_config.get("maxWorkers", 1)
    return workers if isinstance(workers, int) else 1


def _engine_supervisors(settings: list[EngineSettings], inbox: Inbox, config: HandlerConfig) -> EngineSupervisors:
    # Without an engine the worker cannot serve. TorchServe restarts a worker that ends.
    give_up = functools.partial(os._exit, 1)
    return EngineSupervisors(settings, inbox, config.engine_hang_s, give_up, _announcement("engine-absent"))


def _session_table(config: HandlerConfig) -> SessionTable:
    ttl_s = config.session_ttl_s
    return SessionTable(config.max_sessions, ttl_s, config.session_idle_s, max_implicit=config.max_implicit_sessions)


def _policy(config: HandlerConfig, context: Any, checkpoint: str) -> Policy:
    return Policy(
        share_pictures=config.share_pictures,
        allow_system=config.allow_system,
        served=ServedModel(context.model_name, fingerprint(Path(checkpoint)), time.time()),
        places=context.model_yaml_config.get("maxNumSequence"),
        adopt_sessions=config.adopt_sessions,
    )


def _engine_settings(config: HandlerConfig, checkpoint: str, devices: tuple[str, ...]) -> list[EngineSettings]:
    return [
        EngineSettings(
            checkpoint=checkpoint,
            system_prompt=config.system_prompt,
            dtype=config.dtype,
            device=device,
            prefill_chunk_tokens=config.prefill_chunk_tokens,
            device_bytes=config.device_bytes,
            host_bytes=config.host_bytes,
            weights=config.weights,
            kv_dtype=config.kv_dtype,
            engines=len(devices),
        )
        for device in devices
    ]


def _checkpoint(config: HandlerConfig, model_dir: Path) -> str:
    """Return the checkpoint's folder: in the archive, or the configured path, or of the configured hub ID.

    Symbolic links are resolved once. An engine that is started again later then loads the same checkpoint, even if
    another model has been packed meanwhile.
    """
    packed = model_dir / config.checkpoint
    return str(packed.resolve() if packed.is_dir() else find_checkpoint(config.checkpoint))


def _hold_version(model_dir: Path) -> IO[bytes] | None:
    """Keep packing from removing this version of the archive while the worker runs, see deploy/versions.py."""
    with contextlib.suppress(OSError):
        lock = (model_dir.resolve().parent / "lock").open("rb")
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return lock
    return None


def _load_template(checkpoint: str, system_prompt: str) -> ChatTemplate:
    import transformers  # here, because the import takes seconds, during which the engine loads

    from llava_sessions.text.processors import load_processor

    transformers.logging.set_verbosity_error()
    template = ChatTemplate(load_processor(checkpoint), system_prompt)
    template.conversation([Message("user", "question")], [])  # the first one takes longer
    return template


def _row(context: Any, index: int, data: Any) -> Row:
    """Return one request as a row.

    The frontend writes the ID of a new sequence into the session header, in the spelling of its property, and adds the
    start header. A session header of the client in another spelling is a header of its own and is kept.
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


def _stopping(reply: Reply | None) -> Callable[[Any], bool | None]:
    """Return TorchServe's stopping criterion: None for a whole reply, False for a chunk, True for the last chunk."""
    stop = None if reply is None or reply.more is None else not reply.more
    return lambda _: stop


def _set_head(context: Any, index: int, reply: Reply) -> None:
    context.set_response_content_type(index, reply.content_type)
    context.set_response_status(reply.status, reason_phrase(reply.status), index)
    for name, value in reply.headers.items():
        context.set_response_header(index, name, value)
