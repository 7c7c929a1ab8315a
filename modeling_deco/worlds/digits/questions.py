# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The questions of the digits world, with exact answers, and the score of an answer.

An answer begins with the digit that the question names, and the fact follows at once: "7 red.". This order is easier
to learn: after "7 is red." or "7: yes." a model must fetch the digit from one token back before it can look it up. A
run of 8 thousand pictures with such answers stayed on a plateau (50 % on existence); with the present answers a run
reached 98 % after 6 thousand pictures.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch

from ..boxes import box_iou
from .scenes import Box, Scene

BOX_UNIT = 4  # of 96 pixels; answers give the edges of a box in this unit, 0 to 24
MIN_RELATION_STEP = 8  # of 96 pixels between the centers of two digits, on the axis of the question

ExactBox = tuple[float, float, float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question about a scene and its reference answer. `locate` has the exact `box` in pixels, in a picture that is
    96 pixels wide or was scaled to that."""

    kind: str
    text: str
    answer: str
    box: ExactBox | None = None


def _existence_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Alternate between digits that are in the picture and digits that are not."""
    present = [digit.value for digit in scene.digits]
    absent = [value for value in range(10) if value not in present]
    first_is_present = rng.random() < 0.5
    asked = []
    for one, other in zip(rng.permutation(present), rng.permutation(absent), strict=False):
        asked += [one, other] if first_is_present else [other, one]
    return [
        Question("existence", f"Is there a {value}?", f"{value} {'yes' if value in present else 'no'}.")
        for value in asked
    ]


def _count_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    number = len(scene.digits)
    return [Question("count", "How many digits are there?", f"{number} digit{'' if number == 1 else 's'}.")]


def _colour_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [
        Question("colour", f"What colour is the {digit.value}?", f"{digit.value} {digit.colour}.")
        for digit in _shuffled(scene.digits, rng)
    ]


def _read_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [Question("read", "Read the digits.", " ".join(str(digit.value) for digit in scene.digits) + ".")]


def _relation_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask about pairs that are clearly apart on the axis, in random order within a pair."""
    found = []
    for pair in combinations(scene.digits, 2):
        for axis, words in enumerate(("left of", "above")):
            one, other = _shuffled(pair, rng)
            step = other.center[axis] - one.center[axis]
            if abs(step) >= MIN_RELATION_STEP * scene.scale:
                question = f"Is the {one.value} {words} the {other.value}?"
                answer = f"{one.value} {words} {other.value} {'yes' if step > 0 else 'no'}."
                found.append(Question("relation", question, answer))
    return _shuffled(found, rng)


def _locate_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = []
    for digit in _shuffled(scene.digits, rng):
        x0, y0, x1, y1 = (edge / scene.scale for edge in digit.box)
        answer = f"{digit.value} {' '.join(map(str, coarse_box((x0, y0, x1, y1))))}."
        found.append(Question("locate", f"Where is the {digit.value}?", answer, box=(x0, y0, x1, y1)))
    return found


_ASKERS = {
    "existence": _existence_questions,
    "count": _count_questions,
    "colour": _colour_questions,
    "read": _read_questions,
    "relation": _relation_questions,
    "locate": _locate_questions,
}
KINDS = tuple(_ASKERS)

# The questions about one training picture. Facts that are learned late are asked most often.
TRAINING_KINDS = ("existence",) * 2 + ("count", "read") + ("colour",) * 2 + ("relation",) * 2 + ("locate",) * 3


def questions(scene: Scene, rng: np.random.Generator, kinds: Iterable[str] = KINDS) -> list[Question]:
    """Distinct questions about a scene, in the order of `kinds`. A kind may occur several times.

    A kind yields fewer questions if the scene has no more: there is one about the count, and there are none about
    relations where no two digits are clearly apart.
    """
    found = {kind: _ASKERS[kind](scene, rng) for kind in dict.fromkeys(kinds)}
    return [found[kind].pop(0) for kind in kinds if found[kind]]


def _shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    return [items[position] for position in rng.permutation(len(items))]


def coarse_box(box: ExactBox) -> Box:
    """Round the edges of a box to units of `BOX_UNIT` pixels. The result is never empty."""
    x0, y0, x1, y1 = (math.floor(edge / BOX_UNIT + 0.5) for edge in box)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


_LOCATE_ANSWER = re.compile(r"(\d) (\d{1,4}) (\d{1,4}) (\d{1,4}) (\d{1,4})")


def score(question: Question, answer: str) -> bool:
    """Whether an answer is right. The whole text counts, with the repeated digit.

    Case, spacing and the final full stop are ignored. A box is right if its IoU with the exact box is at least 0.5.
    """
    answer, reference = _plain(answer), _plain(question.answer)
    if question.box is None:
        return answer == reference
    match = _LOCATE_ANSWER.fullmatch(answer)
    if match is None or match[1] != reference[0]:
        return False
    box = torch.tensor([BOX_UNIT * int(number) for number in match.groups()[1:]])
    return bool(box_iou(box, torch.tensor(question.box)) >= 0.5)


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()
