# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The clips of the digits world: a minute of digits that come, move, change their colour and go.

A clip has 60 pictures of 96 x 96 pixels, one a second, as a fixed camera takes them. Its three to five digits have
different classes and come at least three seconds apart. Some move once, in one of four directions, and one of them
changes its colour. Digits never touch. A clip depends on `(split, seed, index)` alone, as a scene does.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import (
    COLOURS,
    IMAGE_SIZE,
    MIN_GAP,
    MIN_READING_STEP,
    Box,
    Digit,
    Scene,
    background,
    paint,
    random_glyph,
    random_ink,
    split_number,
)

NUM_SECONDS = 60
MIN_DIGITS, MAX_DIGITS = 3, 5
MIN_WAIT = 3  # seconds between the first ones of two digits
MIN_STAY = 16  # seconds that a digit is seen
MIN_PATH, MAX_PATH = 20, 44  # pixels that a digit moves
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_SEED = 60  # clips and scenes of the same seed and index have different digits


@dataclass(frozen=True)
class Actor:
    """One digit of a clip.

    Attributes:
        value: 0 to 9.
        first, last: the first and the last second in which it is seen.
        start: its box in pixels when it comes.
        direction: a key of `DIRECTIONS`, or None if it stays where it is.
        path: pixels that it moves.
        moves: the second before it moves, and the first in which it has arrived.
        colours: of a digit before and after it changes; equal if it does not.
        changes: the first second in which it has its last colour, or None.
    """

    value: int
    first: int
    last: int
    start: Box
    direction: str | None
    path: int
    moves: tuple[int, int]
    colours: tuple[str, str]
    changes: int | None

    def is_seen(self, second: int) -> bool:
        return self.first <= second <= self.last

    def colour(self, second: int) -> str:
        return self.colours[self.changes is not None and second >= self.changes]

    def box(self, second: int) -> Box:
        begin, end = self.moves
        share = min(max((second - begin) / (end - begin), 0.0), 1.0)
        return _moved(self.start, self.direction, round(self.path * share))


@dataclass(frozen=True)
class Clip:
    """Pictures of a minute, `frames`, and what is in them: `actors` in the order in which they come."""

    frames: tuple[Image.Image, ...]
    actors: tuple[Actor, ...]

    def digits(self, second: int) -> tuple[Digit, ...]:
        """The digits that are seen in a second, in reading order."""
        found = [Digit(a.value, a.colour(second), a.box(second)) for a in self.actors if a.is_seen(second)]
        return tuple(sorted(found, key=lambda digit: digit.center[0]))

    def scene(self, second: int) -> Scene:
        return Scene(self.frames[second], self.digits(second))

    @cached_property
    def changed(self) -> Actor:
        """The digit that changes its colour."""
        return next(actor for actor in self.actors if actor.changes is not None)


def render_clip(split: str, index: int, seed: int = 0) -> Clip:
    """Render clip `index` of `split`. The same arguments give the same clip on every machine."""
    rng = np.random.default_rng([split_number(split), seed, index, _SEED])
    values = rng.choice(10, size=rng.integers(MIN_DIGITS, MAX_DIGITS + 1), replace=False)
    glyphs = [random_glyph(split, value, rng) for value in values]
    actors = _actors([int(value) for value in values], [glyph.shape for glyph in glyphs], rng)
    inks = [[random_ink(colour, rng) for colour in actor.colours] for actor in actors]

    empty = background(rng)
    frames, last, drawn = [], None, None
    for second in range(NUM_SECONDS):
        seen = [(a.value, a.colour(second), a.box(second)) for a in actors if a.is_seen(second)]
        if seen != last:
            canvas = empty.copy()
            for actor, glyph, (before, after) in zip(actors, glyphs, inks, strict=True):
                if actor.is_seen(second):
                    has_changed = actor.changes is not None and second >= actor.changes
                    paint(canvas, glyph, after if has_changed else before, actor.box(second))
            last, drawn = seen, Image.fromarray(canvas.round().astype(np.uint8))
        frames.append(drawn)
    return Clip(tuple(frames), tuple(actors))


