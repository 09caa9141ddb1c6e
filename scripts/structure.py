"""Check the shape of the code: import chains between folders, and the length of files, functions and classes.

Prints what it measured and exits with 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "handler/llava_sessions"
CODE_FOLDERS = ("handler", "client", "deploy", "web")
CHAIN_LIMIT = 6  # folders
FILE_LIMIT = 400  # lines
FUNCTION_LIMIT = 50  # lines
METHOD_LIMIT = 15
_IGNORE = re.compile(r"#\s*type:\s*ignore(?P<codes>\[[^\]]+\])?(?P<reason>.*)")

Graph = Mapping[str, set[str]]


# --- imports between folders ------------------------------------------------------------------------------------------


def folder_imports(package: Path) -> dict[str, set[str]]:
    """Return for each folder of a package the other folders that its modules import, as paths below the package.

    "." is the package's own folder.
    """
    modules = {_module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    folders = {name: path.parent.relative_to(package).as_posix() for name, path in modules.items()}
    graph: dict[str, set[str]] = {folder: set() for folder in folders.values()}
    for name, path in modules.items():
        is_package = path.name == "__init__.py"
        for imported in _imported_modules(ast.parse(path.read_text(encoding="utf-8")), name, is_package):
            module = _longest_known(imported, modules)
            if module and folders[module] != folders[name]:
                graph[folders[name]].add(folders[module])
    return graph


def _module_name(path: Path, package: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Yield the full name of everything that a module imports: a module, or a name in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = node.level - 1 if is_package else node.level
            base = parts[: len(parts) - above] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def _longest_known(name: str, modules: Mapping[str, Path]) -> str | None:
    """Return the module that a full name belongs to, or None if it is outside the package."""
    while name not in modules:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of folders that import each other, directly or through others."""
    reachable = {folder: _reachable(graph, folder) for folder in graph}
    found: list[list[str]] = []
    for folder in sorted(graph):
        group = sorted(other for other in reachable[folder] if folder in reachable[other])
        if folder in group and group not in found:
            found.append(group)
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        folder = waiting.pop()
        if folder not in seen:
            seen.add(folder)
            waiting += graph[folder]
    return seen


def longest_chain(graph: Graph, start: str | None = None, before: tuple[str, ...] = ()) -> list[str]:
    """Return the longest chain of folders in which each imports the next. A folder is at most once in a chain."""
    if start is None:
        return max((longest_chain(graph, folder) for folder in sorted(graph)), key=len, default=[])
    path = (*before, start)
    tails = [longest_chain(graph, folder, path) for folder in sorted(graph[start]) if folder not in path]
    return [start, *max(tails, key=len, default=[])]


# --- lengths and comments ---------------------------------------------------------------------------------------------


def long_parts(path: Path, shown: str) -> Iterator[str]:
    """Yield a line for a file, function or class above its limit."""
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    if lines > FILE_LIMIT:
        yield f"{shown}: {lines} lines (limit {FILE_LIMIT})"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LIMIT:
                yield f"{shown}:{node.lineno}: {node.name} has {length} lines (limit {FUNCTION_LIMIT})"
        elif isinstance(node, ast.ClassDef):
            methods = sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
            if methods > METHOD_LIMIT:
                yield f"{shown}:{node.lineno}: {node.name} has {methods} methods (limit {METHOD_LIMIT})"


def bare_ignores(path: Path, shown: str) -> Iterator[str]:
    """Yield a line for a `type: ignore` that lacks an error code or a reason after it."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = _IGNORE.search(token.string) if token.type == tokenize.COMMENT else None
        if match and not (match["codes"] and re.search(r"\w", match["reason"])):
            yield f"{shown}:{token.start[0]}: `type: ignore` needs an error code and a reason"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurements. Return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(prog="scripts/structure.py", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the checkout (default: this one)")
    root = parser.parse_args(argv).root
    graph = folder_imports(root / PACKAGE)
    chain = longest_chain(graph)
    print(f"longest chain of folder imports in {PACKAGE}: {len(chain)} (limit {CHAIN_LIMIT}): {' > '.join(chain)}")
    problems = (
        [f"the chain must have at most {CHAIN_LIMIT} folders, got {len(chain)}"] if len(chain) > CHAIN_LIMIT else []
    )
    problems += [f"folders import each other: {', '.join(group)}" for group in cycles(graph)]
    paths = [path for folder in CODE_FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    for path in paths:
        shown = path.relative_to(root).as_posix()
        problems += long_parts(path, shown)
        problems += bare_ignores(path, shown)
    for problem in problems:
        print(problem)
    print(f"{len(paths)} files in {', '.join(CODE_FOLDERS)}: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
