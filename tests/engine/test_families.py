"""The answers of every family equal its own `generate` on the whole conversation with all its pictures.

Random weights in float32: the answers are meaningless, but any error in tokens, tiles, positions or the cache changes
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoConfig

from deploy import pack
from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.checkpoint import try_loading
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.engine.process import warm_up
from llava_sessions.errors import Refused
from llava_sessions.ipc.messages import (
    AskSession,
    Cancelled,
    Event,
    Finished,
    OpenFailed,
    OpenSession,
    Prefilled,
    PreparedPicture,
    Sampling,
    StopTurn,
    TurnFailed,
)
from llava_sessions.text.chat_template import ChatTemplate, Message
from llava_sessions.text.checkpoint import UnsupportedCheckpoint
from llava_sessions.text.pictures import NOTHING, Prepared
from llava_sessions.text.processors import load_processor
from llava_sessions.text.tiles import largest_picture
from tests.support.family import Family, frames, make_family, noise
from tests.support.tiny_families import (
    FAMILIES,
    MISTRAL,
    VICUNA,
    make_llava,
    make_next_mistral,
    make_next_video,
    make_onevision,
)

QUESTIONS = ["what is the red circle?", "and the <image> </s> blue square?", "two green stars ☃?"]
CLIP_FAMILIES = ["onevision", "next-video", "internvl"]
AMPLE = DeviceBudget(2**30, 2**30)


# Untied heads on Qwen2 text: InternVL.
@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "onevision-untied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


@dataclass
class Chat:
    """A conversation, and the pictures and clips of each of its requests."""

    conversation: Conversation
    shown: list[tuple[PreparedPicture, ...]]
    prompt: list[int] = field(default_factory=list)
    asked: tuple[PreparedPicture, ...] = ()


class Chats:
    """An engine and its chats, driven as the pump does."""

    def __init__(self, family: Family, budget: DeviceBudget = AMPLE, chunk_tokens: int = 48) -> None:
        self.family = family
        self.tokens = family.tokens
        self.engine = Engine(family.model, family.tokens.answer_text, budget, chunk_tokens)
        self.chats: dict[str, Chat] = {}
        self.events: list[Event] = []

    def open(self, name: str, *seeds: int, clip: int | None = None, count: int = 3) -> None:
        """Open a session on pictures, or on a clip of `count` frames."""
        if clip is not None:
            opening = self.tokens.clip_opening(*frames(clip, count))
        else:
            opening = self.tokens.opening([noise(seed) for seed in seeds])
        self.chats[name] = Chat(Conversation(opening), [opening.pictures])
        self.engine.apply(OpenSession(name, opening.token_ids, opening.pictures))

    def ask(self, name: str, text: str, *seeds: int, clips: Sequence[int] = (), tokens: int = 7) -> list[int]:
        """Start a turn; return the answer of `generate` to the whole conversation."""
        chat = self.chats[name]
        prepared = self.family.prepare(seeds, clips)
        chat.prompt = self.tokens.prompt(chat.conversation.opened_on, text, prepared)
        chat.asked = prepared.pictures
        self.engine.apply(AskSession(name, name, chat.prompt, Sampling(tokens), prepared.pictures))
        return self.family.generate(chat.conversation.token_ids + chat.prompt, [*chat.shown, chat.asked], tokens)

    def run(self, steps: int | None = None) -> dict[str, list[int]]:
        """Step until the engine has no work, or `steps` times; commit the finished turns and return their IDs."""
        answers = {}
        while self.engine.has_work and steps != 0:
            steps = None if steps is None else steps - 1
            for event in self.engine.step():
                self.events.append(event)
                if isinstance(event, Finished):
                    chat = self.chats[event.turn_id]
                    chat.conversation.commit(chat.prompt, event.kept_ids)
                    chat.shown.append(chat.asked)
                    answers[event.turn_id] = event.answer_ids
        return answers


# --- answers ---


def test_answers_equal_generate_in_a_shared_batch_with_several_and_with_later_pictures(family: Family) -> None:
    chats = Chats(family)
    chats.open("one", 1)
    chats.open("pair", 2, 3)
    chats.open("twin", 1)
    later_clips: dict[tuple[str, int], list[int]] = {}
    if family.takes_clips:
        chats.open("clip", clip=0)
        chats.open("later", 1)
        chats.open("long", clip=3, count=9)  # more than the vision tower takes at once
        # After a clip, in the first turn, next to a picture; a known one; two at once.
        later_clips = {("clip", 2): [0], ("later", 0): [1], ("one", 1): [2], ("later", 2): [0, 1]}
    expected: dict[str, list[int]] = {}
    for turn, question in enumerate(QUESTIONS):
        got = {}
        for count, name in enumerate(chats.chats):
            # A later picture in the second turn, in the first one, in both; a known one; two at once.
            more = {("one", 1): [2], ("pair", 1): [1], ("pair", 0): [5], ("clip", 1): [6, 7]}.get((name, turn), [])
            clips = later_clips.get((name, turn), [])
            expected[name] = chats.ask(name, f"{question} {name}", *more, clips=clips, tokens=6 + count)
            got |= chats.run(steps=2)  # the others are still answering when the next one joins
        got |= chats.run()
        assert got == expected
    assert len({tuple(ids) for ids in expected.values()}) > 2, "the answers are all the same: the test is void"
    encode_ms = {event.session_id: event.encode_ms for event in chats.events if isinstance(event, Prefilled)}
    assert (encode_ms["one"] > 0) != (encode_ms["twin"] > 0), "one picture is encoded once"


def test_answers_equal_generate_if_pictures_are_encoded_in_batches(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = Chats(family)
    chats.engine.encoder.most_tiles = 64
    batches: list[list[str]] = []
    encode = family.model.encode_batch

    def noted(pictures: list[PreparedPicture]) -> list[torch.Tensor]:
        batches.append([picture.key for picture in pictures])
        features = encode(pictures)
        assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows in features), "no memory of the batch stays"
        return features

    monkeypatch.setattr(family.model, "encode_batch", noted)
    openings = {"one": [1], "five": [5], "again": [1], "pair": [9, 2], "six": [6]}
    for name, seeds in openings.items():
        chats.open(name, *seeds)
    expected = {name: chats.ask(name, QUESTIONS[0]) for name in openings}
    assert chats.run() == expected
    encoded = [key.partition(":")[0] for batch in batches for key in batch]
    assert sorted(encoded) == [f"noise {seed}" for seed in (1, 2, 5, 6, 9)], "each picture once"
    assert len(batches[0]) > 1, "pictures of one shape are encoded together"


@pytest.mark.parametrize("host_bytes", [2**30, 0], ids=["offloaded", "cold"])
def test_answers_equal_generate_after_their_cache_left_the_device(family: Family, host_bytes: int) -> None:
    features = 320 * family.model.feature_bytes
    chats = Chats(family, DeviceBudget(family.model.kv_shape.device_bytes(512) + features, host_bytes))
    moved = 0
    for name, seeds in {"a": [1], "b": [2, 3], "c": [1]}.items():
        chats.open(name, *seeds)
        chats.run()
    if family.takes_clips:
        chats.open("d", clip=0)
        chats.run()
    for turn, question in enumerate(QUESTIONS[:2]):
        for name in chats.chats:
            clips = [turn] if family.takes_clips and name in "ad" else []
            expected = chats.ask(name, question, *([4] if turn and name == "a" else []), clips=clips)
            assert chats.run() == {name: expected}
            memory = chats.engine.memory()
            moved += memory.offloaded if host_bytes else memory.cold
    assert moved


def test_a_cancelled_turn_frees_its_picture(family: Family) -> None:
    chats = Chats(family)
    chats.open("a", 1)
    expected = chats.ask("a", QUESTIONS[0])
    assert chats.run() == {"a": expected}
    held = chats.engine.memory().features_bytes
    for steps in (0, 1, 2, 9):
        chats.ask("a", "something that never counts", 2, tokens=50)
        chats.run(steps=steps)
        chats.engine.apply(StopTurn("a", "cancelled", keep_answer=False))
        chats.run()
    assert chats.events.count(Cancelled("a")) == 4
    assert chats.engine.memory().features_bytes == held
    for more in ([], [3]):
        expected = chats.ask("a", QUESTIONS[1], *more)
        assert chats.run() == {"a": expected}


def test_an_encoding_error_of_a_later_picture_fails_its_turn_only(family: Family) -> None:
    chats = Chats(family)
    chats.open("a", 1)
    prepared = family.tokens.prepare([noise(2)])
    blind = PreparedPicture(
        "bad", {**prepared.pictures[0].inputs, "pixel_values": np.zeros((1, 1, 3, 5, 5), np.float32)}
    )
    prompt = family.tokens.prompt(chats.chats["a"].conversation.opened_on, "what?", prepared)
    chats.engine.apply(AskSession("a", "bad", prompt, Sampling(4), (blind,)))  # before the session is ready
    chats.run()
    assert [event.turn_id for event in chats.events if isinstance(event, TurnFailed)] == ["bad"]
    assert not any(isinstance(event, OpenFailed) for event in chats.events)
    expected = chats.ask("a", QUESTIONS[0])
    assert chats.run() == {"a": expected}


# --- conversations with clips ---


def sent(family: Family, messages: list[Message], media: list[Prepared]) -> tuple[list[int], list[tuple], list[tuple]]:
    """Return a whole conversation as token IDs, its media by message, and the positions of each picture and clip."""
    ids = family.tokens.conversation(messages, media)
    return ids, [one.pictures for one in media], list(family.tokens.spans(ids, media))


@pytest.mark.parametrize("family", CLIP_FAMILIES, indirect=True)
def test_an_edited_history_with_clips_and_its_fork_equal_generate(family: Family) -> None:
    chats = Chats(family)
    media = [family.prepare([], [0]), family.prepare([3], [1]), family.prepare([], [2, 0])]
    messages = [
        Message("user", "what is it?", 0, 1),
        Message("assistant", "a <video> star"),
        Message("user", "and <IMG_CONTEXT> here?", 1, 1),
        Message("assistant", "red"),
        Message("user", "both?", 0, 2),
    ]
    ids, shown, spans = sent(family, messages, media)
    pictures = tuple(picture for one in shown for picture in one)
    # All media at once, in a session that was opened on nothing.
    chats.engine.apply(OpenSession("a", [], ()))
    chats.engine.apply(AskSession("a", "whole", ids, Sampling(6), pictures))
    # A session that is rebuilt from its token IDs and media, and is asked the rest.
    rest = spans[3][0]
    chats.engine.apply(OpenSession("b", ids[:rest], pictures[:3]))
    chats.engine.apply(AskSession("b", "rebuilt", ids[rest:], Sampling(6), pictures[3:]))
    expected = family.generate(ids, shown, 6)
    assert answers(chats) == {"whole": expected, "rebuilt": expected}
    # Another clip in the second question, one that changes the answer.
    for seed in range(5, 20):
        edited, shown, edited_spans = sent(family, messages, [media[0], family.prepare([3], [seed]), media[2]])
        assert (edited, edited_spans) == (ids, spans), "the token IDs are equal, the clips are not"
        if (different := family.generate(ids, shown, 6)) != expected:
            break
    assert different != expected
    # One session is cropped in front of the clip, a new one copies what is before it.
    kept, end = spans[2]
    pictures = tuple(picture for one in shown for picture in one)
    chats.engine.apply(AskSession("a", "cropped", ids[kept:], Sampling(6), pictures[2:], kept_tokens=kept))
    chats.engine.apply(OpenSession("c", ids[:end], pictures[:3], fork_from="b"))
    chats.engine.apply(AskSession("c", "forked", ids[end:], Sampling(6), pictures[3:]))
    assert answers(chats) == {"cropped": different, "forked": different}


def answers(chats: Chats) -> dict[str, list[int]]:
    """Step until the engine has no work; return the answers by turn."""
    events = [event for _ in iter(lambda: chats.engine.has_work, False) for event in chats.engine.step()]
    return {event.turn_id: event.answer_ids for event in events if isinstance(event, Finished)}


# --- tokens ---


def whole_text(family: Family, messages: list[dict]) -> str:
    """Render the whole conversation."""
    rendered = family.tokens.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The family's template writes "assistant \n" before an earlier answer, but "assistant\n" before the next
    # one. A session keeps the tokens that the model has read.
    return rendered.replace("assistant \n", "assistant\n")


@pytest.mark.parametrize("opened", [1, 2])
def test_ids_and_arrays_equal_the_processors_for_the_whole_conversation(family: Family, opened: int) -> None:
    tokens = family.tokens
    processor = family.tokens.processor
    requests = [[noise(seed) for seed in range(opened)], [noise(3)], [], [noise(4), noise(5)]]
    prepared = [tokens.prepare(pictures) for pictures in requests]
    opening = tokens.opening(requests[0])
    conversation = Conversation(opening)
    messages: list[dict] = []
    for turn, (further, text) in enumerate(zip(prepared[1:], ["one?", "two\n", "three"], strict=True)):
        count = len(further.pictures) + (opened if turn == 0 else 0)
        messages.append({"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": text}]})
        prompt = tokens.prompt(conversation.opened_on, text, further)
        shown = [pictures for pictures in requests[: turn + 2] if pictures]
        images = [[image for _, image in pictures] for pictures in shown]
        text_of_all = whole_text(family, messages)
        if "onevision" in family.name:
            whole, arrays = onevision_whole(processor, text_of_all, images)
        else:
            whole, arrays = whole_of(processor, text_of_all, [image for group in images for image in group])
        assert conversation.token_ids + prompt == whole
        own = family.joined([item.pictures for item in prepared[: turn + 2]])
        assert set(own) == set(arrays) - {"input_ids", "attention_mask"}
        for name, array in own.items():
            np.testing.assert_array_equal(array, arrays[name])
        lead = " " if "<s>" in tokens.processor.tokenizer.all_special_tokens else ""
        answer = processor.tokenizer(f"{lead}yes", add_special_tokens=False)["input_ids"]
        conversation.commit(prompt, answer)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})


def _older(tokenizer: Tokenizer) -> None:
    """Llama's and Mistral's first form: a space is added before all text that follows a special token."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None


