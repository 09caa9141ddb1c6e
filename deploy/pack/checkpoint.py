"""Check that the folder of a checkpoint is complete, and list the files of it that are packed.

The handler checks its kind (`deploy.pack.loading`). Imports neither torch nor transformers, so that `--help` and a
refusal take no time.
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path, PurePosixPath
from typing import Any

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.json",
    "merges.txt",
)
GIT_LFS_MAGIC = b"version https://git-lfs"


def checkpoint_problems(folder: Path) -> list[str]:
    """Return what is missing or damaged in `folder`; empty for a complete checkpoint."""
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    problems = _config_problems(folder) + _processor_problems(folder) + _weight_problems(folder)
    pointers = [path.name for path in checkpoint_files(folder) if _is_pointer(path)]
    return problems + [f"{name} is a git-lfs pointer, not the file itself (run: git lfs pull)" for name in pointers]


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files to pack. Training scripts, model cards and weights in other formats are left out."""
    small = [path for path in folder.iterdir() if any(fnmatch.fnmatch(path.name, pattern) for pattern in SMALL_FILES)]
    return sorted(path for path in [*small, *weight_files(folder)] if path.is_file())


def weight_files(folder: Path) -> list[Path]:
    """Return the weights that transformers loads: the single file if there is one, else the index and its shards."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        return []
    index = _read_json(folder / WEIGHTS_INDEX)
    shards = [] if isinstance(index, str) else sorted(_tensors_by_shard(index))
    return [folder / WEIGHTS_INDEX, *(folder / shard for shard in shards if PurePosixPath(shard).name == shard)]


# --- configuration, processor, tokenizer ------------------------------------------------------------------------------


def _config_problems(folder: Path) -> list[str]:
    if not (folder / "config.json").is_file():
        return ["config.json is missing"]
    config = _read_json(folder / "config.json")
    return [config] if isinstance(config, str) and not _is_pointer(folder / "config.json") else []


def _processor_problems(folder: Path) -> list[str]:
    """Check picture processor, tokenizer and chat template. transformers has used several file names for each."""
    parts: dict[str, dict[str, Any]] = {}
    problems = []
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        content = _read_json(path) if path.is_file() else {}
        if isinstance(content, str):
            problems += [] if _is_pointer(path) else [content]
            content = {}
        parts[name] = content

    if not (folder / "preprocessor_config.json").is_file() and "image_processor" not in parts["processor_config.json"]:
        problems.append("no picture processor: preprocessor_config.json, or image_processor in processor_config.json")
    if not _has_any(folder, "tokenizer.json", "tokenizer.model") and not (
        _has_any(folder, "vocab.json") and _has_any(folder, "merges.txt")
    ):
        problems.append("no tokenizer: tokenizer.json, tokenizer.model, or vocab.json with merges.txt")
    if not _has_any(folder, "chat_template.jinja", "chat_template.json") and not any(
        part.get("chat_template") for part in parts.values()
    ):
        problems.append("no chat template: chat_template.jinja, chat_template.json, or a key of tokenizer_config.json")
    return problems


def _has_any(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _read_json(path: Path) -> dict[str, Any] | str:
    """Return the object in a JSON file, or a problem as text."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as err:
        return f"{path.name} cannot be read: {err.strerror}"
    except ValueError as err:
        return f"{path.name} is not JSON: {err}"
    return content if isinstance(content, dict) else f"{path.name} holds no JSON object"


# --- weights ----------------------------------------------------------------------------------------------------------


def _weight_problems(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return _header_problems(folder / WEIGHTS, set())
    if (folder / WEIGHTS_INDEX).is_file():
        return _shard_problems(folder)
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pt") for path in folder.glob(pattern))
    seen = f" (found {', '.join(others[:4])}, which it does not use)" if others else ""
    return [f"no weights: {WEIGHTS}, or {WEIGHTS_INDEX} and its shards{seen}"]


def _shard_problems(folder: Path) -> list[str]:
    index = _read_json(folder / WEIGHTS_INDEX)
    if isinstance(index, str):
        return [] if _is_pointer(folder / WEIGHTS_INDEX) else [index]
    tensors_of = _tensors_by_shard(index)
    if not tensors_of:
        return [f"{WEIGHTS_INDEX} names no shards"]
    problems = []
    for shard, tensors in sorted(tensors_of.items()):
        if PurePosixPath(shard).name != shard:
            problems.append(f"{WEIGHTS_INDEX} names {shard!r}, which is not a file of this folder")
        elif not (folder / shard).is_file():
            problems.append(f"{shard} is missing, but {WEIGHTS_INDEX} names it")
        else:
            problems += _header_problems(folder / shard, tensors)
    return problems


def _tensors_by_shard(index: dict[str, Any]) -> dict[str, set[str]]:
    tensors_of: dict[str, set[str]] = {}
    weight_map = index.get("weight_map")
    for tensor, shard in (weight_map if isinstance(weight_map, dict) else {}).items():
        tensors_of.setdefault(str(shard), set()).add(tensor)
    return tensors_of


def _header_problems(path: Path, expected: set[str]) -> list[str]:
    """Check that a safetensors file is complete: 8 bytes of header length, the JSON header, then the tensors' data.

    `expected` are the tensors that the index places in this file.
    """
    if _is_pointer(path):
        return []
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return [f"{path.name} is no safetensors file, or is truncated ({size} bytes)"]
        try:
            header = json.loads(file.read(length))
            names = set(header) - {"__metadata__"}
            end = max((header[name]["data_offsets"][1] for name in names), default=0)
        except (ValueError, KeyError, TypeError, IndexError) as err:
            return [f"{path.name} has an unreadable safetensors header: {type(err).__name__}: {err}"]
    if not names:
        return [f"{path.name} holds no tensors"]
    if size != 8 + length + end:
        return [f"{path.name} must be {8 + length + end} bytes by its header, got {size}: truncated or damaged"]
    if missing := sorted(expected - names):
        return [f"{path.name} lacks {len(missing)} tensors of the index, {missing[0]} first"]
    return []


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GIT_LFS_MAGIC)) == GIT_LFS_MAGIC
