"""The engine on a CUDA device: answers in all precisions and families, memory, kernels.

Run by a person with a GPU: `pytest -m cuda`. Without one, the tests with a device run on the CPU instead, so that they
keep running.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_day.attention import Batch, Heads, kernel, relative_error
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.device import native_dtype
from llava_sessions.engine.process import load
from llava_sessions.ipc.messages import EngineSettings, Sampling
from tests.support.device_chats import DeviceChats
from tests.support.tiny_families import FAMILIES

HAS_CUDA = torch.cuda.is_available()
ON_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]
QUESTIONS = ["what is the red circle doing?", "and the blue square near it?", "two green stars?"]
DTYPES = ["float32", "float16", "bfloat16"]
FAMILY_NAMES = ["llava", "next-mistral", "onevision", "internvl3.5"]
_HEADS = (Heads(32, 32, 128), Heads(32, 8, 128), Heads(28, 4, 128), Heads(14, 2, 64), Heads(4, 2, 16))


def on_cuda(*values: object) -> object:
    """Return a parameter set on CUDA."""
    return pytest.param("cuda", *values, marks=ON_CUDA)


cuda_only = pytest.mark.parametrize("device", [on_cuda()])
both = pytest.mark.parametrize("device", [on_cuda(), "cpu"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    return {name: FAMILIES[name](tmp_path_factory.mktemp(name)) for name in FAMILY_NAMES}


# --- answers ---


@pytest.mark.parametrize(
    ("device", "dtype", "family"),
    [
        *(on_cuda(dtype, family) for dtype in DTYPES for family in FAMILY_NAMES),
        ("cpu", "float32", "next-mistral"),
        ("cpu", "float32", "onevision"),
        ("cpu", "float32", "internvl3.5"),
    ],
)
def test_answers_in_a_shared_batch_are_those_of_transformers(
    checkpoints: dict[str, Path], device: str, dtype: str, family: str
) -> None:
    """With several pictures, and with a later one. The others are still answering when the next session joins."""
    chats = DeviceChats(checkpoints[family], device, dtype)
    for name, seeds in {"one": (1,), "pair": (2, 3), "twin": (1,)}.items():
        chats.open(name, *seeds)
    for turn, question in enumerate(QUESTIONS):
        answers = {}
        for count, name in enumerate(chats.conversations):
            more = (5,) if (turn, name) == (1, "one") else ()
            chats.ask(name, f"{question} {name}", Sampling(6 + count), *more)
            answers |= chats.run(steps=2)
        answers |= chats.run()
        assert answers.keys() == chats.conversations.keys()
        for name, answer in answers.items():
            chats.check(name, answer)
    assert len({tuple(chats.conversations[name].token_ids) for name in chats.conversations}) == 3


@pytest.mark.parametrize(("device", "dtype"), [*(on_cuda(dtype) for dtype in DTYPES), ("cpu", "float32")])
def test_answers_are_the_same_after_offloading_and_rebuilding(
    checkpoints: dict[str, Path], device: str, dtype: str
) -> None:
    chats = DeviceChats(checkpoints["next-mistral"], device, dtype)
    shape = chats.model.kv_shape
    names = [f"s{index}" for index in range(6)]
    for index, name in enumerate(names):
        chats.open(name, index)
    chats.run()
    device_bytes = chats.engine.memory().features_bytes + 2 * shape.device_bytes(256)  # one or two sessions
    chats.engine.device_memory.budget = DeviceBudget(device_bytes, 2 * shape.host_bytes(100))
    for index in (0, 1, 2, 0, 3, 4, 5, 1, 2):  # session 0 comes back from the host, the last two are rebuilt
        name = names[index]
        chats.ask(name, QUESTIONS[index % 3], Sampling(6))
        chats.check(name, chats.run()[name])
    held = chats.engine.memory()
    assert all((held.offloads, held.restores, held.drops))
    assert not chats.refused()


@pytest.mark.parametrize(
    ("device", "dtype", "int8"),
    [
        on_cuda("float16", {"kv_dtype": "int8"}),
        on_cuda("float16", {"weights": "int8"}),
        on_cuda("bfloat16", {"weights": "int8", "kv_dtype": "int8"}),
        ("cpu", "float32", {"kv_dtype": "int8"}),
    ],
    ids=str,
)
def test_int8_changes_no_answer_much(
    checkpoints: dict[str, Path], device: str, dtype: str, int8: dict[str, str]
) -> None:
    chats = DeviceChats(checkpoints["next-mistral"], device, dtype, **int8)
    for name in "abc":
        chats.open(name, ord(name))
        chats.ask(name, QUESTIONS[0], Sampling(8))
    for name, answer in chats.run().items():
        chats.check(name, answer)
        chats.engine.sessions[name].kv.offload()
        chats.ask(name, QUESTIONS[1], Sampling(8))
    for name, answer in chats.run().items():
        chats.check(name, answer)
    assert chats.engine.memory().restores == 3


@cuda_only
def test_decode_steps_run_as_graphs(checkpoints: dict[str, Path], device: str) -> None:
    """While caches grow, and after one has left the device."""
    chats = DeviceChats(checkpoints["next-mistral"], device)
    assert chats.model.graphs is not None
    for turn in range(3):
        for name in "abc":
            if not turn:
                chats.open(name, ord(name))
            chats.ask(name, QUESTIONS[turn] * 4, Sampling(40))
        for name, answer in chats.run().items():
            chats.check(name, answer)
        chats.engine.sessions["b"].kv.offload()
    assert chats.model.graphs.is_on
    assert chats.model.graphs.replays > 60


@both
def test_seeded_sampling_does_not_depend_on_the_batch(tiny: Path, device: str) -> None:
    sampling = Sampling(12, temperature=1.5, top_p=0.9, seed=7)
    alone = DeviceChats(tiny, device)
    alone.open("a", 1)
    alone.ask("a", QUESTIONS[0], sampling)
    expected = alone.run()["a"]
    chats = DeviceChats(tiny, device)
    answers = {}
    for index, name in enumerate("bcad"):
        chats.open(name, 1 if name == "a" else index + 10)
        chats.ask(name, QUESTIONS[0], sampling if name == "a" else Sampling(12, temperature=1.0, seed=index))
        answers |= chats.run(steps=1)
    answers |= chats.run()
    assert answers["a"] == expected
    assert len({tuple(answer) for answer in answers.values()}) == 4


# --- kernels ---


@pytest.mark.parametrize(
    ("device", "heads", "dtype"),
    [
        *(on_cuda(heads, dtype) for heads in (*_HEADS, Heads(32, 8, 128, normed=True)) for dtype in DTYPES),
        ("cpu", Heads(4, 2, 16), "float32"),
    ],
    ids=str,
)
def test_attention_of_single_tokens_has_the_numbers_of_float64(device: str, heads: Heads, dtype: str) -> None:
    batch = Batch(heads, [0, 1, 127, 128, 129, 700], getattr(torch, dtype), torch.device(device))
    attend = kernel(heads, batch.dtype, batch.device)
    found = batch.run(attend, attend.task(batch.places())).clone()
    for row in range(len(batch.stored)):
        attended, key, value = batch.expected(row)
        stored_key, stored_value = batch.stored_new(row)
        assert relative_error(found[row], attended) < (5e-6 if dtype == "float32" else 1e-2)
        assert relative_error(stored_key, key) < (5e-6 if dtype == "float32" else 1e-2)
        assert torch.equal(stored_value, value)
        assert batch.is_untouched(row)
        assert torch.equal(batch.run(attend, attend.task(batch.places([row])))[row], found[row])


@pytest.mark.skipif(HAS_CUDA and torch.cuda.get_device_capability() < (8, 0), reason="flash attention needs sm80")
@pytest.mark.parametrize(("device", "dtype"), [on_cuda("float16"), on_cuda("bfloat16")])
def test_all_attention_of_an_answer_is_flash_attention(tiny: Path, device: str, dtype: str) -> None:
    """With fewer KV heads than query heads, in the first and in later chunks, and without cuDNN's plans."""
    chats = DeviceChats(tiny, device, dtype, chunk=16)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # another backend is an error
        chats.open("a", 1)
        chats.ask("a", QUESTIONS[0] * 4, Sampling(8))
        assert chats.run().keys() == {"a"}


