# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The questions of the emoji world about scenes made by hand, and which answers are right."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn")

from PIL import Image

from modeling_deco.worlds.emoji.concepts import CONCEPTS
from modeling_deco.worlds.emoji.questions import (
    CATEGORY_NAMES,
    KINDS,
    Question,
    caption,
    named,
    pair_is_held_out,
    questions,
    recall,
    score,
    training_questions,
)
from modeling_deco.worlds.emoji.scenes import Scene, Thing


def scene_of(*things) -> Scene:
    return Scene(Image.new("RGB", (8, 8)), tuple(Thing(*thing) for thing in things))


# A dog top left, two apples in the lower row, scissors at the right; the dog is the biggest.
SCENE = scene_of(
    ("dog", (0.02, 0.05, 0.38, 0.45), "brown"),
    ("apple", (0.1, 0.7, 0.3, 0.9), "red"),
    ("apple", (0.42, 0.72, 0.6, 0.9), "green"),
    ("scissors", (0.7, 0.3, 0.95, 0.52), None),
)


def random_scene(seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    names = rng.choice(list(CONCEPTS), size=int(rng.integers(1, 4))).tolist()
    names += names[:1] * int(rng.integers(0, 3))
    cells = rng.permutation(9)[: len(names)]
    things = []
    for name, cell in zip(names, cells, strict=True):
        x0, y0 = np.array([cell % 3, cell // 3]) / 3 + rng.uniform(0, 0.1, 2)
        x1, y1 = np.array([x0, y0]) + rng.uniform(0.08, 0.23, 2)
        box = (float(x0), float(y0), float(x1), float(y1))
        things.append((name, box, rng.choice(["red", "orange", "blue", None])))
    return scene_of(*things)


def asked_of(scene: Scene, kind: str, number: int = 60) -> dict[str, Question]:
    """What is asked about a scene over many draws, by text."""
    found = [question for seed in range(number) for question in questions(scene, np.random.default_rng(seed), [kind])]
    return {question.text: question for question in found}


def test_every_reference_answer_is_right():
    kinds = Counter()
    for seed in range(300):
        scene = random_scene(seed)
        for question in questions(scene, np.random.default_rng(seed), KINDS * 2):
            assert score(question, question.answer), question
            assert question.text[0].isupper() or question.text.startswith("Name")
            kinds[question.kind] += 1
        assert named(caption(scene, np.random.default_rng(seed)))[1]
    assert set(kinds) == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("list", "What do you see?", "I see a dog, two apples and scissors."),
        ("existence", "Is there a dog?", "Yes, there is a dog."),
        ("existence", "Are there any apples?", "Yes, there are apples."),
        ("existence", "Are there any scissors?", "Yes, there are scissors."),
        ("count", "How many apples are there?", "There are two apples."),
        ("count", "How many dogs are there?", "There is one dog."),
        ("count", "How many things are there?", "There are four things."),
        ("colour", "What colour is the dog?", "The dog is brown."),
        ("box", "Where is the dog?", "The dog is at [2,5,38,45]."),
        ("box", "Where are the scissors?", "The scissors are at [70,30,95,52]."),
        ("place", "In which part of the picture are the scissors?", "The scissors are on the right."),
        ("place", "In which part of the picture is the dog?", "The dog is in the top left."),
        ("relation", "Is the dog left of the scissors?", "Yes, the dog is left of the scissors."),
        ("relation", "Are the scissors left of the dog?", "No, the scissors are right of the dog."),
        ("relation", "Is the dog left of or right of the scissors?", "The dog is left of the scissors."),
        ("neighbour", "What is right of the dog?", None),  # an apple and the scissors
        ("neighbour", "What is above the scissors?", None),  # the dog is, but not clearly
        ("bigger", "Which is bigger, the scissors or the dog?", "The dog is bigger."),
        ("category", "Name the animals.", "I see a dog."),
        ("category", "Name the foods.", "I see two apples."),
        ("category", "Name the vehicles.", "I see no vehicles."),
        (
            "description",
            "Describe the picture.",
            "There is a brown dog in the top left, a red apple in the bottom left, a green apple at the bottom and "
            "scissors on the right.",
        ),
    ],
)
def test_what_is_asked_about_a_scene(kind, text, answer):
    found = asked_of(SCENE, kind, 400)
    assert (found[text].answer if text in found else None) == answer


def test_a_thing_is_named_where_it_is_alone():
    grapes = scene_of(("grapes", (0.2, 0.2, 0.7, 0.7), "purple"))
    assert asked_of(grapes, "name")["What is this?"].answer == "These are grapes."
    assert asked_of(SCENE, "name") == {}


def test_what_may_mean_several_things_is_not_asked():
    apples_and_books = scene_of(
        ("book", (0.1, 0.1, 0.3, 0.3), "red"),
        ("open book", (0.6, 0.6, 0.9, 0.9), "blue"),
        ("orange", (0.6, 0.1, 0.8, 0.3), "orange"),
    )
    about = {name for text in asked_of(apples_and_books, "box").values() for name in text.about}
    assert about == {"open book", "orange"}
    assert {question.about for question in asked_of(apples_and_books, "colour").values()} == {("open book",)}
    only_a_taxi = scene_of(("taxi", (0.1, 0.1, 0.4, 0.4), "yellow"))
    absent = {question.about[0] for question in asked_of(only_a_taxi, "existence", 400).values()}
    assert "taxi" in absent
    assert "car" not in absent


def test_half_of_the_existence_questions_are_about_what_is_there_and_half_of_the_others_about_its_category():
    found = [questions(SCENE, np.random.default_rng(seed), ["existence"])[0] for seed in range(1000)]
    absent = [CONCEPTS[question.about[0]].category for question in found if question.word == "no"]
    assert len(absent) == pytest.approx(500, abs=60)
    share = sum(category in ("animal", "food", "tool") for category in absent) / len(absent)
    assert share > 0.6


def test_relations_are_balanced():
    words = Counter(
        question.word
        for seed in range(1000)
        for question in questions(SCENE, np.random.default_rng(seed), ["relation"])
    )
    assert words["yes"] == pytest.approx(words["no"], abs=100)


def test_no_pair_is_asked_about_in_training_that_is_held_out():
    share = np.mean([pair_is_held_out("dog", name) for name in CONCEPTS])
    assert 0.1 < share < 0.3
    assert pair_is_held_out("dog", "cat") == pair_is_held_out("cat", "dog")
    held_out = 0
    for seed in range(200):
        scene = random_scene(seed)
        for question in training_questions(scene, np.random.default_rng(seed)):
            if question.kind in ("relation", "neighbour", "bigger"):
                pair = {*question.names, *question.about}
                assert not pair_is_held_out(*pair)
        held_out += sum(question.is_held_out for question in questions(scene, np.random.default_rng(seed)))
    assert held_out > 20


def test_a_picture_has_eight_questions_of_different_kinds():
    found = training_questions(SCENE, np.random.default_rng(0))
    assert len(found) == len({question.kind for question in found}) == 8
    alone = scene_of(("dog", (0.2, 0.2, 0.7, 0.7), None))
    assert all(
        "name" in {question.kind for question in training_questions(alone, np.random.default_rng(seed))}
        for seed in range(20)
    )


@pytest.mark.parametrize(
    ("question", "answer", "is_right"),
    [
        (Question("name", "", "", names=("hot dog",)), "This is a hot dog.", True),
        (Question("name", "", "", names=("hot dog",)), "hot  dog", True),
        (Question("name", "", "", names=("dog",)), "This is a hot dog.", False),
        (Question("name", "", "", names=("bear",)), "This is a teddy bear.", False),
        (Question("name", "", "", names=("bear",)), "This is a brown bear", True),
        (Question("name", "", "", names=("bear",)), "This is a bear and a cat.", False),
        (Question("name", "", "", names=("orange",)), "This is an orange.", True),
        (Question("name", "", "", names=("car",)), "This is an orange car.", True),
        (Question("name", "", "", names=("car",)), "", False),
        (Question("list", "", "", names=("dog", "fork and knife")), "I see a fork and knife and two dogs.", True),
        (Question("list", "", "", names=("dog", "cat")), "I see a dog.", False),
        (Question("list", "", "", names=("dog",)), "I see a dog and a cat.", False),
        (Question("category", "", ""), "I see no animals.", True),
        (Question("category", "", ""), "I see a dog.", False),
        (Question("category", "", ""), "", False),
        (Question("existence", "", "", word="no", about=("dog",)), "No, there is no dog.", True),
        (Question("existence", "", "", word="yes", about=("dog",)), "No, there is no dog.", False),
        (Question("existence", "", "", word="yes", about=("dog",)), "There is a dog.", False),
        (Question("count", "", "", word="three", about=("apple",)), "There are three apples.", True),
        (Question("count", "", "", word="three", about=("apple",)), "3", True),
        (Question("count", "", "", word="three", about=("apple",)), "There are 13 apples.", False),
        (Question("count", "", "", word="three", about=("apple",)), "There are two or three apples.", False),
        (Question("count", "", "", word="no", about=("apple",)), "There are no apples.", True),
        (Question("count", "", "", word="no", about=("apple",)), "There are 0 apples.", True),
        (Question("colour", "", "", word="grey", about=("car",)), "The car is gray.", True),
        (Question("colour", "", "", word="red", about=("car",)), "The car is red and blue.", False),
        (Question("box", "", "", box=(0.2, 0.2, 0.6, 0.6), about=("car",)), "The car is at [20,20,60,60].", True),
        (Question("box", "", "", box=(0.2, 0.2, 0.6, 0.6), about=("car",)), "20 20 55 55", True),
        (Question("box", "", "", box=(0.2, 0.2, 0.6, 0.6), about=("car",)), "[20,20,40,40]", False),
        (Question("box", "", "", box=(0.2, 0.2, 0.6, 0.6), about=("car",)), "[20,20,60]", False),
        (Question("place", "", "", word="in the top left"), "The dog is in the top left.", True),
        (Question("place", "", "", word="at the top"), "The dog is in the top left.", False),
        (Question("relation", "", "", word="left", about=("dog", "cat")), "The dog is left of the cat.", True),
        (Question("relation", "", "", word="left", about=("dog", "cat")), "It is left or right of it.", False),
        (Question("neighbour", "", "", names=("dog",), about=("cat",)), "A dog is left of the cat.", True),
        (Question("neighbour", "", "", names=("dog",), about=("cat",)), "The cat is right of a dog.", False),
        (Question("bigger", "", "", names=("dog",), about=("cat", "dog")), "The cat is bigger.", False),
        (Question("bigger", "", "", names=("dog",), about=("cat", "dog")), "The dog.", True),
    ],
)
def test_the_score_of_an_answer(question, answer, is_right):
    assert score(question, answer) is is_right


def test_recall_counts_the_things_that_are_named():
    question = Question("list", "", "", names=("dog", "cat", "car", "bus"))
    assert recall(question, "I see a dog, three cars and a whatnot.") == 0.5


def test_categories_are_those_of_concepts():
    assert CATEGORY_NAMES.keys() <= {concept.category for concept in CONCEPTS.values()}
