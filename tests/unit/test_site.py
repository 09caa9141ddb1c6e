"""The documentation: `make docs` builds it strictly, its pages load nothing from another host, README stays short."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scripts import site_hooks, words

REPO = Path(__file__).resolve().parents[2]
README_WORDS = 600
# Attributes from which a browser loads, by element. `link` loads only with these values of `rel`.
LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
LOADING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch", "manifest"}
# The theme has these addresses and uses them on request: icons of a linked repository, and diagrams in Mermaid.
# No page has a repository or such a diagram (below).
ON_REQUEST = (
    "https://api.github.com/",
    "https://${e}/api/v4/projects/",
    "https://unpkg.com/mermaid@",
    "https://unpkg.com/resize-observer-polyfill",
)


class Loads(HTMLParser):
    """The addresses that a browser loads with a page, and the classes of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.classes.update(found.get("class", "").split())
        is_link = tag == "link" and not LOADING_LINKS & set(found.get("rel", "").split())
        if tag in LOADING and not is_link:
            self.addresses.append(found.get(LOADING[tag], ""))
        self.addresses += re.findall(r"url\(['\"]?([^'\")]+)", found.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site with the command of `make docs`, into another folder."""
    recipe = re.search(
        r"^docs: env.*\n\t@\S+=1 \.venv/bin/(mkdocs build .*)$", (REPO / "Makefile").read_text(), re.MULTILINE
    )
    assert recipe is not None
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", *recipe[1].split(), "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site: Path) -> Iterator[tuple[str, Loads]]:
    for path in sorted(site.rglob("*.html")):
        loads = Loads()
        loads.feed(path.read_text(encoding="utf-8"))
        yield path.relative_to(site).as_posix(), loads


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    found = {page: [url for url in loads.addresses if re.match(r"(\w+:)?//", url)] for page, loads in pages(site)}
    assert len(found) > 30
    assert {page: urls for page, urls in found.items() if urls} == {}


def test_every_loaded_file_is_in_the_site(site: Path) -> None:
    for page, loads in pages(site):
        for url in loads.addresses:
            path = url.partition("?")[0].partition("#")[0]
            if path and not path.startswith("data:") and page != "404.html":
                assert ((site / page).parent / path).resolve().is_file(), f"{page}: {url}"


def test_scripts_and_styles_have_no_other_host_that_they_load_from(site: Path) -> None:
    for path in [*site.rglob("*.js"), *site.rglob("*.css")]:
        if path.name.startswith("search_index"):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".css":
            assert re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)'\"]+", text) == [], path.name
        else:
            assert [
                url for url in re.findall(r"""["'`](https://[^"'`]+)""", text) if not url.startswith(ON_REQUEST)
            ] == []


def test_no_page_makes_the_theme_load_what_it_would_on_request(site: Path) -> None:
    for page, loads in pages(site):
        assert not {"mermaid", "md-source", "md-source__repository"} & loads.classes, page


def test_the_search_index_has_every_page(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    for name in ("protocol.html", "operations.html", "faq.html", "repository/CHANGELOG.html"):
        assert name in index


def test_links_outside_docs_become_links_of_the_site(tmp_path: Path) -> None:
    for path in ("docs/page.md", "bench/README.md", "bench/results/plot.png", "LICENSE"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    text = "[a](../bench/README.md#x) ![b](../bench/results/plot.png) [c](../bench/) [d](https://x.example) [e](#x)\n"
    fenced = "```text\n[f](../LICENSE)\n```\n"
    rewritten = site_hooks.rewritten(text + fenced, "page.md", tmp_path)
    assert rewritten == (
        "[a](repository/bench/README.md#x) ![b](repository/bench/results/plot.png) [c](repository/bench/README.md) "
        f"[d](https://x.example) [e](#x)\n{fenced}"
    )
    assert site_hooks.linked(text + fenced, "docs/page.md", tmp_path) == {"bench/README.md", "bench/results/plot.png"}
    assert site_hooks.rewritten("[g](../docs/page.md)", "repository/bench/README.md", tmp_path) == "[g](../../page.md)"


# --- README -----------------------------------------------------------------------------------------------------------

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    assert len(words.prose(README).split()) <= README_WORDS


def test_readme_shows_a_screenshot_and_a_plot_of_the_record() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert any(re.fullmatch(r"docs/img/web-.+\.png", picture) for picture in pictures)
    assert any(re.fullmatch(r"bench/results/.+\.png", picture) for picture in pictures)


def test_links_of_readme_and_contributing_lead_to_files() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", (REPO / name).read_text(encoding="utf-8"))
        assert [link for link in links if not (REPO / link).exists()] == []


def test_the_figures_of_readme_are_those_of_the_bench() -> None:
    bench = (REPO / "bench" / "README.md").read_text(encoding="utf-8")
    stateless = re.search(r"^\| TTFT turn 5, stateless / engine \|.*\| ([\d.]+)x \| \w+ \|$", bench, re.MULTILINE)
    assert stateless is not None
    assert f"{stateless[1]} times sooner than from stateless" in README
    record = json.loads((REPO / "bench" / "results" / "turns-float32.json").read_text(encoding="utf-8"))
    kept = record["ratios"]["TTFT of turn 5, KV kept / engine"]
    assert f"{kept:.1f} times sooner than from `generate` with a kept KV cache" in README


def test_the_table_of_the_comparison_has_the_figures_of_the_record() -> None:
    record = json.loads((REPO / "bench" / "results" / "turns-float32.json").read_text(encoding="utf-8"))
    last = {row["side"]: row for row in record["rows"] if row["turn"] == 5}
    page = (REPO / "docs" / "comparison.md").read_text(encoding="utf-8")
    table = re.findall(
        r"^\| (?:stateless|`generate`|LLaVA Sessions, the engine).* \| ([\d,]+) ms \| (\d+) ms \|$", page, re.MULTILINE
    )
    sides = ("stateless", "features cached", "KV kept", "engine")
    recorded = [(last[side]["TTFT ms"].split()[0], last[side]["per token ms"].split()[0]) for side in sides]
    assert table == [(first, f"{float(each):.0f}") for first, each in recorded]
    assert record["facts"]["date"].split()[0] in page
