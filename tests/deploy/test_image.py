"""The container as far as it can be tried without building it: Dockerfile, entrypoint, and how a build is told.

The entrypoint runs here as it does there, with the real TorchServe and a model that needs no weights. `make image-test`
tries the rest. Knows the module's public face and the Dockerfile's text.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.container import entrypoint
from deploy.container.entrypoint import MANIFEST, ContainerError, find_model
from deploy.container.image import ImageError, build_command, find_builder, pip_settings
from deploy.pack.families import TABLE, families, texts
from deploy.serve.ports import PORTS, fixed_ports, free_ports, is_free
from tests.support.commands import eventually

REPO = Path(__file__).resolve().parents[2]
DOCKERFILE = (REPO / "Dockerfile").read_text()
HANDLER = """
import json


class Handler:
    def initialize(self, ctx):
        pass

    def handle(self, rows, ctx):
        return [json.dumps({"model": ctx.model_name})] * len(rows)
"""
# Runs the entrypoint on another folder than /opt/ml/model, which only root could make, and as the user that we are.
# What loses its parent becomes its child, as with process 1.
SERVE = """
import ctypes, os, pwd, sys
from pathlib import Path
from deploy.container import entrypoint
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
entrypoint.USER = pwd.getpwuid(os.getuid()).pw_name
sys.exit(entrypoint.main(["serve"], Path(sys.argv[1])))
"""


def pack_stand_in(folder: Path) -> Path:
    """A model as build_mar.sh lays it out, without weights."""
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "stand_in.py").write_text(HANDLER)
    (folder / "model-config.yaml").write_text("minWorkers: 1\nmaxWorkers: 1\n")
    model = {"modelName": "llava", "handler": "stand_in.py", "modelVersion": "1.0", "configFile": "model-config.yaml"}
    manifest = {"createdOn": "now", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


# --- the Dockerfile ---------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, REPO / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_dockerfile_and_the_entrypoint_agree() -> None:
    command = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[1])
    assert command[1:] == ["-m", "deploy.container"]
    assert json.loads(re.search(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[1]) == ["serve"]
    assert re.search(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[1] == entrypoint.PORT
    assert re.search(r"useradd .* (\w+)$", DOCKERFILE, re.MULTILINE)[1] == entrypoint.USER


def test_the_torch_that_the_dockerfile_speaks_of_is_the_one_that_is_pinned() -> None:
    pinned = re.search(r"^torch==(.*)$", (REPO / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert f"torch {pinned}." in DOCKERFILE


@pytest.mark.parametrize(
    ("torch", "headers", "more"), [("cuda", True, ""), ("cuda", False, " python3-dev"), ("cpu", False, "")]
)
def test_only_the_image_with_cuda_has_a_c_compiler(torch: str, headers: bool, more: str, tmp_path: Path) -> None:
    """Run the first instruction up to the installation, with commands that print their words."""
    step = re.search(
        r"^RUN mkdir -p /usr/share/man/man1 (.*?install [^\n]*) \\$", DOCKERFILE, re.MULTILINE | re.DOTALL
    )[1]
    include = tmp_path / "include"
    include.mkdir()
    if headers:
        (include / "Python.h").touch()
    for name, text in (("python3", f"echo {include}"), ("apt-get", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-ec", f"true {step}"],
        env={"PATH": str(tmp_path), "TORCH": torch},
        capture_output=True,
        text=True,
        check=True,
    )
    compiler = " gcc libc6-dev" if torch == "cuda" else ""
    expected = f"install -y --no-install-recommends haproxy openjdk-17-jdk-headless{compiler}{more}"
    assert done.stdout.splitlines() == ["update", expected]


def test_the_dockerfile_names_no_base_that_aws_has_stopped_patching() -> None:
    assert not re.search(r"pytorch-inference|torchserve:|-sagemaker`", DOCKERFILE)


@pytest.fixture(scope="module")
def left_out() -> re.Pattern[str]:
    """Run the last commands of the installation, with one that prints its words."""
    step = re.search(r"&& (served=.*?)\n\nCOPY", DOCKERFILE, re.DOTALL)[1]
    step = step.replace("/opt/venv/bin/python", "echo").replace("/tmp/families.toml", str(TABLE))
    done = subprocess.run(["/bin/sh", "-ec", step], capture_output=True, text=True, check=True)
    words, _, pattern = done.stdout.rstrip("\n").partition(" -x ")
    assert words == "-m compileall -q /opt/venv"
    return re.compile(pattern)


@pytest.mark.parametrize("kind", [*families(), *texts()])
def test_every_kind_that_is_served_is_compiled(kind: str, left_out: re.Pattern[str]) -> None:
    assert not left_out.search(f"/opt/venv/lib/transformers/models/{kind}/modeling_{kind}.py")
    assert left_out.search("/opt/venv/lib/transformers/models/whisper/modeling_whisper.py")


# --- the entrypoint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "llava"])
def test_the_model_is_found_at_the_top_and_one_folder_below(tmp_path: Path, where: str) -> None:
    model = pack_stand_in(tmp_path / where)
    assert find_model(tmp_path) == model


def test_two_models_are_one_too_many(tmp_path: Path) -> None:
    pack_stand_in(tmp_path / "a")
    pack_stand_in(tmp_path / "b")
    with pytest.raises(ContainerError, match=r"must hold one model, got 2 \(a, b\)"):
        find_model(tmp_path)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "found nothing"),
        (["model.tar.gz"], "found model.tar.gz;"),
        (["config.json", *(f"model-{n}.safetensors" for n in range(6))], "model-3.safetensors and 2 more;"),
    ],
)
def test_no_model_is_one_clear_line_and_an_error(tmp_path: Path, capsys, files: list[str], found: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert entrypoint.main(["serve"], tmp_path) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert f"no model in {tmp_path}" in said.err
    assert found in said.err


def test_the_entrypoint_as_the_image_starts_it_says_so_too() -> None:
    if entrypoint.MODEL.exists():
        pytest.skip(f"this machine has a {entrypoint.MODEL}")
    command = [sys.executable, "-m", "deploy.container", "serve"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("serve: error: no model in /opt/ml/model: ")


@pytest.mark.parametrize("arguments", [[], ["train"], ["serve", "--port"]])
def test_other_arguments_are_refused_in_one_line(arguments: list[str], capsys) -> None:
    assert entrypoint.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve: error: the argument must be serve, got ")


@pytest.mark.parametrize("port", ["", "http", "0", "65534", "-1"])
def test_a_bad_port_is_refused(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    pack_stand_in(tmp_path / "llava")
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", port)
    assert entrypoint.main(["serve"], tmp_path) == 2
    assert f"`SAGEMAKER_BIND_TO_PORT` must be a port from 1 to 65533, got {port!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("9000", "`SAGEMAKER_SAFE_PORT_RANGE` must be LOW-HIGH with ports from 1 to 65535, got '9000'"),
        ("9000-99999", "`SAGEMAKER_SAFE_PORT_RANGE` must be LOW-HIGH"),
        ("9000-8000", "`SAGEMAKER_SAFE_PORT_RANGE` must be LOW-HIGH"),
        ("8080-8086", "`SAGEMAKER_SAFE_PORT_RANGE`: the range must have 7 ports besides the public one, got 8080-8086"),
    ],
)
def test_a_bad_range_of_ports_is_refused(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, given: str, reason: str
) -> None:
    pack_stand_in(tmp_path / "llava")
    monkeypatch.setenv("SAGEMAKER_SAFE_PORT_RANGE", given)
    assert entrypoint.main(["serve"], tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up root")
@pytest.mark.parametrize("secret", [None, "llava/stand_in.py", "llava/MAR-INF"])
def test_root_is_given_up_for_good_where_the_model_can_be_read(open_folder: Path, secret: str | None) -> None:
    model = pack_stand_in(open_folder / "llava")
    if secret:
        (open_folder / secret).chmod(0o600)
    code = """
