# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pictures of the digits world: one to four handwritten digits on a dark background.

The handwriting is scikit-learn's bundled `load_digits`: 1797 scans of 8 x 8 pixels, with no download. The scans are
split: a fifth is `test`, a tenth `validation`, and the rest `train`. A scene is a picture of 96 x 96 pixels whose
digits have different classes and do not touch. It depends on `(split, seed, index)` alone, so a data set is a range of
indices. Only scans of `train` are distorted. Larger pictures have digits of the same size in pixels: they are small
where such a picture is seen as a whole.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates, spline_filter
from sklearn.datasets import load_digits

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 20985
IMAGE_SIZE = 96
MIN_DIGIT_SIZE, MAX_DIGIT_SIZE = 20, 32
MIN_GAP = 2  # pixels between two digits
MIN_READING_STEP = 6  # of 96 pixels in x between the centers of two digits; closer ones have no clear reading order

COLOURS = {
    "red": (235, 60, 55),
    "green": (70, 225, 85),
    "blue": (70, 120, 250),
    "yellow": (245, 220, 60),
    "purple": (185, 75, 235),
    "white": (240, 240, 240),
}
# Ink is nowhere fainter than this, so the edge of a digit, and with it its box, is visible in the picture.
MIN_INK_OPACITY = 0.55
INK_THRESHOLD = 0.3
TILE_MARGIN = 1.3  # room around a scan for rotation and shear

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Digit:
    """One digit of a scene.

    Attributes:
        value: 0 to 9.
        colour: a key of `COLOURS`.
        box: `(x0, y0, x1, y1)` in pixels around the ink; `x1` and `y1` are exclusive.
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
    """A picture and its digits, in reading order: from left to right by the center of their boxes."""

    image: Image.Image
    digits: tuple[Digit, ...]

    @property
    def scale(self) -> int:
        """Side of the picture in units of `IMAGE_SIZE`."""
        return self.image.width // IMAGE_SIZE


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
    """Indices into `load_digits` of the scans of a split. No scan is in two splits."""
    return _split_indices()[SPLITS[split_number(split)]]


def split_number(split: str) -> int:
    """The index of a split in `SPLITS`. An unknown one raises a ValueError."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    return SPLITS.index(split)


@lru_cache(maxsize=len(SPLITS))
def _scans_by_class(split: str) -> tuple[np.ndarray, ...]:
    indices = scan_indices(split)
    targets = _scans()[1][indices]
    return tuple(indices[targets == value] for value in range(10))


# --- rendering -------------------------------------------------------------------------------------------------------


