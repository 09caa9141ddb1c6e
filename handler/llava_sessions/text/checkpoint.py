"""Refuse checkpoints that can't be served, by their files alone.

`build_mar.sh` and the processes that load a checkpoint share these checks. Needs the standard library only, except for
a hub ID.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .families import families, refused, texts

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# Files that quantizers write beside config.json, with the method's name.
_QUANTIZER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Repositories of the authors' formats whose twins have other names than NAME-hf.
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
    config = _read_object(folder / CONFIG)
    if config is not None and not problems:
        kind = kind_problem(config, folder)
        problems = _layout_problems(folder, config) or ([kind] if kind else _quantization_problems(folder, config))
    if not problems:
        problems = _tokenizer_problems(folder)
    if problems:
        raise UnsupportedCheckpoint(*problems)


def kind_problem(config: Mapping[str, Any], folder: Path | None = None) -> str | None:
    """Return why a checkpoint with this config.json is of a kind that is not served, or None.

    families.toml has the kinds: family, class, vision tower and text model. `folder` may give the name of a twin.
    """
    kind = config.get("model_type")
    family = families().get(str(kind))
    if family is None:
        return _unknown_kind(kind, _names(config, folder))
    classes = config.get("architectures") or [family.class_name]
    if not isinstance(classes, list) or family.class_name not in classes:
        return f"config.json: `architectures` must contain {family.class_name!r}, got {classes}"
    parts = (("vision_config", family.towers, family.towers[0]), ("text_config", texts(), family.text))
    for key, supported, usual in parts:
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            return f"config.json: `{key}` must be an object, got {type(part).__name__}"
        found = part.get("model_type", usual)
        if found not in supported:
            return f"config.json: `{key}.model_type` must be {_either(supported)}, got {found!r}"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none."""
    return _read_object(path) or {}


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


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


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
    classes = config.get("architectures") or []
    if "mm_vision_tower" not in config and kind not in _ORIGINAL_TYPES:
        return []
    found = f"config.json: `model_type` {kind!r} with `architectures` {classes} is the original LLaVA layout"
    twin = _twin(_names(config, folder))
    advice = f"pack its twin {twin}" if twin else "pack its twin of the organization llava-hf (named *-hf)"
    return [f"{found}; {advice}"]


def _unknown_kind(kind: object, names: Sequence[str]) -> str:
    """Return the problem of a `model_type` that is not served; `names`: of the checkpoint."""
    problem = f"config.json: `model_type` must be {_either(families())}, got {kind!r}"
    known = refused().get(str(kind))
    if known is None:
        return problem
    twin = _twin(names) if known.remedy else None
    remedy = f"pack its twin {twin}" if twin else known.remedy
    return f"{problem}; {known.title} is not served: {known.reason}" + (f"; {remedy}" if remedy else "")


def _names(config: Mapping[str, Any], folder: Path | None) -> list[str]:
    """Return possible names of a checkpoint's repository: in its config, and of its folder, also in the hub's cache."""
    parts = folder.parts if folder else ()
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return [Path(str(config.get("_name_or_path") or "")).name, *parts[-1:], *cached]


def _twin(names: Sequence[str]) -> str | None:
    """Return the ID on the hub of a published checkpoint in transformers' format, or None.

    `names`: of a repository with the same model in its authors' format.
    """
    published = {hub_id.rpartition("/")[2].lower(): hub_id for family in families().values() for hub_id in family.ids}
    twins = [_TWINS.get(name.lower(), f"{name.lower()}-hf") for name in names]
    return next((published[twin] for twin in twins if twin in published), None)


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


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


def _tokenizer_problems(folder: Path) -> list[str]:
    has_fast = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    if has_fast or not (folder / "tokenizer.model").is_file():
        return []
    convert = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    advice = f"make it once with transformers, sentencepiece and protobuf installed: {convert}"
    return [f"tokenizer.json is missing, and tokenizer.model alone can't be read; {advice}"]
