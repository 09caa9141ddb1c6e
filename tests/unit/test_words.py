"""scripts/words.py: what it counts, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import words


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in (*words.CODE_FOLDERS, "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text('"""Return the answer."""\n')
    (tmp_path / "README.md").write_text("# Title\n\nText.\n")
    (tmp_path / "docs" / "page.md").write_text("Text.\n")
    return tmp_path


def test_docstrings_of_modules_classes_and_functions_are_read() -> None:
    source = (
        '"""One."""\nclass A:\n    """Two."""\n    async def f(self):\n        """Three."""\n        x = "4"  # five\n'
    )
    assert sorted(words.docstrings(source)) == ["One.", "Three.", "Two."]


def test_rates_are_per_thousand_words() -> None:
    count = words.Count("x", checked=True)
    count.add("Nobody told anybody. " + "word " * 497)
    assert count.words == 500
    assert count.rate("whoever ...") == 2.0
    assert count.rate("told, tells") == 2.0
    assert count.rate("wanted") == 0.0
    assert count.is_above()


def test_code_blocks_and_question_headings_are_not_prose() -> None:
    page = "# What is it?\n\nIt serves.\n\n```bash\necho wanted\n```\n\n## What it does\n"
    assert "wanted" not in words.prose(page)
    assert "What is it" not in words.prose(page)
    assert "What it does" in words.prose(page)


def test_a_clean_checkout_passes(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words.main(["--root", str(checkout)]) == 0
    assert "docs/page.md" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["deploy/module.py", "README.md", "docs/page.md"])
def test_a_word_above_the_limit_fails(checkout: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (checkout / place).write_text('"""It tells."""\n')
    assert words.main(["--root", str(checkout)]) == 1
    assert place.split("/")[0] in capsys.readouterr().err
