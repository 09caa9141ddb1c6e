"""One tiny checkpoint of a family, loaded by the engine and by transformers; random pictures of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import PreparedPicture
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.pictures import Prepared
from llava_sessions.text.pictures import joined as prepared_together
from llava_sessions.text.processors import load_processor
from tests.support.tiny_families import FAMILIES

SIZES = [(60, 80), (90, 40), (30, 30), (40, 120)]  # height and width, each for another grid of tiles


@dataclass
class Family:
    """One tiny checkpoint, loaded by the engine and by transformers."""

    name: str
    folder: Path
    tokens: ChatTemplate
    model: Model
    reference: torch.nn.Module

    @property
    def takes_clips(self) -> bool:
        return self.tokens.takes_clips

    @property
    def takes_flat_tiles(self) -> bool:
        """Whether tiles and frames of all media are one array, as in InternVL."""
        return "internvl" in self.name

    def prepare(self, seeds: Sequence[int], clips: Sequence[int] = ()) -> Prepared:
        """Prepare the pictures and then the clips of one request, see `noise` and `frames`."""
        pictures = self.tokens.prepare([noise(seed) for seed in seeds])
        return prepared_together([pictures, *(self.tokens.prepare_clip(*frames(seed)) for seed in clips)])

    def image_tokens(self, prepared: Prepared) -> list[int]:
        """Return how many feature tokens each picture or clip has."""
        tokenize = self.tokens.tokenizer
        ids = (tokenize(text, add_special_tokens=False)["input_ids"] for text in prepared.tokens)
        return [sum(token in self.tokens.media_token_ids for token in one) for one in ids]

    def joined(self, requests: list[tuple[PreparedPicture, ...]]) -> dict[str, np.ndarray]:
        """Return the media of a conversation as the processor's arrays for one call."""
        return flat(requests) if self.takes_flat_tiles else joined(requests)

    def generate(
        self, token_ids: list[int], shown: list[tuple[PreparedPicture, ...]], max_new_tokens: int, **more: object
    ) -> list[int]:
        """Return transformers' greedy answer to a whole conversation. `shown`: the media of each of its requests."""
        ids = torch.tensor([token_ids])
        inputs = {name: torch.from_numpy(array) for name, array in self.joined(shown).items()}
        out = self.reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **inputs,
            **more,
        )
        return out[0, ids.shape[1] :].tolist()


def make_family(name: str, folder: Path) -> Family:
    """Make the checkpoint in a folder and load it twice."""
    FAMILIES[name](folder)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return Family(name, folder, ChatTemplate(load_processor(folder)), Model.load(folder, "float32", "cpu"), reference)


def noise(seed: int) -> tuple[str, Image.Image]:
    """Return a random picture and its key."""
    size = SIZES[seed % len(SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return f"noise {seed}", Image.fromarray(pixels)


def frames(seed: int, count: int = 3) -> tuple[str, list[Image.Image]]:
    """Return the frames of a random clip and its key."""
    return f"clip {seed} {count}", [noise(4 * (seed + number))[1] for number in range(count)]


def flat(requests: list[tuple[PreparedPicture, ...]]) -> dict[str, np.ndarray]:
    """Return the tiles and frames of a conversation as InternVL's arrays for one call, `[tiles, 3, height, width]`."""
    tiles = [array[0] for request in requests for picture in request for array in picture.inputs.values()]
    return {"pixel_values": np.concatenate(tiles)} if tiles else {}


def joined(requests: list[tuple[PreparedPicture, ...]]) -> dict[str, np.ndarray]:
    """Return the media of a conversation as the processor's arrays for one call, padded to equal tile counts.

    Clips have equal numbers of frames: no family's processor pads them.
    """
    pictures = [picture.inputs for request in requests for picture in request]
    arrays = {}
    for name in {name for inputs in pictures for name in inputs} - {"batch_num_images"}:
        rows = [inputs[name] for inputs in pictures if name in inputs]
        most = max(row.shape[1] for row in rows)
        if name == "pixel_values" and rows[0].ndim == 5:
            rows = [np.pad(row, [(0, 0), (0, most - row.shape[1]), *[(0, 0)] * 3]) for row in rows]
        arrays[name] = np.concatenate(rows)
    counts = [sum("batch_num_images" in picture.inputs for picture in request) for request in requests]
    if any(counts):
        arrays["batch_num_images"] = np.array([count for count in counts if count])
    return arrays
