"""A model without weights and torch, with which a server starts in two seconds, for tests of the launcher."""

from __future__ import annotations

import json
from pathlib import Path

NAME = "stand-in"
HANDLER = '''
import json, logging, os, pathlib, signal, threading, time


class Handler:
    """Answers with the session's id and the request's headers; {"steps": n} answers in n chunks, one a step,
    and {"gate": true} with it makes the last one wait for a {"release": true}; {"hang": true} never answers; {"open":
    "id"} names a session in one header only, as TorchServe's own examples do; a body that is no object makes it raise.

    On SIGUSR1 it refuses what is new, finishes what runs, and says so as the product's handler does.
    """

    def initialize(self, ctx):
        how = os.environ.get("STAND_IN", "")
        if how == "refuse" or os.path.exists(how):
            logging.error("startup_error problem=%s", "llava.dtype is 'bananas'")
            raise RuntimeError("refused")
        if how == "crash":
            raise ZeroDivisionError("a bug at start")
        self.left = {}
        self.gated = set()
        self.draining = False
        signal.signal(signal.SIGUSR1, self.drain)
        logging.info("stand_in_ready pid=%d", os.getpid())

    def drain(self, *_):
        self.draining = True
        threading.Thread(target=self.say_drained, daemon=True).start()

    def say_drained(self):
        while any(list(self.left.values())):
            time.sleep(0.01)
        pathlib.Path(os.environ["TEMP"], f"drained-{os.getpid()}").touch()

    def handle(self, rows, ctx):
        answers, stops = [], []
        for number, row in enumerate(rows):
            request = ctx.request_ids[number]
            if request not in self.left:
                body = {} if row["body"] == b"" else row["body"]  # a GET has none
                self.left[request] = body.get("steps", 0)
                if self.draining:
                    ctx.set_response_status(503, "Service Unavailable", number)
                    self.left[request] = -2
                elif body.get("hang"):
                    logging.info("hanging")
                    self.left[request] = -1
                if body.get("gate"):
                    self.gated.add(request)
                if body.get("release"):
                    self.gated.clear()
                if "open" in body:
                    value = body["open"] + "; Expires=2030-01-01T00:00:00Z"
                    ctx.set_response_header(number, "X-Amzn-SageMaker-Session-Id", value)
            if self.left[request] == -1:
                del ctx.request_ids[number]
                answers.append("")
                stops.append(None)
                continue
            if self.left[request] == -2:
                self.left[request] = 0
                answers.append(json.dumps({"error": {"code": "engine_restarting", "message": "I stop soon."}}))
                stops.append(None)
                continue
            if self.left[request] == 0:
                headers = ctx.get_all_request_header(number)
                told = {"session": ctx.get_sequence_id(number), "headers": headers, "pid": os.getpid()}
                answers.append(json.dumps(told))
                stops.append(None)
                continue
            if self.left[request] == 1 and request in self.gated:
                answers.append("")
                stops.append(False)
                continue
            self.left[request] -= 1
            answers.append("chunk\\n")
            stops.append(self.left[request] == 0)
        ctx.stopping_criteria = [lambda _, stop=stop: stop for stop in stops]
        time.sleep(0.002)
        return answers
'''
CONFIG = """
minWorkers: 1
maxWorkers: 1
batchSize: 128
maxBatchDelay: 2
maxNumSequence: 128
maxSequenceJobQueueSize: 4
sequenceMaxIdleMSec: 600000
sequenceTimeoutMSec: 600000
maxRetryTimeoutInSec: 1
sequenceBatching: true
continuousBatching: true
"""


def make_store(root: Path) -> Path:
    """Make a model store with the stand-in in the archiver's no-archive format."""
    model = root / NAME
    (model / "MAR-INF").mkdir(parents=True)
    (model / "stand_in.py").write_text(HANDLER)
    (model / "model-config.yaml").write_text(CONFIG)
    details = {"modelName": NAME, "handler": "stand_in.py", "modelVersion": "1.0", "configFile": "model-config.yaml"}
    manifest = {"createdOn": "now", "runtime": "python", "model": details, "archiverVersion": "0.12.0"}
    (model / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    return root
