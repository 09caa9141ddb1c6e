"""Every code block of README and docs runs as it is, is checked against the models, or names the test that runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from llava_sessions.config_file import read_config
from tests.support.snippets import LANGUAGES, ROOT, Block, Terminal, blocks, pages

from .conftest import ENDPOINT_PORT, SERVE_PORT, SKIPPED, WEB_PORT, Server

PROMETHEUS = ROOT / ".cache" / "prometheus" / "usr" / "bin"  # scripts/need_prometheus.sh
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ALL = [block for page in pages() for block in blocks(page)]
# Blocks that start a server in the foreground, and the fixture that starts it.
SERVERS = {
    "make serve": "served",
    "make endpoint": "endpoint",
    "make web ENDPOINT=http://127.0.0.1:8080": "web_page",
}
MODULES = {"served": "deploy.serve", "endpoint": "deploy.local_endpoint", "web_page": "web"}
# mkdocs includes a file in the place of such a block, and a block below it runs the file. Its language is written as
# `{ .python }`, because ruff formats blocks of the language `python`.
INCLUDES = [block for block in ALL if block.text.startswith("--8<--")]
RUN = [
    block for block in ALL if block.language in ("bash", "python") and block.marked is None and block not in INCLUDES
]
MARKED = [block for block in ALL if block.marked is not None]
PAGES = list(dict.fromkeys(block.page for block in RUN))


def of_language(name: str) -> list[Block]:
    return [block for block in ALL if block.language == name and block.marked is None]


def title(value: object) -> str:
    return value.title if isinstance(value, Block) else str(value)


def test_every_block_has_a_language() -> None:
    others = [block for block in ALL if block.language not in LANGUAGES and block not in INCLUDES]
    assert [block.title for block in others] == []


def test_a_block_that_is_not_run_has_no_commands() -> None:
    """Output is `text`. A `console` shows commands with their output: it names the test that runs them."""
    programs = re.compile(r"^(make|docker|curl|promtool|python|pip|git|aws|\./|\.venv/bin/)\b", re.MULTILINE)
    assert [block.title for block in of_language("text") if programs.search(block.text)] == []
    assert [block.title for block in of_language("console") if block.commands] == []


# --- commands and programs --------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(
    checkout: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[list[str]], Terminal]]:
    """Return a function that opens the terminal of a page, after the servers of these names."""
    opened: list[Terminal] = []

    def open_terminal(servers: list[str]) -> Terminal:
        ports = {"served": SERVE_PORT, "endpoint": ENDPOINT_PORT, "web_page": WEB_PORT}
        found = {ports[name]: request.getfixturevalue(name).port for name in servers}
        paths = [checkout, checkout / "client"]
        (tmp_path / "home").mkdir()
        variables = {
            "HOME": str(tmp_path / "home"),
            "PYTHONPATH": ":".join(map(str, paths)),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
            "PATH": ":".join([str(checkout / ".venv/bin"), str(PROMETHEUS), os.environ["PATH"]]),
            # pip builds and installs what a page names, but into this folder, and without other packages.
            "PIP_TARGET": str(tmp_path / "installed"),
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
        }
        opened.append(Terminal(checkout, tmp_path, found, variables))
        opened[0].define(f'make() {{ command make {" ".join(SKIPPED)} "$@"; }}')
        return opened[0]

    yield open_terminal
    for one in opened:
        one.close()


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_their_order(page: str, terminal: Callable[[list[str]], Terminal]) -> None:
    """A page that uses port 8080 or 8090 gets the server of that port, also if another page has its command."""
    found = [block for block in RUN if block.page == page]
    text = "".join(block.text for block in found)
    servers = [name for number, name in ((SERVE_PORT, "served"), (ENDPOINT_PORT, "endpoint")) if str(number) in text]
    servers += [SERVERS[block.text.strip()] for block in found if block.text.strip() in SERVERS]
    page_terminal = terminal(list(dict.fromkeys(servers)))
    for block in found:
        if block.text.strip() not in SERVERS:
            printed = page_terminal.run(block)
            # curl ends with 0 for the server's errors too.
            assert '"error": {' not in printed, f"{block.title} printed an error:\n{printed}"


def test_the_endpoint_prints_the_variables_of_the_pages_and_leaves_nothing(endpoint: Server) -> None:
    assert "loopback only; signatures are not checked" in endpoint.text
    exports = set(re.findall(r"(AWS_\w+)=", endpoint.text))
    pages_text = "".join(block.text for block in ALL if block.page == "docs/sagemaker.md")
    assert {"AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= exports
    assert exports <= set(re.findall(r"AWS_\w+", pages_text))
    started = psutil.Process(endpoint.pid).children(recursive=True)
    assert len(started) >= 3, "java, its worker and the guard"
    assert endpoint.stop(signal.SIGTERM) == 0
    assert "stopped in" in endpoint.text
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("command", SERVERS)
def test_a_server_of_the_pages_is_a_target_of_the_makefile(command: str) -> None:
    done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(rf"^exec \S+ -m {re.escape(MODULES[SERVERS[command]])} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("block", MARKED, ids=title)
def test_a_marked_block_is_run_by_the_test_that_it_names(block: Block) -> None:
    """The file has every word of each command that is no value: the subcommand and the options.

    A make target is run by a file that runs it or a target that requires it, or that names the module of its recipe.
    """
    assert block.marked is not None
    test = (ROOT / block.marked).read_text(encoding="utf-8")
    if block.language not in ("bash", "console"):
        assert Path(block.page).name in test
        return
    for command in block.commands:
        program, *words = shlex.split(command)
        if program == "make":
            assert words[0] in run_by(test) or runs_module(test, words[0]), f"{block.marked} does not run {command}"
            continue
        if words[:1] == ["-m"]:
            assert names_module(test, words[1]), f"{block.marked} does not run {command}"
            words = words[2:]
        elif program.endswith("llava-deploy"):
            assert has_word(test, words[0]), f"{block.marked} has no {words[0]}"
        else:
            assert has_word(test, Path(program).name), f"{block.marked} has no {program}"
        for word in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert has_word(test, word), f"{block.marked} has no {word}"


def has_word(test: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", test) is not None


def run_by(script: str) -> set[str]:
    """Return the targets that a script makes, with their prerequisites."""
    targets = set(re.findall(r"\bmake ([a-z-]+)", script))
    return targets | {one for target in targets for one in re.findall(r"[a-z-]+", rule(target)[0])}


def runs_module(test: str, target: str) -> bool:
    """Return whether a test runs or imports a Python module of a target's recipe."""
    return any(names_module(test, module) for module in re.findall(r"-m ([\w.]+)", rule(target)[1]))


