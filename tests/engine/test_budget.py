"""`device_bytes: auto` on CUDA: what a first chat with real shapes leaves for sessions, and what `capacity` promises.

Models run on torch's meta device and have two language layers: temporary tensors do not grow with more. KV
caches and weights have the sizes of all layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from deploy.doctor.sizes import Sizes
from deploy.sagemaker import capacity
from deploy.sagemaker.capacity import CONTEXT_BYTES, GIB, INSTANCES, MIB, SHAPES, Shape
from llava_sessions.config import RequestLimits
from llava_sessions.engine.budget import (
    GRAPHS_BYTES,
    DeviceBudget,
    InsufficientMemory,
    choose_budget,
    graphs_limit,
)
from llava_sessions.engine.cuda import int8_linear, layers
from llava_sessions.engine.cuda.int8_linear import Int8DeviceLinear
from llava_sessions.engine.encoding import GPU_TILES
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.fused.linear import PackedLinear
from llava_sessions.engine.fused.operations import Activation
from llava_sessions.engine.loading import load_weights
from llava_sessions.engine.model import Model
from llava_sessions.engine.process import WarmUp, final_budget, measure, warm_up
from llava_sessions.engine.scheduler import LONGEST_GPU_PIECE
from llava_sessions.engine.weight_files import check_memory, weight_bytes
from llava_sessions.ipc.messages import PreparedPicture
from llava_sessions.text.chat_template import ChatTemplate
from tests.support import tiny_families
from tests.support.meta_cuda import Card, meta_cuda
from tests.support.published import config_of, processor_of

CUDA = torch.device("cuda")
LAYERS = 2
TEXT_TOKENS = 1024
# One type for each of the nine GPUs, with one of them where there is such a type.
CARDS = list({(item.gpu, item.gpu_mib): item for item in sorted(INSTANCES, key=lambda item: -item.gpus)}.values())


def _sizes(shape: Shape) -> tuple[object, ...]:
    """Return the sizes of the text model."""
    one = shape.checkpoint
    return (one.text, one.hidden, one.layers, one.heads, one.kv_heads, one.intermediate, one.vocabulary)


# One checkpoint of those that differ in their names, their contexts and what they do with clips only.
DISTINCT = list({(one.tower, one.family.tiling, _sizes(one)): one for one in reversed(SHAPES)}.values())[::-1]
IN_INT8 = [one for one in DISTINCT if one.family.type != "internvl" or one.name in ("InternVL3-8B", "InternVL3.5-8B")]
CASES = [
    *DISTINCT,
    *(replace(shape, weights="int8", kv="int8") for shape in IN_INT8),
    replace(SHAPES[1], weights="int8"),
]


def loaded(shape: Shape) -> tuple[Model, ChatTemplate]:
    """Return a model whose device is called CUDA, and its template."""
    processor = processor_of(shape)
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config_of(shape, LAYERS, processor), dtype=torch.float16)
    model = Model(made)
    model.device = CUDA
    kv_dtype = torch.int8 if shape.kv == "int8" else None
    model.kv_shape = replace(model.kv_shape, device=CUDA, layers=shape.checkpoint.layers, kv_dtype=kv_dtype)
    return model, ChatTemplate(processor)


def chat_on(card: Card, shape: Shape, patch: pytest.MonkeyPatch, fused: bool = False) -> WarmUp:
    """Run what the engine runs when it starts on a card, with plain or with fused layers.

    Prompts have the longest pieces.
    """
    model, template = loaded(shape)
    card.patch(patch)

    def pack_int8(plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> PackedLinear:
        return Int8DeviceLinear(plain, activation, device=CUDA, has_kernel=False)

    with meta_cuda(card):
        if fused:
            for module in (
                "fused.layer",
                "fused.head_norms",
                "cuda.layers",
            ):  # a norm on the meta device has no numbers to compare
                patch.setattr(f"llava_sessions.engine.{module}.is_rms_norm", lambda norm: True)
            assert layers.fuse(model.text, pack_int8 if shape.weights == "int8" else layers.pack)
        if shape.weights == "int8":
            int8_linear.pack_all(model._model, pack_int8)
    card.used_bytes -= card.live_bytes  # they are a part of the weights
    with meta_cuda(card):
        engine = Engine(model, template.answer_text, choose_budget(CUDA))
        return measure(engine, warm_up(engine, template), LONGEST_GPU_PIECE)


def test_the_cards_are_all_kinds_of_gpus() -> None:
    assert len(CARDS) == len({(item.gpu, item.gpu_mib) for item in INSTANCES}) >= 8
    names = {shape.name for shape in SHAPES}
    assert len(names) == len(SHAPES) > len(DISTINCT) >= 18
    same = {(one.tower, one.family.tiling, _sizes(one), one.working_mib) for one in SHAPES}
    assert len(same) == len(DISTINCT), "checkpoints of the same sizes take the same memory"
    assert any(item.gpus == 8 for item in CARDS)


@pytest.mark.parametrize("shape", CASES, ids=lambda shape: f"{shape.name} {shape.weights} {shape.kv}")
def test_the_budget_is_what_fits_and_what_capacity_promises(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = [card for card in CARDS if capacity.fit(shape, card, TEXT_TOKENS).on_gpu]
    small = min(fitting, key=lambda card: card.gpu_mib)  # its first chat must be admitted too
    found = chat_on(Card(small.cuda_bytes, shape.weights_bytes + CONTEXT_BYTES), shape, monkeypatch)
    measured = -(-found.working_bytes // MIB)
    listed = shape.working_mib
    assert measured == listed if shape.weights == shape.kv else measured <= listed
    spare = (2 + 1.25 * (listed - measured)) * MIB
    for instance in CARDS:
        used = shape.weights_bytes + CONTEXT_BYTES
        card = Card(instance.cuda_bytes, used)
        card.reserved_bytes = max(instance.cuda_bytes - used, 0)  # what torch may keep of the first chat
        card.patch(monkeypatch)
        found = replace(found, graphs_bytes=graphs_limit(CUDA, shape.weights_bytes))
        promised = capacity.free_bytes(shape, instance)
        if promised < found.session_bytes:
            with pytest.raises(InsufficientMemory, match="use a larger device"):
                final_budget(CUDA, None, None, found)
            assert instance not in fitting
            continue
        device_bytes = final_budget(CUDA, None, None, found).device_bytes
        # The table rounds the temporary tensors up to a MiB, and has one number for them in int8.
        assert promised <= device_bytes <= promised + spare
        if instance in fitting:
            assert device_bytes >= 0.9 * possible_bytes(instance.cuda_bytes, shape)
        session_bytes = shape.features_bytes + shape.kv_bytes(shape.picture_tokens + TEXT_TOKENS)
        on_gpu = capacity.fit(shape, instance, TEXT_TOKENS).on_gpu // instance.gpus
        assert on_gpu <= device_bytes // session_bytes <= (promised + spare) // session_bytes
        assert promised // session_bytes == on_gpu


@pytest.mark.parametrize("shape", DISTINCT, ids=lambda shape: shape.name)
def test_a_batch_of_pictures_takes_no_more_than_is_reserved(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    model, template = loaded(shape)
    card = Card(400 * GIB, GIB)
    card.patch(monkeypatch)
    for size in ((336, 336), (336, 1000), (600, 600)):
        (one,) = template.opening([("", Image.new("RGB", size))]).pictures
        pixels = one.inputs["pixel_values"]
        tiles = pixels.shape[1] if pixels.ndim == 5 else 1
        batch = [one] * max(GPU_TILES // tiles, 1)
        assert encode_bytes(model, card, batch) <= shape.working_mib * MIB


def encode_bytes(model: Model, card: Card, batch: list[PreparedPicture]) -> int:
    """Return the bytes of temporary tensors at their peak while a batch is encoded."""
    with meta_cuda(card):
        held_bytes = model.allocated_bytes()
        model.peak_bytes()
        features = model.encode_batch(batch)
        return model.peak_bytes() - held_bytes - sum(rows.nbytes for rows in features)


@pytest.mark.parametrize("name", ["LLaVA-NeXT-Video-7B", "LLaVA-OneVision-7B", "InternVL3.5-8B"])
def test_a_clip_takes_no_more_than_is_reserved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of the most frames by default, which is encoded in pieces."""
    (shape,) = (shape for shape in SHAPES if shape.name == name)
    model, template = loaded(shape)
    card = Card(400 * GIB, GIB)
    card.patch(monkeypatch)
    (clip,) = template.clip_opening("", [Image.new("RGB", (64, 64))]).pictures
    frames = clip.inputs["pixel_values_videos"].repeat(RequestLimits().max_frames, 1)
    working_bytes = encode_bytes(model, card, [replace(clip, inputs={"pixel_values_videos": frames})])
    assert working_bytes <= shape.working_mib * MIB


