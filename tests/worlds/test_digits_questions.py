# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Questions of the digits world, answered again from the list of digits, and the score of an answer."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn")

from modeling_deco.worlds.digits.questions import KINDS, Question, questions, score
from modeling_deco.worlds.digits.scenes import render
from modeling_deco.worlds.digits.tokenizer import build_tokenizer

NUM_SCENES = 60


@pytest.fixture(scope="module")
def scenes():
    return [render("validation", index, min_digits=2) for index in range(NUM_SCENES)]


def ask(scene, index, kinds=KINDS):
    return questions(scene, np.random.default_rng(index), kinds)


def answer_independently(question, digits):
    """The answer to a question's text, from `(value, colour, center)` of each digit."""
    words = question.text.lower().rstrip("?.").replace("?", "").split()
    by_value = {str(value): (colour, center) for value, colour, center in digits}
    if words[:2] == ["is", "there"]:
        return words[-1], words[-1] in by_value
    if words[0] == "how":
        return str(len(digits)), None
    if words[0] == "what":
        return words[-1], by_value[words[-1]][0]
    if words[0] == "read":
        return " ".join(value for value, _ in sorted(by_value.items(), key=lambda item: item[1][1][0])), None
    if words[0] == "where":
        return words[-1], by_value[words[-1]][1]
    one, other = by_value[words[2]][1], by_value[words[-1]][1]
    axis = 0 if "left" in words else 1
    assert abs(one[axis] - other[axis]) >= 8
    return words[2], one[axis] < other[axis]


def test_answers_agree_with_the_digits_and_begin_with_what_was_asked_for(scenes):
    seen = Counter()
    for index, scene in enumerate(scenes):
        digits = [(digit.value, digit.colour, digit.center) for digit in scene.digits]
        for question in ask(scene, index):
            subject, truth = answer_independently(question, digits)
            assert question.answer.startswith(subject)
            if isinstance(truth, bool):
                assert question.answer.endswith(" yes." if truth else " no.")
            elif isinstance(truth, str):
                assert question.answer == f"{subject} {truth}."
            elif isinstance(truth, tuple):
                x0, y0, x1, y1 = map(int, question.answer.rstrip(".").split()[-4:])
                assert (2 * (x0 + x1), 2 * (y0 + y1)) == pytest.approx(truth, abs=2)
            seen[question.kind] += 1
    assert set(seen) == set(KINDS)
    assert min(seen.values()) > 0.95 * len(scenes)


def test_boxes_of_larger_pictures_are_in_units_of_the_picture():
    scene = render("validation", 1, min_digits=2, scale=3)
    (question,) = ask(scene, 1, ["locate"])
    digit = next(digit for digit in scene.digits if str(digit.value) == question.answer[0])
    assert question.box == tuple(edge / 3 for edge in digit.box)
    assert [int(edge) for edge in question.answer.rstrip(".").split()[1:]] == pytest.approx(
        [edge / 12 for edge in digit.box], abs=0.5
    )


@pytest.mark.parametrize("kind", ["existence", "relation"])
def test_yes_and_no_are_balanced(kind):
    answers = [
        question.answer
        for index in range(200)
        for question in ask(render("validation", index, min_digits=2), index, [kind])
    ]
    share = sum(answer.endswith("yes.") for answer in answers) / len(answers)
    assert len(answers) > 190
    assert abs(share - 0.5) < 0.1


def test_kinds_may_be_asked_several_times_but_no_question_twice(scenes):
    kinds = ("existence", "existence", "locate", "locate", "count", "count")
    for index, scene in enumerate(scenes):
        asked = ask(scene, index, kinds)
        assert Counter(question.kind for question in asked) == {"existence": 2, "locate": 2, "count": 1}
        assert len({question.text for question in asked}) == len(asked)


def test_questions_are_a_function_of_their_seed(scenes):
    assert ask(scenes[0], 5) == ask(scenes[0], 5)
    assert ask(scenes[0], 5) != ask(scenes[0], 6)


def test_every_question_and_answer_survives_the_tokenizer(scenes):
    tokenizer = build_tokenizer()
    for index, scene in enumerate(scenes):
        for question in ask(scene, index):
            for text in (question.text, question.answer):
                token_ids = tokenizer(text).input_ids
                assert tokenizer.unk_token_id not in token_ids
                assert tokenizer.decode(token_ids) == text.lower()


def test_reference_answers_score(scenes):
    for index, scene in enumerate(scenes):
        for question in ask(scene, index, KINDS + ("locate",) * 3):
            assert score(question, question.answer)
            assert score(question, " " + question.answer.upper().removesuffix("."))


@pytest.mark.parametrize(
    ("reference", "written", "right"),
    [
        ("7 red.", "7 red", True),
        ("7 red.", "4 red.", False),
        ("7 red.", "red.", False),
        ("7 yes.", "7 no.", False),
        ("4 7 1.", "4 1 7.", False),
        ("4 7 1.", "4 7.", False),
        ("3 digits.", "3 digits. 3 digits.", False),
        ("3 digits.", "", False),
    ],
)
def test_everything_that_was_written_counts(reference, written, right):
    assert score(Question("any", "", reference), written) is right


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("7 4 10 9 14.", True),
        ("7 4 10 9 15.", True),
        ("7 5 11 10 15.", False),  # 4 x 3 of 28 units shared
        ("7 9 14 4 10.", False),
        ("3 4 10 9 14.", False),
        ("7 4 10 9.", False),
        ("7 4 10 9 14 14.", False),
        ("7 4 10 9 " + "9" * 400 + ".", False),
    ],
)
def test_boxes_are_judged_by_overlap(written, right):
    question = Question("locate", "Where is the 7?", "7 4 10 9 14.", box=(16, 40, 36, 56))
    assert score(question, written) is right
