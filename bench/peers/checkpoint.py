"""The checkpoint of all sides: that of `bench.make_checkpoint`, in the form that every peer reads.

Its head is zero except for whole words. Greedy answers are therefore words, and a history that is sent as text has the
token IDs of the answers, so a peer's prefix cache covers the whole conversation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..make_checkpoint import CACHE, ensure_checkpoint
from .environments import OPENVINO, PeerError

FOLDER = CACHE.with_name("peers")
WEIGHTS = "model.safetensors"
_MADE_FROM = "made_from.txt"

# LLaVA-1.5's, and in addition a message's content may be a string, which OpenVINO needs.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vision_name(name: str) -> str:
    """Return the name of a weight as vLLM expects it: its vision tower's have one more part."""
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    return inner + name.removeprefix(tower) if name.startswith(tower) and not name.startswith(inner) else name


def checkpoint(preset: str = "bench") -> Path:
    """Return the folder of the checkpoint. Builds it if it is missing or older than its source."""
    source = ensure_checkpoint(preset)
    folder = FOLDER / preset
    recipe = (source / _MADE_FROM).read_text() + TEMPLATE
    if (folder / _MADE_FROM).exists() and (folder / _MADE_FROM).read_text() == recipe:
        return folder
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    shutil.copytree(source, making, ignore=shutil.ignore_patterns(WEIGHTS, _MADE_FROM))
    weights = {vision_name(name): weight for name, weight in load_file(source / WEIGHTS).items()}
    save_file(weights, making / WEIGHTS, metadata={"format": "pt"})
    (making / "chat_template.jinja").write_text(TEMPLATE)
    (making / _MADE_FROM).write_text(recipe)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return folder


def openvino_model(source: Path) -> Path:
    """Return the folder of the checkpoint in OpenVINO's format, with float16 weights. Exports it if it is missing.

    Raise `PeerError` if the export fails.
    """
    folder = source.with_name(source.name + "-openvino")
    recipe = (source / _MADE_FROM).read_text() + "\n".join(OPENVINO.packages)
    if (folder / _MADE_FROM).exists() and (folder / _MADE_FROM).read_text() == recipe:
        return folder
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    command = [str(OPENVINO.folder / "bin" / "optimum-cli"), "export", "openvino", "--model", str(source)]
    command += ["--task", "image-text-to-text", "--weight-format", "fp16", str(making)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE)
    if done.returncode or not (making / "openvino_tokenizer.xml").exists():
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
        raise PeerError(f"OpenVINO's export has failed with code {done.returncode}:\n{last}")
    (making / _MADE_FROM).write_text(recipe)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return folder


OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