import os, sys
from pathlib import Path
from deploy.container import entrypoint
entrypoint.USER = "nobody"
entrypoint.drop_root(Path(sys.argv[1]))
print(os.getresuid(), os.getresgid(), os.getgroups(), os.environ["HOME"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, model], cwd=REPO, capture_output=True, text=True, check=True, timeout=60
    )
    if secret:
        assert done.stdout.startswith("(0, 0, 0) (0, 0, 0) ")
        assert done.stderr == f"serve: the user nobody cannot read {open_folder / secret}: serving as root\n"
    else:
        nobody = pwd.getpwnam("nobody")
        wanted = (nobody.pw_uid,) * 3, (nobody.pw_gid,) * 3, [], nobody.pw_dir
        assert done.stdout.strip() == " ".join(map(str, wanted))
        assert done.stderr == ""


def test_it_serves_what_lies_there_on_every_interface_until_sigterm(tmp_path: Path) -> None:
    """It opens no port outside of SageMaker's range. And a killed java is replaced and leaves no zombie."""
    pack_stand_in(tmp_path / "model")
    [port] = free_ports(1)
    within = free_block(10)
    limits = f"{within.start}-{within.stop - 1}"
    variables = {"SAGEMAKER_BIND_TO_PORT": str(port), "SAGEMAKER_SAFE_PORT_RANGE": limits, "PYTHONPATH": str(REPO)}
    env = {**os.environ, **variables}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, tmp_path / "model"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        # 127.0.0.2 is loopback as well, but a server that listens on 127.0.0.1 alone does not answer there.
        with httpx.Client(base_url=f"http://127.0.0.2:{port}", trust_env=False, timeout=150) as http:
            wait_ping(http)
            assert http.post("/invocations", json={}).json() == {"model": "model"}
            # /metrics is on in the container. This model has no page, so HAProxy reaches nothing behind it.
            assert http.get("/metrics").status_code == 503
            opened = listening(server.pid)
            assert port in opened
            assert opened - {port} <= set(within)
            assert fixed_ports(port, "front", within)["metrics"] in opened
            (java,) = [process for process in below(server.pid) if process.name() == "java"]
            java.kill()
            assert eventually(lambda: java not in below(server.pid) and not zombies(server.pid))
            wait_ping(http)
            assert http.post("/invocations", json={}).json() == {"model": "model"}
            assert not zombies(server.pid)
        server.send_signal(signal.SIGTERM)
        assert server.wait(150) == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(("ends", "code"), [("return 3", 3), ("os.kill(os.getpid(), 9)", 128 + 9)])
