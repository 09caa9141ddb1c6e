"""Every command has `--help` and `--version`, and answers a wrong option in one line that names it as typed."""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo import chat as demo
from deploy import options
from deploy.container import entrypoint, image, metric_lines
from deploy.doctor import command as doctor
from deploy.local_endpoint import command as endpoint
from deploy.pack import command as pack
from deploy.sagemaker import command as llava_deploy
from deploy.serve import command as serve
from web import command as web

REPO = Path(__file__).resolve().parents[2]
SUBCOMMANDS = ("push", "upload", "up", "status", "invoke", "logs", "down", "capacity", "doctor")
COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "serve": serve.main,
    "pack": pack.main,
    "endpoint": endpoint.main,
    "demo": demo.parse_args,
    "web": web.main,
    "image": image.main,
    "container": entrypoint.main,
    "metric_lines": metric_lines.main,
    "llava-deploy": llava_deploy.main,
    "doctor": doctor.main,
    **{f"llava-deploy {name}": lambda argv, name=name: llava_deploy.main([name, *argv]) for name in SUBCOMMANDS},
}
MAKEFILE = (REPO / "Makefile").read_text(encoding="utf-8")


def result(command: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Return the exit code, stdout and stderr of a command."""
    try:
        code = COMMANDS[command](argv)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return code, said.out, said.err


def make_names(target: str) -> str:
    """Return what the Makefile puts into `LLAVA_MAKE` for a target."""
    return re.search(rf"^{target}: export LLAVA_MAKE = (.*)$", MAKEFILE, re.MULTILINE)[1]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port with a listener."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_version(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = result(command, ["--help"], capsys)
    assert (code, err) == (0, "")
    assert out.startswith("usage: ")
    assert "--version" in out
    developers = re.compile(r"__doc__|docstring|argparse|``|\bOwns\b|Must not know|the caller|Raise|`DeployError`")
    assert not developers.search(out)
    assert result(command, ["--version"], capsys) == (0, f"LLaVA Sessions {options.VERSION}\n", "")


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == options.VERSION


@pytest.mark.parametrize(
    ("command", "target", "argv", "message"),
    [
        (
            "serve",
            "serve",
            ["--port", "70000"],
            "make serve: error: PORT must be a whole number from 0 to 65533, got",
        ),
        (
            "serve",
            "",
            ["--port", "x"],
            "python -m deploy.serve: error: --port must be a whole number from 0",
        ),
        ("serve", "", ["--log-level", "all"], "--log-level must be one of error, warn, info, debug, got 'all'"),
        ("serve", "", ["--timeout", "nan"], "--timeout must be a number of at least 0, got 'nan'"),
        ("serve", "", ["--java-opts", "'"], '--java-opts must be valid, got "\'"'),
        ("serve", "", ["--port"], "--port must have a value"),
        ("serve", "", ["--prot", "1"], "unrecognized arguments: --prot 1"),
        ("endpoint", "endpoint", ["--port", "-1"], "make endpoint: error: ENDPOINT_PORT must be a whole number from 0"),
        ("endpoint", "endpoint", ["--instances", "0"], "INSTANCES must be a whole number of at least 1, got '0'"),
        (
            "pack",
            "serve",
            ["--model", "m", "--sessions", "0"],
            "SESSIONS must be a whole number of at least 1, got",
        ),
        (
            "pack",
            "serve",
            ["--model", "m", "--dtype", "int8"],
            "DTYPE must be one of auto, float32, bfloat16, float16",
        ),
        ("web", "web", ["--port", "x"], "make web: error: WEB_PORT must be a whole number from 0 to 65535, got 'x'"),
        ("web", "", ["--ask-option", "heat=1"], "--ask-option must name one of max_new_tokens, "),
        ("web", "", ["--ask-option", "seed=x"], "--ask-option must have a number, true, false or a quoted text, got"),
        ("pack", "", [], "build_mar.sh: error: --model must be given"),
        (
            "demo",
            "demo",
            ["--seed", "5"],
            "make demo: error: SEED must be a whole number from 10000000",
        ),
        (
            "doctor",
            "doctor",
            ["--port", "x"],
            "make doctor: error: PORT must be a whole number from 0 to 65533, got 'x'",
        ),
        ("doctor", "", ["--dtype", "int8"], "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ("image", "image", ["--torch", "rocm"], "make image: error: TORCH must be one of cuda, cpu, got 'rocm'"),
        ("container", "", ["train"], "serve: error: the argument must be serve, got 'train'"),
        (
            "llava-deploy capacity",
            "",
            ["--text-tokens", "many"],
            "--text-tokens must be a whole number of at least 1",
        ),
        ("llava-deploy capacity", "", ["--reserve-gib", "x"], "--reserve-gib must be a number of at least 0, got 'x'"),
        ("llava-deploy up", "", ["--instances", "0"], "--instances must be a whole number of at least 1, got '0'"),
        ("llava-deploy up", "", ["--set", "x"], "--set must be NAME=VALUE, got 'x'"),
        ("llava-deploy", "", ["upp"], "COMMAND must be one of push, upload, up,"),
        ("llava-deploy", "", [], "COMMAND must be given"),
    ],
)
def test_a_wrong_option_is_named_as_typed_in_one_line(
    command: str,
    target: str,
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if target:
        monkeypatch.setenv(options.MAKE_VARIABLE, make_names(target))
    code, out, err = result(command, argv, capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("command", "name"), [("serve", "PORT"), ("endpoint", "ENDPOINT_PORT"), ("web", "WEB_PORT")])
def test_a_taken_port_is_one_line_before_anything_is_packed(
    command: str, name: str, taken: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(options.MAKE_VARIABLE, make_names(command))
    code, out, err = result(command, ["--port", str(taken), "--check"], capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"make {command}: error: ")
    assert {str(taken), name} <= set(re.findall(r"\w+", err))
    assert len(err.splitlines()) == 1
    lines = re.search(rf"^{command}: .*env.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1].splitlines()
    assert "--check" in lines[0]
    assert "build_mar.sh" in lines[1]


def test_every_make_variable_of_a_target_is_one_of_its_names() -> None:
    for target in ("demo", "serve", "endpoint", "image", "web"):
        rule = re.search(rf"^{target}:(?! export).*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
        used = set(re.findall(r"(--[\w-]+) '\$\((\w+)\)'", rule))
        named = {tuple(pair.split("=")) for pair in make_names(target).split()[1:]}
        assert used == named


def test_a_version_of_the_model_is_still_given(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "--model-version"):
        assert pack.parse_args(["--model", "m", option, "2.0"]).version == "2.0"
    assert pack.parse_args(["--model", "m"]).version == "1.0"


def test_every_command_uses_the_same_parser() -> None:
    own = re.compile(r"= argparse\.ArgumentParser\((?!add_help=False)")
    folders = ("bench", "demo", "deploy", "models", "tests", "web")
    paths = [path for folder in folders for path in (REPO / folder).rglob("*.py")]
    assert [path for path in paths if own.search(path.read_text(encoding="utf-8"))] == []
