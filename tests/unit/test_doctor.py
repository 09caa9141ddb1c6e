"""`doctor` names each problem of a machine, a checkpoint or a configuration with its remedy: real broken inputs."""

from __future__ import annotations

import ctypes
import http.server
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deploy.doctor import (
    checkpoint,
    configuration,
    findings,
    gpu,
    headers,
    live,
    machine,
    ports,
    resources,
    settings,
    software,
)
from deploy.doctor.findings import GIB, MIB, Finding, Subject
from deploy.doctor.frontend_keys import MODEL_KEYS, PROPERTIES
from deploy.doctor.machine import Memory
from deploy.doctor.sizes import Sizes, SizesError
from deploy.pack import source
from deploy.sagemaker import command as llava_deploy
from deploy.sagemaker.capacity import SHAPES as PUBLISHED
from deploy.serve import haproxy, java
from deploy.serve.ports import choose_ports, first_unprivileged
from deploy.serve.processes import ServeError
from llava_sessions.config import MAX_REQUEST_BYTES, HandlerConfig
from llava_sessions.protocol.constants import CLOSED_SESSION_HEADER, NEW_SESSION_HEADER, SESSION_HEADER

REPO = Path(__file__).parents[2]
SHAPES = REPO / "models" / "shapes"
CONFIG = REPO / "handler" / "model-config.yaml"
FIRST_UNPRIVILEGED = first_unprivileged()


def levels(found: Iterator[Finding]) -> dict[str, str]:
    """The findings that need action, as `{level: all lines}`."""
    lines: dict[str, str] = {"warning": "", "error": ""}
    for finding in found:
        if finding.level != "ok":
            assert finding.remedy, finding
            lines[finding.level] += finding.line() + "\n"
    return lines


def program(folder: Path, name: str, text: str, status: int = 0) -> str:
    """Write a program that prints a text; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'TEXT'\n{text}\nTEXT\nexit {status}\n")
    path.chmod(0o755)
    return str(folder)


def without_capabilities(call: Callable[[], Any]) -> Any:
    """Call in a thread that has no capabilities, as a user other than root."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_drop_capabilities).result()
        return pool.submit(call).result()


