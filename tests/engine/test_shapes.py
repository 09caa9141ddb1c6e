"""What the demo model is trained and measured on: labels that agree with the pixels, and checkpoints that continue."""

from __future__ import annotations

import ast
import random
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.shapes import distances, outlines, sketches, strokes, surroundings, train
from models.shapes.answers import NOTHING_KNOWN
from models.shapes.build import GRID, IMAGE_PX
from models.shapes.codes import Codes
from models.shapes.descent import Descent
from models.shapes.distances import make_field_picture
from models.shapes.evaluate import is_right
from models.shapes.eye import NO_KIND, Truth
from models.shapes.outlines import Outline
from models.shapes.pictures import Album, Pictures
from models.shapes.plain import plain_drawings
from models.shapes.scenes import COLOURS, HELD_OUT_SEEDS, KINDS, PLACES, QUESTION_TYPES, dialogue
from models.shapes.sketches import LEAST_PX, LEAST_SIZE, MOST_SHAPES, MOST_SIZE, Sketch, centre, make_sketch

PATCH_PX = IMAGE_PX // GRID
SKETCHES = [make_sketch(HELD_OUT_SEEDS.start + number) for number in range(300)]


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(8))
def test_labels_turn_with_the_picture(turn: int) -> None:
    """One lit patch away from every axis of symmetry: all labels must still point at it after each of eight turns."""
    row, column = 1, 6
    pixels = np.zeros((1, IMAGE_PX, IMAGE_PX, 3), np.uint8)
    pixels[0, row * PATCH_PX : (row + 1) * PATCH_PX, column * PATCH_PX : (column + 1) * PATCH_PX] = 255
    shapes = np.full((1, MOST_SHAPES, 4), -1, np.float32)
    shapes[0, 0] = 2, 3, (column + 0.5) / GRID, (row + 0.5) / GRID
    cover = np.zeros((1, GRID, GRID), np.uint8)
    cover[0, row, column] = 1

    picture = Pictures(pixels, shapes, cover).picked(np.array([0]), turn)

    kind, colour, x, y = picture.shapes[0, 0].tolist()
    assert (kind, colour) == (2, 3)
    assert picture.pixels[0, int(y * IMAGE_PX), int(x * IMAGE_PX)].tolist() == [255, 255, 255]
    assert np.argwhere(picture.cover[0]).tolist() == [[int(y * GRID), int(x * GRID)]]
    assert (picture.shapes[0, 1:, 0] == -1).all()


def test_a_shape_that_is_alone_in_its_place_is_named_by_the_middle_patch_of_the_place() -> None:
    shapes = np.full((1, MOST_SHAPES, 4), -1, np.float32)
    shapes[0, :3] = (0, 0, 0.02, 0.02), (1, 1, 0.7, 0.7), (2, 2, 0.97, 0.97)  # the last two share the bottom right

    truth = Truth.of(Pictures(np.zeros((1, 1, 1, 3), np.uint8), shapes, np.zeros((1, GRID, GRID), np.uint8)))

    named = {divmod(patch, GRID): kind for patch, kind in enumerate(truth.centre_kind[0].tolist()) if kind != NO_KIND}
    assert named == {(1, 1): 0, (6, 6): 1, (8, 8): 2}


def test_codes_of_a_patch_add_up() -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = (len(KINDS), len(COLOURS), GRID**2, GRID**2)
    kinds, colours, patches, empty = (torch.randn(size, 5, generator=rng) for size in sizes)
    marks = torch.zeros(1, GRID**2, len(KINDS) + len(COLOURS))
    marks[0, 7, 2] = marks[0, 7, len(KINDS) + 4] = 1

    codes = Codes(kinds, colours, patches, empty, scale=1.0).of(marks)

    torch.testing.assert_close(codes[0, 7], kinds[2] + colours[4] + patches[7])
    torch.testing.assert_close(codes[0, 8], empty[8])


# --- pictures --------------------------------------------------------------------------------------------------------


def test_sketches_have_the_promised_sizes_and_places() -> None:
    for sketch in SKETCHES:
        least = LEAST_PX / min(sketch.width_px, sketch.height_px)
        assert len(sketch.objects) <= MOST_SHAPES
        for shape in sketch.objects:
            assert max(LEAST_SIZE, least) - 1e-9 <= shape.size <= max(MOST_SIZE, least)
            x, y = centre(shape)
            assert PLACES[3 * int(3 * y) + int(3 * x)] == shape.place


