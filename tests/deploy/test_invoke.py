"""`llava-deploy invoke` on the local endpoint: no account is asked anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from models.shapes.scenes import Ask, make_scene, true_answer

from .conftest import Endpoint, under_one_corner

COMMAND = Path(sys.executable).parent / "llava-deploy"
SCENE = make_scene(12_000_009)
TRUTHS = {
    "How many shapes are there?": true_answer(SCENE, Ask("count")),
    "Which shapes are there?": true_answer(SCENE, Ask("list")),
}


@under_one_corner
def test_a_chat_needs_the_endpoints_address_and_nothing_else(endpoint: Endpoint, tmp_path: Path) -> None:
    SCENE.draw().save(tmp_path / "picture.png")
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env |= {
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": endpoint.url,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # whoever asks another service fails
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-west-2",
    }
    command = [COMMAND, "invoke", "picture.png", *TRUTHS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(TRUTHS.values())
    opened, *asked, closed = done.stderr.splitlines()
    assert opened.startswith("open until ")
    assert asked == [f"> {question}" for question in TRUTHS]
    assert closed == "closed"
