"""scripts/structure.py: what it measures, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import structure


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / structure.PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / structure.PACKAGE


CLEAN = {
    "__init__.py": "",
    "config.py": "import json\n",
    "worker/__init__.py": "",
    "worker/pump.py": "from ..journal import store\nfrom .turns import run\n",
    "worker/turns.py": "from .. import config\n",
    "journal/__init__.py": "",
    "journal/store.py": "import llava_sessions.ipc.pipe\nfrom llava_sessions.config import Limits\n",
    "ipc/__init__.py": "",
    "ipc/pipe.py": "def send():\n    from ..config import Limits\n",
}


def test_imports_are_reduced_to_folders(tmp_path: Path) -> None:
    graph = structure.folder_imports(write(tmp_path, CLEAN))
    assert graph == {".": set(), "worker": {"journal", "."}, "journal": {"ipc", "."}, "ipc": {"."}}
    assert structure.longest_chain(graph) == ["worker", "journal", "ipc", "."]
    assert structure.cycles(graph) == []


def test_a_nested_folder_is_one_of_its_own(tmp_path: Path) -> None:
    files = {"__init__.py": "", "engine/__init__.py": "", "engine/model.py": "from .cpu.layers import run\n"}
    files |= {"engine/cpu/__init__.py": "", "engine/cpu/layers.py": "from ... import __name__\n"}
    graph = structure.folder_imports(write(tmp_path, files))
    assert graph == {".": set(), "engine": {"engine/cpu"}, "engine/cpu": {"."}}


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert structure.cycles(graph) == [["a", "b", "c"]]
    assert structure.longest_chain(graph) == ["d", "a", "b", "c"]


def test_a_clean_package_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, CLEAN)
    assert structure.main(["--root", str(tmp_path)]) == 0
    assert "(limit 6): worker > journal > ipc > ." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\n" * 401, "401 lines (limit 400)"),
        ("def f():\n" + "    x = 1\n" * 50, "f has 51 lines (limit 50)"),
        ("class A:\n" + "".join(f"    def f{n}(self): ...\n" for n in range(16)), "A has 16 methods (limit 15)"),
        ("x = 1  # type: ignore\n", "`type: ignore` needs"),
        ("x = 1  # type: ignore[misc]\n", "`type: ignore` needs"),
        ("from .worker import pump\n", "folders import each other: ., ipc, journal, worker"),
    ],
)
def test_an_exceeded_limit_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str) -> None:
    write(tmp_path, {**CLEAN, "config.py": text})
    assert structure.main(["--root", str(tmp_path)]) == 1
    assert problem in capsys.readouterr().out


def test_a_chain_that_is_too_long_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"f{n}/__init__.py": f"from .. import f{n + 1}\n" for n in range(6)}
    write(tmp_path, {"__init__.py": "", **files, "f6/__init__.py": ""})
    assert structure.main(["--root", str(tmp_path)]) == 1
    assert "the chain must have at most 6 folders, got 7" in capsys.readouterr().out


def test_an_ignore_with_a_reason_passes(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('x = 1  # type: ignore[misc]  # the stub is wrong\ny = "# type: ignore"\n')
    assert list(structure.bare_ignores(path, "module.py")) == []
