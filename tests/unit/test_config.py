"""The committed model-config.yaml has no problem; of another file every problem is named at once."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_sessions.config import (
    SECTIONS,
    HandlerConfig,
    MediaLimits,
    RequestLimits,
    frontend_capacity,
    max_body_bytes,
)
from llava_sessions.config_file import ConfigError, expected, read_config
from llava_sessions.errors import describe
from scripts import configuration_page

COMMITTED = Path(__file__).resolve().parents[2] / "handler" / "model-config.yaml"


@pytest.fixture
def committed() -> dict:
    return yaml.safe_load(COMMITTED.read_text())


def frontend(**changes: Any) -> dict:
    """TorchServe's own part of a file that fits 64 sessions of 20 minutes."""
    fits = {"sequenceBatching": True, "continuousBatching": True, "batchSize": 144, "maxNumSequence": 144}
    return {**fits, "sequenceTimeoutMSec": 1_320_000, "sequenceMaxIdleMSec": 1_320_000, **changes}


def with_llava(**fields: Any) -> dict:
    return {**frontend(), "llava": {"checkpoint": "checkpoint", **fields}}


def problems_of(model_yaml: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(model_yaml)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def only_problem_of(model_yaml: dict) -> str:
    problems = problems_of(model_yaml)
    assert len(problems) == 1, problems
    return problems[0]


def shown(value: Any) -> str:
    """Return a value of TorchServe's part as a message shows it."""
    return repr(value) if isinstance(value, str) else describe(value)


def key_of(problem: str) -> str:
    return problem.split("`")[1]


# --- accepted files ---


def test_the_committed_file_reads_without_problems(committed):
    config = read_config(committed)
    section = committed["llava"]
    for name in (
        "checkpoint",
        "dtype",
        "device",
        "max_sessions",
        "session_ttl_s",
        "system_prompt",
    ):
        assert getattr(config, name) == section[name]
    assert (section["prefill_chunk_tokens"], config.prefill_chunk_tokens) == ("auto", None)
    for name, value in section["limits"].items():
        assert getattr(config.limits, name) == value
    for name, value in section["media"].items():
        expected = tuple(value) if isinstance(value, list) else None if value == "auto" else value
        assert getattr(config.media, name) == expected


def test_the_committed_file_writes_the_defaults_out(committed):
    minimal = {**frontend(), "llava": {"checkpoint": committed["llava"]["checkpoint"]}}
    assert read_config(committed) == read_config(minimal)


def test_a_minimal_file_takes_every_default():
    assert read_config(with_llava()) == HandlerConfig(
        checkpoint="checkpoint",
        dtype="auto",
        device="auto",
        max_sessions=64,
        session_ttl_s=1200.0,
        session_idle_s=None,
        engine_hang_s=60.0,
        journal_dir=None,
        journal_s3_prefix=None,
        prefill_chunk_tokens=None,
        device_bytes=None,
        host_bytes=None,
        system_prompt="",
        limits=RequestLimits(),
        media=MediaLimits(),
    )


def test_a_key_without_a_value_counts_as_absent():
    empty = dict.fromkeys(("dtype", "device", "max_sessions", "session_ttl_s", "system_prompt", "limits", "media"))
    assert read_config(with_llava(**empty)) == read_config(with_llava())


def test_given_values_are_taken():
    media = {
        "allowed_hosts": ["a.example", "*.b.example"],
        "s3_buckets": ["b"],
        "local_roots": ["/data"],
        "max_bytes": 1,
    }
    limits = {"max_prompt_chars": 10, "default_new_tokens": 3, "max_new_tokens": 3, "max_pictures": 2}
    config = read_config(with_llava(max_sessions=1, session_ttl_s=1.5, dtype="float16", media=media, limits=limits))
    assert (config.max_sessions, config.session_ttl_s, config.dtype) == (1, 1.5, "float16")
    assert (config.media.allowed_hosts, config.media.local_roots) == (("a.example", "*.b.example"), ("/data",))
    assert config.limits == RequestLimits(max_prompt_chars=10, default_new_tokens=3, max_new_tokens=3, max_pictures=2)


# --- the llava section ---


@pytest.mark.parametrize("model_yaml", [{}, {"llava": None}, {"llava": []}, {"llava": "x"}, {"Llava": {}}])
def test_a_file_without_the_section_has_one_problem(model_yaml):
    assert only_problem_of(model_yaml).startswith("`llava` must be a mapping, got ")


@pytest.mark.parametrize("value", [None, "", 5, ["checkpoint"]])
def test_a_checkpoint_is_required(value):
    assert only_problem_of(with_llava(checkpoint=value)).startswith(
        "`llava.checkpoint` must be a non-empty string, got "
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("dtype", value) for value in ("bananas", "fp16", "FLOAT32", 16, True, [], {})],
        *[("weights", value) for value in ("int4", "INT8", 8, True)],
        *[("device", value) for value in (0, True, ["cpu"])],
        *[("devices", value) for value in ("cuda:0", [], ["gpu"], ["cuda"], ["cuda:00"], [0], ["cpu"] * 65, True)],
        *[("max_sessions", value) for value in (0, -1, 4097, 1.0, "64", True, [], float("nan"))],
        *[("session_ttl_s", value) for value in (0, 0.99, 86_401, "1200", True, float("nan"), float("inf"), [])],
        *[("prefill_chunk_tokens", value) for value in (0, 65_537, 2.5, "256", False, {})],
        *[("system_prompt", value) for value in (0, ["be kind"], True)],
        *[("limits", value) for value in ([], "none", 5, True)],
        *[("media", value) for value in ([], "none", 5, False)],
    ],
)
def test_a_wrong_value_is_named_by_its_key_with_the_expected_and_the_actual_value(key, value):
    problem = only_problem_of(with_llava(**{key: value}))
    assert problem == f"`llava.{key}` must be {expected(HandlerConfig.model_fields[key])}, got {shown(value)}"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *[("limits", "max_prompt_chars", value) for value in (0, -5, 10_000_001, 1.5, "9", True)],
        *[("limits", "max_new_tokens", value) for value in (0, 1_000_001, "9", True)],
        *[("limits", "default_new_tokens", value) for value in (0, 1_000_001, [], False)],
        *[("limits", "max_pictures", value) for value in (0, 1_001, "8", True)],
        *[("media", "max_bytes", value) for value in (0, 2**31 + 1, "10M", True)],
        *[("media", "max_pixels", value) for value in (0, 2**31 + 1, 1e6)],
        *[("media", "fetch_timeout_s", value) for value in (0, 0.09, 61, "10", float("nan"))],
        *[("media", "allowed_hosts", value) for value in ("a.example", [1], [""], [None], {"a": 1}, True)],
        *[("media", "s3_buckets", value) for value in ("bucket", [["a"]])],
        *[("media", "local_roots", value) for value in ("/data", [5])],
    ],
)
def test_a_wrong_value_in_an_inner_section_is_named_by_its_path(section, key, value):
    problem = only_problem_of(with_llava(**{section: {key: value}}))
    assert (
        problem
        == f"`llava.{section}.{key}` must be {expected(SECTIONS[section].model_fields[key])}, got {shown(value)}"
    )