def _drop_capabilities() -> None:
    """Drop the capabilities of this thread: the kernel has them by thread. See capset(2)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the structure; this thread
    assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0


def edited(folder: Path, source: Path, changes: Mapping[str, str]) -> Path:
    """Copy a configuration with other values of some keys. A key that is not there is added at the end."""
    text = source.read_text()
    for key, value in changes.items():
        text, found = re.subn(rf"^( *{re.escape(key)}[:=] ?)[^#\n]*", rf"\g<1>{value} ", text, flags=re.MULTILINE)
        text += "" if found else f"{key}: {value}\n"
    path = folder / source.name
    path.write_text(text)
    return path


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A copy of the demo model that a test may damage."""
    folder = tmp_path / "shapes"
    shutil.copytree(SHAPES, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


# --- the whole command ------------------------------------------------------------------------------------------------


def test_this_checkout_has_no_problem_of_its_own() -> None:
    subject = Subject(model=str(SHAPES), environment=dict(os.environ))
    for check in (
        software.check_packages,
        checkpoint.check_checkpoint,
        checkpoint.check_dtype,
        configuration.check_configuration,
        configuration.check_properties,
        headers.check_headers,
    ):
        found = list(check(subject))
        assert [finding.level for finding in found] == ["ok"], found


def test_the_report_ends_with_1_after_an_error_and_is_json_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert llava_deploy.main(["doctor", "--model", "/no/such/folder", "--port", "0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    reported = [Finding(**finding) for finding in report["findings"]]
    assert report["error"] == sum(finding.level == "error" for finding in reported) > 0
    (finding,) = [finding for finding in reported if finding.check == "checkpoint"]
    assert finding.line() == (
        "error    checkpoint     there is no folder /no/such/folder  "
        "->  give --model (MODEL=) the folder of a checkpoint, or an ID on the hub"
    )


def test_without_packages_it_still_runs_and_says_how_to_install_them() -> None:
    """As `make doctor` before `make env`: with the Python of the system."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from deploy.doctor.command import main; sys.exit(main([]))"
    words = [sys.executable, "-I", "-S", "-c", code, str(REPO)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^error +packages +not installed: torchserve, .*->  run: make env$", done.stdout, re.MULTILINE)
    assert re.search(r"^ok +python ", done.stdout, re.MULTILINE)
    assert not done.stderr


# --- programs and packages --------------------------------------------------------------------------------------------


def test_packages_are_compared_with_the_pins(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text("# a comment\npyyaml==1.0\nno-such-package==2.0\npsutil[test]==3.1  # an extra\n")
    assert software.read_pins(pins) == {"pyyaml": "1.0", "no-such-package": "2.0", "psutil": "3.1"}
    errors = levels(software.check_packages(Subject(), pins))["error"]
    assert "not installed: no-such-package  ->  run: make env" in errors
    assert "pyyaml must be 1.0, got " in errors


def test_an_old_and_a_missing_java_are_errors(tmp_path: Path) -> None:
    program(tmp_path / "old" / "bin", "java", 'openjdk version "11.0.2" 2019-01-15')
    old = Subject(environment={"JAVA_HOME": str(tmp_path / "old")})
    assert "Java must be 17 or later, got 11" in levels(software.check_java(old))["error"]
    assert "JAVA_HOME is" in levels(software.check_java(old))["error"]
    missing = levels(software.check_java(Subject(environment={"PATH": str(tmp_path)})))["error"]
    assert "Java is not found  ->  install Java 17 or later" in missing
    program(tmp_path / "8" / "bin", "java", 'java version "1.8.0_292"')
    eight = Subject(environment={"JAVA_HOME": str(tmp_path / "8")})
    assert "got 1.8.0_292 at" in levels(software.check_java(eight))["error"]
    broken = Subject(environment={"PATH": program(tmp_path / "broken", "java", "no Java here", 1)})
    assert "a program without a version" in levels(software.check_java(broken))["error"]


def test_an_old_haproxy_is_a_warning(tmp_path: Path) -> None:
    path = program(tmp_path, "haproxy", "HAProxy version 2.4.22-0ubuntu0 2023/01/01")
    found = levels(software.check_haproxy(Subject(environment={"PATH": path})))
    assert "HAProxy must be 2.6 or later, got 2.4.22-0ubuntu0: it is not used" in found["warning"]


def test_the_limits_are_those_of_the_code_that_enforces_them() -> None:
    assert haproxy.MIN_HAPROXY == software._MIN_HAPROXY
    assert java.MIN_JAVA == software._MIN_JAVA
    assert configuration.MAX_BODY_BYTES == MAX_REQUEST_BYTES
    assert headers.HEADERS == (SESSION_HEADER, NEW_SESSION_HEADER, CLOSED_SESSION_HEADER)
    assert HandlerConfig.model_fields["engine_hang_s"].default == configuration.DEFAULTS["engine_hang_s"]
    assert HandlerConfig.model_fields["session_ttl_s"].default == configuration.DEFAULTS["session_ttl_s"]


# --- ports ------------------------------------------------------------------------------------------------------------


def test_a_privileged_port_is_an_error_that_names_the_first_other_one() -> None:
    port = FIRST_UNPRIVILEGED - 1
    if port < 1:
        pytest.skip("any user may listen on all ports here")
    found = without_capabilities(lambda: levels(ports.check_ports(Subject(port=port))))
    assert f"port {port} (front) is privileged, and this user may not listen there" in found["error"]
    assert f"choose --port from {FIRST_UNPRIVILEGED} on" in found["error"]
    assert f"port {port + 1} " not in found["error"]
    with pytest.raises(ServeError, match=rf"port {port} \(front\) is privileged"):
        without_capabilities(lambda: choose_ports(port, "front"))


def test_a_used_port_is_an_error_with_the_process_that_holds_it() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        errors = levels(ports.check_ports(Subject(port=port)))["error"]
    assert f"port {port} (" in errors
    assert f"(process {os.getpid()})" in errors
    assert "choose another --port" in errors


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_is_an_error(shapes: Path) -> None:
    weights = shapes / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    errors = levels(checkpoint.check_checkpoint(Subject(model=str(shapes))))["error"]
    assert "truncated or damaged  ->  copy or download the checkpoint again" in errors


def test_a_pointer_of_git_lfs_is_an_error(shapes: Path) -> None:
    (shapes / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    errors = levels(checkpoint.check_checkpoint(Subject(model=str(shapes))))["error"]
    assert "model.safetensors is a git-lfs pointer" in errors
    assert "git lfs pull" in errors


def test_every_missing_part_of_a_checkpoint_is_named(shapes: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (shapes / name).unlink()
    (shapes / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    errors = levels(checkpoint.check_checkpoint(Subject(model=str(shapes))))["error"]
    for problem in ("no tokenizer", "no chat template", "model-00001-of-00002.safetensors is missing"):
        assert problem in errors


def test_another_family_is_an_error_with_those_that_are_served(shapes: Path) -> None:
    config = json.loads((shapes / "config.json").read_text())
    (shapes / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    errors = levels(checkpoint.check_checkpoint(Subject(model=str(shapes))))["error"]
    assert "got 'qwen2_vl'; Qwen2-VL is not served: its positions have three axes (M-RoPE)" in errors
    assert f"choose a checkpoint of a served family in place of {shapes}: LLaVA-1.5, " in errors
    (shapes / "config.json").write_text(json.dumps(config | {"model_type": "internvl_chat"}))
    errors = levels(checkpoint.check_checkpoint(Subject(model=str(shapes))))["error"]
    assert "->  give --model (MODEL=) the twin" in errors


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            "models",
            "models has folders of checkpoints, and is none itself  ->  give --model (MODEL=) one of them: shapes",
        ),
        ("models/shapes/config.json", "config.json is not a folder"),
        ("llava-hf/llava 1.5", f"there is no folder {REPO}/llava-hf/llava 1.5"),
        ("~no-such-user/model", "there is no folder "),
        ("", "the checkpoint must be a folder or an ID on the hub, got ''"),
    ],
)
def test_a_model_that_is_neither_a_folder_nor_an_id_is_an_error(
    monkeypatch: pytest.MonkeyPatch, model: str, problem: str
) -> None:
    monkeypatch.chdir(REPO)
    assert problem in levels(checkpoint.check_checkpoint(Subject(model=model)))["error"]


def test_a_name_that_is_no_folder_next_to_others_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing takes it as an ID on the hub, so it may be correct."""
    monkeypatch.chdir(REPO)
    found = levels(checkpoint.check_checkpoint(Subject(model="models/shape")))
    assert f"there is no folder {REPO}/models/shape: packing looks for models/shape on the hub  -> " in found["warning"]
    assert f", such as {REPO}/models/shapes" in found["warning"]
    assert found["error"] == ""


def test_a_long_name_of_a_model_is_an_id() -> None:
    assert "is an ID on the hub" in levels(checkpoint.check_checkpoint(Subject(model="x" * 300)))["warning"]
    assert findings.HUB_ID.pattern == source._HUB_ID.pattern


def test_a_number_that_is_no_size_is_an_error_of_the_checkpoint_only(shapes: Path) -> None:
    config = json.loads((shapes / "config.json").read_text())

    def write(section: str, change: object) -> None:
        value = {**config[section], **change} if isinstance(change, dict) else change
        (shapes / "config.json").write_text(json.dumps({**config, section: value}))

    for section, change, problem in (
        ("text_config", {"num_attention_heads": 0}, "`num_attention_heads` must be an integer from 1, got 0"),
        ("vision_config", {"patch_size": 0}, "`patch_size` must be an integer from 1, got 0"),
        ("text_config", 5, "`text_config` must be an object, got int"),
    ):
        write(section, change)
        with pytest.raises(SizesError, match=re.escape(f"config.json: {problem}")):
            Sizes.read(shapes)
    write("text_config", {"hidden_size": "x"})
    subject = Subject(model=str(shapes))
    assert "`hidden_size` must be an integer from 1, got 'x'" in levels(checkpoint.check_checkpoint(subject))["error"]
    assert [*checkpoint.check_dtype(subject), *resources.check_memory(subject)] == []


def test_an_id_on_the_hub_is_only_announced() -> None:
    found = levels(checkpoint.check_checkpoint(Subject(model="llava-hf/llava-1.5-7b-hf")))
    assert "packing downloads and checks it" in found["warning"]


def test_a_slow_dtype_is_a_warning() -> None:
    found = levels(checkpoint.check_dtype(Subject(model=str(SHAPES), dtype="float16", device="cpu")))
    assert "float16 is chosen for a CPU" in found["warning"]


def test_sizes_are_those_of_the_published_checkpoint(tmp_path: Path) -> None:
    """LLaVA-1.5-7B: its config.json omits what transformers has as defaults. The capacity table has its sizes."""
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "torch_dtype": "float16"}}
    config["vision_config"] = {"image_size": 336, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = Sizes.read(tmp_path)
    assert sizes.kv_numbers * 2 == PUBLISHED[0].kv_token_bytes
    assert sizes.features_bytes("float16") == PUBLISHED[0].features_bytes
    tokens = PUBLISHED[0].picture_tokens + 1024
    assert sizes.session_bytes("float16") == PUBLISHED[0].features_bytes + PUBLISHED[0].kv_bytes(tokens)
    int8 = sizes.session_bytes("float16", "int8") - sizes.features_bytes("float16")
    assert int8 == PUBLISHED[0].kv_bytes(tokens) * (128 + 4) // (128 * 2), "a scale of 4 bytes for 128 numbers"


def test_weights_in_int8_count_a_byte(tmp_path: Path) -> None:
    def weights(value: str) -> int:
        config = edited(tmp_path, CONFIG, {"weights": value})
        chosen = settings.read(Subject(config=config, dtype="bfloat16", device="cpu"))
        assert chosen is not None
        return resources.demand_of(chosen, sizes, Memory(GIB, GIB, "the machine"), []).weights

    sizes = Sizes.read(SHAPES)
    assert 1_700_000 < sizes.linear_numbers < sizes.stored_bytes // 2
    assert weights("auto") - weights("int8") == sizes.linear_numbers - 4 * sizes.linear_outputs


# --- memory, disk, processes ------------------------------------------------------------------------------------------


def test_weights_beyond_memory_and_disk_are_errors(shapes: Path) -> None:
    """A sparse file of 8 TiB with a true header: complete, and too large for this machine."""
    size = 8 * 2**40
    header = json.dumps({"w": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with (shapes / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    subject = Subject(model=str(shapes), output=shapes / "store", device="cpu")
    assert "the server needs 8193.7 GiB to start" in levels(resources.check_memory(subject))["error"]
    assert "for the packed model, which need 8193.0 GiB" in levels(resources.check_disk(subject))["error"]


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    values = {"memory.max": 64 * MIB, "memory.current": 32 * MIB, "memory.stat": f"anon 1\ninactive_file {8 * MIB}"}
    for name, value in values.items():
        (group / name).write_text(f"{value}\n")
    memory = Memory.read(tmp_path)
    assert (memory.total, memory.free) == (64 * MIB, 40 * MIB)
    chosen = settings.read(Subject())
    assert chosen is not None
    demand = resources.demand_of(chosen, Sizes.read(SHAPES), memory, [])
    errors = levels(resources.start_problems(demand, memory))["error"]
    assert f"40.0 MiB of 64.0 MiB are free (the control group ({group}/memory.max))" in errors


def test_a_budget_that_holds_no_session_is_an_error_and_one_for_few_a_warning(tmp_path: Path) -> None:
    def found(device_bytes: int, sessions: int = 64, kv_dtype: str = "auto") -> dict[str, str]:
        config = edited(tmp_path, CONFIG, {"device_bytes": str(device_bytes), "kv_dtype": kv_dtype})
        chosen = settings.read(Subject(config=config, dtype="float32", device="cpu", sessions=sessions))
        assert chosen is not None
        memory = Memory(64 * GIB, 64 * GIB, "the machine")
        demand = resources.demand_of(chosen, sizes, memory, [])
        return levels(resources.session_problems(demand, memory, chosen.sessions))

    sizes = Sizes.read(SHAPES)
    one = sizes.session_bytes("float32")
    assert "opens would get 429" in found(one - 1)["error"]
    room = one // sizes.features_bytes("float32")
    assert f"features of {room} sessions fit in memory, of {room + 1} configured" in found(one, room + 1)["warning"]
    assert found(64 * one) == {"warning": "", "error": ""}
    in_int8 = sizes.session_bytes("float32", "int8")
    assert in_int8 < one
    assert "opens would get 429" in found(in_int8 - 1, 1, "int8")["error"]
    assert found(in_int8, 1, "int8")["error"] == ""


@pytest.mark.parametrize("value", ["-1", "true", "1e9", "8 GB"])
def test_a_malformed_budget_is_an_error_of_the_configuration_only(tmp_path: Path, value: str) -> None:
    subject = Subject(model=str(SHAPES), config=edited(tmp_path, CONFIG, {"device_bytes": value}), device="cpu")
    assert [finding.check for finding in resources.check_memory(subject)] == ["memory"]
    chosen = settings.read(subject)
    assert chosen is not None
    assert chosen.device_bytes is None
    if value == "-1":
        errors = levels(configuration.check_configuration(subject))["error"]
        assert "`llava.device_bytes` must be auto or an integer from 0 to 1125899906842624, got -1" in errors


def test_a_limit_of_processes_below_the_sequences_is_an_error(tmp_path: Path) -> None:
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "pids.max").write_text("300\n")
    (group / "pids.current").write_text("100\n")
    assert (
        "200 more processes and threads are allowed here"
        in levels(resources.check_processes(Subject(), tmp_path))["error"]
    )
    (group / "pids.max").write_text("max\n")
    assert list(resources.check_processes(Subject(), tmp_path)) == []


def test_bfloat16_is_read_from_the_flags_of_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    for flags, expected in (("fpu avx2", False), ("fpu avx512_bf16 avx2", True)):
        (tmp_path / "proc" / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        assert machine.has_bfloat16(tmp_path) is expected


# --- the GPU ----------------------------------------------------------------------------------------------------------

SMI = "NVIDIA A10G, 470.57.02, 22731, 22000"


def test_a_gpu_that_is_chosen_and_absent_is_an_error(tmp_path: Path) -> None:
    subject = Subject(device="cuda", environment={"PATH": str(tmp_path)})
    assert "device cuda is configured, and nvidia-smi finds no GPU" in levels(gpu.check_gpu(subject))["error"]
    two = Subject(device="cuda:1", environment={"PATH": program(tmp_path, "nvidia-smi", SMI)})
    assert "device cuda:1 is configured, and this machine has 1 GPUs" in levels(gpu.check_gpu(two))["error"]
    odd = Subject(device="cuda:one", environment=two.environment)
    assert "must be auto, cpu, cuda or cuda:N, got 'cuda:one'" in levels(gpu.check_gpu(odd))["error"]
    unknown = Subject(device="gpu", environment=two.environment)
    assert "must be auto, cpu, cuda or cuda:N, got 'gpu'" in levels(gpu.check_gpu(unknown))["error"]


def test_each_device_of_a_list_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_cuda", lambda: "13.0")
    two = "\n".join(f"NVIDIA A10G, 580.10, 22731, {free}" for free in (22000, 21000))
    environment = {"PATH": program(tmp_path, "nvidia-smi", two)}

    def subject(devices: str) -> Subject:
        return Subject(config=edited(tmp_path, CONFIG, {"devices": devices}), environment=environment)

    three = list(gpu.check_gpu(subject("[cuda:0, cuda:2]")))
    assert "device cuda:2 is configured, and this machine has 2 GPUs" in levels(three)["error"]
    free_bytes = [card.free // MIB for card in settings.cards(subject("auto"), read(subject("auto")))]
    assert free_bytes == [22000, 21000]
    second = settings.cards(subject("[cuda:1]"), read(subject("[cuda:1]")))
    assert [card.free // MIB for card in second] == [21000]
    assert len(list(gpu.check_gpu(subject("auto")))) == 2
    sizes = Sizes.read(SHAPES)
    memory = Memory(64 * GIB, 64 * GIB, "the machine")
    one = resources.demand_of(read(subject("[cpu]")), sizes, memory, [])
    both = resources.demand_of(read(subject("[cpu, cpu]")), sizes, memory, [])
    assert (both.weights, both.device, both.engines) == (2 * one.weights, one.device // 2, 2)


def read(subject: Subject) -> settings.Settings:
    chosen = settings.read(subject)
    assert chosen is not None
    return chosen


def test_a_driver_that_is_older_than_torch_needs_is_an_error(tmp_path: Path) -> None:
    cards = machine.gpus(program(tmp_path, "nvidia-smi", SMI))
    assert cards == [machine.Gpu("NVIDIA A10G", "470.57.02", 22731 * MIB, 22000 * MIB)]
    assert "torch's CUDA 13.0 needs driver 580 or later, got 470.57.02" in levels(gpu._usable(cards, "13.0"))["error"]
    assert machine.gpus(program(tmp_path, "nvidia-smi", "NVIDIA-SMI has failed", 9)) is None
    (shared,) = machine.gpus(program(tmp_path, "nvidia-smi", "NVIDIA GB10, 580.95.05, [N/A], [N/A]"))
    assert shared.total == Memory.read().total, "it shares the machine's memory"


# --- the configuration ------------------------------------------------------------------------------------------------


def test_every_contradiction_of_a_configuration_is_named(tmp_path: Path) -> None:
    changes = {
        "minWorkers": "2",
        "responseTimeout": "30",
        "sequenceTimeoutMSec": "60000",
        "maxNumSequence": "9999",
        "sequenceMaxIdleMsec": "1320000",
        "session_idle_s": "2000",
        "journal_dir": "journal",
        "journal_s3_prefix": "s3://bucket",
        "default_deadline_ms": "90000",
        "max_bytes": "31457280",
        "max_clip_bytes": "41943040",
        "max_request_pixels": "1000",
        "local_roots": "[/no/such/folder]",
        "prefill_chunk_tokens": "0",
    }
    found = levels(configuration.check_configuration(Subject(config=edited(tmp_path, CONFIG, changes))))
    for problem in (
        "`llava.prefill_chunk_tokens` must be auto or an integer from 1 to 65536, got",
        "`sequenceTimeoutMSec` must be an integer of at least 1320000",
        "`minWorkers` must be at most `maxWorkers` (1), got 2",
        "`responseTimeout` must be longer than `llava.engine_hang_s` (60 s), got 30 s",
        "`llava.journal_dir` must be an absolute path, got 'journal'",
        "`llava.journal_s3_prefix` must be s3://<bucket>/<prefix>, got 's3://bucket'",
    ):
        assert problem in found["error"], problem
    for problem in (
        "`maxNumSequence` must be at most maxWorkers * batchSize (272), got 9999  ->  build_mar.sh corrects it",
        "TorchServe ignores the unknown key `sequenceMaxIdleMsec`  ->  write `sequenceMaxIdleMSec`",
        "`llava.session_idle_s` (2000) has no effect",
        "`llava.journal_dir` and `llava.journal_s3_prefix` are both set",
        "`llava.limits.default_deadline_ms` is 90000: SageMaker gives up after 60000",
        "`llava.media.max_bytes` is 31457280, and a request holds a picture of at most 25165824",
        "`llava.media.max_clip_bytes` is 41943040, and a request holds a clip of at most 25165824",
        "`llava.media.max_pixels` (40000000) is above `llava.media.max_request_pixels` (1000)",
        "`llava.media.local_roots` has /no/such/folder, which is not a folder",
    ):
        assert problem in found["warning"], problem


def test_a_number_of_the_frontend_that_is_none_is_an_error(tmp_path: Path) -> None:
    changes = {
        "minWorkers": "-1",
        "responseTimeout": "abc",
        "startupTimeout": "0",
        "maxBatchDelay": "0",
        "maxRetryTimeoutInSec": "-1",
    }
    found = levels(configuration.check_configuration(Subject(config=edited(tmp_path, CONFIG, changes))))["error"]
    for key, value in changes.items():
        least = 0 if key == "maxRetryTimeoutInSec" else 1
        assert f"`{key}` must be an integer from {least}, got {value if value != 'abc' else repr(value)}  " in found


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"engine_hang_s": ".inf"}, "`llava.engine_hang_s` must be a number from 3 to 3600, got inf"),
        ({"local_roots": "5"}, "`llava.media.local_roots` must be a list of non-empty strings, got 5"),
        ({"default_deadline_ms": ".inf"}, "`llava.limits.default_deadline_ms` must be an integer from 1 to 600000"),
        ({"journal_dir": "/dev/null/journal"}, "cannot be made: /dev/null is not a folder"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_problem(tmp_path: Path, changes: dict[str, str], problem: str) -> None:
    found = levels(configuration.check_configuration(Subject(config=edited(tmp_path, CONFIG, changes))))
    assert problem in found["error"]
    assert found["error"].count("\n") == 1
    assert found["warning"] == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("llava: [", "is not YAML"),
        ("minWorkers: 1\n", "has no `llava:` section"),
        ("batchSize: 1\nmaxNumSequence: 1\nllava:\n  max_sessions: none\n", "must be an integer from 1, got 'none'"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_an_error(tmp_path: Path, text: str | bytes, problem: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    errors = levels(configuration.check_configuration(Subject(config=path)))["error"]
    assert problem in errors
    assert "handler/model-config.yaml" in errors, "a file that exists"
    assert "cannot be read" in levels(configuration.check_configuration(Subject(config=tmp_path / "no")))["error"]


def test_properties_and_variables_that_do_not_fit_are_named(tmp_path: Path) -> None:
    changes = {
        "max_request_size": "6553500",
        "default_workers_per_model": "2",
        "disable_token_authorization": "false",
        "job_queue_size": "many",
    }
    path = edited(tmp_path, REPO / "config.properties", changes)
    path.write_text(path.read_text() + "jobqueue_size=5\n")
    variables = {"CORS_ORIGINS": "example.com", "PUBLIC_METRICS": "yes", "TS_CONFIG_FILE": "/etc/other"}
    found = levels(configuration.check_properties(Subject(properties=path, environment=variables)))
    assert "`max_request_size` must be at least 33554432, as in HAProxy, got 6553500" in found["error"]
    assert "`default_workers_per_model` must be 1, got 2" in found["error"]
    assert "`disable_token_authorization` must be true" in found["error"]
    assert "`job_queue_size` must be an integer below 2147483648, got 'many'" in found["error"]
    assert "CORS_ORIGINS must be origins such as https://example.com" in found["error"]
    assert "PUBLIC_METRICS must be on or off, got 'yes'" in found["error"]
    assert "unknown key `jobqueue_size`  ->  write `job_queue_size`" in found["warning"]
    assert "TS_CONFIG_FILE is /etc/other" in found["warning"]


def test_a_number_that_java_cannot_read_is_one_error(tmp_path: Path) -> None:
    path = edited(tmp_path, REPO / "config.properties", {"max_request_size": "99999999999"})
    errors = levels(configuration.check_properties(Subject(properties=path)))["error"]
    assert "`max_request_size` must be an integer below 2147483648, got '99999999999'" in errors
    assert errors.count("\n") == 1


def test_torchserve_reads_every_key_of_the_lists() -> None:
    spec = find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).parent / "frontend" / "model-server.jar") as jar:
        model = jar.read("org/pytorch/serve/archive/model/ModelConfig.class")
        manager = jar.read("org/pytorch/serve/util/ConfigManager.class")
    assert [key for key in MODEL_KEYS if key.encode() not in model] == []
    # torchserve's launcher, a Python program, reads this one.
    assert [key for key in PROPERTIES - {"vmargs"} if key.encode() not in manager] == []


# --- headers ----------------------------------------------------------------------------------------------------------


def test_headers_that_disagree_are_errors(tmp_path: Path) -> None:
    changes = {"ts_header_key_sequence_id": "ts_request_sequence_id"}
    properties = edited(tmp_path, REPO / "config.properties", changes)
    worker_env = tmp_path / "local.env"
    worker_env.write_text("export TS_REQUEST_SEQUENCE_ID=x-amzn-sagemaker-session-id\n")
    found = levels(headers.check_headers(Subject(properties=properties, worker_env=worker_env)))["error"]
    assert "ts_header_key_sequence_id must be X-Amzn-SageMaker-Session-Id, got ts_request_sequence_id" in found
    assert "TS_REQUEST_SEQUENCE_ID must be X-Amzn-SageMaker-Session-Id, got x-amzn-sagemaker-session-id" in found
    assert "TS_REQUEST_SEQUENCE_END must be X-Amzn-SageMaker-Closed-Session-Id, got (unset)" in found


def test_a_spelling_that_haproxy_lacks_is_a_problem(tmp_path: Path) -> None:
    text = (REPO / "deploy" / "serve" / "sessions.cfg").read_text()
    rules = tmp_path / "sessions.cfg"
    rules.write_text(re.sub(r"^ *h1-case-adjust x-amzn-sagemaker-session-id.*\n", "", text, flags=re.MULTILINE))
    (problem,) = headers.haproxy_problems((rules,))
    assert problem.endswith("x-amzn-sagemaker-session-id as X-Amzn-SageMaker-Session-Id, got (no rule)")
    assert headers.haproxy_problems(haproxy.CONFIGS) == []


@pytest.mark.skipif(haproxy.find_haproxy() is None, reason="no HAProxy")
def test_rules_that_haproxy_rejects_are_an_error(tmp_path: Path) -> None:
    rules = tmp_path / "front.cfg"
    rules.write_text((REPO / "deploy" / "serve" / "front.cfg").read_text() + "\nfrontend\n    bind :nothing\n")
    subject = Subject(environment=dict(os.environ))
    assert levels(headers.check_haproxy_rules(subject)) == {"warning": "", "error": ""}
    broken = levels(headers.check_haproxy_rules(subject, (haproxy.CONFIGS[0], rules)))
    assert "HAProxy rejects its rules:" in broken["error"]


# --- a running server -------------------------------------------------------------------------------------------------


class SilentServer(http.server.ThreadingHTTPServer):
    """A server of one session that never answers the requests of a type, or a close of another session."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, silent_to: str) -> None:
        self.silent_to = silent_to
        self.closed: list[str] = []
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), Answering)

    def is_silent(self, body: dict[str, Any], session: str) -> bool:
        """Return whether the request gets no answer."""
        return self.silent_to == ("unknown" if session.startswith("doctor-") else body.get("type"))


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers one connection."""

    server: SilentServer

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        session = self.headers.get(SESSION_HEADER, "")
        if self.server.is_silent(body, session):
            self.server.over.wait()
        elif body.get("type") == "close_session":
            self.server.closed.append(session or body["session_id"])
            self._answer({CLOSED_SESSION_HEADER: session})
        else:
            self._answer({SESSION_HEADER: "one"})

    def _answer(self, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.mark.parametrize(
    ("silent_to", "problem", "times"),
    [
        ("unknown", "a close of an unknown session has no answer after {} s", 1),
        ("send_text_prompt", "a question in the session has no answer after {} s", 3),
    ],
)
def test_a_request_without_an_answer_is_named_and_the_session_closed(silent_to: str, problem: str, times: int) -> None:
    for timeout_s in (0.2, 2.0, 20.0):  # on a busy machine the other requests take longer
        with SilentServer(silent_to) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            found = list(live.check_live(Subject(port=server.server_port, is_live=True), timeout_s=timeout_s))
            server.over.set()
            server.shutdown()
            thread.join()
        if found[-1].found == problem.format(f"{timeout_s * times:g}") and server.closed == ["one"]:
            break
    assert found[-1].found == problem.format(f"{timeout_s * times:g}")
    assert "restart the server" in found[-1].remedy
    assert server.closed == ["one"]


def test_a_running_server_needs_a_port() -> None:
    (finding,) = live.check_live(Subject(port=0, is_live=True))
    assert finding.level == "error"
    assert finding.found == "--live must have the port of a server that runs, got 0"
