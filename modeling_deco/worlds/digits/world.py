"""The digits world: small pictures of real handwriting, and questions whose answers are known exactly.

The handwriting is scikit-learn's bundled `load_digits` (1797 scans of 8 x 8 pixels, nothing is downloaded), split by
scan: a fifth is `test`, a tenth `validation`, the rest `train`. A scene is a 96 x 96 picture with one to four digits
of different classes that do not touch; it depends on nothing but `(split, seed, index)`, so a data set is a range of
indices. Scans are distorted in `train` only.

    python -m modeling_deco.worlds.digits.world --split test --num-pictures 200 --out digits-test

writes the pictures as PNG files and their questions as one LLaVA-format JSON file.
"""

import argparse
import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates, spline_filter
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

from ...utils.errors import run

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 20985
IMAGE_SIZE = 96
BOX_UNIT = 4  # pixels; answers name box edges in this unit, 0 to 24
MIN_DIGIT_SIZE, MAX_DIGIT_SIZE = 20, 32
MIN_GAP = 2  # pixels between two digits
# Two digits closer than this in x have no order that a viewer would agree on, so no picture has such a pair.
MIN_READING_STEP = 6
MIN_RELATION_STEP = 8

COLOURS = {
    "red": (235, 60, 55),
    "green": (70, 225, 85),
    "blue": (70, 120, 250),
    "yellow": (245, 220, 60),
    "purple": (185, 75, 235),
    "white": (240, 240, 240),
}
# Ink is nowhere fainter than this, so that the edge of a digit, and with it its box, is a fact of the picture.
MIN_INK_OPACITY = 0.55
INK_THRESHOLD = 0.3
TILE_MARGIN = 1.3  # room around a scan for rotation and shear

Box = tuple[int, int, int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Digit:
    """One digit of a scene.

    Attributes:
        value: 0 to 9.
        colour: a key of `COLOURS`.
        box: `(x0, y0, x1, y1)` in pixels around the ink, `x1` and `y1` exclusive.
    """

    value: int
    colour: str
    box: Box

    @property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; `digits` stand in reading order, left to right by box centre."""

    image: Image.Image
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene with its reference answer; `box` is the exact pixel box for `locate`."""

    kind: str
    text: str
    answer: str
    box: Box | None = None


# --- scans -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Spline coefficients `(1797, 12, 12)` of the scans, padded by two empty pixels, and their classes `(1797,)`."""
    digits = load_digits()
    padded = np.pad(digits.images / 16.0, ((0, 0), (2, 2), (2, 2)))
    return np.stack([spline_filter(scan, order=3) for scan in padded]), digits.target


@lru_cache(maxsize=1)
def _split_indices() -> dict[str, np.ndarray]:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(_scans()[1]))
    num_test, num_validation = len(order) // 5, len(order) // 10
    test, validation, train = np.split(order, [num_test, num_test + num_validation])
    return {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}


