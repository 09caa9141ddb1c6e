"""Random conversations about a picture: questions that stand alone, follow-ups, and their true answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from models.shapes import phrases
from models.shapes.answers import SIDES, Ask, Subject, shapes_at, true_answer
from models.shapes.world import COLOURS, KINDS, PLACES, Pictured, Shape


@dataclass(frozen=True)
class Question:
    """One turn: `kind` is one of QUESTION_TYPES, `answer` the true answer in its canonical wording."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Focus:
    """What a follow-up may refer to: the last question, its shapes and what the answers have said about them."""

    ask: Ask
    shapes: tuple[Shape, ...] = ()
    subject: Subject = field(default_factory=Subject)
    place_known: bool = False
    all_known: bool = False


# --- questions that stand alone --------------------------------------------------------------------------------------


def _pick_kind(scene: Pictured, rng: random.Random, present: float) -> str:
    return rng.choice(scene.objects).kind if scene.objects and rng.random() < present else rng.choice(KINDS)


def _pick_colour(scene: Pictured, rng: random.Random, present: float) -> str:
    return rng.choice(scene.objects).colour if scene.objects and rng.random() < present else rng.choice(COLOURS)


def _pick_subject(scene: Pictured, rng: random.Random, present: float) -> Subject:
    """A kind, a colour or a pair; absent pairs are mostly near misses, built from what the scene does hold."""
    form = rng.random()
    if form < 0.35:
        return Subject(kind=_pick_kind(scene, rng, present))
    if form < 0.6:
        return Subject(colour=_pick_colour(scene, rng, present))
    if scene.objects and rng.random() < present:
        shape = rng.choice(scene.objects)
        return Subject(shape.kind, shape.colour)
    return Subject(_pick_kind(scene, rng, 0.7), _pick_colour(scene, rng, 0.7))


def _pick_place(scene: Pictured, rng: random.Random, present: float) -> str:
    """A place; `present` is how often it is the place (or the side) of a shape that is there."""
    if not scene.objects or rng.random() >= present:
        return rng.choice((*PLACES, *SIDES))
    place = rng.choice(scene.objects).place
    sides = [side for side, places in SIDES.items() if place in places]
    return rng.choice(sides) if sides and (place in SIDES or rng.random() < 0.4) else place


def _ask_colour(scene: Pictured, rng: random.Random) -> Ask:
    return Ask("colour", Subject(kind=_pick_kind(scene, rng, 0.85)))


def _ask_kind(scene: Pictured, rng: random.Random) -> Ask:
    return Ask("kind", Subject(colour=_pick_colour(scene, rng, 0.85)))


def _ask_count_kind(scene: Pictured, rng: random.Random) -> Ask:
    return Ask("count_some", Subject(kind=_pick_kind(scene, rng, 0.75)))


def _ask_count_colour(scene: Pictured, rng: random.Random) -> Ask:
    return Ask("count_some", Subject(colour=_pick_colour(scene, rng, 0.75)))


def _ask_where(scene: Pictured, rng: random.Random) -> Ask:
    return Ask("where", _pick_subject(scene, rng, 0.88))


def _ask_exists(scene: Pictured, rng: random.Random) -> Ask:
    return Ask("exists", _pick_subject(scene, rng, 0.5))


def _ask_check(scene: Pictured, rng: random.Random) -> Ask:
    if rng.random() < 0.5:
        subject = Subject(kind=_pick_kind(scene, rng, 0.9))
        claims = [shape.colour for shape in subject.among(scene)]
        return Ask("is_colour", subject, claim=_pick_claim(rng, claims, COLOURS))
    subject = _pick_subject(scene, rng, 0.9)
    return Ask("is_at", subject, place=_pick_claimed_place(rng, subject.among(scene)))


def _pick_claim(rng: random.Random, truths: list[str], others: tuple[str, ...]) -> str:
    return rng.choice(truths) if truths and rng.random() < 0.45 else rng.choice(others)


def _pick_claimed_place(rng: random.Random, shapes: tuple[Shape, ...]) -> str:
    truths = [shape.place for shape in shapes]
    truths += [side for side, places in SIDES.items() if any(place in places for place in truths)]
    return _pick_claim(rng, truths, PLACES)


