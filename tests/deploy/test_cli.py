"""The AWS CLI, unmodified, on the endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .conftest import NAME, Endpoint, picture, under_one_corner

AWS = Path(sys.executable).parent / "aws"
KEYS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-west-2"}


@under_one_corner
def test_a_chat_by_the_aws_cli(endpoint: Endpoint, tmp_path: Path) -> None:
    def invoke(body: dict, session: str, fails: bool = False) -> tuple[dict, str]:
        (tmp_path / "body.json").write_text(json.dumps(body))
        words = ["sagemaker-runtime", "invoke-endpoint", "--endpoint-url", endpoint.url, "--endpoint-name", NAME]
        words += ["--content-type", "application/json", "--session-id", session, "--body", "fileb://body.json"]
        done = subprocess.run(
            [AWS, *words, "answer.json"], cwd=tmp_path, env=os.environ | KEYS, capture_output=True, text=True
        )
        assert (done.returncode != 0) == fails, done.stderr
        return {} if fails else json.loads(done.stdout), done.stderr

    told, _ = invoke({"type": "start_session", "image": picture(20)}, "NEW_SESSION")
    session = told["NewSessionId"].split(";")[0]
    told, _ = invoke({"type": "send_text_prompt", "prompt_text": "Which shapes are there?"}, session)
    assert told["ContentType"] == "application/json"
    assert json.loads((tmp_path / "answer.json").read_text())["session_id"] == session
    told, _ = invoke({"type": "close_session"}, session)
    assert told["ClosedSessionId"] == session
    _, errors = invoke({"type": "close_session"}, session, fails=True)
    assert "ValidationError" in errors
