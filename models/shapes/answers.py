"""The true answer to each question about a picture, in its one canonical wording.

In a question "on the left" is the whole left column; right, top and bottom likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from models.shapes import phrases
from models.shapes.world import Pictured, Shape

NOTHING_KNOWN = "There is no shape that I know."
SIDES = {
    "top": ("top left", "top", "top right"),
    "bottom": ("bottom left", "bottom", "bottom right"),
    "left": ("top left", "left", "bottom left"),
    "right": ("top right", "right", "bottom right"),
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Subject:
    """What a question is about: shapes of a kind, of a colour, of both, or (neither given) all shapes."""

    kind: str | None = None
    colour: str | None = None

    def among(self, scene: Pictured) -> tuple[Shape, ...]:
        return tuple(s for s in scene.objects if self.kind in (None, s.kind) and self.colour in (None, s.colour))

    def noun(self, count: int = 1) -> str:
        """ "red circle", "red shape", "circles" ... by what is given."""
        noun = self.kind or "shape"
        if count != 1:
            noun += "es" if noun == "cross" else "s"
        return f"{self.colour} {noun}" if self.colour else noun


@dataclass(frozen=True)
class Ask:
    """A question without its wording: `what` is a key of phrases.PHRASES, the rest are its parts."""

    what: str
    subject: Subject = Subject()
    place: str = ""
    claim: str = ""
    besides: tuple[Shape, ...] = ()


def true_answer(scene: Pictured, ask: Ask) -> str:
    """Return the one canonical answer; to any question about a picture without a known shape it is NOTHING_KNOWN."""
    if not scene.objects:
        return NOTHING_KNOWN
    return _ANSWERS[ask.what](scene, ask)


def shapes_at(scene: Pictured, place: str) -> tuple[Shape, ...]:
    """Return the shapes at a place; a side ("left") is its whole row or column."""
    return tuple(shape for shape in scene.objects if shape.place in SIDES.get(place, (place,)))


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _named(shapes: tuple[Shape, ...]) -> str:
    """ "a red circle and two blue stars": shapes of one kind and colour are counted together."""
    return _counted([Subject(shape.kind, shape.colour) for shape in shapes])


def _counted(subjects: list[Subject]) -> str:
    counts = Counter(subjects)
    return _joined([f"a {one.noun()}" if n == 1 else f"{_NUMBERS[n]} {one.noun(n)}" for one, n in counts.items()])


def _there(shapes: tuple[Shape, ...], adverb: str = "") -> str:
    """ "There is a red circle and a blue star": the verb agrees with the first part, as people speak."""
    names = [shape.name for shape in shapes]
    verb = "are" if names.count(names[0]) > 1 else "is"
    return f"There {verb}{adverb} {_named(shapes)}"


def _at(place: str) -> str:
    return phrases.places_in_words(place)[0]


def _about(scene: Pictured, subject: Subject, describe: Callable[[Shape], str]) -> str:
    """ "The circle is red.", "The circles are red and blue." or "There is no circle." """
    shapes = subject.among(scene)
    if not shapes:
        return f"There is no {subject.noun()}."
    verb = "is" if len(shapes) == 1 else "are"
    parts = list(dict.fromkeys(describe(shape) for shape in shapes))
    return f"The {subject.noun(len(shapes))} {verb} {_joined(parts)}."


def _say_all(scene: Pictured, ask: Ask) -> str:
    return f"{_there(scene.objects)}."


def _say_count(scene: Pictured, ask: Ask) -> str:
    count = len(ask.subject.among(scene))
    return f"There {'is' if count == 1 else 'are'} {_NUMBERS[count]} {ask.subject.noun(count)}."


def _say_colour(scene: Pictured, ask: Ask) -> str:
    return _about(scene, ask.subject, lambda shape: shape.colour)


def _say_kind(scene: Pictured, ask: Ask) -> str:
    shapes = ask.subject.among(scene)
    if len(shapes) < 2:
        return _about(scene, ask.subject, lambda shape: f"a {shape.kind}")
    return f"The {ask.subject.noun(2)} are {_counted([Subject(shape.kind) for shape in shapes])}."


def _say_where(scene: Pictured, ask: Ask) -> str:
    return _about(scene, ask.subject, lambda shape: _at(shape.place))


def _say_at(scene: Pictured, ask: Ask) -> str:
    shapes = shapes_at(scene, ask.place)
    return f"{_there(shapes) if shapes else 'There is nothing'} {_at(ask.place)}."


def _say_exists(scene: Pictured, ask: Ask) -> str:
    there = bool(ask.subject.among(scene))
    return f"{'Yes, there is a' if there else 'No, there is no'} {ask.subject.noun()}."


def _say_anything(scene: Pictured, ask: Ask) -> str:
    there = bool(shapes_at(scene, ask.place))
    return f"{'Yes, there is something' if there else 'No, there is nothing'} {_at(ask.place)}."


def _say_is_colour(scene: Pictured, ask: Ask) -> str:
    fact = _say_colour(scene, ask)
    return _with_verdict(scene, ask, fact, lambda shape: shape.colour == ask.claim)


def _say_is_at(scene: Pictured, ask: Ask) -> str:
    fact = _say_where(scene, ask)
    return _with_verdict(scene, ask, fact, lambda shape: shape in shapes_at(scene, ask.place))


def _with_verdict(scene: Pictured, ask: Ask, fact: str, holds: Callable[[Shape], bool]) -> str:
    """Put yes or no before a fact about one shape; return a fact about none or several shapes as it is."""
    shapes = ask.subject.among(scene)
    if len(shapes) != 1:
        return fact
    return f"{'Yes' if holds(shapes[0]) else 'No'}, {fact[0].lower()}{fact[1:]}"


def _say_else(scene: Pictured, ask: Ask) -> str:
    rest = tuple(shape for shape in scene.objects if shape not in ask.besides)
    return f"{_there(rest, ' also')}." if rest else "There is nothing else."


_ANSWERS: dict[str, Callable[[Pictured, Ask], str]] = {
    "list": _say_all,
    "count": _say_count,
    "count_some": _say_count,
    "colour": _say_colour,
    "kind": _say_kind,
    "where": _say_where,
    "at": _say_at,
    "exists": _say_exists,
    "anything": _say_anything,
    "is_colour": _say_is_colour,
    "is_at": _say_is_at,
    "else": _say_else,
}
