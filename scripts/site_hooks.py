"""Hooks of mkdocs.yml: pages may link files of the repository outside docs/, as they do for a reader of the checkout.

Each linked file becomes a file of the site below `repository/`, and each link to it is rewritten. Files that are linked
from a copied page follow, so the site has no link to a place that an offline reader lacks.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
COPIES = "repository"
CHANGELOG = "CHANGELOG.md"  # a page of the navigation
_STATES = re.compile(r"^### (\w+)\n([^#]*?)^```mermaid\n.*?^```$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^(```|~~~).*?^\1[^\S\n]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")


def repository_path(uri: str) -> str:
    """Return the path in the repository of a file of the site."""
    return uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"docs/{uri}"


def site_uri(path: str) -> str:
    """Return the place in the site of a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}"


def target_of(link: str, page: str, root: Path = ROOT) -> str | None:
    """Return the file of the repository that a link on `page` names, or None. A folder stands for its README.md."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if path.startswith(".."):
        return None
    if (root / path).is_dir():
        path = f"{path}/README.md"
    return path if (root / path).is_file() else None


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    parts, at = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[at : fence.start()]), fence.group()]
        at = fence.end()
    return "".join([*parts, change(markdown[at:])])


def linked(markdown: str, page: str, root: Path = ROOT) -> set[str]:
    """Return the files of the repository that `page` links."""
    found: set[str] = set()

    def collect(text: str) -> str:
        found.update(target for link in _LINK.findall(text) if (target := target_of(link, page, root)))
        return text

    _outside_fences(markdown, collect)
    return found


def rewritten(markdown: str, uri: str, root: Path = ROOT) -> str:
    """Return the page with its links to files of the repository as links of the site."""
    page = repository_path(uri)

    def rewrite(match: re.Match[str]) -> str:
        target = target_of(match[1], page, root)
        if target is None:
            return match[1]
        return posixpath.relpath(site_uri(target), posixpath.dirname(uri) or ".")

    return _outside_fences(markdown, lambda text: _LINK.sub(rewrite, text))


def on_files(files: Files, config: Any) -> Files:
    """Add the linked files of the repository to the site."""
    waiting = [CHANGELOG, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, site_uri(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += linked((ROOT / path).read_text(encoding="utf-8"), path)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite the links of a page, and show its Mermaid diagrams as the drawings of scripts/diagrams.py."""
    markdown = _STATES.sub(r"### \1\n\2![\1: states and transitions](img/states-\1.svg)", markdown)
    return rewritten(markdown, page.file.src_uri)
