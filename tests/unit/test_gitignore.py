"""What the commands of README and docs write is ignored by git."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *sorted(path.relative_to(REPO).as_posix() for path in (REPO / "docs").glob("*.md")))
WRITTEN = (
    "model_store/llava/MAR-INF/MANIFEST.json",  # make serve, make demo, build_mar.sh
    "model_store/llava.sagemaker/model-config.yaml",  # build_mar.sh --sagemaker
    "model_store/picture.png",  # the notebook
    "demo/pictures/10000000.png",  # make demo
    ".cache/notebook.ipynb",  # make notebook
    "site/index.html",  # make docs
    "photos/first.png",  # docs/photo-assistant.md
    "docs/.ipynb_checkpoints/notebook-checkpoint.ipynb",  # Jupyter
    ".coverage",  # make coverage
    ".venv-peers/vllm/installed.txt",  # bench.peers
    "logs/model_log.log",  # TorchServe without the launcher
    "llava_sessions.egg-info/PKG-INFO",
)
pytestmark = pytest.mark.skipif(not (REPO / ".git").exists(), reason="not a checkout")


@pytest.fixture(scope="module")
def ignored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bool]:
    """Return whether git ignores a path.

    An empty repository is asked: in a checkout, `model_store/llava` may be a link, and git answers nothing behind one.
    """
    empty = tmp_path_factory.mktemp("empty")
    subprocess.run(["git", "init", "-q"], cwd=empty, check=True)
    shutil.copy(REPO / ".gitignore", empty)
    check = ["git", "check-ignore", "-q", "--no-index"]
    return lambda path: subprocess.run([*check, path], cwd=empty, check=False).returncode == 0


def test_files_of_the_commands_are_ignored(ignored: Callable[[str], bool]) -> None:
    assert [path for path in WRITTEN if not ignored(path)] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_a_documented_command_writes_is_ignored(page: str, ignored: Callable[[str], bool]) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    redirected = r"(?:^|[^<>&=-])>{1,2} *([\w./-]+\.\w+)|\b(?:tee|-o|--output) ([\w./-]+\.\w+)"
    names = [first or second for block in blocks for first, second in re.findall(redirected, block, re.MULTILINE)]
    assert [name for name in names if not name.startswith("/") and not ignored(name)] == []