@cuda_only
def test_the_fused_layers_are_used(tiny: Path, device: str) -> None:
    assert DeviceChats(tiny, device).model.token_attention is not None


# --- memory ---


@cuda_only
def test_offloaded_kv_is_in_pinned_memory(tiny: Path, device: str) -> None:
    chats = DeviceChats(tiny, device)
    chats.open("a", 1)
    chats.run()
    kv = chats.engine.sessions["a"].kv
    kv.offload()
    assert kv.tier == "offloaded"
    assert kv.on_host is not None
    assert all(part.is_pinned() for block in kv.on_host for part in block)


@cuda_only
def test_closing_frees_the_device_memory(tiny: Path, device: str) -> None:
    chats = DeviceChats(tiny, device)
    before = torch.cuda.memory_allocated()
    for index in range(4):
        chats.open(f"s{index}", index)
    chats.run()
    assert torch.cuda.memory_allocated() > before
    for index in range(4):
        chats.close(f"s{index}")
    chats.run()
    assert torch.cuda.memory_allocated() == before


@cuda_only
def test_a_cache_moves_within_its_budget(tiny: Path, device: str) -> None:
    chats = DeviceChats(tiny, device)
    chats.open("a", 1)
    chats.run()
    kv = chats.engine.sessions["a"].kv
    kv.reserve(64 * 256)
    kv.length = 60 * 256
    cache_bytes = kv.device_bytes
    for move in (kv.offload, kv.restore):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        move()
        torch.cuda.synchronize()
        added = cache_bytes if move == kv.restore else 0
        layers = chats.model.kv_shape.layers
        assert torch.cuda.max_memory_allocated() <= before + added + cache_bytes / layers + 2**20


