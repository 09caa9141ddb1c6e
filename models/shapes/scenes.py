"""The world the model knows: scenes of one to four coloured shapes, and the truth about them.

Owns: what a scene is, which questions there are, each true answer in its one canonical wording.
Must not know: pixels (`drawing`), the many wordings of a question (`phrases`), models, tensors.

    scene = make_scene(10_000_000)
    picture = scene.draw()
    for question in dialogue(scene, seed=1, turns=3):
        print(question.text, question.answer)

A picture has three rows and three columns. The nine places are "top left", "top", ... "bottom right". In a question,
"on the left" means the whole left column (so do right, top and bottom for theirs), which is what people mean by it.
No scene holds two shapes of the same kind and colour; kinds repeat, colours repeat.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from models.shapes import drawing, phrases

KINDS = ("circle", "square", "triangle", "star", "diamond", "cross")
COLOURS = tuple(drawing.PAINTS)
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
HELD_OUT_SEEDS = range(10_000_000, 20_000_000)  # training draws below; the demo, the tests, the evaluation in here
MOST_SHAPES = 4
NOTHING_KNOWN = "There is no shape that I know."

_SIDES = {
    "top": ("top left", "top", "top right"),
    "bottom": ("bottom left", "bottom", "bottom right"),
    "left": ("top left", "left", "bottom left"),
    "right": ("top right", "right", "bottom right"),
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LEAST_DISTANCE = 48.0  # of any background colour from any shape's colour, see drawing.colour_distance


@dataclass(frozen=True)
class Shape:
    """One shape; `size` and `shift` are in cells (a third of the picture), `tilt` is in radians."""

    kind: str
    colour: str
    place: str
    size: float
    shift: tuple[float, float] = (0.0, 0.0)
    tilt: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    def mark(self) -> drawing.Mark:
        """The outline to draw."""
        row, column = divmod(PLACES.index(self.place), 3)
        middle = ((column + 0.5 + self.shift[0]) / 3, (row + 0.5 + self.shift[1]) / 3)
        return drawing.Mark(self.kind, drawing.PAINTS[self.colour], middle, self.size / 6, self.tilt)


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order (row by row) on a background."""

    objects: tuple[Shape, ...]
    background: drawing.Background

    def draw(self, size_px: int = 336) -> Image.Image:
        """The picture, RGB, `size_px` by `size_px`."""
        return drawing.paint_picture(self.background, [shape.mark() for shape in self.objects], size_px)


def make_scene(seed: int, objects: int | None = None) -> Scene:
    """The scene of a seed, the same on every machine; `objects` fixes how many shapes (1 to 9), else 1 to 4."""
    rng = random.Random(seed)
    count = objects or rng.choices((1, 2, 3, 4), (1, 2, 3, 3))[0]
    pairs = _pick_pairs(rng, count)
    places = sorted(rng.sample(range(9), count))
    shapes = tuple(
        _shape_at(rng, kind, colour, PLACES[cell]) for (kind, colour), cell in zip(pairs, places, strict=True)
    )
    return Scene(shapes, _pick_background(rng, {colour for _, colour in pairs}))


def _pick_pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Different (kind, colour) pairs; half of the scenes draw from few kinds or few colours so that both repeat."""
    kinds, colours = KINDS, COLOURS
    if rng.random() < 0.35:
        kinds = tuple(rng.sample(KINDS, 1 + count // 2))
    elif rng.random() < 0.45:
        colours = tuple(rng.sample(COLOURS, 1 + count // 2))
    return rng.sample([(kind, colour) for kind in kinds for colour in colours], count)


def _shape_at(rng: random.Random, kind: str, colour: str, place: str) -> Shape:
    size = rng.uniform(0.54, 0.84)
    free = (0.94 - size * 1.1) / 2  # stars and diamonds reach 1.1 radii; a margin keeps neighbours apart
    shift = (round(rng.uniform(-free, free), 4), round(rng.uniform(-free, free), 4))
    return Shape(kind, colour, place, round(size, 4), shift, round(rng.uniform(-0.12, 0.12), 4))


def _pick_background(rng: random.Random, colours: set[str]) -> drawing.Background:
    style = rng.choice(drawing.STYLES)
    first = _pick_paint(rng, colours, near=None)
    second = _pick_paint(rng, colours, near=first)
    angle = rng.uniform(0.0, 3.1416)
    return drawing.Background(style, first, second, round(angle, 4), rng.randint(4, 14), rng.randrange(2**31))


def _pick_paint(rng: random.Random, colours: set[str], near: drawing.Rgb | None) -> drawing.Rgb:
    """A muted colour far from all `colours`, and not too far from `near` (so all shades in between are far too)."""
    for _ in range(400):
        grey = rng.randrange(50, 226)
        paint = tuple(min(235, max(30, grey + rng.randrange(-38, 39))) for _ in range(3))
        if near and not 5 < drawing.colour_distance(paint, near) < 24:
            continue
        if all(drawing.colour_distance(paint, drawing.PAINTS[colour]) > _LEAST_DISTANCE for colour in colours):
            return paint
    return near or (128, 128, 128)


@dataclass(frozen=True)
class Question:
    """One turn: `kind` is one of QUESTION_TYPES, `answer` the true answer in its canonical wording."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Subject:
    """Whom a question is about: shapes of a kind, of a colour, of both, or (neither given) all shapes."""

    kind: str | None = None
    colour: str | None = None

    def among(self, scene: Scene) -> tuple[Shape, ...]:
        return tuple(s for s in scene.objects if self.kind in (None, s.kind) and self.colour in (None, s.colour))

    def noun(self, count: int = 1) -> str:
        """ "red circle", "red shape", "circles" ... by what is given."""
        noun = self.kind or "shape"
        if count != 1:
            noun += "es" if noun == "cross" else "s"
        return f"{self.colour} {noun}" if self.colour else noun


