"""The capacity formula against sums done by hand, models as transformers builds them, and the engine's own cache."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import moto.ec2
import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaNextConfig

from deploy.sagemaker import capacity
from deploy.sagemaker import command as llava_deploy
from deploy.sagemaker.capacity import GIB, INSTANCES, KV_STEP_TOKENS, MIB, SHAPES, InstanceType, Shape
from llava_sessions.engine.kv import GROWTH_TOKENS, KVShape, SessionKV
from tests.support.published import config_of

LLAVA_7B = SHAPES[0]


@pytest.mark.parametrize("model", SHAPES, ids=lambda model: model.name)
def test_weights_are_those_that_transformers_makes(model: Shape) -> None:
    with torch.device("meta"):  # no memory is taken
        made = AutoModelForImageTextToText.from_config(config_of(model))
    assert model.parameters == sum(parameter.numel() for parameter in made.parameters())


def test_a_next_picture_is_at_most_as_long_as_assumed() -> None:
    """576 tokens of the whole picture; of its tiles 24 x 24 each and an end of line to every row."""
    tiles = [(height // 14) * (width // 14) + height // 14 for height, width in LlavaNextConfig().image_grid_pinpoints]
    next_models = {model.picture_tokens for model in SHAPES if "NeXT" in model.name}
    assert next_models == {576 + max(tiles)} == {2928}


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 1600, 3952])
@pytest.mark.parametrize("model", SHAPES, ids=lambda model: model.name)
def test_kv_is_what_the_engine_allocates(model: Shape, tokens: int) -> None:
    device = torch.device("meta")
    kv = SessionKV(KVShape(model.checkpoint.layers, model.checkpoint.kv_heads, model.head_dim, torch.bfloat16, device))
    kv.reserve(tokens)
    assert model.kv_bytes(tokens) == kv.device_bytes
    assert KV_STEP_TOKENS == GROWTH_TOKENS


def test_the_formula_by_hand() -> None:
    # LLaVA-1.5-7B: 32 layers x keys and values x 32 heads x 128 numbers x 2 bytes = 512 KiB a token; a picture is
    # 576 x 4096 x 2 bytes = 4.5 MiB; 576 + 1024 tokens fill 7 steps of 256, 1792 x 512 KiB = 896 MiB.
    assert LLAVA_7B.kv_token_bytes == 512 * 1024
    assert LLAVA_7B.features_bytes == 4.5 * MIB
    assert LLAVA_7B.kv_bytes(1600) == 896 * MIB
    # Weights of 7,063,427,072 numbers are 14,126,854,144 bytes. A GPU of 22,888 MiB less those and 2 GiB has
    # 7,367.5 MiB: 8 sessions of 900.5 MiB. 20 % of 32 GiB hold 7 more, each 7 steps of 128 MiB, a power of two; their 7
    # pictures take 31.5 MiB of the GPU, and 8 whole sessions still fit.
    assert LLAVA_7B.parameters == 7_063_427_072
    instance = InstanceType("ml.g5.2xlarge", "A10G", 22888, 32)
    fits = capacity.fit(LLAVA_7B, instance, 1024, 2 * GIB)
    assert (fits.on_gpu, fits.in_ram, fits.open) == (8, 7, 15)
    # The engine's own reserve: 98.5 % of 22,888 MiB is 22,544.68; less 13,472.4 of weights, 448 of CUDA, 256 and
    # 1.25 x 195 = 243.75: 8,124.5 MiB. The weights fill more than half of the GPU, so there are no CUDA graphs.
    assert round(capacity.free_bytes(LLAVA_7B, instance) / MIB, 1) == 8124.5
    assert capacity.fit(LLAVA_7B, instance, 1024).on_gpu == 9


def test_graphs_take_memory_if_the_weights_leave_half_of_the_gpu() -> None:
    # 98.5 % of 45,776 MiB is 45,089.36; less 13,472.4, 448, 256, 243.75 and 192: 30,477.2 MiB.
    instance = InstanceType("ml.g6e.xlarge", "L40S", 45776, 32)
    assert round(capacity.free_bytes(LLAVA_7B, instance) / MIB, 1) == 30477.2


def test_int8_by_hand() -> None:
    # LLaVA-1.5-13B: 40 layers of 4 x 5120 x 5120 + 3 x 5120 x 13824 weights and a head of 5120 x 32064 are
    # 12,851,937,280 weights, and as many bytes. Their outputs are 40 x (5 x 5120 + 2 x 13824) + 32064 = 2,161,984.
    large = replace(SHAPES[1], weights="int8", kv="int8")
    assert large.linears == (12_851_937_280, 2_161_984)
    kept = large.parameters - 12_851_937_280  # embeddings, vision tower, projector, norms
    assert large.weights_bytes == 2 * kept + 12_851_937_280 + 4 * 2_161_984
    assert large.kv_token_bytes == 40 * 2 * 40 * (128 + 4)
    assert 1.8 < SHAPES[1].kv_token_bytes / large.kv_token_bytes < 2
    # 256 tokens: numbers of 100 MiB take 128 MiB, and scales of 3.125 MiB take 4 MiB.
    assert large.host_bytes(256) == (128 + 4) * MIB
    assert capacity.fit(SHAPES[1], InstanceType("ml.g5.2xlarge", "A10G", 22888, 32), 1024).on_gpu == 0
    assert capacity.fit(large, InstanceType("ml.g5.2xlarge", "A10G", 22888, 32), 1024).on_gpu == 11


def test_the_smallest_type_of_a_model() -> None:
    found = capacity.smallest(SHAPES[1], 1024)
    assert found is not None
    assert all(
        item.gpus * item.gpu_mib >= found.gpus * found.gpu_mib
        for item in INSTANCES
        if capacity.fit(SHAPES[1], item, 1024).on_gpu
    )
    assert capacity.smallest(replace(SHAPES[1], checkpoint=replace(SHAPES[1].checkpoint, hidden=50_000)), 1024) is None


def test_the_command_prints_int8(capsys: pytest.CaptureFixture[str]) -> None:
    assert llava_deploy.main(["capacity", "--weights", "int8", "--kv-dtype", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "Weights: int8. KV caches: int8." in printed
    rows = [line for line in printed.splitlines() if line.startswith("| ml.g5.2xlarge |")]
    assert len(rows) == 5, "a table for each family"
    assert rows[0].split("|")[4].strip().endswith("(11)"), "LLaVA-1.5-13B on 24 GB"


def test_the_command_prints_the_models_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert llava_deploy.main(["capacity", "--model", "internvl3.5-8"]) == 0
    assert {line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "InternVL3" in line} == {
        "InternVL3.5-8B",
        "instance",
    }
    with pytest.raises(SystemExit) as exited:
        llava_deploy.main(["capacity", "--model", "GPT"])
    assert exited.value.code == 2
    assert "must be a part of one of the names LLaVA-1.5-7B, " in capsys.readouterr().err


def test_pinned_steps_are_rounded_up_to_a_power_of_two() -> None:
    device = torch.device("cuda")
    for model in (*SHAPES, *capacity.with_precision("auto", "int8")):
        kv_dtype = torch.int8 if model.kv == "int8" else None
        shape = KVShape(
            model.checkpoint.layers, model.checkpoint.kv_heads, model.head_dim, torch.float16, device, kv_dtype
        )
        for tokens in (1, 256, 257, 4096):
            assert model.host_bytes(tokens) == shape.host_bytes(tokens)
            assert model.kv_bytes(tokens) == shape.device_bytes(tokens)
    by_hand = {model.name: model.host_bytes(257) // MIB for model in SHAPES}
    assert by_hand["LLaVA-1.5-7B"] == 2 * 128  # 256 x 512 KiB
    assert by_hand["LLaVA-1.5-13B"] == 2 * 256  # 256 x 800 KiB = 200 MiB
    assert by_hand["LLaVA-OneVision-7B"] == 2 * 16  # 256 x 56 KiB = 14 MiB


def test_where_the_weights_leave_no_room_nothing_is_open() -> None:
    fits = capacity.fit(SHAPES[1], InstanceType("ml.g5.2xlarge", "A10G", 22888, 32), 1024, 2 * GIB)
    assert (fits.on_gpu, fits.open) == (0, 0)


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda instance: instance.name)
def test_what_is_open_really_fits(instance: InstanceType) -> None:
    for model in SHAPES:
        check_what_is_open(model, instance)


def check_what_is_open(model: Shape, instance: InstanceType) -> None:
    fits = capacity.fit(model, instance, 1024, 2 * GIB)
    assert (fits.on_gpu % instance.gpus, fits.in_ram % instance.gpus, fits.open % instance.gpus) == (0, 0, 0)
    opened, in_ram = fits.open // instance.gpus, fits.in_ram // instance.gpus
    tokens = model.picture_tokens + 1024
    on_gpu = opened - min(in_ram, opened)
    used = opened * model.features_bytes + max(on_gpu, bool(opened)) * model.kv_bytes(tokens)
    assert used + (model.weights_bytes + 2 * GIB if opened else 0) <= instance.gpu_mib * MIB
    assert fits.in_ram * model.host_bytes(tokens) <= 0.2 * instance.ram_gib * GIB


def test_each_gpu_has_an_engine_and_all_share_the_ram() -> None:
    # ml.g5.12xlarge has 4 A10G: 9 sessions each as above. 20 % of 192 GiB hold 42.8 times 7 steps of 128 MiB, of which
    # each engine has 10.7: 10. Their 10 pictures take 45 MiB of 8,124.5, and 8 whole sessions still fit.
    one = capacity.fit(LLAVA_7B, InstanceType("ml.g5.2xlarge", "A10G", 22888, 48), 1024)
    four = capacity.fit(LLAVA_7B, InstanceType("ml.g5.12xlarge", "A10G", 22888, 192, 4), 1024)
    assert (one.on_gpu, one.in_ram, one.open) == (9, 10, 18)
    assert (four.on_gpu, four.in_ram, four.open) == (36, 40, 72)


def test_instances_are_as_ec2_describes_them() -> None:
    """Against EC2's DescribeInstanceTypes, as moto ships it."""
    path = Path(moto.ec2.__file__).parent / "resources/instance_types.json.gz"
    described = json.loads(gzip.decompress(path.read_bytes()))
    for instance in INSTANCES:
        found = described[instance.name.removeprefix("ml.")]
        (gpu,) = found["GpuInfo"]["Gpus"]
        size = gpu["MemoryInfo"]["SizeInMiB"]
        assert (gpu["Name"], gpu["Count"], size) == (instance.gpu, instance.gpus, instance.gpu_mib)
        assert found["MemoryInfo"]["SizeInMiB"] == instance.ram_gib * 1024
        # One for the Python of each engine, and as many for TorchServe, pictures and the worker.
        assert found["VCpuInfo"]["DefaultVCpus"] >= 4 * instance.gpus


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert llava_deploy.main(["capacity", "--model", "LLaVA-1.5"]) == 0
    printed = capsys.readouterr().out
    guide = (Path(__file__).resolve().parents[2] / "docs/sagemaker.md").read_text(encoding="utf-8")
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) > len(INSTANCES)
    assert [line for line in table if line not in guide] == []
