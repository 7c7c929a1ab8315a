# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Intervals of shares, and how many pictures a target needs."""

import math

import pytest
from scipy.stats import binomtest

from modeling_deco.inference.agreement import agreement, parse_target, pictures_needed, wilson


@pytest.mark.parametrize(("equal", "number"), [(0, 10), (7, 10), (10, 10), (36, 40), (399, 400)])
def test_the_interval_is_that_of_scipy(equal, number):
    expected = binomtest(equal, number).proportion_ci(0.95, method="wilson")
    assert wilson(equal / number, number) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_answers_about_one_picture_are_not_independent():
    """Four pictures with three answers each: nine of twelve are equal, and the interval is that of four trials."""
    agreed = agreement([[True, True, True], [True, False, True], [True, True, True], [False, True, False]])
    low, high = wilson(0.75, 4)
    assert agreed == {"share": 0.75, "low": low, "high": high, "answers": 12, "pictures": 4}
    assert low < wilson(0.75, 12)[0]


def test_where_nothing_or_everything_is_equal_the_interval_has_one_end_there():
    assert agreement([[True]] * 7)["high"] == 1
    assert agreement([[False]] * 7)["low"] == 0
    assert agreement([[True]] * 7)["low"] == pytest.approx(7 / (7 + 1.959964**2))


@pytest.mark.parametrize(("share", "target"), [(1.0, 0.99), (0.995, 0.99), (0.9, 0.75), (1.0, 0.5)])
def test_the_pictures_that_are_needed_are_the_fewest_that_suffice(share, target):
    needed = pictures_needed(share, target)
    assert wilson(share, needed)[0] >= target > wilson(share, needed - 1)[0]


def test_no_number_of_pictures_lifts_a_share_above_itself():
    assert pictures_needed(1.0, 0.99) == 381
    assert pictures_needed(0.99, 0.99) is None
    assert pictures_needed(0.5, 0.99) is None


@pytest.mark.parametrize(
    ("text", "share"),
    [("99%", 0.99), ("97.5 %", 0.975), ("0.5%", 0.005), ("98", 0.98), ("0.98", 0.98), (" 5% ", 0.05)],
)
def test_a_target_is_a_percentage_or_a_share(text, share):
    assert math.isclose(parse_target(text), share)


@pytest.mark.parametrize(("text", "problem"), [("high", "is not a percentage"), ("", "is not a percentage")])
def test_a_target_that_is_no_number_is_refused(text, problem):
    with pytest.raises(ValueError, match=f"The target '{text}' {problem}"):
        parse_target(text)


@pytest.mark.parametrize("text", ["100%", "0%", "101", "-1%", "nan", "inf"])
def test_a_target_that_no_interval_can_meet_is_refused(text):
    with pytest.raises(ValueError, match=f"The target '{text}' is not between 0% and 100%"):
        parse_target(text)