def test_the_launchers_end_is_the_containers(ends: str, code: int) -> None:
    serve = f"def serve():\n    {ends}\n"
    script = (
        f"import os\nfrom deploy.container import entrypoint\n{serve}raise SystemExit(entrypoint.run_as_init(serve))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=REPO, check=False, timeout=60).returncode == code


def below(pid: int) -> list[psutil.Process]:
    """All descendants."""
    return psutil.Process(pid).children(recursive=True)


def listening(pid: int) -> set[int]:
    """Return the TCP ports on which the descendants listen."""
    opened: set[int] = set()
    for process in below(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            found = process.net_connections("tcp")
            opened |= {item.laddr.port for item in found if item.status == psutil.CONN_LISTEN}
    return opened


def free_block(count: int) -> range:
    """Return ports in a row without listeners, outside of the range from which other servers choose."""
    blocks = (range(low, low + count) for low in range(14_000, PORTS.start - count, count))
    return next(block for block in blocks if all(map(is_free, block)))


def zombies(pid: int) -> list[psutil.Process]:
    """Descendants that have ended and that nobody has reaped."""
    found = []
    for process in below(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_ping(http: httpx.Client) -> None:
    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return http.get("/ping").status_code == 200
        return False

    assert eventually(answers, 150), "/ping never answered 200"


# --- how a build is told ----------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "index" / "simple").mkdir(parents=True)
    return tmp_path / "wheels"


@pytest.fixture
def listing(wheels: Path) -> str:
    """What `pip config list` prints."""
    simple = wheels.parent / "index" / "simple"
    return (
        f":env:.cert='{wheels}.pem'\n"
        ":env:.default-timeout='180'\n"
        "global.cert='/elsewhere.pem'\n"
        f"global.extra-index-url='file://{simple} https://pypi.example/simple'\n"
        f"global.find-links='{wheels}'\n"
        "install.user='false'\n"
    )


def test_pips_settings_reach_the_pip_in_the_build(listing: str, wheels: Path, tmp_path: Path) -> None:
    pip = pip_settings(listing)
    assert pip.folders == {"/run/pip/0": wheels.parent / "index", "/run/pip/1": wheels}
    assert str(pip.certificates) == f"{wheels}.pem"
    conf = tmp_path / "pip.conf"
    pip.write(conf)
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PIP_")},
        "PIP_CONFIG_FILE": str(conf),
    }
    env["HOME"] = env["XDG_CONFIG_HOME"] = str(tmp_path)
    read = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert "global.cert='/run/secrets/pip_cert'" in read
    assert "global.find-links='/run/pip/1'" in read
    urls = re.search(r"global.extra-index-url='(.*)'", read)[1]
    assert urls.replace("\\n", " ").split() == ["file:///run/pip/0/simple", "https://pypi.example/simple"]


def test_buildah_sees_pips_folders_and_keeps_its_secrets_out_of_the_image(listing: str, wheels: Path) -> None:
    pip = pip_settings(listing)
    builder = ["buildah", "--root", "/elsewhere"]
    words = " ".join(build_command(builder, "a:b", {"TORCH": "cpu"}, pip, Path("/pip.conf")))
    assert words.startswith("buildah --root /elsewhere build ")
    assert "--tag a:b --build-arg TORCH=cpu" in words
    assert f"--secret id=pip,src=/pip.conf --secret id=pip_cert,src={wheels}.pem" in words
    assert f"--volume {wheels}:/run/pip/1:ro" in words
    assert "pypi.example" not in words


def test_docker_says_that_it_cannot_see_pips_folders(listing: str, wheels: Path) -> None:
    with pytest.raises(ImageError, match=re.escape(str(wheels))):
        build_command(["docker"], "a:b", {}, pip_settings(listing), Path("/pip.conf"))


def test_without_settings_nothing_is_handed_to_the_build() -> None:
    words = build_command(["docker"], "a:b", {}, pip_settings("\n"), Path("/pip.conf"))
    assert words == ["docker", "build", "--file", str(REPO / "Dockerfile"), "--tag", "a:b", str(REPO)]


def test_a_machine_without_a_builder_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="apt-get install buildah"):
        find_builder()
