# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pictures of the emoji world: one to six everyday things on a varied background.

A scene depends on `(split, seed, index)` alone, so a data set is a range of indices. The split is by artist, and
photographs behind the things are cut from different halves. Things are turned, mirrored and recoloured in every split.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images

from .art import SETS, concepts_of, icon, icon_names
from .colours import main_colour, recoloured
from .concepts import CONCEPTS

SPLITS = tuple(SETS)
IMAGE_SIZE = 384
SINGLE_SIDE = (0.35, 0.85)  # longer side of a thing that is alone, of the picture's
SIDE = (0.2, 0.42)  # and of one among others
MAX_ANGLE = 25.0  # degrees
RECOLOURED = 0.4  # share of the things whose hues are turned
REPEATED = 0.35  # share of the pictures in which one thing is there several times
_INK = 77  # of 255; fainter pixels are not in a box
_ATTEMPTS = 60

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One thing in a scene.

    Attributes:
        concept: a key of `CONCEPTS`.
        box: `(x0, y0, x1, y1)` around its ink, 0 to 1 of the picture's width and height.
        colour: the plain name of its main colour, or None if it has several.
    """

    concept: str
    box: Box
    colour: str | None


@dataclass(frozen=True)
class Scene:
    """A picture and its things, in no order."""

    image: Image.Image
    things: tuple[Thing, ...]


def render(
    split: str, index: int, *, seed: int = 0, min_things: int = 1, max_things: int = 6, size: int = IMAGE_SIZE
) -> Scene:
    """Render a scene. The number of things is drawn evenly, and may come out smaller where they find no room.

    Args:
        split: a key of `SETS`, the artists who drew the things.
        size: side of the picture in pixels.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    num_things = int(rng.integers(min_things, max_things + 1))
    picture = _background(split, rng, size)
    things: list[Thing] = []
    for concept, repeats in _concepts(split, num_things, rng):
        drawings = icon_names(split, concept)
        drawing = drawings[rng.integers(len(drawings))]
        hue = _hue(rng)
        for _ in range(repeats):
            if rng.random() < 0.5:  # things of a kind are often alike, and not always
                drawing, hue = drawings[rng.integers(len(drawings))], _hue(rng)
            drawn = _drawn(drawing, hue, rng, size, is_single=num_things == 1)
            place = _free_place(drawn, [thing.box for thing in things], rng, size)
            if place is None:
                continue
            colour = main_colour(drawn)
            if split == "train":
                drawn = _varied(drawn, rng)
            picture.paste(drawn, place, drawn)
            things.append(Thing(concept, _box(drawn, place, size), colour))
    return Scene(picture, tuple(things))


def single(split: str, concept: str, index: int, *, seed: int = 0, size: int = IMAGE_SIZE) -> Scene:
    """A scene with one thing in its own colours, for asking its name."""
    rng = np.random.default_rng([SPLITS.index(split), seed, index, list(CONCEPTS).index(concept)])
    picture = _background(split, rng, size)
    drawings = icon_names(split, concept)
    drawn = _drawn(drawings[rng.integers(len(drawings))], 0.0, rng, size, is_single=True)
    place = _free_place(drawn, [], rng, size)
    assert place is not None
    colour = main_colour(drawn)
    picture.paste(drawn, place, drawn)
    return Scene(picture, (Thing(concept, _box(drawn, place, size), colour),))


