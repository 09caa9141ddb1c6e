"""The running server agrees with docs/openapi.yaml: schemathesis sends examples, well-formed and malformed requests.

tests/support/schemathesis.toml has the checks. Every status is in the document, and no error of the server but 503 with
Retry-After occurs. The headers, content types and bodies of the replies fit the document.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx

from deploy.serve.haproxy import HAProxy
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.wire import ChatSession

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "openapi.yaml"
CONFIG = ROOT / "tests" / "support" / "schemathesis.toml"
HOOKS = "tests.support.schemathesis_hooks"
TIMEOUT_S = 600


def test_the_server_agrees_with_its_description(front: HAProxy, tmp_path: Path, same_worker: None) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)]
    command += ["run", str(DOCUMENT), "--url", front.url, "--no-color"]
    with httpx.Client(base_url=front.url, timeout=60, trust_env=False) as http:
        chat = ChatSession.open(http, make_scene(HELD_OUT_SEEDS[0]).draw())
        variables = {"SCHEMATHESIS_HOOKS": HOOKS, "OPENAPI_TEST_SESSION": chat.session_id, "PYTHONPATH": str(ROOT)}
        options = {"cwd": tmp_path, "env": {**os.environ, **variables}, "timeout": TIMEOUT_S, "text": True}
        run = subprocess.run(command, capture_output=True, check=False, **options)
        chat.close()
    assert run.returncode == 0, run.stdout + run.stderr
    for phase in ("Examples", "Coverage", "Fuzzing"):
        assert f"✅ {phase}" in run.stdout, run.stdout
    assert "Tested: 11" in run.stdout, run.stdout
