"""Owns what is agreed with TorchServe's frontend: the two headers that carry a session, and the end of a sequence.

The frontend takes their names from its properties, the worker from its environment, and neither tells when they differ:
requests of one session then reach different workers, or the handler sees no session at all. Must not know TorchServe's
Python API.
"""

from __future__ import annotations

import http.client
import json
import logging
import queue
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from .protocol import CLOSED_SESSION_HEADER, JSON_TYPE, SESSION_HEADER

log = logging.getLogger(__name__)

END_HEADER = "x-llava-end-sequence"
# One request waits for a step of the handler; several share it.
_THREADS = 4
# A machine that is busy enough answers none in time, and what is not ended keeps its place.
_TRIES = 3

# property of the frontend, environment variable that overrides it, environment variable of the worker, what it must be
_KEYS = (
    ("ts_header_key_sequence_id", "TS_HEADER_KEY_SEQUENCE_ID", "TS_REQUEST_SEQUENCE_ID", SESSION_HEADER),
    ("ts_header_key_sequence_end", "TS_HEADER_KEY_SEQUENCE_END", "TS_REQUEST_SEQUENCE_END", CLOSED_SESSION_HEADER),
)


def read_properties(text: str) -> dict[str, str]:
    """The pairs of a Java properties file, as far as TorchServe's own launcher reads them (ts/model_server.py)."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def frontend_properties() -> dict[str, str] | None:
    """The properties that the frontend was started with: the `-f` file of the Java process above this worker.

    None when no such process is seen, {} when it was started without a file.
    """
    for process in psutil.Process().parents():
        try:
            command = process.cmdline()
            if "org.pytorch.serve.ModelServer" not in command:
                continue
            if "-f" not in command[:-1]:
                return {}
            path = Path(command[command.index("-f") + 1])
            return read_properties((Path(process.cwd()) / path).read_text())
        except (psutil.Error, OSError):
            continue
    return None


def header_problems(properties: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """How the frontend's and the worker's session headers differ from what they must be; empty when all is well."""
    problems = []
    from_environment = properties.get("enable_envvars_config", "false").lower() == "true"
    for key, override, worker_variable, wanted in _KEYS:
        frontend = properties.get(key)
        if from_environment and environment.get(override):
            key, frontend = f"environment variable {override}", environment[override]
        if frontend != wanted:
            has = f"the frontend has {key}={frontend or '(unset)'}"
            problems.append(f"{has}; it must be {wanted} (config.properties)")
        worker = environment.get(worker_variable)
        if worker != wanted:
            problems.append(
                f"the worker has {worker_variable}={worker or '(unset)'}; it must be {wanted} (deploy/serve/local.env)"
            )
    return problems


class SequenceEnder:
    """Ends sequences of the frontend by requests to it, from a few threads of its own.

    Without it the frontend forgets them too, but only after `sequenceTimeoutMSec`. `mark` is the header that tells the
    pump that such a request is ours; `able`, whether such requests are answered, as far as is known: with TLS or token
    authorisation they are not. `pending` are the sequences that have still to be ended.
    """

    def __init__(self, inference_address: str, model: str) -> None:
        """`inference_address` as in the frontend's properties, such as `http://0.0.0.0:8080`."""
        address = urlsplit(inference_address)
        # The worker runs on the frontend's host; an address that means "all" is reached by loopback.
        self._host = "127.0.0.1" if address.hostname in (None, "0.0.0.0", "::") else address.hostname
        self._port = address.port or 80
        self._plain = self.able = address.scheme == "http"
        self._path = f"/predictions/{model}"
        self.mark = (END_HEADER, secrets.token_hex(16))
        self._queue: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self.pending = 0
        self._lock = threading.Lock()
        for _ in range(_THREADS):
            threading.Thread(target=self._run, name="sequences", daemon=True).start()

    def end(self, sequence_id: str) -> None:
        """Have the sequence ended soon."""
        with self._lock:
            self.pending += 1
        self._queue.put((sequence_id, _TRIES))

    def _run(self) -> None:
        while True:
            sequence_id, tries = self._queue.get()
            try:
                status = self._post(sequence_id) if self._plain else 0
                problem = None if status == http.client.OK else f"status {status}"
            except (OSError, http.client.HTTPException) as error:
                problem = type(error).__name__
            if problem and tries > 1:
                self._queue.put((sequence_id, tries - 1))
                continue
            with self._lock:
                self.pending -= 1
            self.able = not problem
            if problem:
                log.warning("sequence_not_ended reason=%s", problem)

    def _post(self, sequence_id: str) -> int:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=10)
        headers = {SESSION_HEADER: sequence_id.encode(), "Content-Type": JSON_TYPE, **dict([self.mark])}
        try:
            connection.request("POST", self._path, json.dumps({"type": "close_session"}), headers)
            return connection.getresponse().status
        finally:
            connection.close()