@pytest.mark.parametrize(
    ("key", "low", "high"), [("max_sessions", 1, 60), ("prefill_chunk_tokens", 1, 65_536), ("session_ttl_s", 1, 1200)]
)
def test_both_ends_of_a_range_are_taken(key, low, high):
    for value in (low, high):
        assert getattr(read_config(with_llava(**{key: value})), key) == value


def test_a_default_answer_longer_than_the_longest_is_refused():
    problem = only_problem_of(with_llava(limits={"default_new_tokens": 11, "max_new_tokens": 10}))
    assert problem == "`llava.limits.default_new_tokens` must be at most `max_new_tokens` (10), got 11"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_session": 5}, "llava.max_session"),
        ({"Checkpoint": "x"}, "llava.Checkpoint"),
        ({7: 1}, "llava.7"),
        ({"limits": {"max_new_token": 5}}, "llava.limits.max_new_token"),
        ({"media": {"allowed_host": []}}, "llava.media.allowed_host"),
    ],
)
def test_a_misspelt_key_is_named_with_the_known_keys(fields, path):
    model_yaml = with_llava()
    model_yaml["llava"].update(fields)
    problem = only_problem_of(model_yaml)
    assert problem.startswith(f"`{path}` must be one of the keys ")
    known = problem.partition("of the keys ")[2].removesuffix(", got an unknown key").split(", ")
    assert known == sorted(known)
    assert {"llava": "max_sessions", "limits": "max_new_tokens", "media": "allowed_hosts"}[path.split(".")[-2]] in known


# --- TorchServe's part ---


def test_the_frontend_has_capacity_for_twice_the_sessions_and_16_more():
    assert frontend_capacity(64) == 144
    assert frontend_capacity(1) == 18


@pytest.mark.parametrize("key", ["sequenceBatching", "continuousBatching"])
@pytest.mark.parametrize("value", [False, None, "true", 1])
def test_both_batching_switches_must_be_on(key, value):
    assert only_problem_of({**with_llava(), key: value}) == f"`{key}` must be true, got {shown(value)}"


