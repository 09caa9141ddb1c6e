"""Refuse checkpoints that can't be served, by their files alone.

`build_mar.sh` and the processes that load a checkpoint share these checks. Needs the standard library only, except for
a hub ID.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
VISION_TOWERS = ("clip_vision_model", "siglip_vision_model", "internvl_vision")
# Files that quantizers write beside config.json, with the method's name.
_QUANTIZER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Repositories of the original layout whose twins have other names than NAME-hf.
_TWINS = {"llava-v1.5-7b": "llava-1.5-7b-hf", "llava-v1.5-13b": "llava-1.5-13b-hf"}
_ORIGINAL_TYPES = ("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen", "llava_qwen2", "llava_gemma")


class UnsupportedCheckpoint(Exception):
    """The checkpoint can't be served. `problems` name the files, the keys and the supported values."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems: Sequence[str] = problems


def find_checkpoint(name: str) -> Path:
    """Return a checkpoint's folder; download the files of a hub ID that are not in its cache."""
    folder = Path(name)
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download  # here, because few servers need it

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]))


def fingerprint(folder: Path) -> str:
    """Return a short name of a checkpoint, for OpenAI's clients: the same for the same configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
    with contextlib.suppress(OSError):
        digest.update((folder / CONFIG).read_bytes())
    return f"fp_{digest.hexdigest()[:10]}"


def refuse_unsupported(folder: Path) -> None:
    """Raise `UnsupportedCheckpoint` for a folder of a kind that this project does not serve."""
    problems = _adapter_problems(folder)
    config = read_json(folder / CONFIG)
    if config and not problems:
        problems = _layout_problems(folder, config) or _quantization_problems(folder, config) or _tower_problems(config)
    if not problems:
        problems = _tokenizer_problems(folder)
    if problems:
        raise UnsupportedCheckpoint(*problems)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def end_token_ids(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Return the token IDs that end an answer. Raise `UnsupportedCheckpoint` if there are none.

    They are those of generation_config.json, else of config.json, and the tokenizer's: chat templates end a turn with
    it, and a checkpoint whose configurations name another token would answer up to the limit.
    """
    config = read_json(folder / CONFIG)
    text = config.get("text_config") or {}
    named = read_json(folder / "generation_config.json").get("eos_token_id")
    if named is None:
        named = text.get("eos_token_id", config.get("eos_token_id"))
    ids = {*(named if isinstance(named, list) else [named]), tokenizer_eos} - {None}
    if not ids:
        raise UnsupportedCheckpoint(
            "no token ends an answer: generation_config.json and config.json have no `eos_token_id`, "
            "and tokenizer_config.json has no `eos_token`"
        )
    return frozenset(ids)


def _adapter_problems(folder: Path) -> list[str]:
    if not (folder / "adapter_config.json").is_file():
        return []
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "another checkpoint"
    merge = "merge it first (peft: `merge_and_unload`, then `save_pretrained`) and pack the result"
    if (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file():
        where = f"adapter_config.json: a LoRA adapter of {base} is beside the checkpoint and would not be used"
        return [f"{where}; {merge}, or remove the adapter"]
    return [f"adapter_config.json: this is a LoRA adapter of {base}, not a checkpoint; {merge}"]


def _layout_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    """Recognize the layout of the original LLaVA code, which transformers can't load."""
    kind = str(config.get("model_type"))
    classes = [str(name) for name in config.get("architectures") or []]
    if "mm_vision_tower" not in config and kind not in _ORIGINAL_TYPES:
        return []
    found = f"config.json: `model_type` {kind!r} with `architectures` {classes} is the original LLaVA layout"
    names = [Path(str(config.get("_name_or_path") or "")).name, folder.name]
    twin = next((f"llava-hf/{_twin(name)}" for name in names if name.startswith("llava-")), None)
    advice = f"pack its twin {twin}" if twin else "pack its twin of the organization llava-hf (named *-hf)"
    return [f"{found}; {advice}"]


def _twin(name: str) -> str:
    return _TWINS.get(name, f"{name}-hf")


def _quantization_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    for where, part in (("", config), ("text_config.", config.get("text_config"))):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else None
            return [_quantized(f"config.json: `{where}quantization_config`", str(method or "unknown"))]
    for name, method in _QUANTIZER_FILES.items():
        if (folder / name).is_file():
            return [_quantized(name, method)]
    return []


def _quantized(where: str, method: str) -> str:
    return f"{where}: quantized weights ({method}) can't be served; pack the checkpoint in float16 or bfloat16"


def _tower_problems(config: dict[str, Any]) -> list[str]:
    tower = (config.get("vision_config") or {}).get("model_type", VISION_TOWERS[0])
    if tower in VISION_TOWERS:
        return []
    return [f"config.json: `vision_config.model_type` must be {' or '.join(VISION_TOWERS)}, got {tower!r}"]


def _tokenizer_problems(folder: Path) -> list[str]:
    has_fast = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    if has_fast or not (folder / "tokenizer.model").is_file():
        return []
    convert = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    advice = f"make it once with transformers, sentencepiece and protobuf installed: {convert}"
    return [f"tokenizer.json is missing, and tokenizer.model alone can't be read; {advice}"]
