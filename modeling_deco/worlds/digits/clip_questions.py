# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Questions about order and time in the clips of the digits world, and the tokenizer that knows their words.

As the answers about pictures, an answer begins with the digit that its question names.
"""

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerFast

from .clips import DIRECTIONS, NUM_SECONDS, Clip
from .questions import Question, score
from .tokenizer import WORDS, build_tokenizer

TIME_UNIT = 5  # answers give times in seconds, rounded to this unit
TIME_TOLERANCE = 3  # seconds by which a right answer may differ from the exact time

_NUMBERS = tuple(str(second) for second in range(0, NUM_SECONDS + 1, TIME_UNIT) if str(second) not in WORDS)
_NEW = (*DIRECTIONS, "was", "which", "came", "first", "before", "when", "did", "come", "change", "changed", "its")
_NEW += ("direction", "move", "in", "at", "end")
CLIP_WORDS = (*_NUMBERS, *(word for word in _NEW if word not in WORDS))


def _existence(clip: Clip, rng: np.random.Generator) -> Question:
    present = [actor.value for actor in clip.actors]
    is_present = rng.random() < 0.5
    value = rng.choice(present if is_present else [value for value in range(10) if value not in present])
    return Question("existence", f"Was there a {value}?", f"{value} {'yes' if is_present else 'no'}.")


def _first(clip: Clip, rng: np.random.Generator) -> Question:
    return Question("first", "Which digit came first?", f"{clip.actors[0].value}.")


def _before(clip: Clip, rng: np.random.Generator) -> Question:
    index = rng.integers(1, len(clip.actors))
    one, other = clip.actors[index], clip.actors[index - 1]
    return Question("before", f"Which digit came before the {one.value}?", f"{one.value} {other.value}.")


def _when(clip: Clip, rng: np.random.Generator) -> Question:
    actor = clip.actors[rng.integers(len(clip.actors))]
    return Question("when", f"When did the {actor.value} come?", f"{actor.value} {_time(actor.first)}.")


def _changed(clip: Clip, rng: np.random.Generator) -> Question:
    return Question("changed", "Which digit changed its colour?", f"{clip.changed.value}.")


def _direction(clip: Clip, rng: np.random.Generator) -> Question:
    moving = [actor for actor in clip.actors if actor.direction is not None]
    actor = moving[rng.integers(len(moving))]
    return Question(
        "direction", f"In which direction did the {actor.value} move?", f"{actor.value} {actor.direction}."
    )


def _end(clip: Clip, rng: np.random.Generator) -> Question:
    digits = clip.digits(NUM_SECONDS - 1)
    return Question("end", "Which digits are there at the end?", " ".join(str(digit.value) for digit in digits) + ".")


_ASKERS = {
    "existence": _existence,
    "first": _first,
    "before": _before,
    "when": _when,
    "changed": _changed,
    "direction": _direction,
    "end": _end,
}
CLIP_KINDS = tuple(_ASKERS)


def clip_questions(clip: Clip, rng: np.random.Generator, kinds: Iterable[str] = CLIP_KINDS) -> list[Question]:
    """Distinct questions about a clip, one for each of `kinds`, fewer where a kind occurs more often than it has
    questions."""
    return list(dict.fromkeys(_ASKERS[kind](clip, rng) for kind in kinds))


def _time(second: int) -> int:
    return TIME_UNIT * round(second / TIME_UNIT)


def score_clip(question: Question, answer: str, clip: Clip) -> bool:
    """Whether an answer about a clip is right, as in `questions.score`. A time may differ by `TIME_TOLERANCE`."""
    if question.kind != "when":
        return score(question, answer)
    words = answer.rstrip(". ").split()
    if len(words) != 2 or words[0] != question.answer[0] or not (words[1].isdecimal() and len(words[1]) < 4):
        return False
    (actor,) = (actor for actor in clip.actors if str(actor.value) == words[0])
    return abs(int(words[1]) - actor.first) <= TIME_TOLERANCE


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the digits world with `<video>` and the words of these questions behind its own 58 tokens."""
    return build_tokenizer(CLIP_WORDS)