def _legacy(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)


def _newer(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


@pytest.mark.parametrize("form", [_older, _legacy, _newer])
@pytest.mark.parametrize("template", ["vicuna", "mistral", "clip"])
def test_ids_equal_those_of_the_whole_conversation_in_every_form_of_sentencepiece(
    tmp_path: Path, template: str, form: Callable[[Tokenizer], None]
) -> None:
    takes_clip = template == "clip"
    processor = load_processor((make_next_video if takes_clip else make_next_mistral)(tmp_path))
    processor.chat_template = {"vicuna": VICUNA, "mistral": MISTRAL, "clip": processor.chat_template}[template]
    form(processor.tokenizer.backend_tokenizer)
    tokens = ChatTemplate(processor)
    messages: list[dict] = []
    conversation = Conversation(tokens.clip_opening(*frames(0)) if takes_clip else tokens.opening([noise(1)]))
    opened = [{"type": "video" if takes_clip else "image"}]
    media = ([], [frames(0)[1]]) if takes_clip else ([noise(1)[1]], [])
    for turn, text in enumerate(["what is it?", "and now,\nthere?", "x"]):
        messages.append({"role": "user", "content": opened * (turn == 0) + [{"type": "text", "text": text}]})
        rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        whole, _ = whole_of(processor, rendered, *media)
        assert conversation.token_ids + tokens.prompt(conversation.opened_on, text) == whole
        # The answer: its IDs in the whole conversation.
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "a star"}]})
        answered = processor.apply_chat_template(messages, tokenize=False).removesuffix("</s> ").rstrip(" ")
        ids, _ = whole_of(processor, answered, *media)
        conversation.commit(tokens.prompt(conversation.opened_on, text), ids[len(whole) :])


