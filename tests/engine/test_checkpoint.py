"""A checkpoint is packed if, and only if, an engine can serve it.

Each case is models/shapes with one thing changed. Packing makes the model without weights, so that a case takes a
fraction of a second. tests/unit/test_pack.py runs the processes of `build_mar.sh`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deploy.pack import checkpoint_problems
from llava_sessions.engine import checkpoint
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.loading import load_weights
from llava_sessions.engine.model import Model
from llava_sessions.engine.process import load
from llava_sessions.ipc.messages import AskSession, EngineSettings, Event, Finished, OpenSession, Sampling
from llava_sessions.text.chat_template import ChatTemplate, TemplateError
from llava_sessions.text.checkpoint import UnsupportedCheckpoint, refuse_unsupported
from llava_sessions.text.families import families, refused, texts
from llava_sessions.text.processors import load_processor
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support import variants as v

QUESTIONS = ("Which shapes are there?", "What is in the middle?")
Change = Callable[[Path], object]

# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[Change], str]] = {
    "prefixed weights": (
        [v.rename_tensors(v.prefixed)],
        r"model\.safetensors lacks 36 tensors of the model \(model\.language_.* and 36 that .* \(base_model\.model",
    ),
    "prefixed weights in shards": (
        [v.rename_tensors(v.prefixed), v.shard],
        r"model\.safetensors\.index\.json lacks 36 tensors",
    ),
    "no projector": (
        [v.without_tensors("multi_modal_projector")],
        r"model\.safetensors lacks 4 tensors of the model \(model\.multi_modal_projector\.linear_1\.bias",
    ),
    "no vision tower": ([v.without_tensors("vision_tower")], r"lacks \d+ tensors of the model \(model\.vision_tower"),
    "no head, untied": (
        [v.without_tensors("language_model.lm_head")],
        r"lacks 1 tensors of the model \(lm_head\.weight",
    ),
    "another shape": (
        [v.set_keys("config.json", "text_config", intermediate_size=256)],
        r"12 tensors of another shape than the model's: \S+ must be \[192, 256\] by config\.json, got \[192, 512\]",
    ),
    "too few embeddings": (
        [v.set_keys("config.json", "text_config", vocab_size=600)],
        r"`text_config\.vocab_size` must be 667 or more, got 600",
    ),
    "image token": (
        [v.set_keys("config.json", image_token_index=4)],
        r"config\.json: `image_token_index` must be the tokenizer's ID of '<image>', 3, got 4",
    ),
    "patch size": (
        [v.set_keys("processor_config.json", patch_size=12)],
        r"a picture has 144 image tokens and 81 features \(`patch_size`",
    ),
    "no end token": ([v.no_end_token], r"no token ends an answer: .*`eos_token_id`.*`eos_token`"),
    "captioner template": (
        [v.template(v.CAPTIONER_TEMPLATE)],
        r"takes `content` in neither form .*it writes '<image>' for a question without a picture",
    ),
    "template that raises": (
        [v.template("{{ raise_exception('only two roles') }}")],
        r"takes `content` in neither form .*only two roles",
    ),
    "tokenizer.model alone": ([v.sentence_pieces_only], r"tokenizer\.model alone can't be read; .*save_pretrained"),
    "bitsandbytes": ([v.quantized("bitsandbytes")], r"config\.json: `quantization_config`: .*\(bitsandbytes\)"),
    "GPTQ": ([v.quantized("gptq")], r"`quantization_config`: .*\(gptq\)"),
    "AWQ in the text config": (
        [v.set_keys("config.json", "text_config", quantization_config={"quant_method": "awq"})],
        r"`text_config\.quantization_config`: .*\(awq\)",
    ),
    "GPTQ in a file of its own": (
        [lambda folder: v.write(folder, "quantize_config.json", "{}")],
        r"quantize_config\.json: quantized weights \(gptq\)",
    ),
    "Pixtral": (
        [v.pixtral],
        r"`vision_config\.model_type` must be clip_vision_model or siglip_vision_model, got 'pixtral'",
    ),
    "LoRA adapter": (
        [v.add_adapter, v.remove("config.json", "processor_config.json", "model.safetensors")],
        r"this is a LoRA adapter of some-org/llava-1\.5-7b-hf, not a checkpoint; merge it first",
    ),
    "LoRA adapter beside": ([v.add_adapter], r"a LoRA adapter of some-org/llava-1\.5-7b-hf is beside the checkpoint"),
    "another family": (
        [v.set_keys("config.json", model_type="bert")],
        r"`model_type` must be llava, .* or \w+, got 'bert'$",
    ),
    "no family": (
        [lambda folder: v.write(folder, "config.json", "{}")],
        r"config\.json: `model_type` must be llava, .*, got None$",
    ),
    "another class": (
        [v.set_keys("config.json", architectures=["LlavaLlama"])],
        r"`architectures` must contain 'LlavaForConditionalGeneration', got \['LlavaLlama'\]",
    ),
    "a class that is no list": (
        [v.set_keys("config.json", architectures=5)],
        r"config\.json: `architectures` must contain 'LlavaForConditionalGeneration', got 5$",
    ),
    "text config a number": (
        [v.set_keys("config.json", text_config=5)],
        r"config\.json: `text_config` must be an object, got int",
    ),
    "original layout": (
        [v.original_layout],
        r"'llava_llama' .* is the original LLaVA layout; .* twin llava-hf/llava-1\.5-7b-hf",
    ),
}


def kinds() -> Iterator[tuple[str, Change, str]]:
    """Yield what families.toml refuses: a name, a change of config.json, and words of the problem."""
    for kind, row in refused().items():
        words = rf"got '{kind}'; {re.escape(row.title)} is not served: {re.escape(row.reason)}"
        yield kind, v.set_keys("config.json", model_type=kind), words
    for kind, family in families().items():
        tower = {"model_type": family.towers[0]}
        served = {"model_type": kind, "architectures": [family.class_name], "vision_config": tower}
        other = next(one for one in families().values() if one.type != kind).class_name
        yield (
            f"{kind} by the class of another",
            v.set_keys("config.json", **served | {"architectures": [other]}),
            rf"`architectures` must contain '{family.class_name}', got \['{other}'\]",
        )
        for part, supported in (("vision_config", family.towers), ("text_config", texts())):
            words = " or ".join(filter(None, [", ".join(supported[:-1]), supported[-1]]))
            yield (
                f"{kind} with another {part}",
                v.set_keys("config.json", **served | {part: {"model_type": "bert"}}),
                rf"config\.json: `{part}\.model_type` must be {words}, got 'bert'",
            )


REFUSED |= {name: ([change], words) for name, change, words in kinds()}


def packing_problems(folder: Path, capsys: pytest.CaptureFixture) -> list[str]:
    """Return what packing finds, stage by stage as `deploy.pack.source` runs them."""

    def stage(name: str) -> list[str]:
        capsys.readouterr()
        checkpoint.main(name, str(folder))
        return json.loads(capsys.readouterr().out)

    return stage("files") or checkpoint_problems(folder) or stage("load")


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_served_is_refused_when_packing_and_at_start(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes, words = REFUSED[case]
    folder = v.make_variant(tmp_path / "llava-v1.5-7b", *changes)
    problems = packing_problems(folder, capsys)
    assert len(problems) == 1, problems
    assert re.search(words, problems[0]), problems
    assert "\n" not in problems[0]
    with pytest.raises((UnsupportedCheckpoint, TemplateError, RuntimeError)) as refused:
        load(settings(folder))
    if case != "patch size":  # its first picture finds that, in other words
        assert str(refused.value) == problems[0]


def test_what_the_table_serves_is_refused_at_no_stage_of_packing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the files alone: tests/engine/test_families.py loads a tiny checkpoint of each family."""
    folder = v.make_variant(tmp_path / "checkpoint")
    for kind, family in families().items():
        for text in texts():
            for tower in family.towers:
                v.set_keys(
                    "config.json",
                    model_type=kind,
                    architectures=[family.class_name],
                    vision_config={"model_type": tower},
                    text_config={"model_type": text},
                )(folder)
                refuse_unsupported(folder)
                assert checkpoint_problems(folder) == []
        v.set_keys("config.json", vision_config=None, text_config=None, architectures=None)(folder)
        refuse_unsupported(folder)


