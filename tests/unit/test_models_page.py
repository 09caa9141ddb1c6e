"""docs/models.md has the current tables of families and checkpoints."""

from __future__ import annotations

from deploy.pack.families import families, refused
from scripts import models_page


def test_the_tables_of_the_page_are_generated() -> None:
    page = models_page.PAGE.read_text(encoding="utf-8")
    assert page == models_page.with_tables(page)


def test_the_page_has_every_family_and_checkpoint() -> None:
    page = models_page.PAGE.read_text(encoding="utf-8")
    ids = [name for family in families().values() for one in family.checkpoints for name in one.ids]
    assert len(ids) == len(set(ids)) >= 20
    assert [name for name in (*families(), *refused(), *ids) if f"`{name}`" not in page] == []