@pytest.mark.parametrize("value", [143, None, "144", 144.0, True])
def test_too_few_sequences_for_the_sessions_are_refused(value):
    problem = only_problem_of({**with_llava(), "maxNumSequence": value})
    least = "144 for 64 `llava.max_sessions`"
    assert problem == f"`maxNumSequence` must be an integer of at least {least}, got {shown(value)}"


@pytest.mark.parametrize("value", [143, None, "144", True])
def test_too_small_a_batch_for_the_sessions_is_refused(value):
    problems = problems_of({**with_llava(), "batchSize": value})
    least = "144 for 64 `llava.max_sessions`"
    assert f"`batchSize` must be an integer of at least {least}, got {shown(value)}" in problems


def test_more_sessions_need_more_room():
    problems = problems_of(with_llava(max_sessions=65))
    assert [key_of(problem) for problem in problems] == ["batchSize", "maxNumSequence"]
    assert read_config({**with_llava(max_sessions=65), "batchSize": 146, "maxNumSequence": 146}).max_sessions == 65


@pytest.mark.parametrize("key", ["sequenceTimeoutMSec", "sequenceMaxIdleMSec"])
@pytest.mark.parametrize("value", [1_319_999, 0, None, "1320000", 1_320_000.0])
def test_a_frontend_that_expires_sequences_before_the_handler_is_rejected(key, value):
    problem = only_problem_of({**with_llava(), key: value})
    least = "1320000 (`llava.session_ttl_s` and 120 s)"
    assert problem == f"`{key}` must be an integer of at least {least}, got {shown(value)}"


def test_a_longer_session_needs_longer_time_outs_of_the_frontend():
    model_yaml = {**with_llava(session_ttl_s=3600), "sequenceMaxIdleMSec": 3_720_000}
    assert only_problem_of(model_yaml).startswith("`sequenceTimeoutMSec` must be an integer of at least 3720000 ")


def test_more_sequences_than_the_workers_can_hold_are_refused():
    problem = only_problem_of({**with_llava(), "maxNumSequence": 145})
    assert problem == "`maxNumSequence` must be at most maxWorkers * batchSize (144), got 145"
    assert read_config({**with_llava(), "maxNumSequence": 288, "maxWorkers": 2})


# --- the body's limit ---


def test_the_longest_body_has_room_for_every_picture_and_for_a_prompt_of_escapes():
    limits = RequestLimits(max_prompt_chars=100, max_pictures=2, max_frames=3)
    media = MediaLimits(max_bytes=1_000, max_clip_bytes=1_000)
    most = max_body_bytes(limits, media)
    frames = [base64.b64encode(bytes(1_000)).decode()] * 3
    body = {"type": "start_session", "video": frames, "prompt_text": "\U0001f600" * 100}
    assert len(json.dumps(body)) < most
    assert max_body_bytes(limits, MediaLimits(max_bytes=2_000, max_clip_bytes=1_000)) > most


def test_the_longest_body_has_room_for_a_whole_conversation():
    limits = RequestLimits(
        max_prompt_chars=1, max_pictures=1, max_frames=1, max_history_chars=2_000, max_history_pictures=4
    )
    picture = {"type": "image_url", "image_url": base64.b64encode(bytes(1_000)).decode()}
    text = {"type": "text", "text": "\U0001f600" * 2_000}
    body = {"messages": [{"role": "user", "content": [text, *[picture] * 4]}]}
    media = MediaLimits(max_bytes=1_000, max_clip_bytes=1_000)
    assert len(json.dumps(body)) < max_body_bytes(limits, media)
    more = limits.model_copy(update={"max_history_pictures": 5})
    assert max_body_bytes(more, media) > max_body_bytes(limits, media)


def test_the_longest_body_has_room_for_clips():
    limits = RequestLimits(
        max_prompt_chars=1, max_pictures=1, max_frames=3, max_history_chars=1, max_history_pictures=2
    )
    of_files = MediaLimits(max_bytes=1, max_clip_bytes=100_000)
    of_frames = MediaLimits(max_bytes=100_000, max_clip_bytes=1)
    file = base64.b64encode(bytes(100_000)).decode()
    clip = {"type": "video_url", "video_url": {"url": file}}
    frames = {"type": "video_url", "video_url": {"url": ",".join([file] * 3)}}
    for media, part in ((of_files, clip), (of_frames, frames)):
        body = {"messages": [{"role": "user", "content": [part, part]}]}
        assert len(json.dumps(body)) < max_body_bytes(limits, media)


def test_the_default_of_frames_is_at_most_their_limit():
    assert RequestLimits().default_frames == 8
    assert RequestLimits(max_frames=4).default_frames == 4
    assert read_config(with_llava(limits={"max_frames": 4, "default_frames": None})).limits.default_frames == 4
    problem = only_problem_of(with_llava(limits={"max_frames": 4, "default_frames": 5}))
    assert problem == "`llava.limits.default_frames` must be at most `max_frames` (4), got 5"
    assert only_problem_of(with_llava(limits={"max_frames": 0})).startswith("`llava.limits.max_frames` must be ")


