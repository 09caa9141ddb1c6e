"""Dialogues as token IDs, and what the language model sees of a sketch before the eye is ready."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from models.shapes import build
from models.shapes.build import GRID, IMAGE_TOKENS
from models.shapes.codes import Codes
from models.shapes.scenes import COLOURS, KINDS, PLACES, Pictured, Question, Shape, dialogue, make_scene
from models.shapes.sketches import centre

IGNORED = -100  # torch's mark for positions outside the loss

# The question types that are learned last are asked more often.
MIX = {
    "list": 3.0,
    "then_where": 2.5,
    "then_else": 2.5,
    "at": 2.2,
    "check": 1.6,
    "where": 1.5,
    "then_what": 1.5,
    "colour": 1.4,
    "count_kind": 1.4,
    "exists": 1.2,
    "then_check": 1.2,
    "then_count": 1.2,
    "count": 0.8,
}
SYSTEM_PROMPTS = (
    "Answer in one short sentence.",
    "You are a helpful assistant.",
    "You answer questions about pictures of shapes.",
    "Be brief and truthful.",
    (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
)


class Script:
    """Writes dialogues as token IDs, piece by piece, exactly as the processor tokenizes their rendered text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image = [tokenizer.convert_tokens_to_ids(build.IMAGE)] * IMAGE_TOKENS
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token IDs of a piece of text, from a cache for pieces that repeat."""
        if text not in self._known:
            self._known[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[text]

    def turn(self, number: int, question: Question) -> tuple[list[int], list[int]]:
        """Return the token IDs of a question and of its answer; the picture precedes the first question."""
        if number == 0:
            asked = [*self.encode("USER: "), *self.image, *self.encode(f"\n{question.text} ASSISTANT:")]
        else:
            asked = [*self.encode("USER:"), *self.encode(f" {question.text} ASSISTANT:")]
        return asked, [*self.encode(f" {question.answer}"), self.tokenizer.eos_token_id]

    def dialogue(self, scene: Pictured, turns: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """Return token IDs and targets of a random dialogue; targets are IGNORED outside of answers."""
        ids = [] if rng.random() < 0.05 else [self.tokenizer.bos_token_id]  # hand-written prompts often lack <s>
        if rng.random() < 0.15:
            ids += self.encode(rng.choice(SYSTEM_PROMPTS) + " ")
        targets = [IGNORED] * len(ids)
        for number, question in enumerate(dialogue(scene, rng.getrandbits(48), turns, hasty=0.25, weights=MIX)):
            asked, answered = self.turn(number, question)
            ids += asked + answered
            targets += [IGNORED] * len(asked) + answered
        return ids, targets

    def batch(self, scenes: list[Pictured], turns: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Return token IDs and targets of a dialogue about each scene."""
        written = [self.dialogue(scene, turns, rng) for scene in scenes]
        ids = padded([ids for ids, _ in written], self.tokenizer.pad_token_id)
        return ids, padded([targets for _, targets in written], IGNORED)

    def check(self, processor: LlavaProcessor) -> None:
        """Raise if chat template and processor write a dialogue in another way than `dialogue` does."""
        scene = make_scene(0)
        ids, messages = [self.tokenizer.bos_token_id], []
        for number, question in enumerate(dialogue(scene, 0, 4, hasty=0.5)):
            asked, answered = self.turn(number, question)
            ids += asked + answered
            image = [{"type": "image"}] if number == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
            messages.append({"role": "assistant", "content": question.answer})
        rendered = processor.apply_chat_template(messages)
        expected = processor(text=rendered, images=scene.draw(), return_tensors="pt")["input_ids"][0].tolist()
        if ids != expected:
            raise RuntimeError(f"training writes {ids}, the chat template {expected}")


class Voice(nn.Module):
    """The language model with its head; the features of pictures are inserted where `<image>` tokens are."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.head = model.lm_head
        self.image_token_id = model.config.image_token_id

    def loss(self, batch: tuple[Tensor, Tensor], features: Tensor) -> tuple[Tensor, float]:
        """Return the mean loss over answer tokens, and the share of them guessed right."""
        ids, targets = batch
        embedded = self.language_model.embed_tokens(ids)
        embedded = embedded.masked_scatter((ids == self.image_token_id).unsqueeze(-1), features.to(embedded.dtype))
        hidden = self.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        answers = targets[:, 1:] != IGNORED  # padding is on the right, where causal attention cannot see it
        logits = self.head(hidden[:, :-1][answers]).float()
        truth = targets[:, 1:][answers]
        return F.cross_entropy(logits, truth), (logits.argmax(-1) == truth).float().mean().item()


def padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def imagined(scenes: list[Pictured], codes: Codes, rng: np.random.Generator) -> Tensor:
    """Return features as a trained eye may give them: codes with noise, doubts and a few false alarms."""
    marks = np.zeros((len(scenes), IMAGE_TOKENS, len(KINDS) + len(COLOURS)), np.float32)
    for row, scene in enumerate(scenes):
        for shape in scene.objects:
            mark = _doubtful_mark(KINDS.index(shape.kind), COLOURS.index(shape.colour), rng)
            for patch, share in _patches(shape, scene, rng):
                marks[row, patch] += share * mark
        for _ in range(rng.poisson(0.3)):
            false = _doubtful_mark(int(rng.integers(len(KINDS))), int(rng.integers(len(COLOURS))), rng)
            marks[row, rng.integers(IMAGE_TOKENS)] += rng.uniform(0, 0.3) * false
    noise = torch.from_numpy(rng.standard_normal((*marks.shape[:2], codes.kinds.shape[1]), np.float32))
    return codes.of(torch.from_numpy(marks)) + rng.uniform(0.03, 0.2) * noise


def _doubtful_mark(kind: int, colour: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mark of strength 0.75 to 1 that leans towards another kind or colour now and then."""
    mark = np.zeros(len(KINDS) + len(COLOURS), np.float32)
    for first, size, right in ((0, len(KINDS), kind), (len(KINDS), len(COLOURS), colour)):
        doubt = rng.uniform(0, 0.4) if rng.random() < 0.06 else 0.0
        mark[first + right] += 1 - doubt
        mark[first + int(rng.integers(size))] += doubt
    return mark * rng.uniform(0.75, 1.0)


def _patches(shape: Shape, scene: Pictured, rng: np.random.Generator) -> list[tuple[int, float]]:
    """Return the patch that names a shape, and a neighbour too if the shape's centre is near their border."""
    row, column = divmod(PLACES.index(shape.place), 3)
    if [other.place for other in scene.objects].count(shape.place) == 1:
        return [((3 * row + 1) * GRID + 3 * column + 1, 1.0)]
    (first, share), (second, other) = (_along(value, rng) for value in centre(shape))
    return [
        (row * GRID + column, a * b)
        for column, a in ((first, 1 - share[0]), (share[1], share[0]))
        for row, b in ((second, 1 - other[0]), (other[1], other[0]))
        if a * b > 0
    ]


def _along(value: float, rng: np.random.Generator) -> tuple[int, tuple[float, int]]:
    """Return the patch along one axis, and which share of the mark its neighbour gets."""
    at = min(max(value, 0.0), 0.9999) * GRID
    patch = int(at)
    within = at - patch
    for distance, neighbour in ((within, patch - 1), (1 - within, patch + 1)):
        if distance < 0.12 and 0 <= neighbour < GRID and neighbour // 3 == patch // 3:
            doubt = 0.5 - distance / 0.24 + rng.uniform(-0.15, 0.15)
            return patch, (min(max(doubt, 0.0), 0.6), neighbour)
    return patch, (0.0, patch)