@cuda_only
def test_no_session_is_lost_if_the_device_has_less_memory_than_the_budget(tiny: Path, device: str) -> None:
    chats = DeviceChats(tiny, device, budget=DeviceBudget(2**40, 2**30))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    failed = torch.cuda.memory_stats().get("num_ooms", 0)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
    try:
        names = [f"s{index}" for index in range(120)]  # 256 KiB of KV each
        for index, name in enumerate(names):
            chats.open(name, index % 3)
            chats.ask(name, QUESTIONS[0], Sampling(4))
        answers = chats.run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_stats()["num_ooms"] > failed, "memory did not run out: the test is void"
    assert len(answers) + len({event.session_id for event in chats.refused()}) == len(names)
    assert not [event for event in chats.events if "Failed" in type(event).__name__]
    for name, answer in answers.items():
        chats.check(name, answer)


@pytest.mark.parametrize(
    ("device", "dtype", "family"), [*(on_cuda("auto", family) for family in FAMILY_NAMES), ("cpu", "float32", "llava")]
)
def test_an_engine_starts_with_its_own_budget_and_precision(
    checkpoints: dict[str, Path], device: str, dtype: str, family: str
) -> None:
    settings = EngineSettings(
        str(checkpoints[family]), system_prompt="", dtype=dtype, device=device, prefill_chunk_tokens=256
    )
    engine = load(settings)
    if dtype == "auto":
        assert engine.model.dtype == native_dtype(torch.device(device), torch.bfloat16)
    budget = engine.device_memory.budget
    assert budget.device_bytes > 2**28
    if device == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        assert 0.9 * free - 2**30 <= budget.device_bytes <= free