@dataclass(frozen=True)
class Ask:
    """What is wanted, free of wording: `what` is a key of phrases.PHRASES, the rest are its parts."""

    what: str
    subject: Subject = Subject()
    place: str = ""
    claim: str = ""
    besides: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class Focus:
    """What a follow-up may lean on: the last ask, the shapes it was about and what is known of them by now."""

    ask: Ask
    shapes: tuple[Shape, ...] = ()
    subject: Subject = Subject()
    place_told: bool = False
    fully_told: bool = False


# --- the truth -------------------------------------------------------------------------------------------------------


def true_answer(scene: Scene, ask: Ask) -> str:
    """Return the one canonical answer; to any question about a picture without a known shape it is NOTHING_KNOWN."""
    if not scene.objects:
        return NOTHING_KNOWN
    return _ANSWERS[ask.what](scene, ask)


def shapes_at(scene: Scene, place: str) -> tuple[Shape, ...]:
    """The shapes at a place; a side ("left") means its whole row or column."""
    return tuple(shape for shape in scene.objects if shape.place in _SIDES.get(place, (place,)))


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


def _about(scene: Scene, subject: Subject, tell: Callable[[Shape], str]) -> str:
    """ "The circle is red.", "The circles are red and blue." or "There is no circle." """
    shapes = subject.among(scene)
    if not shapes:
        return f"There is no {subject.noun()}."
    verb = "is" if len(shapes) == 1 else "are"
    parts = list(dict.fromkeys(tell(shape) for shape in shapes))
    return f"The {subject.noun(len(shapes))} {verb} {_joined(parts)}."


def _say_all(scene: Scene, ask: Ask) -> str:
    return f"{_there(scene.objects)}."


def _say_count(scene: Scene, ask: Ask) -> str:
    count = len(ask.subject.among(scene))
    return f"There {'is' if count == 1 else 'are'} {_NUMBERS[count]} {ask.subject.noun(count)}."


def _say_colour(scene: Scene, ask: Ask) -> str:
    return _about(scene, ask.subject, lambda shape: shape.colour)


def _say_kind(scene: Scene, ask: Ask) -> str:
    shapes = ask.subject.among(scene)
    if len(shapes) < 2:
        return _about(scene, ask.subject, lambda shape: f"a {shape.kind}")
    return f"The {ask.subject.noun(2)} are {_counted([Subject(shape.kind) for shape in shapes])}."


def _say_where(scene: Scene, ask: Ask) -> str:
    return _about(scene, ask.subject, lambda shape: _at(shape.place))


def _say_at(scene: Scene, ask: Ask) -> str:
    shapes = shapes_at(scene, ask.place)
    return f"{_there(shapes) if shapes else 'There is nothing'} {_at(ask.place)}."


def _say_exists(scene: Scene, ask: Ask) -> str:
    there = bool(ask.subject.among(scene))
    return f"{'Yes, there is a' if there else 'No, there is no'} {ask.subject.noun()}."


def _say_anything(scene: Scene, ask: Ask) -> str:
    there = bool(shapes_at(scene, ask.place))
    return f"{'Yes, there is something' if there else 'No, there is nothing'} {_at(ask.place)}."


def _say_is_colour(scene: Scene, ask: Ask) -> str:
    told = _say_colour(scene, ask)
    return _with_verdict(scene, ask, told, lambda shape: shape.colour == ask.claim)


def _say_is_at(scene: Scene, ask: Ask) -> str:
    told = _say_where(scene, ask)
    return _with_verdict(scene, ask, told, lambda shape: shape in shapes_at(scene, ask.place))


def _with_verdict(scene: Scene, ask: Ask, told: str, holds: Callable[[Shape], bool]) -> str:
    """Yes or no is for one shape; of none or several the bare facts are told, which is truthful either way."""
    shapes = ask.subject.among(scene)
    if len(shapes) != 1:
        return told
    return f"{'Yes' if holds(shapes[0]) else 'No'}, {told[0].lower()}{told[1:]}"


