"""Checkpoints as users bring them: models/shapes with one thing changed each.

Unchanged files are symbolic links. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parents[2] / "models" / "shapes"
FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)
WEIGHTS = "model.safetensors"
COLOURS = ("red", "yellow", "green", "blue", "purple", "white", "black")
# Content as a string, with the picture's token where the message has it.
STRING_TEMPLATE = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'user' -%}{{- 'USER: ' + m.content | trim -}}"
    "{%- else -%}{{- ' ASSISTANT: ' + m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"
)
# Content as a string; the template writes the image token itself, into every question.
CAPTIONER_TEMPLATE = STRING_TEMPLATE.replace("m.content | trim", "'<image>\\n' + m.content.replace('<image>', '')")

Tensors = dict[str, dict[str, Any]]


def make_variant(folder: Path, *changes: Callable[[Path], object]) -> Path:
    """Make a folder with the files of models/shapes, and apply the changes to it."""
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).symlink_to(SHAPES / name)
    for change in changes:
        change(folder)
    return folder


def write(folder: Path, name: str, content: str) -> None:
    """Write a file of the variant in place of a link."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(content, encoding="utf-8")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of the variant; empty if there is none."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def set_keys(name: str, part: str = "", **values: object) -> Callable[[Path], None]:
    """Return a change of a JSON file: `values` in it or in its `part`. None removes a key."""

    def change(folder: Path) -> None:
        content = read_json(folder, name)
        target = content[part] if part else content
        target.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del target[key]
        write(folder, name, json.dumps(content))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    """Return a change that removes files."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def template(text: str) -> Callable[[Path], None]:
    """Return a change to another chat template."""
    return lambda folder: write(folder, "chat_template.jinja", text)


def rename_tensors(rename: Callable[[str], str | None]) -> Callable[[Path], None]:
    """Return a change of the weights' names. A tensor without a new name is left out."""

    def change(folder: Path) -> None:
        raw = (SHAPES / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header: Tensors = json.loads(raw[8 : 8 + length])
        data = raw[8 + length :]
        kept: Tensors = {"__metadata__": {"format": "pt"}}
        parts: list[bytes] = []
        at = 0
        for name, entry in header.items():
            new_name = None if name == "__metadata__" else rename(name)
            if new_name is None:
                continue
            begin, end = entry["data_offsets"]
            kept[new_name] = {**entry, "data_offsets": [at, at + end - begin]}
            at += end - begin
            parts.append(data[begin:end])
        text = json.dumps(kept).encode()
        text += b" " * (-len(text) % 8)
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))

    return change


def without_tensors(start: str) -> Callable[[Path], None]:
    """Return a change that removes the tensors whose names begin with `start`."""
    return rename_tensors(lambda name: None if name.startswith(start) else name)


def prefixed(name: str) -> str:
    """Return a name as a merge of an adapter leaves it."""
    return f"base_model.model.{name}" if name.startswith("language_model.model.layers") else name


def shard(folder: Path) -> None:
    """Put the weights into a shard with an index."""
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    raw = (folder / "model-00001-of-00001.safetensors").read_bytes()
    names = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    names.pop("__metadata__", None)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    write(folder, f"{WEIGHTS}.index.json", json.dumps(index))


def processor_of_older_transformers(folder: Path) -> None:
    """As before transformers 4.46: the picture processor in its own file, and no processor_config.json."""
    processor = read_json(folder, "processor_config.json")
    remove("processor_config.json")(folder)
    preprocessor = {**processor["image_processor"], "processor_class": "LlavaProcessor"}
    write(folder, "preprocessor_config.json", json.dumps(preprocessor))


def template_as_key(name: str) -> Callable[[Path], None]:
    """Return a change that moves the chat template into a JSON file, which may not exist yet."""

    def change(folder: Path) -> None:
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        remove("chat_template.jinja")(folder)
        write(folder, name, json.dumps({**read_json(folder, name), "chat_template": text}))

    return change


def says(words: dict[str, str]) -> Callable[[Path], None]:
    """Return a change that has the tokenizer write other characters for some words of the answers."""

    def change(folder: Path) -> None:
        tokenizer = read_json(folder, "tokenizer.json")
        replaced = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in words.items()]
        tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], *replaced]}
        write(folder, "tokenizer.json", json.dumps(tokenizer))

    return change


def add_adapter(folder: Path) -> None:
    """Add what a LoRA run leaves."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "some-org/llava-1.5-7b-hf", "r": 8}
    write(folder, "adapter_config.json", json.dumps(adapter))
    write(folder, "adapter_model.safetensors", "")


def pixtral(folder: Path) -> None:
    """Make another family's config.json, whose `model_type` is llava as well."""
    vision = {"model_type": "pixtral", "hidden_size": 128, "image_size": 72, "patch_size": 24}
    set_keys("config.json", vision_config=vision, vision_feature_select_strategy="full")(folder)
    set_keys("processor_config.json", processor_class="PixtralProcessor")(folder)


def original_layout(folder: Path) -> None:
    """Make the config.json of the original LLaVA code."""
    config = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 1024}
    config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    write(folder, "config.json", json.dumps(config))
    remove("processor_config.json", "chat_template.jinja")(folder)


def sentence_pieces_only(folder: Path) -> None:
    """Leave tokenizer.model alone."""
    remove("tokenizer.json")(folder)
    write(folder, "tokenizer.model", "pieces")


def no_end_token(folder: Path) -> None:
    """Name no token that ends an answer."""
    set_keys("generation_config.json", eos_token_id=None)(folder)
    set_keys("config.json", "text_config", eos_token_id=None)(folder)
    set_keys("tokenizer_config.json", eos_token=None)(folder)
    template(STRING_TEMPLATE.replace("eos_token", "'</s>'"))(folder)


def wrong_end_token(folder: Path) -> None:
    """Name another token than the one that ends the turns."""
    set_keys("generation_config.json", eos_token_id=0)(folder)
    set_keys("config.json", "text_config", eos_token_id=0)(folder)


def end_token_in_tokenizer_only(folder: Path) -> None:
    """Name the token that ends an answer in the tokenizer only."""
    set_keys("generation_config.json", eos_token_id=None)(folder)
    set_keys("config.json", "text_config", eos_token_id=None)(folder)


def quantized(method: str) -> Callable[[Path], None]:
    """Return a change to a config.json of quantized weights."""
    return set_keys("config.json", quantization_config={"quant_method": method, "bits": 4})
