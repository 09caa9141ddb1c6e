"""Settings for a CUDA device: precision, current device, attention kernels and masks. CUDA's own answers are fakes."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForImageTextToText

from llava_sessions.engine import attention
from llava_sessions.engine.attention import Segment, causal_mask
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.content import FeatureStore
from llava_sessions.engine.cpu import attention as cpu_attention
from llava_sessions.engine.cuda.compiler_cache import choose_cache_folder
from llava_sessions.engine.device import (
    MissingDevice,
    check_exists,
    native_dtype,
    prepare,
    share_cores,
    takes_grouped_heads,
)
from llava_sessions.engine.kv import KVShape, SessionKV
from llava_sessions.engine.memory import DeviceMemory
from llava_sessions.engine.model import Model

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Forget cached answers, and keep the process's setting for cuDNN."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    takes_grouped_heads.cache_clear()
    yield
    takes_grouped_heads.cache_clear()
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home folder that does not exist yet, without a configured folder for Triton, and a temporary folder."""
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "home"


def test_triton_keeps_its_own_folder_if_that_is_writable(home: Path) -> None:
    choose_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == ""
    assert (home / ".triton").is_dir()


def test_triton_uses_a_private_temporary_folder_without_a_writable_home(home: Path) -> None:
    home.touch()  # a file: no folder can be made in it, not even by root
    choose_cache_folder()
    first = Path(os.environ["TRITON_CACHE_DIR"])
    assert first.parent == home.parent / "temporary"
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    os.environ["TRITON_CACHE_DIR"] = ""
    choose_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == str(first), "a restart finds the compiled kernels again"
    os.environ["TRITON_CACHE_DIR"] = ""
    first.chmod(0o777)
    choose_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] != str(first), "another user could have written there"


def test_a_configured_folder_of_triton_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    choose_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == "/somewhere"
    assert not home.exists()


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Record the devices that are made current."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    return devices


@pytest.mark.parametrize(
    ("stored", "has_bfloat16", "expected"),
    [
        (torch.float16, True, torch.float16),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float16),
        (torch.float32, True, torch.bfloat16),
        (torch.float32, False, torch.float16),
        (None, True, torch.bfloat16),
    ],
)
def test_a_checkpoint_keeps_its_16_bit_precision_on_cuda(
    stored: torch.dtype | None, has_bfloat16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert native_dtype(CUDA, stored) == expected


def test_the_precision_on_a_cpu_does_not_depend_on_the_checkpoint() -> None:
    assert native_dtype(CPU, torch.float16) == native_dtype(CPU, torch.float32) == native_dtype(CPU)


@pytest.mark.parametrize(
    ("configured", "expected"), [("auto", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_a_float16_checkpoint_is_loaded_as_configured(
    tiny: Path,
    tmp_path: Path,
    configured: str,
    expected: torch.dtype,
    current: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On `cuda:1`, which becomes the current device before any question about it."""
    shutil.copytree(tiny, tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "half/config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    loads: list[dict[str, Any]] = []

    def load(*_: Any, **options: Any) -> None:
        loads.append(options)
        raise StopIteration  # there is no such device here

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bool(current))
    with pytest.raises(StopIteration):
        Model.load(tmp_path / "half", configured, "cuda:1")
    assert (loads[0]["dtype"], loads[0]["device_map"]) == (expected, {"": "cuda:1"})
    assert current == [torch.device("cuda:1")]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_without_an_index_the_current_device_stays(current: list[torch.device]) -> None:
    prepare(CUDA)
    assert not current
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_cpu_changes_no_setting(current: list[torch.device]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare(CPU)
    assert not current
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("device", "expected"), [(CUDA, 7), (CPU, 0)], ids=str)
def test_memory_that_torch_has_taken_is_reported(
    device: torch.device, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7)
    memory = DeviceMemory(
        DeviceBudget(1, 1),
        sessions={},
        features=FeatureStore(),
        kv_shape=KVShape(1, 1, 8, torch.float16, device),
        feature_bytes=1,
        context_tokens=1,
    )
    usage = memory.usage(allocated_bytes=5)
    assert (usage.allocated_bytes, usage.reserved_bytes) == (5, expected)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((7, 5), torch.float16, False),
        ((8, 0), torch.float16, True),
        ((8, 6), torch.bfloat16, True),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
    ],
)
def test_only_flash_attention_takes_grouped_heads(
    capability: tuple[int, int], dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert takes_grouped_heads(CUDA, dtype) is expected
    assert takes_grouped_heads(CPU, dtype)


@pytest.mark.parametrize(("stored", "new"), [(1, 2), (7, 5), (300, 64)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_mask_on_cuda_hides_what_the_bool_mask_hides(stored: int, new: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(stored)
    with torch.inference_mode():
        query = torch.randn(1, 4, new, 16, generator=generator)
        keys, values = torch.randn(2, 1, kv_heads, stored + new, 16, generator=generator)
        mask = causal_mask(stored, new, CUDA)
        assert isinstance(mask, CausalBias)
        attended = cpu_attention.attention(query, keys, values, 0.25, mask)
        expected = cpu_attention.attention(query, keys, values, 0.25, causal_mask(stored, new, CPU))
    torch.testing.assert_close(attended, expected)


def test_without_a_kernel_for_grouped_heads_keys_and_values_are_repeated(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32))
    heads: list[tuple[int, int]] = []

    def record(query: torch.Tensor, keys: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        heads.append((query.shape[1], keys.shape[1]))
        return scaled_dot_product_attention(query, keys, *args, **options)

    monkeypatch.setattr(cpu_attention, "scaled_dot_product_attention", record)
    expected = logits(model)
    assert {query > keys for query, keys in heads} == {True}
    heads.clear()
    monkeypatch.setattr(attention, "takes_grouped_heads", lambda *_: False)
    torch.testing.assert_close(logits(model), expected)
    assert {query == keys for query, keys in heads} == {True}


def logits(model: Model) -> torch.Tensor:
    """Return the logits after a prompt in two chunks."""
    kv = SessionKV(model.kv_shape)
    model.forward([Segment(kv, [5, 6, 7], None, [], False)])
    return model.forward([Segment(kv, [8, 9], None, [], True)]).logits


@pytest.mark.parametrize(("device", "gpus", "exists"), [("cuda", 0, False), ("cuda:2", 2, False), ("cuda:1", 2, True)])
def test_a_gpu_that_does_not_exist_is_an_error_that_names_it(
    device: str, gpus: int, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    check_exists("cpu")
    if exists:
        check_exists(device)
        return
    with pytest.raises(MissingDevice, match=f"`llava.devices` must exist .* got {device}: torch finds {gpus} GPUs"):
        check_exists(device)


@pytest.mark.parametrize(("engines", "threads"), [(1, 5), (2, 2), (8, 1)])
def test_engines_share_the_cores(engines: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        share_cores(engines)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
