"""Token IDs of whole conversations equal those of the checkpoint's own processor, in every family and template."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from llava_sessions.errors import Refused
from llava_sessions.text.chat_template import ChatTemplate, Message, OpenedOn, PicturesPrecedeOpening, TemplateError
from llava_sessions.text.pictures import Prepared, joined
from llava_sessions.text.processors import load_processor
from tests.engine.test_chat_template import ODD_TEXTS, SPECIALS, TEMPLATES
from tests.support.tiny_families import FAMILIES, INTERNVL

FRAMES = 3
CLIP_FAMILIES = ["onevision", "next-video", "internvl"]
SHAPES = Path(__file__).resolve().parents[2] / "models" / "shapes"
# No roles, and a message's content as one string.
STRINGS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As several templates of Mistral and Gemma: a question comes first, roles alternate, and there is no system message.
ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
    "{{ '[' + message['role'] + '] ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# As ALTERNATING, but a system message is left out without an error.
SILENT = ALTERNATING.replace("in messages %}", "in messages if message.role != 'system' %}")

CONVERSATIONS: dict[str, list[Message]] = {
    "one question": [Message("user", "What is the red circle doing?", 1)],
    "only text": [Message("user", "Write a title:\n\n  two spaces, a\ttab.")],
    "a later picture": [Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "What is it?", 1)],
    "a picture alone": [Message("user", "", 1), Message("assistant", "A circle."), Message("user", "Its colour?")],
    "a greeting": [Message("assistant", "How can I help?"), Message("user", "What is it?", 1)],
    "an empty answer": [Message("user", "Hi"), Message("assistant", ""), Message("user", "And now?")],
    "everything": [
        Message("system", "Be brief."),
        Message("assistant", "Hello."),
        Message("user", "What is it?", 2),
        Message("assistant", "naïve 猫🐈, 12:30\n"),
        Message("user", "And this 'one'?", 1),
    ],
}
# Of the families with clips.
CLIP_CONVERSATIONS: dict[str, list[Message]] = {
    "a clip": [Message("user", "What happens?", 0, 1)],
    "a clip alone": [Message("user", "", 0, 1), Message("assistant", "A star falls."), Message("user", "Why?")],
    "a clip after a picture": [Message("user", "Hi", 1), Message("assistant", "Hello."), Message("user", "Now?", 0, 1)],
    "a picture after a clip": [Message("user", "Hi", 0, 1), Message("assistant", "Hello."), Message("user", "Now?", 1)],
    "all media": [
        Message("system", "Be brief."),
        Message("user", "What is it?", 2, 2),
        Message("assistant", "naïve 猫🐈, 12:30\n"),
        Message("user", "And this 'one'?", 0, 1),
        Message("assistant", "A star."),
        Message("user", "All?", 1, 1),
    ],
}
# What clips and pictures are written with in some family, and a form of it in another letter case.
MEDIA_TEXTS = ["<video>", "<IMG_CONTEXT>", "<img>", "</img>", "<image>", "Frame1: <img><IMG_CONTEXT></img>", "<VIDEO>"]


def picture() -> Image.Image:
    return Image.new("RGB", (60, 40), "red")


def prepare(chat: ChatTemplate, messages: Sequence[Message]) -> list[Prepared]:
    """Prepare the pictures and clips of each message that has some."""
    shown = [message for message in messages if message.kinds]
    return [
        joined(
            [
                chat.prepare([(f"{turn} {n}", picture()) for n in range(message.pictures)]),
                *(chat.prepare_clip(f"clip {turn} {n}", [picture()] * FRAMES) for n in range(message.clips)),
            ]
        )
        for turn, message in enumerate(shown)
    ]


def ids(chat: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    return chat.conversation(messages, prepare(chat, messages))


def whole_ids(chat: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Return the IDs that the processor itself makes of a conversation."""
    processor = chat.processor
    parts = [
        {"role": message.role, "content": [{"type": kind} for kind in message.kinds] + _texts(message)}
        for message in messages
    ]
    rendered = processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    bos = processor.tokenizer.bos_token
    groups = [[picture()] * message.pictures for message in messages if message.pictures]
    # Only this family's pictures depend on the other pictures of their message.
    grouped = isinstance(processor, transformers.LlavaOnevisionProcessor)
    images = groups if grouped else [image for group in groups for image in group]
    media: dict[str, Any] = {"images": images or None}
    if clips := sum(message.clips for message in messages):
        media["videos"] = [[picture()] * FRAMES] * clips
    add = not (bos and rendered.startswith(bos))
    arrays = processor(**media, text=rendered, add_special_tokens=add, return_tensors="pt")
    token_ids: list[int] = arrays["input_ids"][0].tolist()
    return token_ids