@pytest.mark.parametrize("form", [_older, _legacy, _newer])
def test_special_tokens_in_a_question_are_encoded_as_text_in_every_form_of_sentencepiece(
    tmp_path: Path, form: Callable[[Tokenizer], None]
) -> None:
    processor = load_processor(make_next_mistral(tmp_path))
    form(processor.tokenizer.backend_tokenizer)
    tokens = ChatTemplate(processor)
    conversation = Conversation(tokens.opening([noise(1)]))
    for _ in range(2):
        for text in ("is </s> it?", "<image>", "what<image>is </s>?", "</s></s> a"):
            prompt = tokens.prompt(conversation.opened_on, text)
            assert tokens.image_token_id not in prompt
            # The same as for other words: no space is added or removed around them.
            plain = tokens.prompt(conversation.opened_on, text.replace("<image>", "<1mage>").replace("</s>", "</z>"))
            text_of_prompt, expected = map(processor.tokenizer.decode, (prompt, plain))
            assert text_of_prompt == expected.replace("<1mage>", "<image>").replace("</z>", "</s>")
            assert text in text_of_prompt
            assert prompt[0] == plain[0]  # decoding would hide a space
        conversation.commit(tokens.prompt(conversation.opened_on, "a"), [300])


def onevision_whole(processor, text: str, images: list[list[Image.Image]]) -> tuple[list[int], dict]:
    """Return the processor's IDs and arrays for pictures grouped by request; it takes one group per prompt."""
    arrays = processor.image_processor(images, return_tensors="np")
    places = [processor.replace_image_token(arrays, index) for index in range(sum(map(len, images)))]
    (expanded,), _ = processor.get_text_with_replacements([text], places)
    return processor.tokenizer(expanded)["input_ids"], arrays