@pytest.mark.parametrize(
    "shape",
    [SHAPES[0], SHAPES[3], replace(SHAPES[0], weights="int8", kv="int8")],
    ids=lambda shape: f"{shape.name} {shape.weights}",
)
def test_fused_layers_take_no_more_temporary_memory(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(40 * GIB, shape.weights_bytes + CONTEXT_BYTES)
    assert chat_on(card, shape, monkeypatch, fused=True).working_bytes <= shape.working_mib * MIB


def possible_bytes(total_bytes: int, shape: Shape) -> float:
    """Return what fits: all but weights, CUDA's 0.4 GiB, temporary tensors with a margin, and 0.5 GiB."""
    return total_bytes - shape.weights_bytes - 0.9 * GIB - 1.25 * shape.working_mib * MIB


@pytest.mark.parametrize(
    ("name", "possible_gib"),
    [
        ("LLaVA-1.5-7B", 8.2),
        ("LLaVA-NeXT-7B (Vicuna)", 8.1),
        ("LLaVA-NeXT-7B (Mistral)", 6.8),
        ("LLaVA-OneVision-7B", 5.4),
    ],
)
def test_the_budget_on_24_gb(name: str, possible_gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sums done by hand for a card of 22.3 GiB. Twice the peak of the first chat left 0 for two of them."""
    (shape,) = (shape for shape in SHAPES if shape.name == name)
    card = Card(int(22.3 * GIB), shape.weights_bytes + int(0.4 * GIB))
    card.reserved_bytes = 6 * GIB
    card.patch(monkeypatch)
    budget = choose_budget(CUDA, working_bytes=shape.working_mib * MIB)
    assert budget.device_bytes >= 0.9 * possible_gib * GIB


def test_a_first_chat_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[0]
    with pytest.raises(InsufficientMemory, match="use a larger device"):
        chat_on(Card(shape.weights_bytes + 600 * MIB, shape.weights_bytes), shape, monkeypatch)


@pytest.mark.parametrize(("total_gib", "limit_bytes"), [(26, GRAPHS_BYTES), (25, 0)])
def test_graphs_have_memory_if_the_weights_leave_half_of_the_device(
    total_gib: int, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(total_gib * GIB, 14 * GIB).patch(monkeypatch)
    assert graphs_limit(CUDA, weights_bytes=13 * GIB) == limit_bytes


def test_a_configured_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(GIB, GIB).patch(monkeypatch)
    assert final_budget(CUDA, 5, 7, WarmUp(1, GIB)) == DeviceBudget(5, 7)


def test_what_would_serve_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At load, from the sizes in the files, and after the first chat."""
    folder = tiny_families.make_llava(tmp_path)
    whole, in_int8 = weight_bytes(folder, torch.float16)
    Card(whole, 0).patch(monkeypatch)
    check_memory(folder, torch.float16, CUDA, "auto")
    Card(whole - 1, 0).patch(monkeypatch)
    check_memory(folder, torch.float16, CUDA, "int8")
    with pytest.raises(InsufficientMemory, match=r"the weights take .* set `llava.weights` to int8"):
        check_memory(folder, torch.float16, CUDA, "auto")
    Card(in_int8 - 1, 0).patch(monkeypatch)
    for weights in ("auto", "int8"):
        with pytest.raises(InsufficientMemory, match=r"use a larger device, of at least .* `llava-deploy capacity`"):
            check_memory(folder, torch.float16, CUDA, weights)
    Card(GIB, GIB).patch(monkeypatch)
    with pytest.raises(InsufficientMemory, match=r"set `llava.weights` to int8, which frees 2\.0 GiB"):
        final_budget(CUDA, None, None, WarmUp(1, GIB, int8_frees_bytes=2 * GIB))


@torch.inference_mode()
def test_the_sizes_in_the_files_are_those_of_the_loaded_weights(tmp_path: Path) -> None:
    for name, make in tiny_families.FAMILIES.items():
        folder = make(tmp_path / name)
        model = load_weights(folder, torch.float16, "cpu")
        whole, in_int8 = weight_bytes(folder, torch.float16)
        held = sum(parameter.nbytes for parameter in {id(one): one for one in model.parameters()}.values())
        assert held <= whole <= 1.2 * held, "layers of the vision tower that are not used are in the files only"
        assert whole - in_int8 == int8_linear.freed_bytes(model)
        sizes = Sizes.read(folder)  # of `llava-deploy doctor`, which must not import the engine
        for on_cuda, dtype, saved in ((True, "float16", whole - in_int8), (False, "bfloat16", whole - in_int8)):
            plain_bytes = sizes.weights_bytes(dtype, on_cuda)
            assert plain_bytes - sizes.weights_bytes(dtype, on_cuda, "int8") == saved
        shape = replace(Model(model).kv_shape, kv_dtype=torch.int8)
        assert sizes.kv_bytes(300, "float16", "int8") == shape.device_bytes(300)
