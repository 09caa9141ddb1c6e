"""Check that a checkpoint can be served, without reading its weights.

`build_mar.sh` runs `python -m llava_sessions.engine.checkpoint STAGE FOLDER SYSTEM_PROMPT` with the handler that it
packs, so that packing and loading accept the same checkpoints. Prints the problems as a JSON list. Stage `files` takes
no time and reads the small files only. Stage `load` takes seconds: it makes processor, chat template and model as at
the start of a server, the model without memory on torch's meta device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..errors import error_line
from ..text.checkpoint import UnsupportedCheckpoint, end_token_ids, refuse_unsupported


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

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        template = ChatTemplate(load_processor(folder), system_prompt)
        end_token_ids(folder, template.tokenizer.eos_token_id)
        model = load_weights(folder, torch.float32, "meta")
        _compare_counts(template, model)
    except TemplateError as error:
        raise UnsupportedCheckpoint(str(error)) from error
    except (UnsupportedCheckpoint, MemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for files that it can't read
        raise UnsupportedCheckpoint(f"it can't be loaded: {error_line(error)}") from error


def _compare_counts(template: Any, model: Any) -> None:
    """Raise `UnsupportedCheckpoint` if the vision tower makes another number of features than the prompt has tokens."""
    import torch
    from PIL import Image

    opening = template.opening([("checked", Image.new("RGB", (64, 48)))])
    inputs = {name: torch.from_numpy(array) for name, array in opening.pictures[0].inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to("meta", torch.float32)
    with torch.inference_mode():
        features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    count = sum(len(part) for part in features)
    if count != opening.image_tokens:
        raise UnsupportedCheckpoint(
            f"processor_config.json and config.json disagree: a picture has {opening.image_tokens} image tokens and "
            f"{count} features (`patch_size`, `vision_feature_select_strategy`, `num_additional_image_tokens`)"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
