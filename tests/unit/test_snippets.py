"""tests/support/snippets.py: blocks of a page share a shell and a Python, and a block that fails is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import snippets
from tests.support.snippets import Block, Terminal


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    (tmp_path / "work").mkdir()
    one = Terminal(tmp_path, tmp_path / "work", {8080: 4711}, {"GIVEN": "yes"})
    yield one
    one.close()


def block(text: str, language: str = "bash") -> Block:
    return Block("page.md", 7, language, text)


def test_blocks_of_a_page_share_their_names_and_exports(terminal: Terminal) -> None:
    assert terminal.run(block('name=value\nsay() { echo "said $1"; }\nexport SHARED=$GIVEN\n')) == ""
    assert terminal.run(block("say $name\ncat\n")) == "said value\n", "input is empty"
    assert terminal.run(block("import os\nvalue = os.environ['SHARED']\n", "python")) == ""
    assert terminal.run(block("print(value, __name__)\n", "python")) == "yes __main__\n"


def test_only_ports_of_servers_are_replaced(terminal: Terminal) -> None:
    text = "echo http://127.0.0.1:8080/v1 127.0.0.1:9000 8080 --port 8080\n"
    assert terminal.run(block(text)) == "http://127.0.0.1:4711/v1 127.0.0.1:9000 8080 --port 4711\n"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("echo before\nfalse\necho after\n", "bash"),
        ("false | true\n", "bash"),
        ("echo $unset\n", "bash"),
        ("print('before')\nraise ValueError('why')\n", "python"),
    ],
)
def test_a_block_that_fails_is_an_error_with_its_place_and_output(terminal: Terminal, text: str, language: str) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:7 failed with exit code 1") as failed:
        terminal.run(block(text, language))
    assert "after" not in str(failed.value)
    if "before" in text:
        assert "before" in str(failed.value)


def test_blocks_are_found_with_their_language_line_and_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = "<!-- runs: tests/x.py -->\n```console\n$ make a \\\n  b\nout\n```\n"
    page = f"# Title\n\n```bash\nls  # list\n```\n\n{marked}```\n?\n```\n"
    (tmp_path / "page.md").write_text(page)
    monkeypatch.setattr(snippets, "ROOT", tmp_path)
    found = snippets.blocks("page.md")
    assert [(one.line, one.language, one.marked) for one in found] == [
        (3, "bash", None),
        (8, "console", "tests/x.py"),
        (13, "", None),
    ]
    assert [one.commands for one in found[:2]] == [["ls"], ["make a b"]]
