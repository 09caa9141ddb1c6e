"""The many wordings of each question.

`{the}` is "the red circle", `{a}` "a red circle", `{many}` "red circles", `{at}` "at the top left", `{claim}` "red".
"""

from __future__ import annotations

import random

PHRASES: dict[str, tuple[str, ...]] = {
    "list": (
        "What shapes are there?",
        "Which shapes are there?",
        "Which shapes do you see?",
        "What do you see?",
        "What is in the picture?",
        "What's in this picture?",
        "What can you see in the picture?",
        "What does the picture show?",
        "What is shown here?",
        "Describe the picture.",
        "Please describe this picture.",
        "List the shapes.",
        "Name all the shapes in the picture.",
        "Which shapes are in the picture?",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes do you see?",
        "How many shapes are in the picture?",
        "How many shapes are there in total?",
        "How many shapes are there in all?",
        "Count the shapes.",
        "What is the number of shapes?",
    ),
    "count_some": (
        "How many {many} are there?",
        "How many {many} do you see?",
        "How many {many} can you see?",
        "How many {many} are in the picture?",
        "How many {many} are there in the picture?",
        "Count the {many}.",
        "What is the number of {many}?",
    ),
    "colour": (
        "What colour is {the}?",
        "Which colour is {the}?",
        "What colour does {the} have?",
        "Which colour does {the} have?",
        "What is the colour of {the}?",
        "What's the colour of {the}?",
        "Tell me the colour of {the}.",
    ),
    "kind": (
        "What shape is {the}?",
        "Which shape is {claim}?",
        "What is {claim}?",
        "What kind of shape is {the}?",
        "What is {the}?",
        "What's {the}?",
        "Which shape is the {claim} one?",
        "What shape is the {claim} one?",
        "What is the {claim} thing?",
    ),
    "where": (
        "Where is {the}?",
        "Where's {the}?",
        "Where is {the} in the picture?",
        "Where do you see {the}?",
        "Where can I find {the}?",
        "What is the position of {the}?",
        "In which place is {the}?",
    ),
    "at": (
        "What is {at}?",
        "What's {at}?",
        "What do you see {at}?",
        "What can you see {at}?",
        "What is there {at}?",
        "Which shape is {at}?",
        "What shape is {at}?",
        "What is {at} of the picture?",
    ),
    "exists": (
        "Is there {a}?",
        "Is there {a} in the picture?",
        "Do you see {a}?",
        "Can you see {a}?",
        "Are there any {many}?",
        "Are there {many}?",
        "Do you see any {many}?",
        "Does the picture show {a}?",
    ),
    "anything": (
        "Is there anything {at}?",
        "Is anything {at}?",
        "Is there something {at}?",
        "Do you see anything {at}?",
        "Is there a shape {at}?",
    ),
    "is_colour": ("Is {the} {claim}?", "Is the colour of {the} {claim}?", "Does {the} have the colour {claim}?"),
    "is_at": ("Is {the} {at}?", "Do you see {the} {at}?", "Is {the} {at} of the picture?"),
}

# Follow-ups refer to the turn before; "it" is one shape, "they" several.
FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "its_colour": (
        "And what colour is it?",
        "What colour is it?",
        "Which colour does it have?",
        "And its colour?",
        "What is its colour?",
        "And which colour?",
    ),
    "their_colour": ("And what colour are they?", "What colours are they?", "Which colours do they have?"),
    "its_kind": (
        "And what shape is it?",
        "What shape is it?",
        "What kind of shape is it?",
        "And its shape?",
        "Which shape is it?",
        "And which shape?",
    ),
    "their_kind": ("And what shapes are they?", "What shapes are they?", "Which shapes are they?"),
    "its_place": ("And where is it?", "Where is it?", "Where exactly is it?", "And its position?", "And where?"),
    "their_place": ("And where are they?", "Where are they?", "Where do you see them?", "And where?"),
    "its_name": ("What is it?", "And what is it?", "What is there?", "Which one is it?"),
    "their_name": ("What are they?", "And what are they?", "Which ones are there?", "What shapes are they?"),
    "what_there": ("What is it?", "And what is it?", "What is there?", "What do you see there?"),
    "count_those": (
        "How many of those are there?",
        "And how many of those are there?",
        "How many of them are there?",
        "How many are there?",
        "And how many?",
        "How many?",
    ),
    "same_about": ("And {the}?", "What about {the}?", "How about {the}?", "And what about {the}?"),
    "same_count": ("And {many}?", "What about {many}?", "And how many {many}?", "How about {many}?"),
    "same_exists": ("And {a}?", "What about {a}?", "Or {a}?", "And is there {a}?"),
    "same_at": ("And {at}?", "What about {at}?", "And what is {at}?", "How about {at}?"),
    "same_anything": ("And {at}?", "Or {at}?", "And is there anything {at}?", "What about {at}?"),
    "is_it_colour": ("Is it {claim}?", "And is it {claim}?", "Is its colour {claim}?"),
    "is_it_at": ("Is it {at}?", "And is it {at}?"),
    "else": (
        "What else is there?",
        "And what else is there?",
        "What else do you see?",
        "Is there anything else?",
        "What else?",
        "Anything else?",
    ),
}

_PREFIXES = ("Please tell me: ", "Tell me: ", "Hello! ", "Okay. ", "Thanks. ", "I see. ")
_OTHER_WORDS = (
    ("picture", ("picture", "picture", "image", "photo")),
    ("colour", ("colour", "color")),
)
_OTHER_NOUNS = (
    ("shapes", ("shapes", "shapes", "shapes", "objects", "things", "figures")),
    (" shape?", (" shape?", " shape?", " object?", " thing?")),
)


def places_in_words(name: str) -> tuple[str, ...]:
    """Return the ways to name a place in a question; answers use the first one."""
    if name == "middle":
        return ("in the middle", "in the centre", "in the center", "in the middle")
    if " " not in name:
        lead = "at" if name in ("top", "bottom") else "on"
        return (f"{lead} the {name}", f"{lead} the {name}", f"at the {name}", f"on the {name} side", f"to the {name}")
    height, side = name.split()
    other = {"top": "upper", "bottom": "lower"}[height]
    return (
        f"at the {name}",
        f"at the {name}",
        f"in the {name}",
        f"in the {name} corner",
        f"at the {height}-{side} corner",
        f"in the {other} {side}",
        f"on the {name}",
    )


def loosen(text: str, rng: random.Random) -> str:
    """Return the question with other spellings and synonyms, sometimes with a polite start."""
    for word, others in _OTHER_WORDS:
        text = text.replace(word, rng.choice(others))
    if text.startswith(("How many", "What", "Which", "Count", "List", "Name")) and rng.random() < 0.3:
        for word, others in _OTHER_NOUNS:
            text = text.replace(word, rng.choice(others))
    if rng.random() < 0.03:
        text = rng.choice(_PREFIXES) + text
    return text


def typed_in_haste(text: str, rng: random.Random) -> str:
    """Return the question as people type it in a chat: lower case, no question mark, no apostrophe."""
    if rng.random() < 0.75:
        text = text.lower()
    if rng.random() < 0.7:
        text = text.rstrip("?.")
    if rng.random() < 0.3:
        text = text.replace("'", "")
    return text