@pytest.mark.parametrize(
    ("config", "folder", "twin"),
    [
        ({"model_type": "internvl_chat"}, "InternVL3-1B", "OpenGVLab/InternVL3-1B-hf"),
        (
            {"model_type": "internvl_chat"},
            "models--OpenGVLab--InternVL3_5-8B/snapshots/0a1",
            "OpenGVLab/InternVL3_5-8B-HF",
        ),
        ({"model_type": "internvl_chat", "_name_or_path": "OpenGVLab/InternVL3-2B"}, "x", "OpenGVLab/InternVL3-2B-hf"),
        ({"model_type": "internvl_chat"}, "InternVL2-8B", "of the organization OpenGVLab (named *-hf or *-HF)"),
        ({"model_type": "llava_llama"}, "LLaVA-NeXT-Video-7B", "llava-hf/LLaVA-NeXT-Video-7B-hf"),
        ({"model_type": "llava_llama"}, "llava-of-mine", "of the organization llava-hf (named *-hf)"),
    ],
)
def test_the_authors_format_names_its_twin(config: dict, folder: str, twin: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match=re.escape(f"pack its twin {twin}") + "$"):
        refuse_unsupported(tmp_path / folder)


@pytest.mark.parametrize("part", ["", "text_config"])
def test_a_head_that_either_config_ties_is_tied(part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tied = v.set_keys("config.json", part, tie_word_embeddings=True)
    folder = v.make_variant(tmp_path / "tied", v.without_tensors("language_model.lm_head"), tied)
    assert packing_problems(folder, capsys) == []
    model = load_weights(folder, torch.float32, "cpu")
    assert torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)