def scan_indices(split: str) -> np.ndarray:
    """Indices into `load_digits` of the scans that belong to `split`; the splits share none."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(SPLITS)}")
    return _split_indices()[split]


@lru_cache(maxsize=len(SPLITS))
def _scans_by_class(split: str) -> tuple[np.ndarray, ...]:
    indices = scan_indices(split)
    targets = _scans()[1][indices]
    return tuple(indices[targets == value] for value in range(10))


# --- rendering -------------------------------------------------------------------------------------------------------


def _scan_coordinates(size: float, distort: bool, rng: np.random.Generator) -> np.ndarray:
    """Where in a padded scan each pixel of a tile looks: `(2, side, side)`, rows then columns."""
    side = math.ceil(size * TILE_MARGIN)
    ticks = (np.arange(side) - (side - 1) / 2) * (8 / size)  # scan pixels from the centre
    rows, columns = np.meshgrid(ticks, ticks, indexing="ij")
    if distort:
        angle, shear = rng.uniform(-0.28, 0.28), rng.uniform(-0.25, 0.25)
        stretch_y, stretch_x = np.exp(rng.uniform(-0.12, 0.12, size=2))
        columns = columns * stretch_x + shear * rows
        rows = rows * stretch_y
        rows, columns = (
            math.cos(angle) * rows - math.sin(angle) * columns,
            math.sin(angle) * rows + math.cos(angle) * columns,
        )
        # One slow wave per direction bends strokes without breaking them.
        amplitude, phase = rng.uniform(-0.45, 0.45, size=4), rng.uniform(0, 2 * np.pi, size=4)
        frequency = rng.uniform(0.3, 0.9, size=4)
        row_waves = amplitude[:2, None] * np.sin(frequency[:2, None] * ticks + phase[:2, None])
        column_waves = amplitude[2:, None] * np.sin(frequency[2:, None] * ticks + phase[2:, None])
        rows = rows + row_waves[0][:, None] + row_waves[1][None, :]
        columns = columns + column_waves[0][:, None] + column_waves[1][None, :]
    return np.stack([rows, columns]) + 5.5


def _glyph(scan: int, size: float, distort: bool, rng: np.random.Generator) -> np.ndarray:
    """Opacity of a digit's ink, cropped to the ink: `(height, width)`, 0 or `MIN_INK_OPACITY` to 1."""
    tile = map_coordinates(_scans()[0][scan], _scan_coordinates(size, distort, rng), order=3, prefilter=False)
    threshold = INK_THRESHOLD + (rng.uniform(-0.09, 0.12) if distort else 0.0)
    opacity = MIN_INK_OPACITY + (1 - MIN_INK_OPACITY) * np.clip((tile - threshold) / 0.4, 0, 1)
    ink = tile > threshold
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return np.where(ink, opacity, 0.0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(shapes: list[tuple[int, int]], rng: np.random.Generator) -> list[Box]:
    """Boxes of the given `(height, width)` that keep their distances; drawn again until all find a place."""
    while True:
        boxes: list[Box] = []
        for height, width in shapes:
            left = rng.integers(0, IMAGE_SIZE - width + 1, size=32)
            top = rng.integers(0, IMAGE_SIZE - height + 1, size=32)
            free = np.ones(32, dtype=bool)
            for x0, y0, x1, y1 in boxes:
                apart = (left >= x1 + MIN_GAP) | (left + width <= x0 - MIN_GAP)
                apart |= (top >= y1 + MIN_GAP) | (top + height <= y0 - MIN_GAP)
                free &= apart & (np.abs(2 * left + width - x0 - x1) >= 2 * MIN_READING_STEP)
            if not free.any():
                break
            x, y = int(left[free.argmax()]), int(top[free.argmax()])
            boxes.append((x, y, x + width, y + height))
        if len(boxes) == len(shapes):
            return boxes


@lru_cache(maxsize=1)
def _cloud_basis() -> np.ndarray:
    """Linear interpolation from 4 knots to a side of the picture: `(96, 4)`."""
    return np.stack([np.interp(np.linspace(0, 3, IMAGE_SIZE), range(4), row) for row in np.eye(4)], axis=1)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Dark clouds with pixel noise, `(96, 96, 3)`, at most 70."""
    basis = _cloud_basis()
    knots = rng.uniform(4, 52, size=(3, 4, 4))
    clouds = (basis @ knots @ basis.T).transpose(1, 2, 0)
    return clouds + rng.integers(0, 18, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def render(split: str, index: int, seed: int = 0, min_digits: int = 1, max_digits: int = 4) -> Scene:
    """Draw scene `index` of `split`. The same arguments give the same scene, on every machine and in any order.

    Raises:
        ValueError: an unknown split, or numbers of digits outside 1 to 10.
    """
    if not 1 <= min_digits <= max_digits <= 10:
        raise ValueError(f"min_digits {min_digits} and max_digits {max_digits} must satisfy 1 <= min <= max <= 10")
    by_class = _scans_by_class(split)
    distort = split == "train"
    rng = np.random.default_rng([SPLITS.index(split), seed, index])

    values = rng.choice(10, size=rng.integers(min_digits, max_digits + 1), replace=False)
    colours = rng.choice(list(COLOURS), size=len(values))
    glyphs = [
        _glyph(rng.choice(by_class[value]), rng.uniform(MIN_DIGIT_SIZE, MAX_DIGIT_SIZE), distort, rng)
        for value in values
    ]
    boxes = _place([glyph.shape for glyph in glyphs], rng)

    canvas = _background(rng)
    for glyph, colour, (x0, y0, x1, y1) in zip(glyphs, colours, boxes, strict=True):
        ink = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.88, 1.0) + rng.uniform(-12, 12, size=3), 0, 255)
        canvas[y0:y1, x0:x1] += glyph[..., None] * (ink - canvas[y0:y1, x0:x1])
    digits = [Digit(int(value), str(colour), box) for value, colour, box in zip(values, colours, boxes, strict=True)]
    digits.sort(key=lambda digit: digit.center[0])
    return Scene(Image.fromarray(canvas.round().astype(np.uint8)), tuple(digits))


# --- questions -------------------------------------------------------------------------------------------------------

# Answers begin with the digit asked for, and what was looked up follows it at once: "7 red.". After "7 is red." or
# "7: yes." a model would have to fetch the digit from one token back before it can look it up, and a run of 8 thousand
# pictures stayed on the plateau with them (existence 50 %), where it left it with these (98 % after 6 thousand).


def _existence_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Half of them about digits that are not there, whatever the number of digits in the picture."""
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
    """Pairs that are clearly apart on the axis asked about; which of the two comes first is a coin toss."""
    found = []
    for pair in combinations(scene.digits, 2):
        for axis, words in enumerate(("left of", "above")):
            one, other = _shuffled(pair, rng)
            step = other.center[axis] - one.center[axis]
            if abs(step) >= MIN_RELATION_STEP:
                question = f"Is the {one.value} {words} the {other.value}?"
                answer = f"{one.value} {words} {other.value} {'yes' if step > 0 else 'no'}."
                found.append(Question("relation", question, answer))
    return _shuffled(found, rng)


def _locate_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [
        Question(
            "locate",
            f"Where is the {digit.value}?",
            f"{digit.value} {' '.join(map(str, coarse_box(digit.box)))}.",
            box=digit.box,
        )
        for digit in _shuffled(scene.digits, rng)
    ]


_ASKERS = {
    "existence": _existence_questions,
    "count": _count_questions,
    "colour": _colour_questions,
    "read": _read_questions,
    "relation": _relation_questions,
    "locate": _locate_questions,
}
KINDS = tuple(_ASKERS)


def questions(scene: Scene, rng: np.random.Generator, kinds: Iterable[str] = KINDS) -> list[Question]:
    """Different questions about a scene, in the order of `kinds`, where a kind may be named several times.

    A kind gives fewer questions than asked for when the scene has no more: one about the count, and none about
    relations where no two digits are clearly apart.
    """
    found = {kind: _ASKERS[kind](scene, rng) for kind in dict.fromkeys(kinds)}
    return [found[kind].pop(0) for kind in kinds if found[kind]]


def _shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    return [items[position] for position in rng.permutation(len(items))]


def coarse_box(box: Box) -> Box:
    """The box in units of `BOX_UNIT` pixels, each edge rounded to the nearest, never empty."""
    x0, y0, x1, y1 = (math.floor(edge / BOX_UNIT + 0.5) for edge in box)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


# --- scoring ---------------------------------------------------------------------------------------------------------

_LOCATE_ANSWER = re.compile(r"(\d) (\d+) (\d+) (\d+) (\d+)")


def iou(box: Box, other: Box) -> float:
    """Intersection over union of two boxes in the same unit."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    intersection = max(width, 0) * max(height, 0)
    areas = sum(max(x1 - x0, 0) * max(y1 - y0, 0) for x0, y0, x1, y1 in (box, other))
    return intersection / (areas - intersection) if intersection else 0.0


def score(question: Question, answer: str) -> bool:
    """Whether an answer is right, judged on all that was written, the repeated digit included.

    Case, spacing and the final full stop do not count. A box is right when it overlaps the exact one by IoU >= 0.5.
    """
    answer, reference = _plain(answer), _plain(question.answer)
    if question.box is None:
        return answer == reference
    match = _LOCATE_ANSWER.fullmatch(answer)
    if match is None or match[1] != reference[0]:
        return False
    x0, y0, x1, y1 = (BOX_UNIT * int(number) for number in match.groups()[1:])
    return iou((x0, y0, x1, y1), question.box) >= 0.5


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


# --- LLaVA-format data -----------------------------------------------------------------------------------------------


# What is asked about a training picture: look-ups often, and what is learned last most often.
TRAINING_KINDS = ("existence",) * 2 + ("count", "read") + ("colour",) * 2 + ("relation",) * 2 + ("locate",) * 3


def write_llava_data(
    out: Path,
    split: str,
    num_pictures: int,
    seed: int,
    min_digits: int,
    one_record_per_picture: bool = False,
    max_turns: int = len(TRAINING_KINDS),
) -> Path:
    """Write `images/*.png` and `{split}.json` under `out`; returns the path of the JSON file.

    Each question is a record of its own: as turns of one conversation, earlier answers give later ones away.
    `one_record_per_picture` writes them as turns, `TRAINING_KINDS` of them, for training with independent turns. With
    fewer `max_turns` a picture has one turn to so many, drawn at random: conversations, whose first question can only
    be answered from the picture.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in tqdm(range(num_pictures), unit="picture"):
        scene = render(split, index, seed=seed, min_digits=min_digits)
        name = f"{split}-{seed}-{index:06d}"
        scene.image.save(out / "images" / f"{name}.png")
        rng = np.random.default_rng([SPLITS.index(split), seed, index])
        if one_record_per_picture:
            asked = questions(scene, rng, TRAINING_KINDS)
            if max_turns < len(TRAINING_KINDS):
                asked = [asked[order] for order in rng.permutation(len(asked))[: rng.integers(1, max_turns + 1)]]
            turns = _turns(asked)
            records.append({"id": name, "image": f"{name}.png", "conversations": turns})
            continue
        for question in questions(scene, rng):
            record = {"id": f"{name}-{question.kind}", "image": f"{name}.png", "conversations": _turns([question])}
            records.append(record)
    path = out / f"{split}.json"
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    logger.info("wrote %d pictures to %s and %d records to %s", num_pictures, out / "images", len(records), path)
    return path


def _turns(asked: Sequence[Question]) -> list[dict[str, str]]:
    turns = []
    for question in asked:
        turns += [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write pictures and questions of the digits world in LLaVA's format.")
    parser.add_argument("--split", choices=SPLITS, required=True, help="which scans the pictures are made of")
    parser.add_argument("--num-pictures", type=int, required=True, help="how many pictures, from index 0")
    parser.add_argument("--out", type=Path, required=True, help="folder for images/ and SPLIT.json")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures (default 0)")
    parser.add_argument("--min-digits", type=int, default=1, help="fewest digits in a picture (default 1)")
    parser.add_argument(
        "--one-record-per-picture",
        action="store_true",
        help="write the questions about a picture as turns of one record",
    )
    parser.add_argument(
        "--max-turns",
        type=int,
        default=len(TRAINING_KINDS),
        help="with it, draw one turn to so many for each record: conversations (default: all questions, in order)",
    )
    args = parser.parse_args(argv)
    if not 1 <= args.max_turns <= len(TRAINING_KINDS):
        parser.error(f"--max-turns must be 1 to {len(TRAINING_KINDS)}, got {args.max_turns}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_llava_data(
        args.out,
        args.split,
        args.num_pictures,
        args.seed,
        args.min_digits,
        args.one_record_per_picture,
        args.max_turns,
    )


if __name__ == "__main__":
    run("digits.world", main, bad_input=(ValueError,))
