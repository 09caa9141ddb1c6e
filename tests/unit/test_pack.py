"""The build kit: what is refused and in which words, what travels, and what the archive's configuration says.

The checkpoint is made here (a real safetensors file, small); the archiver is the real one. Knows nothing of the handler
but its place in the tree: a stand-in is packed, so that these tests do not change with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from deploy import pack as kit
from deploy import versions
from deploy.pack import PackError, PackJob
from deploy.pack.families import TABLE

REPO = Path(__file__).resolve().parents[2]
CONFIG = """\
# Workers and batching.
minWorkers: 1
batchSize: 144   # twice the sessions, and room
sequenceBatching: true
maxNumSequence: 144
llava:
  # What is served.
  checkpoint: checkpoint     # folder in the archive, absolute path, or hub id
  dtype: auto
  device: auto

  max_sessions: 64  # open at once
other:
  dtype: untouched
"""


# The stand-in's check of a checkpoint: it refuses a folder that has a file `refuse-STAGE`, in the words of that file.
CHECK = """
import json, pathlib, sys

words = pathlib.Path(sys.argv[2]) / f"refuse-{sys.argv[1]}"
print(json.dumps(words.read_text().splitlines() if words.exists() else []))
"""


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-source"
    folder.mkdir()
    save_file({"a": np.zeros((64, 64), np.float32), "b": np.ones(3, np.float16)}, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
    write_json(folder / "processor_config.json", {"image_processor": {}})
    write_json(folder / "tokenizer.json", {})
    write_json(folder / "tokenizer_config.json", {})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for stranger in ("train.py", "README.md", "pytorch_model.bin", "optimizer.safetensors"):
        (folder / stranger).write_text("not to be packed")
    return folder


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    (checkpoint / "model.safetensors").unlink()
    for number, name in enumerate("ab", 1):
        save_file({name: np.full(100, number, np.float32)}, checkpoint / f"model-0000{number}-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(checkpoint / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return checkpoint


@pytest.fixture
def job(tmp_path: Path, checkpoint: Path) -> PackJob:
    handler = tmp_path / "handler"
    (handler / "llava_sessions" / "engine" / "__pycache__").mkdir(parents=True)
    (handler / "llava_handler.py").write_text("class Handler:\n    pass\n")
    (handler / "llava_sessions" / "__init__.py").write_text("")
    (handler / "llava_sessions" / "engine" / "__init__.py").write_text("")
    (handler / "llava_sessions" / "engine" / "checkpoint.py").write_text(CHECK)
    (handler / "llava_sessions" / "text").mkdir()
    (handler / "llava_sessions" / "text" / "families.toml").write_bytes(TABLE.read_bytes())
    (handler / "llava_sessions" / "engine" / "__pycache__" / "x.cpython-311.pyc").write_text("")
    (handler / "model-config.yaml").write_text(CONFIG)
    return PackJob(
        model=str(checkpoint), config=handler / "model-config.yaml", output=tmp_path / "store", handler=handler
    )


# --- the archive ------------------------------------------------------------------------------------------------------

TRAVELS = {
    "llava_handler.py",
    "model-config.yaml",
    "llava_sessions/__init__.py",
    "llava_sessions/engine/__init__.py",
    "llava_sessions/engine/checkpoint.py",
    "llava_sessions/text/families.toml",
    "checkpoint/config.json",
    "checkpoint/processor_config.json",
    "checkpoint/tokenizer.json",
    "checkpoint/tokenizer_config.json",
    "checkpoint/chat_template.jinja",
    "checkpoint/model.safetensors",
}


@pytest.mark.parametrize(
    ("kind", "file_name"), [("no-archive", "chat"), ("default", "chat.mar"), ("tgz", "chat.tar.gz")]
)
def test_each_format_holds_the_handler_and_the_checkpoint_and_nothing_else(
    job: PackJob, kind: str, file_name: str, checkpoint: Path
) -> None:
    packed = kit.pack_model(replace(job, format=kind, name="chat", version="2.1"))

    assert packed.archive == job.output / file_name
    assert archives(job.output) == [file_name], "no scratch folder stays behind"
    sizes, manifest = kit.read_archive(packed.archive, kind)
    assert set(sizes) == TRAVELS
    assert sizes["checkpoint/model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert manifest["model"]["modelName"] == "chat"
    assert manifest["model"]["handler"] == "llava_handler.py"
    assert manifest["model"]["modelVersion"] == "2.1"


def test_packed_weights_are_a_copy_that_a_later_training_run_cannot_change(job: PackJob, checkpoint: Path) -> None:
    archive = kit.pack_model(job).archive
    packed = archive / "checkpoint" / "model.safetensors"
    before = packed.read_bytes()
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.write(b"changed in place")
    assert packed.read_bytes() == before


def test_shards_travel_with_their_index(job: PackJob, sharded: Path) -> None:
    sizes, _ = kit.read_archive(kit.pack_model(job).archive, "no-archive")
    weights = {name for name in sizes if "safetensors" in name}
    assert weights == {
        "checkpoint/model.safetensors.index.json",
        "checkpoint/model-00001-of-00002.safetensors",
        "checkpoint/model-00002-of-00002.safetensors",
    }


def test_weights_beside_leave_the_checkpoint_where_it_is(job: PackJob, checkpoint: Path) -> None:
    packed = kit.pack_model(replace(job, weights="beside"))
    sizes, _ = kit.read_archive(packed.archive, "no-archive")
    assert not [name for name in sizes if name.startswith("checkpoint/")]
    config = yaml.safe_load((packed.archive / "model-config.yaml").read_text())
    assert config["llava"]["checkpoint"] == str(checkpoint)


def test_hub_id_beside_is_written_down_and_not_fetched(job: PackJob) -> None:
    packed = kit.pack_model(replace(job, model="some-org/llava-1.5-7b", weights="beside"))
    config = yaml.safe_load((packed.archive / "model-config.yaml").read_text())
    assert config["llava"]["checkpoint"] == "some-org/llava-1.5-7b"


def test_hub_id_that_cannot_be_fetched_says_so(job: PackJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PackError, match=r"(?s)nobody/no-such-model is neither a folder nor.*offline\?"):
        kit.pack_model(replace(job, model="nobody/no-such-model"))


class Hub(ThreadingHTTPServer):
    """A hub with one repository, whose files are those of a folder. `fetched`: the names of files by GET."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubRequest)
        self.folder = folder
        self.fetched: list[str] = []