def _say_else(scene: Scene, ask: Ask) -> str:
    rest = tuple(shape for shape in scene.objects if shape not in ask.besides)
    return f"{_there(rest, ' also')}." if rest else "There is nothing else."


_ANSWERS: dict[str, Callable[[Scene, Ask], str]] = {
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


# --- questions that stand alone --------------------------------------------------------------------------------------


def _pick_kind(scene: Scene, rng: random.Random, present: float) -> str:
    return rng.choice(scene.objects).kind if scene.objects and rng.random() < present else rng.choice(KINDS)


def _pick_colour(scene: Scene, rng: random.Random, present: float) -> str:
    return rng.choice(scene.objects).colour if scene.objects and rng.random() < present else rng.choice(COLOURS)


def _pick_subject(scene: Scene, rng: random.Random, present: float) -> Subject:
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


def _pick_place(scene: Scene, rng: random.Random, present: float) -> str:
    """A place; `present` is how often it is the place (or the side) of a shape that is there."""
    if not scene.objects or rng.random() >= present:
        return rng.choice((*PLACES, *_SIDES))
    place = rng.choice(scene.objects).place
    sides = [side for side, places in _SIDES.items() if place in places]
    return rng.choice(sides) if sides and (place in _SIDES or rng.random() < 0.4) else place


def _ask_colour(scene: Scene, rng: random.Random) -> Ask:
    return Ask("colour", Subject(kind=_pick_kind(scene, rng, 0.85)))


def _ask_kind(scene: Scene, rng: random.Random) -> Ask:
    return Ask("kind", Subject(colour=_pick_colour(scene, rng, 0.85)))


def _ask_count_kind(scene: Scene, rng: random.Random) -> Ask:
    return Ask("count_some", Subject(kind=_pick_kind(scene, rng, 0.75)))


def _ask_count_colour(scene: Scene, rng: random.Random) -> Ask:
    return Ask("count_some", Subject(colour=_pick_colour(scene, rng, 0.75)))


def _ask_where(scene: Scene, rng: random.Random) -> Ask:
    return Ask("where", _pick_subject(scene, rng, 0.88))


def _ask_exists(scene: Scene, rng: random.Random) -> Ask:
    return Ask("exists", _pick_subject(scene, rng, 0.5))


def _ask_check(scene: Scene, rng: random.Random) -> Ask:
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
    truths += [side for side, places in _SIDES.items() if any(place in places for place in truths)]
    return _pick_claim(rng, truths, PLACES)


_STANDALONE: dict[str, Callable[[Scene, random.Random], Ask]] = {
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


def _follow_ups(scene: Scene, focus: Focus, rng: random.Random) -> list[_Follow]:
    """All that may be asked next without naming the shapes again, each unambiguous after the last true answer."""
    options = _same_again(scene, focus, rng)
    if focus.ask.what == "anything" and focus.shapes:
        return [*options, ("then_what", "what_there", Ask("at", place=focus.ask.place))]
    if focus.shapes and focus.ask.what != "count":
        options.append(("then_else", "else", Ask("else", besides=focus.shapes)))
    if focus.ask.what == "exists" and focus.shapes and not (focus.subject.kind and focus.subject.colour):
        options.append(("then_count", "count_those", Ask("count_some", focus.subject)))
    if focus.fully_told:
        return options
    if focus.ask.what == "count":
        key = "its_name" if len(focus.shapes) == 1 else "their_name"
        options.append(("then_what", key, Ask("list")))
    # After "Yes, there is a circle." it is only "it" if there is one; of several the number was not told yet.
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
    if not focus.place_told:
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
    if not focus.place_told:
        options.append(("then_where", "their_place", Ask("where", subject)))
    return options


def _same_again(scene: Scene, focus: Focus, rng: random.Random) -> list[_Follow]:
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


def _focus_after(scene: Scene, ask: Ask, before: Focus | None) -> Focus | None:
    """What the turn just answered leaves in view."""
    if ask.what in ("list", "else"):
        return None
    if ask.what in ("at", "anything"):
        return Focus(ask, shapes_at(scene, ask.place), place_told=True, fully_told=True)
    shapes, subject = ask.subject.among(scene), ask.subject
    going_on = before is not None and before.shapes == shapes and before.subject == subject
    place_told = ask.what in ("where", "is_at") or (going_on and before.place_told)
    if len(shapes) == 1 and ask.what in ("colour", "is_colour"):
        subject = replace(subject, colour=shapes[0].colour)
    if len(shapes) == 1 and ask.what == "kind":
        subject = replace(subject, kind=shapes[0].kind)
    return Focus(ask, shapes, subject, place_told)


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
    scene: Scene, seed: int, turns: int, hasty: float = 0.0, weights: dict[str, float] | None = None
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


def _next_ask(scene: Scene, focus: Focus | None, rng: random.Random, weights: dict[str, float]) -> _Follow:
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