def names_module(test: str, module: str) -> bool:
    """Return whether a test runs a module as a command or imports it."""
    folder, _, name = module.rpartition(".")
    imported = rf"from {re.escape(folder)} import [^\n]*\b{name}\b|" if folder else ""
    return re.search(rf"""{imported}(?:-m["', ]+|from |import ){re.escape(module)}\b""", test) is not None


def rule(target: str) -> tuple[str, str]:
    """Return the prerequisites and the recipe of a target."""
    found = re.search(rf"^{target}:(?! export)([^#\n]*).*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    return (found[1], found[2]) if found else ("", "")


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text(encoding="utf-8"))["components"]["schemas"]


def with_values(value: Any) -> Any:
    """Return the value with a text instead of each placeholder, such as `<base64>`."""
    match value:
        case dict():
            return {key: with_values(inner) for key, inner in value.items()}
        case list():
            return [with_values(inner) for inner in value]
        case str() if re.fullmatch(r"<.*>", value):
            return "value"
    return value


@pytest.mark.parametrize("block", of_language("json"), ids=title)
def test_json_is_a_request_or_a_reply(block: Block, schemas: dict[str, Any]) -> None:
    value = with_values(json.loads(block.text))
    fitting = []
    for name in schemas:
        schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        if jsonschema.Draft202012Validator(schema).is_valid(value):
            fitting.append(name)
    assert fitting != []


@pytest.mark.parametrize("block", of_language("yaml"), ids=title)
def test_yaml_is_a_part_of_the_configuration(block: Block) -> None:
    """With the other keys of the file that travels in the archive, it is one that the handler accepts."""
    whole = yaml.safe_load((ROOT / "handler" / "model-config.yaml").read_text(encoding="utf-8"))
    for key, value in yaml.safe_load(block.text).items():
        whole[key] = {**whole[key], **value} if isinstance(value, dict) else value
    read_config(whole)


@pytest.mark.parametrize("block", INCLUDES, ids=title)
def test_an_included_program_is_run_by_its_page(block: Block) -> None:
    [path] = re.findall(r'^--8<-- "(.+)"$', block.text, re.MULTILINE)
    commands = [command for other in RUN if other.page == block.page for command in other.commands]
    assert any(f"docs/{path}" in command for command in commands)
