# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How often two sets of answers agree, with an interval, and how many pictures show that they agree often enough."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypedDict

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # 1.96


class Agreement(TypedDict):
    """The share of equal answers with its interval from `low` to `high`, and the numbers behind it."""

    share: float
    low: float
    high: float
    answers: int
    pictures: int


def wilson(share: float, number: float) -> tuple[float, float]:
    """Wilson's interval of a share among a number of independent trials."""
    center = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    half = _Z * math.sqrt(share * (1 - share) / number + (_Z / (2 * number)) ** 2) / (1 + _Z**2 / number)
    low, high = max(0.0, center - half), min(1.0, center + half)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)  # exact where rounding would differ


def agreement(equal: Sequence[Sequence[bool]]) -> Agreement:
    """The share of equal answers, and its interval.

    Answers about one picture are not independent. The interval is Wilson's for as many trials as there are pictures,
    not answers. So it is right even if all answers about one picture agree or differ together, and wider than
    necessary if they do not.

    Args:
        equal: for each picture, whether each of its answers is equal.
    """
    answers = sum(map(len, equal))
    share = sum(map(sum, equal)) / answers
    low, high = wilson(share, len(equal))
    return {"share": share, "low": low, "high": high, "answers": answers, "pictures": len(equal)}


def pictures_needed(share: float, target: float) -> int | None:
    """The number of pictures with which the interval of a share begins at the target. None: no number is enough."""
    if share <= target:
        return None
    needed = math.ceil(_Z**2 * target * (1 - target) / (share - target) ** 2)
    while wilson(share, needed)[0] < target:  # by rounding
        needed += 1
    return needed


def parse_target(text: str) -> float:
    """Parse `"99%"`, `"99"` or `"0.99"`. A ValueError says what is wrong."""
    number = text.strip().removesuffix("%").strip()
    try:
        share = float(number)
    except ValueError:
        raise ValueError(f"The target {text!r} is not a percentage (99%).") from None
    if number != text.strip() or share >= 1:
        share /= 100
    if not 0 < share < 1:
        raise ValueError(
            f"The target {text!r} is not between 0% and 100%. No number of pictures shows that all answers are equal."
        )
    return share
