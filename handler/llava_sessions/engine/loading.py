"""Load the weights of a checkpoint into its model in transformers, and refuse a checkpoint that can't be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

from ..text.checkpoint import WEIGHTS, WEIGHTS_INDEX, UnsupportedCheckpoint, kind_problem
from .weight_files import tensors_on_meta

# Rotary embeddings that depend on the longest position of a forward: sessions would change each other's numbers.
_ROPE_BY_LENGTH = ("longrope",)
_DYNAMIC_ROPE = "dynamic"  # depends on it only beyond the context that is served


def load_weights(checkpoint: str | Path, dtype: torch.dtype, device: str) -> Any:
    """Return the transformers model of a folder or hub ID.

    With `device` "meta", no weights are read: the tensors of the files are compared with the model's by name and shape.
    Raises `UnsupportedCheckpoint`, also if no file gives a tensor of the model: transformers would make it random.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    problem = _unsupported(config)
    if problem:
        raise UnsupportedCheckpoint(problem)
    _drop_unused_vision_layers(config)
    _use_default_rope(config.get_text_config())
    # Headers only: mapping a file into memory fails if it is larger than the machine's memory.
    headers = tensors_on_meta(Path(checkpoint)) if device == "meta" else None
    auto: Any = AutoModelForImageTextToText if headers is None else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    made: Any = auto.from_pretrained(
        checkpoint if headers is None else None,
        state_dict=headers,
        config=config,
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, by name
    )
    model, loaded = made
    problems = _weight_problems(Path(checkpoint), loaded)
    if problems:
        raise UnsupportedCheckpoint(*problems)
    return model


def _weight_problems(folder: Path, loaded: dict[str, Any]) -> list[str]:
    """Return what transformers reports of tensors that are missing or have another shape than the model's."""
    file = WEIGHTS if (folder / WEIGHTS).is_file() or not (folder / WEIGHTS_INDEX).is_file() else WEIGHTS_INDEX
    problems = []
    missing = sorted(loaded["missing_keys"])
    if missing:
        unknown = sorted(name for name in loaded["unexpected_keys"] if "vision_" not in name)
        found = f", and {len(unknown)} that the model does not know ({_some(unknown)})" if unknown else ""
        problems.append(f"{file} lacks {len(missing)} tensors of the model ({_some(missing)}){found}")
    mismatched = sorted(loaded["mismatched_keys"])
    if mismatched:
        name, found_shape, shape = mismatched[0][:3]
        shapes = f"{name} must be {list(shape)} by config.json, got {list(found_shape)}"
        problems.append(f"{file} has {len(mismatched)} tensors of another shape than the model's: {shapes}")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _unsupported(config: Any) -> str | None:
    """Return why the checkpoint of a config can't be served, or None if it can."""
    problem = kind_problem(config.to_dict())
    if problem:
        return problem
    text = config.get_text_config()
    rope = _rope_type(text)
    if rope in _ROPE_BY_LENGTH:
        return f"{text.model_type} text with rope_type {rope!r}, whose positions depend on the longest of a batch"
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        found = f"{text.model_type} text with layers of type {', '.join(sorted(others))}"
        return f"{found}; supported: full causal attention in every layer"
    return None


def _rope_type(text: Any) -> str:
    kind: str = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    return kind


def _use_default_rope(text: Any) -> None:
    """Change the config of a text model with dynamic RoPE to the default RoPE.

    Up to `max_position_embeddings`, which bounds the context here, both give the same numbers: dynamic RoPE changes the
    base only beyond it (`_compute_dynamic_ntk_parameters` in transformers/modeling_rope_utils.py). But dynamic RoPE
    reads the largest position of each forward on the host.
    """
    if _rope_type(text) == _DYNAMIC_ROPE:
        others = {name: value for name, value in text.rope_parameters.items() if name not in ("factor", "type")}
        text.rope_parameters = others | {"rope_type": "default"}


def _drop_unused_vision_layers(config: Any) -> None:
    """Change the config so that no vision layer is loaded after the last one whose output is used.

    LLaVA uses the last but one. `hidden_states[n]` is the output of layer n, `hidden_states[0]` of the embeddings. All
    layers are used for -1, which InternVL reads as the output of the tower.
    """
    count = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    if chosen == -1:
        return
    used = [n if n >= 0 else count + 1 + n for n in (chosen if isinstance(chosen, list) else [chosen])]
    config.vision_config.num_hidden_layers = max(used)
    config.vision_feature_layer = used if isinstance(chosen, list) else used[0]
