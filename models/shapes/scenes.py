"""The world that the model knows, in one import: shapes, scenes, questions and true answers.

scene = make_scene(10_000_000)
picture = scene.draw()
for question in dialogue(scene, seed=1, turns=3):
    print(question.text, question.answer)
"""

from models.shapes.answers import NOTHING_KNOWN, Ask, Subject, shapes_at, true_answer
from models.shapes.dialogues import FOLLOW_UP_TYPES, QUESTION_TYPES, Question, dialogue
from models.shapes.world import (
    COLOURS,
    HELD_OUT_SEEDS,
    KINDS,
    MOST_SHAPES,
    PLACES,
    Pictured,
    Scene,
    Shape,
    make_scene,
)

__all__ = [
    "COLOURS",
    "FOLLOW_UP_TYPES",
    "HELD_OUT_SEEDS",
    "KINDS",
    "MOST_SHAPES",
    "NOTHING_KNOWN",
    "PLACES",
    "QUESTION_TYPES",
    "Ask",
    "Pictured",
    "Question",
    "Scene",
    "Shape",
    "Subject",
    "dialogue",
    "make_scene",
    "shapes_at",
    "true_answer",
]