def test_sketches_show_every_number_kind_colour_and_place() -> None:
    shapes = [shape for sketch in SKETCHES for shape in sketch.objects]
    assert {len(sketch.objects) for sketch in SKETCHES} == set(range(MOST_SHAPES + 1))
    assert {shape.kind for shape in shapes} == set(KINDS)
    assert {shape.colour for shape in shapes} == set(COLOURS)
    assert {shape.place for shape in shapes} == set(PLACES)
    assert any(figure.fill is None for sketch in SKETCHES for figure in sketch.figures)


def test_a_sketch_is_the_same_each_time() -> None:
    first, second = make_sketch(7), make_sketch(7)
    assert first == second
    assert first.draw().tobytes() == second.draw().tobytes()


def _is_plain(sketch: Sketch) -> bool:
    around = sketch.surroundings
    return not around.jpeg_quality and not around.blur and around.oversampling == 1


def test_the_shape_in_front_has_its_colour_at_its_middle() -> None:
    """The last figure is in front, so its middle has its paint."""
    seen = 0
    for sketch in islice((s for s in SKETCHES if _is_plain(s) and s.figures), 40):
        front = sketch.figures[-1]
        if front.fill is None or front.kind not in ("circle", "square", "diamond"):
            continue
        picture = sketch.draw()
        unit = min(picture.size)
        x, y = (sum(extremes) / 2 * unit for extremes in _extremes(front.outline))
        assert picture.getpixel((int(x), int(y))) == front.fill
        seen += 1
    assert seen >= 5


def _extremes(outline: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], tuple[float, float]]:
    across, down = [x for x, _ in outline], [y for _, y in outline]
    return (min(across), max(across)), (min(down), max(down))


@pytest.mark.parametrize("outline", [outlines.ring(5, (1.0, 0.4)), outlines.rounded_box(0.2)], ids=["star", "box"])
def test_an_outline_is_fitted_around_its_middle(outline: Outline) -> None:
    across, down = _extremes(tuple(outlines.fitted(outline, 0.5, (0.3, 0.7))))
    assert max(across[1] - across[0], down[1] - down[0]) == pytest.approx(0.5)
    assert sum(across) / 2 == pytest.approx(0.3)
    assert sum(down) / 2 == pytest.approx(0.7)


def test_training_never_sees_a_held_out_picture() -> None:
    with pytest.raises(ValueError, match="`seeds` must end before"):
        Pictures.of(range(HELD_OUT_SEEDS.start - 1, HELD_OUT_SEEDS.start + 1))