def whole_of(processor, text: str, images: Sequence[Image.Image], clips: Sequence = ()) -> tuple[list[int], dict]:
    """Return the processor's IDs and arrays."""
    media = {"images": images or None} | ({"videos": clips} if clips else {})
    arrays = processor(**media, text=text, return_tensors="pt")  # InternVL's joins torch's tensors only
    return arrays["input_ids"][0].tolist(), {name: np.asarray(array) for name, array in arrays.items()}


def test_one_picture_at_open_and_one_later_equal_the_processors_flat_list(family: Family) -> None:
    first = family.prepare([1])
    second = family.prepare([2])
    place = family.tokens.processor.image_token
    ids, together = whole_of(family.tokens.processor, place * 2, [noise(1)[1], noise(2)[1]])
    features = sum(token in family.tokens.media_token_ids for token in ids)
    assert features == sum(family.image_tokens(first) + family.image_tokens(second))
    for name, array in family.joined([first.pictures, second.pictures]).items():
        np.testing.assert_array_equal(array, together[name])


def test_onevision_gives_a_tiled_and_an_untiled_picture_different_keys(family: Family) -> None:
    alone = family.tokens.prepare([noise(1)])
    pair = family.tokens.prepare([noise(1), noise(2)])
    same = alone.pictures[0].key == pair.pictures[0].key
    assert same == (alone.tokens[0] == pair.tokens[0]) == ("onevision" not in family.name)