def _texts(message: Message) -> list[dict[str, Any]]:
    return [{"type": "text", "text": message.text}] if message.text or not message.kinds else []


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in ("onevision-untied", "internvl3.5")])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    """The chat template of a tiny checkpoint of each family."""
    return ChatTemplate(load_processor(FAMILIES[request.param](tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def shapes() -> ChatTemplate:
    return ChatTemplate(load_processor(SHAPES))


@pytest.fixture(scope="module")
def make_chat(tiny: Path):
    """Make a `ChatTemplate` of the tiny checkpoint's processor with another chat template."""

    def make(template: str, system_prompt: str = "") -> ChatTemplate:
        processor = transformers.AutoProcessor.from_pretrained(tiny)
        processor.chat_template = template
        return ChatTemplate(processor, system_prompt)

    return make


@pytest.fixture(scope="module", params=CLIP_FAMILIES)
def clips(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    """The chat template of a tiny checkpoint of each family with clips."""
    return ChatTemplate(load_processor(FAMILIES[request.param](tmp_path_factory.mktemp(request.param))))


# --- as the processor ---


def test_every_familys_ids_are_those_of_its_processor(family: ChatTemplate) -> None:
    conversations = CONVERSATIONS | (CLIP_CONVERSATIONS if family.takes_clips else {})
    assert {name for name, one in conversations.items() if ids(family, one) != whole_ids(family, one)} == set()


def test_the_demo_models_ids_are_those_of_its_processor(shapes: ChatTemplate) -> None:
    assert {name for name, one in CONVERSATIONS.items() if ids(shapes, one) != whole_ids(shapes, one)} == set()


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_templates_ids_are_those_of_the_processor(make_chat, name: str) -> None:
    chat = make_chat(TEMPLATES[name])
    assert {name for name, one in CONVERSATIONS.items() if ids(chat, one) != whole_ids(chat, one)} == set()


def test_a_template_that_takes_strings_gets_the_pictures_before_the_text(make_chat) -> None:
    chat = make_chat(STRINGS)
    text = chat.tokenizer.decode(ids(chat, CONVERSATIONS["everything"])).replace("<image>" * 16, "<image>")
    assert text == (
        "system: Be brief.\nassistant: Hello.\nuser: <image>\n<image>\nWhat is it?\n"
        "assistant: naïve 猫🐈, 12:30\n\nuser: <image>\nAnd this 'one'?\nassistant: "
    )


def test_a_conversation_with_unprepared_pictures_is_an_error(shapes: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="prepared pictures"):
        shapes.conversation([Message("user", "What is it?", 1)])


# --- as a growing conversation ---


def test_the_start_of_an_empty_session_is_a_prompt_too(family: ChatTemplate) -> None:
    for pictures, clips in [(0, 0), (2, 0), *[(1, 2)] * family.takes_clips]:
        question = [Message("user", "What is it?", pictures, clips)]
        prepared = prepare(family, question)
        prompt = family.prompt(OpenedOn("image", 0), "What is it?", *prepared)
        assert prompt == family.conversation(question, prepared)


def test_an_opening_and_what_follows_it_are_the_whole_conversation(family: ChatTemplate) -> None:
    opened = [Message("user", "What is it?", 2), *CONVERSATIONS["an empty answer"][1:], Message("assistant", "x")]
    shown_at_open = family.prepare([("a", picture()), ("b", picture())])
    opening = family.opening_on(shown_at_open)
    rest = [Message("user", "What is it?"), *opened[1:]]
    assert opening.token_ids + family.conversation(rest, [], opening.opened_on) == ids(family, opened)


@pytest.mark.parametrize(("kind", "opened", "clips_after"), [("video", 1, 0), ("video", 1, 1), ("image", 2, 1)])
def test_an_opening_its_turns_and_its_whole_conversation_have_equal_ids(
    clips: ChatTemplate, kind: str, opened: int, clips_after: int
) -> None:
    """Text that follows the last feature token of an opening belongs to the first prompt."""
    whole = [
        Message("user", "What happens?", *((0, 1 + clips_after) if kind == "video" else (opened, clips_after))),
        Message("assistant", "It falls."),
        Message("user", "And then?", 1, 1),
        Message("assistant", "It rises."),
    ]
    first, second = prepare(clips, whole)
    at_open = Prepared(first.pictures[:opened], first.tokens[:opened], first.kinds[:opened])
    after = Prepared(first.pictures[opened:], first.tokens[opened:], first.kinds[opened:])
    opening = clips.opening_on(at_open, kind)
    assert opening.token_ids[-1] in clips.media_token_ids
    rest = [replace(whole[0], pictures=0, clips=clips_after), *whole[1:]]
    clips.check_opening(kind, opened)
    clips.check_question(opening.opened_on, 0, clips_after)
    clips.check_conversation(rest, opening.opened_on)
    shown = [after, second] if clips_after else [second]
    assert opening.token_ids + clips.conversation(rest, shown, opening.opened_on) == ids(clips, whole)
    # As turns. The template may write another text before an earlier answer than before a new one.
    prompt = clips.prompt(opening.opened_on, "What happens?", after)
    assert opening.token_ids + prompt == ids(clips, whole[:1])
    clips.check_question(None, 1, 1)
    later = clips.prompt(None, "And then?", second)
    assert ids(clips, whole[:3])[-len(later) :] == later


def test_a_question_after_a_whole_history_continues_it(family: ChatTemplate, shapes: ChatTemplate) -> None:
    history = [Message("user", "What is it?", 1), Message("assistant", "It stands near two stars.")]
    for chat in (family, shapes):
        continued = ids(chat, history) + chat.prompt(None, "And the blue square?")
        assert continued == ids(chat, [*history, Message("user", "And the blue square?")])


def test_an_answer_of_the_demo_model_has_the_same_ids_in_a_whole_conversation(shapes: ChatTemplate) -> None:
    """The demo model begins its answers with a space, as its template writes them."""
    opening = shapes.opening([("a", picture())])
    grown = opening.token_ids + shapes.prompt(opening.opened_on, "Which shapes are there?")
    grown += shapes.tokenizer(" There are two circles.", add_special_tokens=False)["input_ids"]
    grown += shapes.prompt(None, "How many are there?")
    whole = [
        Message("user", "Which shapes are there?", 1),
        Message("assistant", "There are two circles."),
        Message("user", "How many are there?"),
    ]
    assert grown == ids(shapes, whole)


# --- special tokens ---


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_special_tokens_of_a_client_are_text_in_every_message(make_chat, text: str) -> None:
    for template in (*TEMPLATES.values(), STRINGS, ALTERNATING):
        chat = make_chat(template)
        plain = [
            Message("system", "brief"),
            Message("user", "circle", 1),
            Message("assistant", "star"),
            Message("user", "colour", 1),
        ]
        odd = [Message(message.role, f"{message.text}{text}", message.pictures) for message in plain]
        expected = ids(chat, plain)
        found = ids(chat, odd)
        for special in SPECIALS:
            token = chat.tokenizer.convert_tokens_to_ids(special)
            assert found.count(token) == expected.count(token)
        decoded = chat.tokenizer.decode(expected)
        for message in plain:
            decoded = decoded.replace(message.text, f"{message.text}{text}", 1)
        assert chat.tokenizer.decode(found) == decoded


def test_a_special_token_in_one_text_leaves_the_ids_of_the_others(family: ChatTemplate) -> None:
    """Texts between special tokens are encoded one by one, with the IDs that they have within the whole."""
    rng = random.Random(5)
    words = ["red", "circle", " ", "\n", "near", "12", "é", "猫", "'s", "  "]
    for _ in range(20):
        texts = ["a" + "".join(rng.choices(words, k=8)) + "z" for _ in range(3)]
        plain = [Message("user", texts[0], 1), Message("assistant", texts[1]), Message("user", f"{texts[2]} x")]
        odd = [*plain[:2], Message("user", f"{texts[2]} x</s>")]
        expected = ids(family, plain)
        end = len(family.tokenizer("x</s>", add_special_tokens=False)["input_ids"]) + 30
        assert ids(family, odd)[: len(expected) - end] == expected[: len(expected) - end]


def test_a_text_never_becomes_a_picture_or_a_clip(family: ChatTemplate) -> None:
    """Neither in a question, nor in a system message, an answer or an earlier question."""
    shown = (1, 1) if family.takes_clips else (1, 0)
    for text in MEDIA_TEXTS:
        plain = [
            Message("system", "brief"),
            Message("user", "circle", *shown),
            Message("assistant", "moves"),
            Message("user", "colour", *shown),
        ]
        odd = [replace(message, text=f"{message.text} {text} x") for message in plain]
        prepared = prepare(family, odd)
        found = family.conversation(odd, prepared)
        assert _features(family, found) == _features(family, ids(family, plain))
        expected = family.tokenizer.decode(ids(family, plain))
        for message in plain:
            expected = expected.replace(message.text, f"{message.text} {text} x")
        assert family.tokenizer.decode(found) == expected
        opening = family.opening_on(prepared[0]) if not family.takes_clips else family.opening([("a", picture())])
        prompt = family.prompt(opening.opened_on, f"what {text}?")
        assert not _features(family, prompt)
        assert f"what {text}?" in family.tokenizer.decode(prompt)


def _features(chat: ChatTemplate, token_ids: list[int]) -> list[int]:
    return [token for token in token_ids if token in chat.media_token_ids]


def test_the_spans_of_pictures_and_clips_contain_exactly_their_features(clips: ChatTemplate) -> None:
    messages = CLIP_CONVERSATIONS["all media"]
    prepared = prepare(clips, messages)
    token_ids = clips.conversation(messages, prepared)
    spans = clips.spans(token_ids, prepared)
    in_spans = [len(_features(clips, token_ids[start:end])) for start, end in spans]
    assert in_spans == [len(_features(clips, _tokens_of(clips, text))) for one in prepared for text in one.tokens]
    assert sum(in_spans) == len(_features(clips, token_ids))
    assert all(token_ids[at] in clips.media_token_ids for start, end in spans for at in (start, end - 1))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    # From a token on: the first message's media belong to an opening.
    start = spans[3][1]
    assert clips.spans(token_ids, prepared[1:], start) == spans[4:]


def _tokens_of(chat: ChatTemplate, text: str) -> list[int]:
    token_ids: list[int] = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return token_ids


# --- media without a place ---


def test_a_clip_for_a_family_without_clips_is_rejected(family: ChatTemplate) -> None:
    history = [Message("user", "a", 0, 1), Message("assistant", "b"), Message("user", "c")]
    if family.takes_clips:
        family.check_conversation(history)
        return
    for check in (
        lambda: family.check_conversation(history),
        lambda: family.check_question(None, 0, 1),
        lambda: family.check_question(OpenedOn("image", 1), 1, 1),
        lambda: family.check_question(OpenedOn("image", 0), 0, 1),
        lambda: family.check_opening("video", 1),
    ):
        with pytest.raises(Refused, match="got a clip") as refused:
            check()
        assert refused.value.code == "unsupported_media"


def test_a_picture_in_the_first_question_about_a_clip_needs_a_template_that_keeps_the_order(
    clips: ChatTemplate,
) -> None:
    """LLaVA's templates write the pictures of a message before its clips, but the clip is in the KV cache already."""
    keeps_order = "internvl" in type(clips.processor).__name__.lower()
    opening = clips.clip_opening("clip", [picture()] * FRAMES)
    shown = clips.prepare([("a", picture())])
    question = Message("user", "What?", 1)
    if keeps_order:
        clips.check_question(opening.opened_on, 1)
        clips.check_conversation([question], opening.opened_on)
        assert clips.prompt(opening.opened_on, "What?", shown)
        return
    for attempt in (
        lambda: clips.check_question(opening.opened_on, 1),
        lambda: clips.prompt(opening.opened_on, "What?", shown),
    ):
        with pytest.raises(PicturesPrecedeOpening, match="must show no picture after it for this model, got 1"):
            attempt()
    with pytest.raises(Refused, match="must begin with a question about the pictures"):
        clips.check_conversation([question], opening.opened_on)
    clips.check_question(None, 1)  # in a later turn
    clips.check_question(OpenedOn("image", 0), 1, 1)  # both with one question


def test_media_in_another_order_than_the_messages_are_an_error(clips: ChatTemplate) -> None:
    (both,) = prepare(clips, [Message("user", "a", 1, 1)])
    turned = Prepared(both.pictures[::-1], both.tokens[::-1], both.kinds[::-1])
    with pytest.raises(ValueError, match="prepared pictures"):
        clips.conversation([Message("user", "a", 1, 1)], [turned])
    with pytest.raises(Refused, match="got 1 clip, then 1 picture"):
        clips.prompt(None, "a", turned)


# --- forms of templates ---


def internvl(folder: Path, template: str = INTERNVL) -> Any:
    """Return InternVL's processor with another chat template."""
    processor = load_processor(FAMILIES["internvl"](folder))
    processor.chat_template = template
    return processor


def test_a_default_system_message_is_written_once(tmp_path: Path) -> None:
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    processor = internvl(tmp_path, default + INTERNVL)
    chat = ChatTemplate(processor)
    conversations = CONVERSATIONS | CLIP_CONVERSATIONS
    assert {name for name, one in conversations.items() if ids(chat, one) != whole_ids(chat, one)} == set()
    opening = chat.clip_opening("clip", [picture()] * FRAMES)
    text = chat.tokenizer.decode(opening.token_ids + chat.prompt(opening.opened_on, "a") + chat.prompt(None, "b"))
    assert text.count("Be kind.") == 1
    own = ChatTemplate(processor, "Be brief.")
    text = own.tokenizer.decode(own.clip_opening("clip", [picture()] * FRAMES).token_ids)
    assert ("Be kind." in text, text.count("Be brief.")) == (False, 1)


def test_an_older_template_of_internvl_gives_the_ids_of_the_newer_one(tmp_path: Path) -> None:
    """It writes a token that the processor does not know. It takes a string with the processor's token too."""
    older = ChatTemplate(internvl(tmp_path / "older", INTERNVL.replace("<IMG_CONTEXT>", "<image>")))
    newer = ChatTemplate(internvl(tmp_path / "newer"))
    for messages in [*CONVERSATIONS.values(), *CLIP_CONVERSATIONS.values()]:
        assert ids(older, messages) == ids(newer, messages)


def test_an_older_template_of_internvl_that_takes_lists_only_is_rejected(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
        "{{ part['text'] if part['type'] == 'text' else '<image>\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    with pytest.raises(TemplateError, match="writes no '<IMG_CONTEXT>' where a user shows image content"):
        ChatTemplate(internvl(tmp_path, template))


@pytest.mark.parametrize("place", ["<IMG_CONTEXT>", "<video>"])
def test_a_system_prompt_that_contains_a_place_is_rejected(tmp_path: Path, place: str) -> None:
    with pytest.raises(TemplateError, match=f"`system_prompt` must not contain '{place}'"):
        ChatTemplate(internvl(tmp_path), f"Never write {place}.")


def test_a_template_without_a_place_for_clips_takes_pictures_only(tmp_path: Path) -> None:
    template = INTERNVL.replace("{{ '<video>\n' }}", "")
    chat = ChatTemplate(internvl(tmp_path, template))
    assert not chat.takes_clips
    with pytest.raises(Refused, match="got a clip") as refused:
        chat.check_question(None, 1, 1)
    assert refused.value.code == "unsupported_media"
    assert ids(chat, CONVERSATIONS["everything"]) == whole_ids(chat, CONVERSATIONS["everything"])


def test_a_place_of_a_clip_that_is_no_token_is_text_if_a_user_types_it(tmp_path: Path) -> None:
    processor = internvl(tmp_path, INTERNVL.replace("<video>", "<clip>"))
    processor.video_token = "<clip>"
    processor.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><clip>)")
    chat = ChatTemplate(processor)
    messages = [Message("user", "a <clip>?", 0, 1), Message("assistant", "<clip>"), Message("user", "<clip> b", 0, 1)]
    chat.check_conversation(messages)
    prepared = prepare(chat, messages)
    token_ids = chat.conversation(messages, prepared)
    assert chat.tokenizer.decode(token_ids).count("<clip>") == 3
    plain = [replace(message, text=message.text.replace("<clip>", "clip")) for message in messages]
    assert len(_features(chat, token_ids)) == len(_features(chat, ids(chat, plain)))
    opening = chat.opening_on(prepared[0], "video")
    prompt = chat.prompt(opening.opened_on, "a <clip>?")
    assert token_ids[: len(opening.token_ids) + len(prompt)] == opening.token_ids + prompt


# --- templates without a place ---


@pytest.mark.parametrize("template", [ALTERNATING, SILENT])
def test_a_system_message_without_a_place_precedes_the_first_question(make_chat, template: str) -> None:
    chat = make_chat(template)
    system = Message("system", "Be brief.")
    for question in (Message("user", "What is it?", 1), Message("user", "", 1)):
        text = chat.tokenizer.decode(ids(chat, [system, question])).replace("<image>" * 16, "<image>")
        assert text == f"<s>[user] <image>Be brief.{'' if not question.text else chr(10) * 2 + question.text}"


def test_a_greeting_follows_an_empty_question_where_a_question_must_come_first(make_chat) -> None:
    chat = make_chat(ALTERNATING)
    text = chat.tokenizer.decode(ids(chat, CONVERSATIONS["a greeting"])).replace("<image>" * 16, "<image>")
    assert text == "<s>[user] [assistant] How can I help?</s>[user] <image>What is it?"


@pytest.mark.parametrize("template", [*TEMPLATES.values(), STRINGS])
def test_the_operators_system_prompt_precedes_a_clients(make_chat, template: str) -> None:
    chat = make_chat(template, "You are kind.")
    text = chat.tokenizer.decode(ids(chat, CONVERSATIONS["everything"]))
    assert text.index("You are kind.\n\nBe brief.") < text.index("What is it?")
    alone = chat.tokenizer.decode(ids(chat, CONVERSATIONS["one question"]))
    assert alone.index("You are kind.") < alone.index("What is the red circle doing?")


def test_a_template_without_a_place_for_a_later_picture_is_named_before_any_is_prepared(make_chat) -> None:
    chat = make_chat(TEMPLATES["open"].replace("'<image>", "'' if loop.index0 else '<image>"))
    with pytest.raises(Refused, match="places here"):
        chat.check_conversation([Message("user", "a", 3)])
    chat.check_conversation([Message("user", "a", 1)])


def test_every_conversation_of_a_suitable_template_passes_the_check(family: ChatTemplate) -> None:
    for messages in [*CONVERSATIONS.values(), *(CLIP_CONVERSATIONS.values() if family.takes_clips else [])]:
        family.check_conversation(messages)
    family.check_conversation([Message("user", "a"), Message("assistant", "b")], OpenedOn("image", 2))