def test_an_album_reads_what_was_saved(tmp_path: Path) -> None:
    drawn = Pictures.of(range(4))
    drawn.save(tmp_path / "0.npz")
    batch = Album(tmp_path).batch(16, np.random.default_rng(0))
    colours = {tuple(row) for row in batch.shapes[..., 1].tolist()}
    assert colours <= {tuple(row) for row in drawn.shapes[..., 1].tolist()}
    assert batch.pixels.shape == (16, IMAGE_PX, IMAGE_PX, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz"]


# --- the second generator and the plain drawings ---------------------------------------------------------------------


def test_the_second_generator_shares_no_drawing_code_with_the_first() -> None:
    imported = {
        node.module: {alias.name for alias in node.names}
        for node in ast.walk(ast.parse(Path(distances.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("models")
    }
    assert imported == {"models.shapes.scenes": {"COLOURS", "KINDS", "PLACES", "Shape"}}
    assert "ImageDraw" not in Path(distances.__file__).read_text()
    assert all("distances" not in Path(module.__file__).read_text() for module in (sketches, strokes, surroundings))


def test_the_second_generator_puts_shapes_where_it_says() -> None:
    """Exactly one filled shape on a plain ground: the pixels that differ from the corner surround its place."""
    checked = 0
    for seed in count(HELD_OUT_SEEDS.start):
        picture = make_field_picture(seed)
        if len(picture.objects) != 1:
            continue
        pixels = np.asarray(picture.draw()).astype(int)
        rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(-1) > 130)
        y, x = (rows.min() + rows.max()) / 2 / len(pixels), (columns.min() + columns.max()) / 2 / len(pixels[0])
        assert PLACES[3 * int(3 * y) + int(3 * x)] == picture.objects[0].place
        checked += 1
        if checked == 10:
            return


def test_there_are_324_plain_drawings_of_one_shape() -> None:
    every = list(plain_drawings())
    assert len(every) == 324
    assert {shape.kind for drawing in every for shape in drawing.objects} == set(KINDS)


# --- questions and answers -------------------------------------------------------------------------------------------


def test_every_answer_about_a_picture_without_a_known_shape_says_so() -> None:
    empty = next(sketch for sketch in SKETCHES if not sketch.objects)
    answers = {question.answer for seed in range(20) for question in dialogue(empty, seed, 6)}
    assert answers == {NOTHING_KNOWN}


def test_every_type_of_question_is_asked() -> None:
    asked = {question.kind for number, sketch in enumerate(SKETCHES) for question in dialogue(sketch, number, 6)}
    assert asked == set(QUESTION_TYPES)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("There is a red star.", "There is a red star.", True),
        ("There is a red star and a blue cross.", "There is a blue cross and a red star.", True),
        ("There are two red stars and a blue cross.", "There is a blue cross and two red stars.", True),
        ("There is a red star, a blue cross and a red star.", "There is a blue cross and a red star.", False),
        ("There is a red cross and a blue star.", "There is a blue cross and a red star.", False),
        ("The star is at the top.", "The star is at the top left.", False),
    ],
)
def test_answers_are_compared_word_by_word_but_lists_in_any_order(answer: str, truth: str, right: bool) -> None:
    assert is_right(answer, truth) is right


# --- training --------------------------------------------------------------------------------------------------------


def _descent() -> tuple[nn.Sequential, Descent]:
    torch.manual_seed(3)
    model = nn.Sequential()
    model.add_module("layers", nn.Sequential(nn.Linear(6, 8), nn.Tanh()))
    model.add_module("head", nn.Linear(8, 2))
    return model, Descent([model])


def _train(model: nn.Sequential, descent: Descent, steps: range) -> list[float]:
    losses = []
    for step in steps:
        given = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = (model(given).float() - given[:, :2].float()).square().mean()
        descent.step(loss, share=1.0)
        losses.append(loss.item())
    return losses


def test_training_lowers_the_loss() -> None:
    losses = _train(*_descent(), range(250))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_training_continues_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, descent = _descent()
    _train(model, descent, range(4))
    torch.save(descent.state(), tmp_path / "checkpoint")
    expected = _train(model, descent, range(4, 8))

    model, descent = _descent()
    descent.load(torch.load(tmp_path / "checkpoint"))
    assert _train(model, descent, range(4, 8)) == expected


def test_a_run_continues_after_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    job = train.Job(0, train.Plan(), tmp_path, tmp_path, tmp_path, tmp_path / "meeting")
    model, descent = _descent()
    progress = train.Progress(job, "part", 6, descent)
    for step in islice(progress.bar(), 4):
        expected = _train(model, descent, range(step, step + 1))
        if step < 3:
            progress.taken(step)

    model, descent = _descent()
    again = train.Progress(job, "part", 6, descent)
    assert list(again.bar()) == [3, 4, 5]
    assert _train(model, descent, range(3, 4)) == expected


def test_pictures_with_many_or_equal_shapes_are_drawn_more_often() -> None:
    one, equal, different = (np.full((MOST_SHAPES, 4), -1, np.float32) for _ in range(3))
    one[0] = equal[0] = equal[1] = different[0] = 2, 3, 0.2, 0.2
    different[1] = 2, 4, 0.8, 0.2
    weights = [train.weight_in_lists(shapes) for shapes in (one, equal, different)]
    assert weights[0] < weights[2] < weights[1]

    rng = random.Random(1)
    drawn = [row for _ in range(300) for row in train.weighted(weights, 1, rng)]
    assert drawn.count(0) < drawn.count(2) < drawn.count(1)
    assert sorted(train.weighted(weights, 3, rng)) == [0, 1, 2]