def test_a_clip_is_rejected_by_a_family_without_clips(family: Family) -> None:
    if not family.takes_clips:
        with pytest.raises(Refused, match="must be pictures") as refused:
            family.tokens.clip_opening(*frames(0))
        assert refused.value.code == "unsupported_media"
        return
    opening = family.tokens.clip_opening(*frames(0))
    assert opening.pictures[0].inputs["pixel_values_videos"].shape == (1, 3, 3, 28, 28)
    assert opening.image_tokens == 3 * 4 + ("onevision" in family.name)
    whole = whole_text(family, [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}])
    prompt = family.tokens.prompt(opening.opened_on, "what?")
    ids, arrays = whole_of(family.tokens.processor, whole, [], [frames(0)[1]])
    assert opening.token_ids + prompt == ids
    for name, array in family.joined([opening.pictures]).items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("family", CLIP_FAMILIES, indirect=True)
def test_features_and_tokens_of_clips_agree_for_any_number_and_size_of_frames(family: Family) -> None:
    for count in (1, 2, 9):
        for size in [(28, 28), (1, 3), (200, 13), (56, 57)]:
            pixels = [np.asarray(Image.effect_noise(size, 99).convert("RGB"))] * count
            prepared = family.tokens.prepare_clip(f"{count} {size}", pixels)
            (clip,) = prepared.pictures
            assert family.model.encode(clip).shape[0] == family.image_tokens(prepared)[0], (count, size)


def test_pictures_are_prepared_in_several_threads_at_once(family: Family) -> None:
    requests = [[noise(seed)] if seed % 3 else [noise(seed), noise(seed + 1)] for seed in range(16)]
    alone = [family.tokens.prepare(pictures) for pictures in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(family.tokens.prepare, requests))
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        for left, right in zip(one.pictures, other.pictures, strict=True):
            assert left.key == right.key
            for name, array in left.inputs.items():
                np.testing.assert_array_equal(array, right.inputs[name])