def _actors(values: list[int], shapes: list[tuple[int, int]], rng: np.random.Generator) -> list[Actor]:
    """What happens to the digits, with boxes of the given `(height, width)`. Retries until no two of them touch."""
    while True:
        placed: list[Actor] = []
        for actor, shape in zip(_plan(values, rng), shapes, strict=True):
            tries = (_placed(actor, shape, rng) for _ in range(32))
            free = next((found for found in tries if all(_are_apart(found, other) for other in placed)), None)
            if free is None:
                break
            placed.append(free)
        if len(placed) == len(values):
            return placed


def _plan(values: list[int], rng: np.random.Generator) -> list[Actor]:
    """When the digits come, move, change and go, without their places."""
    number = len(values)
    latest = NUM_SECONDS - MIN_STAY - MIN_WAIT * (number - 1)
    firsts = np.sort(rng.integers(0, latest + 1, size=number)) + MIN_WAIT * np.arange(number)
    lasts = [
        NUM_SECONDS - 1 if rng.random() < 0.5 else rng.integers(first + MIN_STAY - 1, NUM_SECONDS) for first in firsts
    ]
    lasts[-1] = NUM_SECONDS - 1  # there is a digit at the end
    moving, changing = rng.choice(number, size=rng.integers(1, 4), replace=False), rng.integers(number)
    actors = []
    for index, (value, first, last) in enumerate(zip(values, firsts, lasts, strict=True)):
        moves = np.sort(rng.choice(np.arange(first + 2, last - 1), size=2, replace=False))
        before, after = rng.choice(list(COLOURS), size=2, replace=False)
        changes = int(rng.integers(first + 3, last - 2)) if index == changing else None
        actors.append(
            Actor(
                value=value,
                first=int(first),
                last=int(last),
                start=(0, 0, 0, 0),
                direction=str(rng.choice(list(DIRECTIONS))) if index in moving else None,
                path=int(rng.integers(MIN_PATH, MAX_PATH + 1)),
                moves=(int(moves[0]), int(moves[1])),
                colours=(str(before), str(before if changes is None else after)),
                changes=changes,
            )
        )
    return actors


def _placed(actor: Actor, shape: tuple[int, int], rng: np.random.Generator) -> Actor:
    """The digit at a random place from which its path stays in the picture."""
    height, width = shape
    x0, y0, x1, y1 = _moved((0, 0, width, height), actor.direction, actor.path)
    left, top = max(0, -x0), max(0, -y0)
    right, bottom = IMAGE_SIZE - max(width, x1), IMAGE_SIZE - max(height, y1)
    x, y = int(rng.integers(left, right + 1)), int(rng.integers(top, bottom + 1))
    return replace(actor, start=(x, y, x + width, y + height))


def _moved(box: Box, direction: str | None, path: int) -> Box:
    dx, dy = DIRECTIONS.get(direction or "", (0, 0))
    x0, y0, x1, y1 = box
    return x0 + dx * path, y0 + dy * path, x1 + dx * path, y1 + dy * path


def _are_apart(one: Actor, other: Actor) -> bool:
    """Whether the ways of two digits keep their distance, and the digits have a clear reading order at the end."""
    if one.first > other.last or other.first > one.last:
        return True
    (left, top, right, bottom), (x0, y0, x1, y1) = _way(one), _way(other)
    is_apart = left >= x1 + MIN_GAP or x0 >= right + MIN_GAP or top >= y1 + MIN_GAP or y0 >= bottom + MIN_GAP
    ends = [actor.box(NUM_SECONDS - 1) for actor in (one, other)]
    return is_apart and abs(sum(ends[0][::2]) - sum(ends[1][::2])) >= 2 * MIN_READING_STEP


def _way(actor: Actor) -> Box:
    """The box around all places of a digit."""
    end = _moved(actor.start, actor.direction, actor.path)
    x0, y0, x1, y1 = zip(actor.start, end, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def write_video(frames, path: Path, frames_per_second: int | Fraction = 1) -> None:
    """Write pictures as a video, in the format of the file's name. It needs PyAV (`pip install av`)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frames_per_second)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "8"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
