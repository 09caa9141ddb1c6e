"""Shows that what is served is what transformers says: greedy answers equal `generate` on the full conversation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from models.shapes.scenes import HELD_OUT_SEEDS, dialogue, make_scene
from tests.support.wire import ChatSession

from .conftest import SHAPES

CHATS, TURNS, MAX_NEW_TOKENS = 50, 3, 48


def served(http: httpx.Client, seed: int) -> list[dict]:
    """A random chat as the server answers it."""
    chat = ChatSession.open(http, make_scene(seed).draw())
    options = {"max_new_tokens": MAX_NEW_TOKENS, "return_token_ids": True}
    replies = [chat.ask(question.text, **options) for question in dialogue(make_scene(seed), seed, TURNS)]
    chat.close()
    return replies


def generated(model: torch.nn.Module, processor: object, seed: int) -> list[list[int]]:
    """The same chat as a stateless user of transformers has it: picture and whole history as text, every turn."""
    scene = make_scene(seed)
    messages: list[dict] = []
    answers = []
    for question in dialogue(scene, seed, TURNS):
        picture = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question.text}]})
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=scene.draw(), return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        said = processor.tokenizer.decode(answers[-1], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    return answers


def test_fifty_chats_of_three_turns_equal_generate_token_for_token(http: httpx.Client) -> None:
    seeds = HELD_OUT_SEEDS[1000 : 1000 + CHATS]
    with ThreadPoolExecutor(8) as pool:  # so that sessions share their batches
        replies = dict(zip(seeds, pool.map(lambda seed: served(http, seed), seeds), strict=True))
    processor = AutoProcessor.from_pretrained(SHAPES)
    model = AutoModelForImageTextToText.from_pretrained(SHAPES, dtype=torch.float32)
    for seed in seeds:
        expected = generated(model, processor, seed)
        assert [reply["token_ids"] for reply in replies[seed]] == expected, seed
        texts = [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
        assert [reply["response_text"] for reply in replies[seed]] == texts