# Sides from 1 to some tiles, around the multiples of a patch (7) and of a tile (28), and odd ratios of both.
_SIDES = (1, 2, 3, 6, 13, 27, 28, 29, 55, 57, 83, 112, 200)
ODD_SIZES = [(w, h) for w in _SIDES for h in _SIDES if max(w, h) <= 100 * min(w, h) and (w * 7 + h * 3) % 4 == 0]


def test_features_and_image_tokens_agree_for_odd_sizes(family: Family) -> None:
    assert len(ODD_SIZES) >= 40
    for size in ODD_SIZES:
        pixels = np.asarray(Image.effect_noise(size, 99).convert("RGB"))
        (picture,) = (prepared := family.tokens.pictures.picture(f"{size}", pixels)).pictures
        (tokens,) = family.image_tokens(prepared)
        assert family.model.encode(picture).shape[0] == tokens, size
        ids, same = whole_of(family.tokens.processor, family.tokens.processor.image_token, [Image.fromarray(pixels)])
        assert ids.count(family.tokens.image_token_id) == tokens, size
        own = family.joined([(picture,)])["pixel_values"]
        np.testing.assert_array_equal(own, same["pixel_values"], str(size))


def test_template_and_model_have_the_same_feature_tokens(family: Family) -> None:
    assert family.tokens.media_token_ids == family.model.media_token_ids


def test_a_prompt_without_pictures_needs_nothing_prepared(family: Family) -> None:
    conversation = Conversation(family.tokens.opening([noise(1)]))
    assert family.tokens.prepare([]) == NOTHING == Prepared()
    assert family.tokens.image_token_id not in family.tokens.prompt(conversation.opened_on, "an <image>?")


# --- rejected checkpoints ---


def change(folder: Path, **values: object) -> Path:
    config = AutoConfig.from_pretrained(folder)
    for name, value in values.items():
        setattr(config.text_config, name, value)
    config.save_pretrained(folder)
    return folder


def test_a_text_model_without_full_attention_is_rejected(tmp_path: Path) -> None:
    hybrid = change(make_onevision(tmp_path / "hybrid"), layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(UnsupportedCheckpoint, match=r"chunked_attention.*full causal attention"):
        Model.load(hybrid)


@pytest.mark.parametrize(
    ("make", "changes", "context_tokens"),
    [
        (make_next_mistral, {"sliding_window": 512}, 512),
        (make_next_mistral, {"sliding_window": 4096}, 2048),
        (make_onevision, {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}, 128),
        (make_onevision, {"use_sliding_window": False, "sliding_window": 128}, 2048),
    ],
)
def test_a_sliding_window_bounds_the_context(tmp_path: Path, make, changes: dict, context_tokens: int) -> None:
    """Up to the window's width, attention to the window is attention to all tokens, as the engine computes it."""
    assert Model.load(make(tmp_path, **changes), device="cpu").context_tokens == context_tokens


def test_another_text_model_is_rejected_by_its_name(tmp_path: Path) -> None:
    folder = make_llava(tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "gemma2"'))
    with pytest.raises(UnsupportedCheckpoint, match=r"`text_config.model_type` must be llama, .*, got 'gemma2'"):
        Model.load(folder)


def test_the_build_kit_packs_the_served_families(family: Family) -> None:
    try_loading(family.folder)
    assert pack.checkpoint_problems(family.folder) == []


def test_the_largest_picture_has_the_most_tiles(family: Family) -> None:
    largest = family.tokens.prepare([("key", Image.new("RGB", largest_picture(family.tokens.processor)))])
    others = [family.tokens.prepare([noise(seed)]) for seed in range(4)]
    assert len(largest.tokens[0]) >= max(len(other.tokens[0]) for other in others)
    if not family.takes_flat_tiles and family.name != "llava":
        assert largest.pictures[0].inputs["pixel_values"].shape[1] == 1 + 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_family_gives_answers_in_every_precision(family: Family, dtype: str) -> None:
    model = Model.load(family.folder, dtype, "cpu")
    warm_up(Engine(model, family.tokens.answer_text, AMPLE), family.tokens)
    if family.takes_clips:
        (clip,) = family.tokens.clip_opening(*frames(0, 1)).pictures
        assert model.encode(clip).dtype == model.dtype