@pytest.mark.parametrize("key", ["allow_system", "share_pictures"])
def test_a_switch_is_true_or_false(committed, key):
    committed["llava"][key] = False
    assert getattr(read_config(committed), key) is False
    for value in ("no", 0, 1.0):
        committed["llava"][key] = value
        with pytest.raises(ConfigError, match=f"^`llava.{key}` must be true or false, got "):
            read_config(committed)


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"], ["cuda:0", "cuda:3"]])
def test_a_list_of_devices_is_taken(devices: list[str]) -> None:
    assert read_config(with_llava(devices=devices)).devices == tuple(devices)
    assert read_config(with_llava(devices="auto")).devices is None


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"devices": ["cpu"], "device": "cpu"}, "`llava.devices` must be auto with `llava.device` cpu, got cpu"),
        ({"devices": ["cuda:1", "cuda:1"]}, "`llava.devices` must name each GPU once, got cuda:1, cuda:1"),
        ({"devices": ["cuda:0", "cpu"]}, "`llava.devices` must be GPUs only or CPUs only, got cuda:0, cpu"),
    ],
)
def test_a_list_of_devices_that_cannot_work_is_a_problem(section: dict, problem: str) -> None:
    assert only_problem_of(with_llava(**section)) == problem


def test_a_list_of_devices_needs_one_worker() -> None:
    config = {**with_llava(devices=["cpu", "cpu"]), "maxWorkers": 2}
    assert only_problem_of(config) == "`maxWorkers` must be 1 with a list of `llava.devices`, got 2"


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_int8_weights_on_a_gpu_need_16_bits(device: str) -> None:
    for dtype in ("auto", "bfloat16", "float16"):
        assert read_config(with_llava(weights="int8", device=device, dtype=dtype)).weights == "int8"
    problem = only_problem_of(with_llava(weights="int8", device=device, dtype="float32"))
    assert problem == "`llava.dtype` must be auto, bfloat16 or float16 with int8 weights, got 'float32'"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_int8_weights_on_a_cpu_need_bfloat16(dtype: str) -> None:
    problem = only_problem_of(with_llava(weights="int8", device="cpu", dtype=dtype))
    assert problem == f"`llava.dtype` must be auto or bfloat16 with int8 weights on a CPU, got '{dtype}'"
    assert only_problem_of(with_llava(weights="int8", devices=["cpu", "cpu"], dtype=dtype)) == problem
    assert read_config(with_llava(weights="int8", device="cpu")).weights == "int8"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_int8_caches_go_with_every_device_and_precision(device: str, dtype: str) -> None:
    assert read_config(with_llava(kv_dtype="int8", device=device, dtype=dtype)).kv_dtype == "int8"
    problem = only_problem_of(with_llava(kv_dtype="fp8", device=device, dtype=dtype))
    assert problem == "`llava.kv_dtype` must be one of auto, int8, got 'fp8'"


# --- all at once ---


def test_every_problem_is_named_at_once(committed):
    wrong = copy.deepcopy(committed)
    wrong["llava"].update(checkpoint="", dtype="int3", device=5, max_sessions="many", session_ttl_s=-1, colour="red")
    wrong["llava"].update(prefill_chunk_tokens=0, system_prompt=1)
    wrong["llava"]["limits"].update(max_prompt_chars=None, max_new_tokens="all", tokens=1)
    wrong["llava"]["media"].update(max_bytes=0, allowed_hosts="any")
    wrong.update(sequenceBatching=False, batchSize=1, sequenceTimeoutMSec=None)
    assert {key_of(problem) for problem in problems_of(wrong)} == {
        *(
            "llava.checkpoint",
            "llava.dtype",
            "llava.device",
            "llava.max_sessions",
            "llava.session_ttl_s",
            "llava.colour",
        ),
        *("llava.prefill_chunk_tokens", "llava.system_prompt", "llava.limits.max_new_tokens", "llava.limits.tokens"),
        *("llava.media.max_bytes", "llava.media.allowed_hosts"),
        *("sequenceBatching", "batchSize", "maxNumSequence", "sequenceTimeoutMSec"),
    }


def test_reading_changes_nothing_in_what_was_read(committed):
    before = copy.deepcopy(committed)
    read_config(committed)
    assert committed == before


# --- documentation ---


def test_the_configuration_page_is_up_to_date():
    page = COMMITTED.parents[1] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == configuration_page.page()


def test_every_key_has_a_description():
    assert all(
        field.description for section in (HandlerConfig, *SECTIONS.values()) for field in section.model_fields.values()
    )