def test_a_template_that_takes_no_system_prompt_is_refused_if_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    strict = v.STRING_TEMPLATE.replace(
        "{%- else -%}", "{%- elif m.role == 'system' -%}{{ raise_exception('no system') }}{%- else -%}"
    )
    folder = v.make_variant(tmp_path / "checkpoint", v.template(strict))
    assert packing_problems(folder, capsys) == []
    checkpoint.main("load", str(folder), "Be brief.")
    (problem,) = json.loads(capsys.readouterr().out)
    assert "no system" in problem


def test_packing_reads_no_weights() -> None:
    model = load_weights(v.SHAPES, torch.float32, "meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


# --- served -----------------------------------------------------------------------------------------------------------

SERVED: dict[str, list[Change]] = {
    "no patch size": [v.processor_of_older_transformers],
    "no counts": [
        v.set_keys(
            "processor_config.json",
            patch_size=None,
            vision_feature_select_strategy=None,
            num_additional_image_tokens=None,
        )
    ],
    "template in tokenizer_config.json": [v.template_as_key("tokenizer_config.json")],
    "template in chat_template.json": [v.template_as_key("chat_template.json")],
    "template in processor_config.json": [v.template_as_key("processor_config.json")],
    "template of strings": [v.template(v.STRING_TEMPLATE)],
    "wrong end token": [v.wrong_end_token],
    "end token in the tokenizer only": [v.end_token_in_tokenizer_only],
    "several end tokens": [v.set_keys("generation_config.json", eos_token_id=[0, 2])],
    "no generation_config.json": [v.remove("generation_config.json")],
    "shards": [v.shard],
}


def settings(folder: Path) -> EngineSettings:
    return EngineSettings(
        checkpoint=str(folder),
        system_prompt="",
        dtype="float32",
        device="cpu",
        prefill_chunk_tokens=256,
        device_bytes=None,
        host_bytes=None,
    )


def answers(engine: Engine, template: ChatTemplate) -> list[tuple[str, str]]:
    """Return text and finish reason of each answer of one chat."""
    opening = template.opening([("scene", make_scene(HELD_OUT_SEEDS[0]).draw())])
    engine.apply(OpenSession("chat", opening.token_ids, opening.pictures))
    found = []
    opened_on = opening.opened_on
    for question in QUESTIONS:
        engine.apply(AskSession("chat", question, template.prompt(opened_on, question), Sampling(64)))
        events: list[Event] = []
        while engine.has_work:
            events += engine.step()
        found += [(event.text, event.reason) for event in events if isinstance(event, Finished)]
        opened_on = None
    return found


@pytest.fixture(scope="module")
def expected() -> Iterator[list[tuple[str, str]]]:
    found = answers(load(settings(v.SHAPES)), ChatTemplate(load_processor(v.SHAPES)))
    assert [reason for _, reason in found] == ["stop", "stop"]
    assert all(text for text, _ in found)
    return found


@pytest.mark.parametrize("case", SERVED)
def test_what_is_packed_answers_as_the_unchanged_checkpoint_does(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture, expected: list[tuple[str, str]]
) -> None:
    folder = v.make_variant(tmp_path / "checkpoint", *SERVED[case])
    assert packing_problems(folder, capsys) == []
    assert answers(load(settings(folder)), ChatTemplate(load_processor(folder))) == expected


@pytest.mark.parametrize("words", [{f" {colour}": f" \u2028{colour}" for colour in v.COLOURS}, {".": ".\n"}])
def test_odd_characters_of_answers_are_no_reason_to_refuse(
    words: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture, expected: list[tuple[str, str]]
) -> None:
    folder = v.make_variant(tmp_path / "checkpoint", v.says(words))
    assert packing_problems(folder, capsys) == []
    found = answers(load(settings(folder)), ChatTemplate(load_processor(folder)))
    assert found != expected
    assert [reason for _, reason in found] == ["stop", "stop"]


def test_a_checkpoint_without_end_tokens_of_its_own_stops_as_generate_does() -> None:
    assert Model.load(v.SHAPES, "float32", "cpu").eos_token_ids == {2}
