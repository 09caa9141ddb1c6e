"""Check that a checkpoint can be served, without reading its weights.

`build_mar.sh` runs `python -m llava_sessions.engine.checkpoint STAGE FOLDER SYSTEM_PROMPT` with the handler that it
packs, so that packing and loading accept the same checkpoints. Prints the problems as a JSON list. Stage `files` takes
no time and reads the small files only. Stage `load` takes seconds: it makes processor, chat template and model as at
the start of a server, the model without memory on torch's meta device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import error_line
from ..text.checkpoint import UnsupportedCheckpoint, end_token_ids, refuse_unsupported

# Attributes of processors that count the image tokens of a picture.
COUNTED_BY = (
    "patch_size",
    "vision_feature_select_strategy",
    "num_additional_image_tokens",
    "num_image_tokens",
    "image_seq_length",
)


def main(stage: str, folder: str, system_prompt: str = "") -> None:
    """Print the problems of a stage."""
    problems: list[str] = []
    try:
        if stage == "files":
            refuse_unsupported(Path(folder))
        else:
            try_loading(Path(folder), system_prompt)
    except UnsupportedCheckpoint as error:
        problems += error.problems
    json.dump(problems, sys.stdout)


def try_loading(folder: Path, system_prompt: str = "") -> None:
    """Raise `UnsupportedCheckpoint` for a folder that a server could not load."""
    import torch
    import transformers

    from ..text.chat_template import ChatTemplate, TemplateError
    from ..text.processors import load_processor
    from .loading import load_weights
    from .vision import encode

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        template = ChatTemplate(load_processor(folder), system_prompt)
        end_token_ids(folder, template.tokenizer.eos_token_id)
        model = load_weights(folder, torch.float32, "meta")

        def features(picture: Any) -> Any:
            return encode(model.model, [picture], torch.float32, torch.device("meta"))[0]

        _compare_counts(template, "a picture", template.opening([("checked", _picture())]), features)
        check_clips(template, features)
    except TemplateError as error:
        raise UnsupportedCheckpoint(str(error)) from error
    except (UnsupportedCheckpoint, MemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for files that it can't read
        raise UnsupportedCheckpoint(f"it can't be loaded: {error_line(error)}") from error


def check_clips(template: Any, encode: Callable[[Any], Any]) -> None:
    """Raise `UnsupportedCheckpoint` if a clip of one frame has another number of features than feature tokens.

    Does nothing for a model without clips. `template`: a `ChatTemplate`. `encode`: as `Model.encode`, whose errors are
    raised: the vision tower may not take frames of their size.
    """
    if template.takes_clips:
        _compare_counts(template, "a clip of one frame", template.clip_opening("checked", [_picture()]), encode)


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 48))


def _compare_counts(template: Any, noun: str, opening: Any, encode: Callable[[Any], Any]) -> None:
    """Raise `UnsupportedCheckpoint` if the vision tower makes another number of features than the prompt has tokens."""
    features = len(encode(opening.pictures[0]))
    if features != opening.image_tokens:
        keys = ", ".join(f"`{key}`" for key in COUNTED_BY if hasattr(template.processor, key))
        raise UnsupportedCheckpoint(
            f"processor_config.json and config.json disagree: {noun} has {opening.image_tokens} image tokens and "
            f"{features} features ({keys})"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