_STANDALONE: dict[str, Callable[[Pictured, random.Random], Ask]] = {
    "list": lambda scene, rng: Ask("list"),
    "count": lambda scene, rng: Ask("count"),
    "count_kind": _ask_count_kind,
    "count_colour": _ask_count_colour,
    "colour": _ask_colour,
    "kind": _ask_kind,
    "where": _ask_where,
    "at": lambda scene, rng: Ask("at", place=_pick_place(scene, rng, 0.65)),
    "exists": _ask_exists,
    "exists_at": lambda scene, rng: Ask("anything", place=_pick_place(scene, rng, 0.5)),
    "check": _ask_check,
}


# --- follow-ups ------------------------------------------------------------------------------------------------------

_Follow = tuple[str, str, Ask]  # question type, key of phrases.FOLLOW_UPS, what is asked


def _follow_ups(scene: Pictured, focus: Focus, rng: random.Random) -> list[_Follow]:
    """Return the unambiguous questions that may follow the last answer without naming the shapes again."""
    options = _same_again(scene, focus, rng)
    if focus.ask.what == "anything" and focus.shapes:
        return [*options, ("then_what", "what_there", Ask("at", place=focus.ask.place))]
    if focus.shapes and focus.ask.what != "count":
        options.append(("then_else", "else", Ask("else", besides=focus.shapes)))
    if focus.ask.what == "exists" and focus.shapes and not (focus.subject.kind and focus.subject.colour):
        options.append(("then_count", "count_those", Ask("count_some", focus.subject)))
    if focus.all_known:
        return options
    if focus.ask.what == "count":
        key = "its_name" if len(focus.shapes) == 1 else "their_name"
        options.append(("then_what", key, Ask("list")))
    # After "Yes, there is a circle." the word "it" needs exactly one circle; the answer did not give the number.
    if len(focus.shapes) == 1:
        options += _about_it(focus, rng)
    elif focus.shapes and focus.ask.what != "exists":
        options += _about_them(focus)
    return options


def _about_it(focus: Focus, rng: random.Random) -> list[_Follow]:
    subject, shape = focus.subject, focus.shapes[0]
    options: list[_Follow] = []
    if not subject.colour:
        options.append(("then_colour", "its_colour", Ask("colour", subject)))
        claim = _pick_claim(rng, [shape.colour], COLOURS)
        options.append(("then_check", "is_it_colour", Ask("is_colour", subject, claim=claim)))
    if not subject.kind:
        options.append(("then_kind", "its_kind", Ask("kind", subject)))
    if not focus.place_known:
        options.append(("then_where", "its_place", Ask("where", subject)))
        place = _pick_claimed_place(rng, focus.shapes)
        options.append(("then_check", "is_it_at", Ask("is_at", subject, place=place)))
    return options


def _about_them(focus: Focus) -> list[_Follow]:
    subject = focus.subject
    options: list[_Follow] = []
    if subject.kind and focus.ask.what != "colour":
        options.append(("then_colour", "their_colour", Ask("colour", subject)))
    if subject.colour and focus.ask.what != "kind":
        options.append(("then_kind", "their_kind", Ask("kind", subject)))
    if not focus.place_known:
        options.append(("then_where", "their_place", Ask("where", subject)))
    return options


def _same_again(scene: Pictured, focus: Focus, rng: random.Random) -> list[_Follow]:
    """The same question about something else: "And the square?", "And on the left?"."""
    what, before = focus.ask.what, focus.ask.subject
    if what in ("at", "anything"):
        key = "same_at" if what == "at" else "same_anything"
        return [("then_same", key, Ask(what, place=_pick_place(scene, rng, 0.6)))]
    if what in ("colour", "kind", "count_some", "where", "exists") and (before.kind or before.colour):
        key = {"count_some": "same_count", "exists": "same_exists"}.get(what, "same_about")
        if what == "colour":
            subject = Subject(kind=_pick_kind(scene, rng, 0.8))
        elif what == "kind":
            subject = Subject(colour=_pick_colour(scene, rng, 0.8))
        else:
            subject = _pick_subject(scene, rng, 0.8 if what == "where" else 0.6)
        if what == "count_some" and subject.kind and subject.colour:
            subject = Subject(kind=subject.kind)
        return [("then_same", key, Ask(what, subject))]
    return []