def _concepts(split: str, num_things: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Different concepts, and how often each is in the picture."""
    repeats = [1] * num_things
    if num_things > 1 and rng.random() < REPEATED:
        most = int(rng.integers(2, num_things + 1))
        repeats = [most] + [1] * (num_things - most)
    names = rng.choice(concepts_of(split), len(repeats), replace=False)
    return list(zip(names.tolist(), repeats, strict=True))


def _hue(rng: np.random.Generator) -> float:
    return float(rng.random()) if rng.random() < RECOLOURED else 0.0


def _drawn(drawing: tuple[str, str], hue: float, rng: np.random.Generator, size: int, is_single: bool) -> Image.Image:
    """An icon, turned, mirrored, recoloured and scaled, cut to its ink."""
    image = recoloured(icon(*drawing), hue)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.rotate(rng.uniform(-MAX_ANGLE, MAX_ANGLE), Image.Resampling.BILINEAR, expand=True)
    image = image.crop(_ink_box(image))
    stretch = float(np.exp(rng.uniform(-0.12, 0.12)))
    width, height = image.width * stretch, image.height / stretch
    scale = rng.uniform(*(SINGLE_SIDE if is_single else SIDE)) * size / max(width, height)
    return image.resize((max(8, round(width * scale)), max(8, round(height * scale))), Image.Resampling.LANCZOS)


def _varied(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another light: for training alone."""
    alpha = image.getchannel("A")
    for enhance, low, high in (
        (ImageEnhance.Brightness, 0.75, 1.2),
        (ImageEnhance.Contrast, 0.7, 1.3),
        (ImageEnhance.Color, 0.6, 1.3),
    ):
        image = enhance(image).enhance(rng.uniform(low, high))
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    image.putalpha(alpha)
    return image


def _ink_box(image: Image.Image) -> tuple[int, int, int, int]:
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > _INK)).getbbox()
    return box or (0, 0, image.width, image.height)


def _box(drawn: Image.Image, place: tuple[int, int], size: int) -> Box:
    x0, y0, x1, y1 = _ink_box(drawn)
    left, top = place
    return (left + x0) / size, (top + y0) / size, (left + x1) / size, (top + y1) / size


def _free_place(drawn: Image.Image, taken: list[Box], rng: np.random.Generator, size: int) -> tuple[int, int] | None:
    """Where the thing touches no other, or None if there is hardly room."""
    for _ in range(_ATTEMPTS):
        left = int(rng.integers(0, max(1, size - drawn.width + 1)))
        top = int(rng.integers(0, max(1, size - drawn.height + 1)))
        box = _box(drawn, (left, top), size)
        if not any(_overlap(box, other) for other in taken):
            return left, top
    return None


def _overlap(box: Box, other: Box) -> bool:
    return min(box[2], other[2]) > max(box[0], other[0]) and min(box[3], other[3]) > max(box[1], other[1])


# --- backgrounds -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(image) for image in load_sample_images().images]


def _background(split: str, rng: np.random.Generator, size: int) -> Image.Image:
    kind = rng.choice(("plain", "gradient", "noise", "photograph"), p=(0.3, 0.25, 0.2, 0.25))
    if kind == "photograph":
        photograph = _photographs()[rng.integers(len(_photographs()))]
        half = photograph.width // 2
        left = 0 if split == "train" else half
        side = int(rng.integers(120, min(half, photograph.height) + 1))
        x, y = left + int(rng.integers(0, half - side + 1)), int(rng.integers(0, photograph.height - side + 1))
        image = photograph.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR)
        return ImageEnhance.Contrast(image).enhance(rng.uniform(0.4, 1.0))
    first, second = _colour(rng), _colour(rng)
    if kind == "plain":
        return Image.new("RGB", (size, size), tuple(int(value) for value in first))
    if kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        steps = np.linspace(-1, 1, size)
        along = np.clip((np.cos(angle) * steps[None] + np.sin(angle) * steps[:, None]) / 2.8 + 0.5, 0, 1)[..., None]
        return Image.fromarray((first * (1 - along) + second * along).astype(np.uint8))
    cells = int(rng.integers(3, 48))
    noise = rng.normal(0, rng.uniform(5, 40), (cells, cells, 3)) + first
    resample = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.NEAREST
    return Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).resize((size, size), resample)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Half of the backgrounds are pale or dark, as paper and night are."""
    colour = rng.uniform(0, 255, 3)
    return colour if rng.random() < 0.5 else 0.25 * colour + 0.75 * (255 if rng.random() < 0.7 else 20)