def _scan_coordinates(size: float, distort: bool, rng: np.random.Generator) -> np.ndarray:
    """Coordinates in a padded scan at which the pixels of a tile are sampled: `(2, side, side)`, rows then columns."""
    side = math.ceil(size * TILE_MARGIN)
    ticks = (np.arange(side) - (side - 1) / 2) * (8 / size)  # scan pixels from the center
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
    """Opacity of a digit, cropped to its ink: `(height, width)`, 0 or from `MIN_INK_OPACITY` to 1."""
    tile = map_coordinates(_scans()[0][scan], _scan_coordinates(size, distort, rng), order=3, prefilter=False)
    threshold = INK_THRESHOLD + (rng.uniform(-0.09, 0.12) if distort else 0.0)
    opacity = MIN_INK_OPACITY + (1 - MIN_INK_OPACITY) * np.clip((tile - threshold) / 0.4, 0, 1)
    ink = tile > threshold
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return np.where(ink, opacity, 0.0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(shapes: list[tuple[int, int]], rng: np.random.Generator, scale: int) -> list[Box]:
    """Random boxes of the given `(height, width)` that keep their distances. Retries until all fit."""
    size, reading_step = scale * IMAGE_SIZE, scale * MIN_READING_STEP
    while True:
        boxes: list[Box] = []
        for height, width in shapes:
            left = rng.integers(0, size - width + 1, size=32)
            top = rng.integers(0, size - height + 1, size=32)
            free = np.ones(32, dtype=bool)
            for x0, y0, x1, y1 in boxes:
                apart = (left >= x1 + MIN_GAP) | (left + width <= x0 - MIN_GAP)
                apart |= (top >= y1 + MIN_GAP) | (top + height <= y0 - MIN_GAP)
                free &= apart & (np.abs(2 * left + width - x0 - x1) >= 2 * reading_step)
            if not free.any():
                break
            x, y = int(left[free.argmax()]), int(top[free.argmax()])
            boxes.append((x, y, x + width, y + height))
        if len(boxes) == len(shapes):
            return boxes


@lru_cache
def _cloud_basis(size: int) -> np.ndarray:
    """Weights `(size, 4)` of the linear interpolation from 4 knots to a side of the picture."""
    return np.stack([np.interp(np.linspace(0, 3, size), range(4), row) for row in np.eye(4)], axis=1)


def background(rng: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """Dark clouds with pixel noise: `(size, size, 3)`, with values up to 70."""
    basis = _cloud_basis(size)
    knots = rng.uniform(4, 52, size=(3, 4, 4))
    clouds = (basis @ knots @ basis.T).transpose(1, 2, 0)
    return clouds + rng.integers(0, 18, size=(size, size, 3), dtype=np.uint8)


def random_glyph(split: str, value: int, rng: np.random.Generator) -> np.ndarray:
    """A digit in a scan and a size of its own: opacity `(height, width)`, cropped to its ink."""
    scan = rng.choice(_scans_by_class(split)[value])
    return _glyph(scan, rng.uniform(MIN_DIGIT_SIZE, MAX_DIGIT_SIZE), split == "train", rng)


def random_ink(colour: str, rng: np.random.Generator) -> np.ndarray:
    """A shade of a colour, `(3,)`, from 0 to 255."""
    return np.clip(np.array(COLOURS[colour]) * rng.uniform(0.88, 1.0) + rng.uniform(-12, 12, size=3), 0, 255)


def paint(canvas: np.ndarray, glyph: np.ndarray, ink: np.ndarray, box: Box) -> None:
    """Paint a digit over a canvas `(height, width, 3)`."""
    x0, y0, x1, y1 = box
    canvas[y0:y1, x0:x1] += glyph[..., None] * (ink - canvas[y0:y1, x0:x1])


def render(split: str, index: int, seed: int = 0, min_digits: int = 1, max_digits: int = 4, scale: int = 1) -> Scene:
    """Render scene `index` of `split`. The same arguments give the same scene on every machine.

    Args:
        scale: side of the picture in units of 96 pixels. The digits keep their size in pixels.

    Raises:
        ValueError: the split is unknown, or a number of digits is not within 1 to 10.
    """
    if not 1 <= min_digits <= max_digits <= 10:
        raise ValueError(f"min_digits={min_digits} and max_digits={max_digits} must satisfy 1 <= min <= max <= 10.")
    rng = np.random.default_rng([split_number(split), seed, index])

    values = rng.choice(10, size=rng.integers(min_digits, max_digits + 1), replace=False)
    colours = rng.choice(list(COLOURS), size=len(values))
    glyphs = [random_glyph(split, value, rng) for value in values]
    boxes = _place([glyph.shape for glyph in glyphs], rng, scale)

    canvas = background(rng, scale * IMAGE_SIZE)
    for glyph, colour, box in zip(glyphs, colours, boxes, strict=True):
        paint(canvas, glyph, random_ink(colour, rng), box)
    digits = [Digit(int(value), str(colour), box) for value, colour, box in zip(values, colours, boxes, strict=True)]
    digits.sort(key=lambda digit: digit.center[0])
    return Scene(Image.fromarray(canvas.round().astype(np.uint8)), tuple(digits))