def _focus_after(scene: Pictured, ask: Ask, before: Focus | None) -> Focus | None:
    """Return what follow-ups may refer to after a turn."""
    if ask.what in ("list", "else"):
        return None
    if ask.what in ("at", "anything"):
        return Focus(ask, shapes_at(scene, ask.place), place_known=True, all_known=True)
    shapes, subject = ask.subject.among(scene), ask.subject
    going_on = before is not None and before.shapes == shapes and before.subject == subject
    place_known = ask.what in ("where", "is_at") or (going_on and before.place_known)
    if len(shapes) == 1 and ask.what in ("colour", "is_colour"):
        subject = replace(subject, colour=shapes[0].colour)
    if len(shapes) == 1 and ask.what == "kind":
        subject = replace(subject, kind=shapes[0].kind)
    return Focus(ask, shapes, subject, place_known)


# --- conversations ---------------------------------------------------------------------------------------------------

FOLLOW_UP_TYPES = (
    "then_colour",
    "then_kind",
    "then_where",
    "then_what",
    "then_count",
    "then_check",
    "then_same",
    "then_else",
)
QUESTION_TYPES = (*_STANDALONE, *FOLLOW_UP_TYPES)
# "And the square?" and "What else?" fit after most turns, "How many of those?" after few: this evens them out.
_USUAL_WEIGHTS = {
    "exists": 1.6,
    "then_same": 0.5,
    "then_else": 0.35,
    "then_count": 5.0,
    "then_colour": 1.6,
    "then_kind": 1.6,
}


def dialogue(
    scene: Pictured, seed: int, turns: int, hasty: float = 0.0, weights: dict[str, float] | None = None
) -> list[Question]:
    """A random conversation of `turns` questions about the scene, each with its true answer.

    `hasty` is the share of questions typed in lower case or without a question mark; `weights` makes question types
    (names of QUESTION_TYPES) more or less frequent than usual, 1.0 where it does not name one.
    """
    rng = random.Random(seed)
    weights = {kind: _USUAL_WEIGHTS.get(kind, 1.0) * (weights or {}).get(kind, 1.0) for kind in QUESTION_TYPES}
    focus: Focus | None = None
    asked: set[Ask] = set()
    questions: list[Question] = []
    while len(questions) < turns:
        kind, key, ask = _next_ask(scene, focus, rng, weights)
        if ask in asked and rng.random() < 0.9:
            continue
        asked.add(ask)
        text = _worded(key, ask, rng)
        if rng.random() < hasty:
            text = phrases.typed_in_haste(text, rng)
        questions.append(Question(kind, text, true_answer(scene, ask)))
        focus = _focus_after(scene, ask, focus)
    return questions


def _next_ask(scene: Pictured, focus: Focus | None, rng: random.Random, weights: dict[str, float]) -> _Follow:
    options = _follow_ups(scene, focus, rng) if focus else []
    if options and rng.random() < 0.6:
        return rng.choices(options, [weights[kind] for kind, _, _ in options])[0]
    kinds = list(_STANDALONE)
    kind = rng.choices(kinds, [weights[kind] for kind in kinds])[0]
    ask = _STANDALONE[kind](scene, rng)
    return kind, ask.what, ask


def _worded(key: str, ask: Ask, rng: random.Random) -> str:
    forms = phrases.PHRASES.get(key) or phrases.FOLLOW_UPS[key]
    subject = ask.subject
    words = {
        "the": f"the {subject.noun()}",
        "a": f"a {subject.noun()}",
        "many": subject.noun(2),
        "at": rng.choice(phrases.places_in_words(ask.place)) if ask.place else "",
        "claim": ask.claim or subject.colour or "",
    }
    if subject.colour and not subject.kind and key in ("where", "same_about", "is_at", "exists", "same_exists"):
        other = rng.choice(("shape", "shape", "one", "thing", "object"))
        words["the"], words["a"] = f"the {subject.colour} {other}", f"a {subject.colour} {other}"
    if subject.colour and not subject.kind and key == "same_count":
        words["many"] = f"{subject.colour} {rng.choice(('shapes', 'shapes', 'ones', 'things'))}"
    return phrases.loosen(rng.choice(forms).format(**words), rng)