class _HubRequest(BaseHTTPRequestHandler):
    """One request of the hub's client, of a repository org/name."""

    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        sha = "a" * 40
        files = sorted(self.server.folder.iterdir())
        if path == "/api/models/org/name/revision/main":
            body = json.dumps({"id": "org/name", "sha": sha, "siblings": []}).encode()
        elif path == f"/api/models/org/name/tree/{sha}":
            sizes = [{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": one.name} for one in files]
            body = json.dumps(sizes).encode()
        else:
            name = path.removeprefix(f"/org/name/resolve/{sha}/")
            body = (self.server.folder / name).read_bytes()
            if self.command == "GET":
                self.server.fetched.append(name)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{zlib.crc32(body):x}"')  # the client names its files by it
        self.send_header("X-Repo-Commit", sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(checkpoint)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    files = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_weights_of_a_hub_id_are_fetched_only_for_a_kind_that_is_served(hub: Hub, job: PackJob) -> None:
    hub_job = replace(job, model="org/name", handler=REPO / "handler", try_loading=False)
    config = json.loads((hub.folder / "config.json").read_text())
    write_json(hub.folder / "config.json", config | {"model_type": "internvl_chat"})
    with pytest.raises(PackError, match="InternVL in its authors' own format is not served"):
        kit.pack_model(hub_job)
    assert "config.json" in hub.fetched
    assert "model.safetensors" not in hub.fetched


def test_a_hub_id_is_fetched_and_packed(hub: Hub, job: PackJob) -> None:
    sizes, _ = kit.read_archive(kit.pack_model(replace(job, model="org/name")).archive, "no-archive")
    assert set(sizes) == TRAVELS
    assert hub.fetched.count("model.safetensors") == 1
    assert "pytorch_model.bin" not in hub.fetched


def test_packing_again_replaces_the_archive_whole(job: PackJob) -> None:
    archive = kit.pack_model(job).archive
    (archive / "left-over.txt").write_text("from the run before")
    kit.pack_model(replace(job, sessions=8))
    assert not (archive / "left-over.txt").exists()
    assert yaml.safe_load((archive / "model-config.yaml").read_text())["llava"]["max_sessions"] == 8


def test_another_format_of_the_name_goes_and_other_names_stay(job: PackJob) -> None:
    kit.pack_model(replace(job, format="default"))
    kit.pack_model(replace(job, format="tgz", name="other"))
    packed = kit.pack_model(job)
    assert packed.removed == (job.output / "llava.mar",)
    assert archives(job.output) == ["llava", "other.tar.gz"]
    assert len(versions_of(job)) == 2, "the version of the other format went too"


def test_a_failed_run_leaves_the_old_archive_alone(job: PackJob, checkpoint: Path) -> None:
    archive = kit.pack_model(job).archive
    before = sorted(path.name for path in archive.rglob("*"))
    (checkpoint / "config.json").unlink()
    with pytest.raises(PackError):
        kit.pack_model(job)
    assert sorted(path.name for path in archive.rglob("*")) == before
    assert archives(job.output) == ["llava"]


def test_a_folder_named_like_the_model_in_the_temp_folder_survives(
    job: PackJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bystander = tmp_path / "temp" / "llava" / "precious.txt"
    bystander.parent.mkdir(parents=True)
    bystander.write_text("the archiver deletes $TMPDIR/<model-name>")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    kit.pack_model(job)
    assert bystander.exists()


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "-dash", "a.b", "ä"])
def test_model_names_are_plain(job: PackJob, name: str) -> None:
    with pytest.raises(PackError, match="letters, digits"):
        kit.pack_model(replace(job, name=name))


# --- versions ---------------------------------------------------------------------------------------------------------


def archives(store: Path) -> list[str]:
    """Return the names in a model store that a server could be given."""
    return sorted(path.name for path in store.iterdir() if path.name != versions.VERSIONS)


def versions_of(job: PackJob) -> list[Path]:
    return list((job.output / versions.VERSIONS).glob("*/*"))


def test_a_server_keeps_the_version_that_it_holds_until_it_ends(job: PackJob) -> None:
    kit.pack_model(replace(job, sessions=3))
    held = versions.hold(job.archive)
    for sessions in (4, 5):
        kit.pack_model(replace(job, sessions=sessions))
        assert "max_sessions: 3" in (held.path / "model-config.yaml").read_text()
        assert f"max_sessions: {sessions}" in (job.archive / "model-config.yaml").read_text()
    assert len(versions_of(job)) == 2, "that of 4 sessions was used by nobody"
    held.release()
    kit.pack_model(job)
    assert len(versions_of(job)) == 1
    assert not held.path.exists()


def test_a_server_that_is_killed_holds_nothing(job: PackJob) -> None:
    kit.pack_model(job)
    code = "import pathlib, sys; from deploy import versions; held = versions.hold(pathlib.Path(sys.argv[1])); "
    code += "print(flush=True); input()"
    command = [sys.executable, "-c", code, str(job.archive)]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout
        server.stdout.readline()
        kit.pack_model(job)
        assert len(versions_of(job)) == 2
        server.kill()
        server.wait()
    kit.pack_model(job)
    assert len(versions_of(job)) == 1


def test_the_link_is_switched_and_never_absent(job: PackJob, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.pack_model(job)
    seen: list[bool] = []
    monkeypatch.setattr(Path, "unlink", lambda path, **_: seen.append(path == job.archive))
    kit.pack_model(job)
    assert True not in seen
    assert job.archive.is_symlink()
    assert not os.path.isabs(os.readlink(job.archive)), "the store can be moved and mounted"


def test_a_folder_of_a_release_without_versions_is_replaced(job: PackJob) -> None:
    (job.archive / "checkpoint").mkdir(parents=True)
    assert (kit.pack_model(job).archive / "MAR-INF").is_dir()
    assert archives(job.output) == ["llava"]


def test_the_scratch_folder_of_a_killed_packer_is_removed_and_that_of_a_running_one_stays(job: PackJob) -> None:
    killed = job.output / f"{versions.SCRATCH}killed"
    killed.mkdir(parents=True)
    (killed / versions.LOCK).touch()
    with versions.scratch(job.output) as running:
        kit.pack_model(job)
        assert running.exists()
    assert archives(job.output) == ["llava"]


# --- for SageMaker ----------------------------------------------------------------------------------------------------


def test_for_sagemaker_the_folder_is_the_archive_itself(job: PackJob) -> None:
    packed = kit.pack_model(replace(job, sagemaker=True))
    assert packed.archive == job.output / "llava.sagemaker"
    files = {path.relative_to(packed.archive).as_posix() for path in packed.archive.rglob("*") if path.is_file()}
    assert files == TRAVELS | {"MAR-INF/MANIFEST.json"}
    assert not [path for path in packed.archive.rglob("*") if path.is_symlink()]
    modes = {path.stat().st_mode & 0o777 for path in packed.archive.rglob("*") if path.is_file()}
    assert modes == {0o644}, "the container's user is not the one who packed"
    config = yaml.safe_load((packed.archive / "model-config.yaml").read_text())
    assert config["llava"]["checkpoint"] == "checkpoint"


def test_the_tarball_for_sagemaker_unpacks_into_the_same_folder(job: PackJob, tmp_path: Path) -> None:
    folder = kit.pack_model(replace(job, sagemaker=True)).archive
    wanted = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    packed = kit.pack_model(replace(job, sagemaker=True, format="tgz"))
    assert packed.archive == folder, "one takes the other's place: only one of them is uploaded"
    assert [path.name for path in packed.archive.iterdir()] == ["model.tar.gz"]
    with tarfile.open(packed.archive / "model.tar.gz") as tarball:
        assert {member.uname for member in tarball} == {"root"}
        tarball.extractall(tmp_path / "opt-ml-model", filter="data")
    root = tmp_path / "opt-ml-model"
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {**found, "MAR-INF/MANIFEST.json": b""} == {**wanted, "MAR-INF/MANIFEST.json": b""}, "but for the time of it"


def test_archives_for_here_and_for_sagemaker_lie_side_by_side(job: PackJob) -> None:
    kit.pack_model(replace(job, format="default"))
    kit.pack_model(replace(job, sagemaker=True))
    kit.pack_model(replace(job, format="default"))
    assert archives(job.output) == ["llava.mar", "llava.sagemaker"]


@pytest.mark.parametrize(("change", "words"), [({"weights": "beside"}, "inside"), ({"format": "default"}, "tgz")])
def test_what_an_endpoint_could_not_load_is_refused(job: PackJob, change: dict[str, str], words: str) -> None:
    with pytest.raises(PackError, match=words):
        kit.pack_model(replace(job, sagemaker=True, **change))
    assert not job.output.exists()


# --- the configuration ------------------------------------------------------------------------------------------------


def test_config_gets_our_values_and_keeps_its_comments(job: PackJob) -> None:
    packed = kit.pack_model(replace(job, sessions=20, dtype="bfloat16", device="cuda"))
    text = (packed.archive / "model-config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["batchSize"] == config["maxNumSequence"] == 184  # 2 * (20 + 64) + 16
    assert config["llava"] == {"checkpoint": "checkpoint", "dtype": "bfloat16", "device": "cuda", "max_sessions": 20}
    assert config["other"] == {"dtype": "untouched"}
    assert packed.sessions == 20
    for comment in ("# Workers and batching.", "# twice the sessions, and room", "# What is served.", "# open at once"):
        assert comment in text


def test_what_is_not_asked_for_stays_as_the_file_says(job: PackJob) -> None:
    job.config.write_text(CONFIG.replace("dtype: auto", "dtype: float16").replace("batchSize: 144", "batchSize: 1"))
    config = yaml.safe_load((kit.pack_model(job).archive / "model-config.yaml").read_text())
    assert config["llava"]["dtype"] == "float16"
    assert config["llava"]["max_sessions"] == 64
    assert config["batchSize"] == config["maxNumSequence"] == 272


def test_paths_with_odd_characters_survive_the_rendering() -> None:
    text, _ = kit.render_config(CONFIG, {"checkpoint": "/models/it's #1: llava"}, 2)
    assert yaml.safe_load(text)["llava"]["checkpoint"] == "/models/it's #1: llava"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CONFIG.replace("maxNumSequence: 144\n", ""), "maxNumSequence"),
        (CONFIG.replace("  device: auto\n", ""), r"llava\.device"),
        (CONFIG.replace("llava:", "lava:"), "no `llava:` section"),
        (
            CONFIG.replace("max_sessions: 64", "max_sessions: many"),
            "an integer from 1, got 'many'",
        ),
        ("a: [", "not YAML"),
        ("batchSize: 1\nmaxNumSequence: 1\nllava: {checkpoint: x, device: y, max_sessions: 1}", "cannot edit"),
    ],
)
def test_a_config_that_cannot_be_rendered_is_refused(text: str, words: str) -> None:
    with pytest.raises(PackError, match=words):
        kit.render_config(text, {"checkpoint": "checkpoint", "device": "cpu"}, None)


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_has_no_problems(checkpoint: Path) -> None:
    assert kit.checkpoint_problems(checkpoint) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


Break = Callable[[Path], object]
BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "config a list": (lambda d: write_json(d / "config.json", []), "holds no JSON object"),
    "no picture processor": (lambda d: write_json(d / "processor_config.json", {}), "no picture processor"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
    "no chat template": (lambda d: (d / "chat_template.jinja").unlink(), "no chat template"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights: model.safetensors"),
    "weights cut short": (lambda d: cut(d / "model.safetensors"), "truncated or damaged"),
    "weights empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "no safetensors file"),
    "weights are text": (lambda d: (d / "model.safetensors").write_text("hello, " * 99), "no safetensors file"),
    "weights a pointer": (lambda d: pointer(d / "model.safetensors"), "model.safetensors is a git-lfs pointer"),
    "tokenizer a pointer": (lambda d: pointer(d / "tokenizer.json"), "tokenizer.json is a git-lfs pointer"),
    "config a pointer": (lambda d: pointer(d / "config.json"), "config.json is a git-lfs pointer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_problem_of_a_checkpoint_is_named(checkpoint: Path, case: str) -> None:
    damage, words = BROKEN[case]
    damage(checkpoint)
    problems = kit.checkpoint_problems(checkpoint)
    assert len(problems) == 1
    assert words in problems[0]


def test_processors_in_files_of_their_own_are_packed(job: PackJob, checkpoint: Path) -> None:
    write_json(checkpoint / "processor_config.json", {})
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        write_json(checkpoint / name, {"size": {}})
    sizes, _ = kit.read_archive(kit.pack_model(job).archive, "no-archive")
    extra = {"checkpoint/preprocessor_config.json", "checkpoint/video_preprocessor_config.json"}
    assert set(sizes) == TRAVELS | extra


def test_what_the_handler_can_not_load_is_refused_in_its_words(job: PackJob, checkpoint: Path) -> None:
    (checkpoint / "refuse-load").write_text("model.safetensors lacks 4 tensors\n")
    with pytest.raises(PackError) as refused:
        kit.pack_model(job)
    assert refused.value.problems == ["model.safetensors lacks 4 tensors"]
    (checkpoint / "refuse-files").write_text("this is a LoRA adapter\n")
    (checkpoint / "config.json").unlink()
    with pytest.raises(PackError) as refused:
        kit.pack_model(replace(job, weights="beside"))
    assert refused.value.problems == ["this is a LoRA adapter"], "and not that config.json is missing"
    assert not job.output.exists()


def test_problems_of_shards_are_named_each(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    save_file({"c": np.zeros(2, np.float32)}, sharded / "model-00002-of-00002.safetensors")
    problems = kit.checkpoint_problems(sharded)
    assert problems == [
        "model-00001-of-00002.safetensors is missing, but model.safetensors.index.json names it",
        "model-00002-of-00002.safetensors lacks 1 tensors of the index, b first",
    ]


def test_an_index_cannot_reach_out_of_the_folder(sharded: Path) -> None:
    write_json(sharded / "model.safetensors.index.json", {"weight_map": {"a": "../../etc/passwd"}})
    assert "not a file of this folder" in kit.checkpoint_problems(sharded)[0]
    assert all(path.parent == sharded for path in kit.checkpoint_files(sharded))


# --- the command ------------------------------------------------------------------------------------------------------


def build_mar(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The script as a user calls it, from another folder."""
    return subprocess.run([REPO / "build_mar.sh", *args], capture_output=True, text=True, cwd=cwd, check=False)


def test_all_problems_come_at_once_with_exit_code_2(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "chat_template.jinja").unlink()
    cut(checkpoint / "model.safetensors")
    done = build_mar("--model", str(checkpoint), "--output", "store", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    for words in ("no tokenizer", "no chat template", "truncated"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


def test_help_names_every_option(tmp_path: Path) -> None:
    done = build_mar("--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in (
        "--sagemaker",
        "--model",
        "--name",
        "--format",
        "--dtype",
        "--device",
        "--weights",
        "--sessions",
        "--config",
    ):
        assert option in done.stdout


def test_the_command_packs_the_real_handler_and_says_how_to_serve_it(tmp_path: Path) -> None:
    done = build_mar("--model", str(REPO / "models" / "shapes"), "--output", "store", "--sessions", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "store/llava" in done.stdout
    assert "up to 3 sessions" in done.stdout
    assert "torchserve --start --foreground --ncs" in done.stdout
    assert "--models llava" in done.stdout
    # What was packed imports as TorchServe's worker imports it: from the archive alone.
    code = "import llava_sessions.protocol; print(llava_sessions.__file__)\n"
    code += "from llava_sessions.text.families import families; assert families()"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "store/llava", env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str((tmp_path / "store/llava").resolve()))
