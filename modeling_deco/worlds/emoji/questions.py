# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The questions of the emoji world, as people ask them, with exact answers in sentences, and the score of an answer.

An answer repeats what the question names, and the fact follows: "The dog is at [12,40,55,88].". So the model has one
thing to look up. Numbers up to nine are words, and boxes have no spaces, because each token costs time.

A question is asked only where its answer is clear in the picture: what is left of what, which of two things is bigger,
and which thing is meant.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import TypeVar
from zlib import crc32

import numpy as np
import torch

from ..boxes import box_iou
from .colours import COLOURS
from .concepts import CONCEPTS, Concept
from .scenes import Scene, Thing

MIN_STEP = 0.1  # of the picture's side, between the centers of two things of which one is left of or above the other
MIN_AREA_RATIO = 1.5  # of two things of which one is bigger
MIN_PLACE_MARGIN = 0.04  # of the picture's side, between the center of a thing and the next place
NUM_TRAINING_QUESTIONS = 8  # about one picture

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Only categories whose every concept people would call by this word.
CATEGORY_NAMES = {"animal": "animals", "food": "foods", "plant": "plants", "vehicle": "vehicles"}

# Beside what ends with the word: an "open book" is a book. Nobody asks for the ships where there is a sailboat.
_SORTS = {
    "ball": ("soccer ball", "bowling ball", "baseball", "basketball", "volleyball", "football"),
    "bird": ("chick", "chicken", "duck", "eagle", "owl", "penguin", "rooster"),
    "bear": ("panda", "koala"),
    "bouquet": ("rose", "tulip", "hibiscus flower", "sunflower"),
    "car": ("taxi",),
    "chicken": ("chick", "rooster"),
    "clock": ("wristwatch",),
    "cloud": ("tornado",),
    "couch": ("chair",),
    "fish": ("pufferfish", "shark"),
    "glasses": ("sunglasses",),
    "lizard": ("crocodile",),
    "monkey": ("gorilla",),
    "mountain": ("volcano",),
    "ship": ("canoe", "sailboat", "speedboat"),
    "shoe": ("boot", "high heel", "ice skate", "sandal", "sneaker"),
    "telephone": ("mobile phone",),
    "truck": ("fire engine",),
}

ExactBox = tuple[float, float, float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question about a scene and its reference answer.

    Attributes:
        kind: one of `KINDS`.
        text: what is asked.
        answer: a right answer, in a sentence.
        names: the concepts that a right answer names, where it is for naming them.
        word: what a right answer says otherwise: yes or no, a number, a colour, a direction or a place.
        box: where the thing is, in parts of the picture's width and height, where the answer is a box.
        about: the concepts that the question names.
        is_held_out: whether it is about a pair of concepts that training does not ask about.
    """

    kind: str
    text: str
    answer: str
    names: tuple[str, ...] = ()
    word: str = ""
    box: ExactBox | None = None
    about: tuple[str, ...] = ()
    is_held_out: bool = False


# --- English ---------------------------------------------------------------------------------------------------------


def _is_plural(concept: Concept) -> bool:
    """Whether the name itself is a plural, as "scissors"."""
    return not concept.article and concept.plural == concept.name


def _the(name: str) -> str:
    """ "the dog", "the scissors", but "Santa Claus"."""
    return name if not CONCEPTS[name].article and name[0].isupper() else f"the {name}"


def _is(name: str) -> str:
    return "are" if _is_plural(CONCEPTS[name]) else "is"


def _some(name: str, number: int = 1, adjective: str | None = None) -> str:
    """ "a dog", "an orange car", "two dogs", "scissors"."""
    concept = CONCEPTS[name]
    words = f"{adjective} " if adjective else ""
    if number > 1 and not _is_plural(concept):
        return f"{NUMBERS[number]} {words}{concept.plural}"
    if not (concept.article and adjective):
        return f"{words}{concept.with_article}"
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {words}{name}"


def _listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _sentence(text: str, end: str = ".") -> str:
    return text[0].upper() + text[1:] + end


# --- what is clear in a scene ----------------------------------------------------------------------------------------


def _center(thing: Thing) -> tuple[float, float]:
    x0, y0, x1, y1 = thing.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def _step(one: Thing, other: Thing, axis: int) -> float:
    """How far the center of `other` is behind that of `one` on an axis; 0 if it is not clear which is first.

    It is clear if neither center lies within the other thing's extent on this axis.
    """
    step = _center(other)[axis] - _center(one)[axis]
    extents = [(thing.box[axis + 2] - thing.box[axis]) / 2 for thing in (one, other)]
    return step if abs(step) >= max(MIN_STEP, *extents) else 0.0


def _area(thing: Thing) -> float:
    x0, y0, x1, y1 = thing.box
    return (x1 - x0) * (y1 - y0)


def _third(position: float) -> int:
    return min(int(3 * position), 2)


def _place(thing: Thing) -> str:
    """ "in the top left", "in the middle"."""
    x, y = _center(thing)
    column, row = ("left", "", "right")[_third(x)], ("top", "", "bottom")[_third(y)]
    if row and column:
        return f"in the {row} {column}"
    return f"at the {row}" if row else f"on the {column}" if column else "in the middle"


def _has_clear_place(thing: Thing) -> bool:
    return all(abs(center - edge) >= MIN_PLACE_MARGIN for center in _center(thing) for edge in (1 / 3, 2 / 3))


def _colour(thing: Thing) -> str | None:
    """The colour of a thing, unless its name says one: nobody asks for the colour of an orange."""
    return None if set(thing.concept.split()) & set(COLOURS) else thing.colour


@lru_cache(maxsize=len(CONCEPTS))
def _sorts(name: str) -> frozenset[str]:
    """The other concepts that people may also call by this name."""
    return frozenset(_SORTS.get(name, ())) | {other for other in CONCEPTS if other.endswith(f" {name}")}


def _is_clear(name: str, scene: Scene) -> bool:
    """Whether a name can only mean the things of this concept."""
    return not any(thing.concept in _sorts(name) for thing in scene.things)


def _single(scene: Scene) -> list[Thing]:
    """The things that "the dog" can only mean."""
    counts = Counter(thing.concept for thing in scene.things)
    return [thing for thing in scene.things if counts[thing.concept] == 1 and _is_clear(thing.concept, scene)]


def pair_is_held_out(one: str, other: str) -> bool:
    """Whether questions about two concepts together are for evaluation alone. It is a fifth of all pairs."""
    return crc32("|".join(sorted((one, other))).encode()) % 5 == 0


# --- the kinds of questions ------------------------------------------------------------------------------------------


def _choice(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]


def _shuffled(items: Iterable[T], rng: np.random.Generator) -> list[T]:
    items = list(items)
    return [items[place] for place in rng.permutation(len(items))]


def _from_left(scene: Scene) -> list[Thing]:
    return sorted(scene.things, key=lambda thing: _center(thing)[0])


def _counted(things: Iterable[Thing]) -> str:
    """ "a dog and two cats", from left to right by the first of each."""
    return _listed([_some(name, number) for name, number in Counter(thing.concept for thing in things).items()])


def _placed(scene: Scene, with_colours: bool) -> list[tuple[str, str]]:
    """ "a red car on the left" and its verb, for the things that share name, colour and place."""
    groups = Counter((thing.concept, with_colours and _colour(thing), _place(thing)) for thing in _from_left(scene))
    return [
        (f"{_some(name, number, colour or None)} {place}", "are" if number > 1 else _is(name))
        for (name, colour, place), number in groups.items()
    ]


def _name_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    if len(scene.things) == 1:
        name = scene.things[0].concept
        text = _choice(("What is this?", "What is that?", "What can you see here?", "Name this."), rng)
        this = "These are" if _is_plural(CONCEPTS[name]) else "This is"
        yield Question("name", text, f"{this} {_some(name)}.", names=(name,))


def _list_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    texts = ("What do you see?", "Name everything.", "What is in the picture?", "List all things in the picture.")
    names = tuple(dict.fromkeys(thing.concept for thing in scene.things))
    yield Question("list", _choice(texts, rng), f"I see {_counted(_from_left(scene))}.", names=names)


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    """A concept that is not in the scene, half of the time of the category of one that is."""
    present = {thing.concept for thing in scene.things}
    category = CONCEPTS[_choice(scene.things, rng).concept].category if rng.random() < 0.5 else None
    while True:
        concept = _choice(_concepts(category), rng)
        if concept.name not in present and _is_clear(concept.name, scene):
            return concept.name


@lru_cache
def _concepts(category: str | None) -> list[Concept]:
    return [concept for concept in CONCEPTS.values() if category in (None, concept.category)]


def _existence_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Alternate between concepts that are in the picture and concepts that are not."""
    counts = Counter(thing.concept for thing in scene.things)
    is_present = rng.random() < 0.5
    present = _shuffled(counts, rng)
    for _ in range(2 * len(counts)):
        name = present.pop() if is_present else _absent(scene, rng)
        concept, number = CONCEPTS[name], counts[name]
        if not concept.article or rng.random() < 0.3:
            several, are = (concept.plural, "are") if concept.article else (name, _is(name))
            text = _choice((f"{are} there any {several}?", f"Do you see any {several}?"), rng)
            positive = f"there are {several}" if number > 1 and concept.article else f"there {_is(name)} {_some(name)}"
            negative = f"there {are} no {several}"
        else:
            text = _choice(("Is there {}?", "Do you see {}?", "Is {} in the picture?"), rng).format(_some(name))
            positive, negative = f"there is {_some(name)}", f"there is no {name}"
        word, answer = ("yes", f"Yes, {positive}.") if is_present else ("no", f"No, {negative}.")
        yield Question("existence", _sentence(text, ""), answer, word=word, about=(name,))
        is_present = not is_present


def _count_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Ask for each number that occurs, mostly first for what is there several times, which is rare."""
    counts = Counter(thing.concept for thing in scene.things)
    asked = [(name, number) for name, number in counts.items() if CONCEPTS[name].article and _is_clear(name, scene)]
    several = [(name, number) for name, number in asked if number > 1]
    others = [_choice(ones, rng)] if (ones := [one for one in asked if one[1] == 1]) and rng.random() < 0.5 else []
    absent = _absent(scene, rng)
    if CONCEPTS[absent].article and rng.random() < 0.5:
        others.append((absent, 0))
    if rng.random() < 0.5 or not [*several, *others]:
        others.append(("", len(scene.things)))
    in_order = rng.random() < 0.7
    for name, number in [*several, *_shuffled(others, rng)] if in_order else _shuffled([*several, *others], rng):
        many, one = (CONCEPTS[name].plural, name) if name else ("things", "thing")
        text = _choice(("How many {} are there?", "How many {} do you see?", "Count the {}."), rng).format(many)
        answer = f"There is one {one}." if number == 1 else f"There are {NUMBERS[number]} {many}."
        yield Question("count", text, answer, word=NUMBERS[number], about=(name,) if name else ())


def _colour_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for thing in _shuffled(_single(scene), rng):
        name, colour = thing.concept, _colour(thing)
        if colour is not None:
            texts = ("What colour {} {}?", "What color {} {}?", "Which colour {} {}?")
            text = _choice(texts, rng).format(_is(name), _the(name))
            answer = _sentence(f"{_the(name)} {_is(name)} {colour}")
            yield Question("colour", text, answer, word=colour, about=(name,))


def _box_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for thing in _shuffled(_single(scene), rng):
        name = thing.concept
        texts = (f"Where {_is(name)} {_the(name)}?", f"Find {_the(name)}.", f"Give the box of {_the(name)}.")
        answer = _sentence(f"{_the(name)} {_is(name)} at {box_text(thing.box)}")
        yield Question("box", _choice(texts, rng), answer, box=thing.box, about=(name,))


def box_text(box: ExactBox) -> str:
    """A box as answers have it, "[12,40,55,88]": left, top, right and bottom in percent, 0 to 99."""
    return "[{},{},{},{}]".format(*(min(max(round(100 * edge), 0), 99) for edge in box))


def _place_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for thing in _shuffled(_single(scene), rng):
        if _has_clear_place(thing):
            name = thing.concept
            one, verb = _the(name), _is(name)
            texts = (f"In which part of the picture {verb} {one}?", f"Which part of the picture {verb} {one} in?")
            text = _choice(texts, rng)
            answer = _sentence(f"{_the(name)} {_is(name)} {_place(thing)}")
            yield Question("place", text, answer, word=_place(thing), about=(name,))


_DIRECTIONS = (("left of", "right of"), ("above", "below"))  # by axis: before, behind


def _relation_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    asked = [(_shuffled(pair, rng), axis) for pair in combinations(_single(scene), 2) for axis in range(2)]
    for (one, other), axis in _shuffled(asked, rng):
        step = _step(one, other, axis)
        if step == 0:
            continue
        names = one.concept, other.concept
        first, second, verb = _the(names[0]), _the(names[1]), _is(names[0])
        right, wrong = _DIRECTIONS[axis] if step > 0 else _DIRECTIONS[axis][::-1]
        statement = f"{first} {verb} {right} {second}"
        if rng.random() < 0.3:
            choices = " or ".join(_shuffled((right, wrong), rng))
            text, answer, word = f"{verb} {first} {choices} {second}?", statement, right.removesuffix(" of")
        else:
            is_yes = rng.random() < 0.5
            text = f"{verb} {first} {right if is_yes else wrong} {second}?"
            word = "yes" if is_yes else "no"
            answer = f"{word}, {statement}"
        held_out = pair_is_held_out(*names)
        text, answer = _sentence(text, ""), _sentence(answer)
        yield Question("relation", text, answer, word=word, about=names, is_held_out=held_out)


def _neighbour_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Ask where one thing is clearly on a side of another, and no other thing may be meant."""
    asked = [(thing, axis, side) for thing in _single(scene) for axis in range(2) for side in range(2)]
    for thing, axis, side in _shuffled(asked, rng):
        sign = -1 if side == 0 else 1
        on_side = [
            other
            for other in scene.things
            if other is not thing and sign * (_center(other)[axis] - _center(thing)[axis]) > 0
        ]
        if len(on_side) != 1 or _step(thing, on_side[0], axis) == 0:
            continue
        name, found = thing.concept, on_side[0].concept
        where = f"{_DIRECTIONS[axis][side]} {_the(name)}"
        text = _choice((f"What is {where}?", f"What do you see {where}?", f"Which thing is {where}?"), rng)
        answer = _sentence(f"{_some(found)} {_is(found)} {where}")
        held_out = pair_is_held_out(name, found)
        yield Question("neighbour", text, answer, names=(found,), about=(name,), is_held_out=held_out)


def _bigger_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for pair in _shuffled(combinations(_single(scene), 2), rng):
        small, big = sorted(pair, key=_area)
        if _area(big) >= MIN_AREA_RATIO * _area(small):
            one, other = (_the(thing.concept) for thing in _shuffled(pair, rng))
            texts = ("Which is bigger, {} or {}?", "What is larger, {} or {}?", "Which one is bigger: {} or {}?")
            name, about = big.concept, (small.concept, big.concept)
            answer = _sentence(f"{_the(name)} {_is(name)} bigger")
            text, held_out = _choice(texts, rng).format(one, other), pair_is_held_out(*about)
            yield Question("bigger", text, answer, names=(name,), about=about, is_held_out=held_out)


def _category_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Ask for a category that is in the picture; at times for one that is not."""
    present = {CONCEPTS[thing.concept].category for thing in scene.things}
    asked = [category for category in CATEGORY_NAMES if category in present or rng.random() < 0.1]
    for category in _shuffled(asked, rng):
        things = [thing for thing in _from_left(scene) if CONCEPTS[thing.concept].category == category]
        several = CATEGORY_NAMES[category]
        texts = (f"Name the {several}.", f"Which {several} do you see?", f"What {several} are in the picture?")
        answer = f"I see {_counted(things) if things else f'no {several}'}."
        names = tuple(dict.fromkeys(thing.concept for thing in things))
        yield Question("category", _choice(texts, rng), answer, names=names)


def _description_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    texts = ("Describe the picture.", "Describe this picture in a sentence.", "What does the picture show?")
    placed = _placed(scene, with_colours=True)
    answer = f"There {placed[0][1]} {_listed([text for text, _ in placed])}."
    names = tuple(dict.fromkeys(thing.concept for thing in scene.things))
    yield Question("description", _choice(texts, rng), answer, names=names)


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Iterator[Question]]] = {
    "name": _name_questions,
    "list": _list_questions,
    "existence": _existence_questions,
    "count": _count_questions,
    "colour": _colour_questions,
    "box": _box_questions,
    "place": _place_questions,
    "relation": _relation_questions,
    "neighbour": _neighbour_questions,
    "bigger": _bigger_questions,
    "category": _category_questions,
    "description": _description_questions,
}
KINDS = tuple(_ASKERS)
PAIR_KINDS = ("relation", "neighbour", "bigger")  # with questions about held-out pairs of concepts


def questions(
    scene: Scene, rng: np.random.Generator, kinds: Iterable[str] = KINDS, with_held_out: bool = True
) -> list[Question]:
    """Distinct questions about a scene, in the order of `kinds`. A kind may occur several times.

    A kind yields fewer questions if the scene has no more: a single thing is named, and only several are compared.

    Args:
        with_held_out: whether to ask about held-out pairs of concepts.
    """
    kinds = list(kinds)
    found = {kind: _ASKERS[kind](scene, rng) for kind in dict.fromkeys(kinds)}
    asked = []
    for kind in kinds:
        question = next((other for other in found[kind] if with_held_out or not other.is_held_out), None)
        if question is not None:
            asked.append(question)
    return asked


def training_questions(
    scene: Scene, rng: np.random.Generator, number: int = NUM_TRAINING_QUESTIONS, with_held_out: bool = False
) -> list[Question]:
    """At most `number` questions, of as many kinds as the scene has, in random order; then a second one of each kind.

    A single thing is always named, because few pictures have a single thing.
    """
    first, *others = KINDS
    kinds = [first, *_shuffled(others, rng), *_shuffled(others, rng)]
    return _shuffled(questions(scene, rng, kinds, with_held_out)[:number], rng)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A short caption: what is in the picture, and mostly where and in which colours."""
    if rng.random() < 0.25:
        return _sentence(_counted(_from_left(scene)))
    return _sentence(_listed([text for text, _ in _placed(scene, with_colours=rng.random() < 0.7)]))


# --- the score -------------------------------------------------------------------------------------------------------


def score(question: Question, answer: str) -> bool:
    """Whether an answer is right.

    Case, spacing, articles and the frame of the sentence are ignored, but not words that are unknown where things are
    named: a "teddy bear" is not a bear. A list is right if it names exactly the concepts that are there; a description
    is judged as a list. A box is right if its IoU with the exact box is at least 0.5.
    """
    if question.box is not None:
        numbers = re.findall(r"\d+", _without(question.about, _plain(answer)))
        box = torch.tensor([float(number[:3]) / 100 for number in numbers])
        return len(box) == 4 and bool(box_iou(box, torch.tensor(question.box)) >= 0.5)
    if question.word:
        return _says(question, answer)
    names, is_known = named(answer)
    if question.kind == "neighbour":
        return is_known and names[:1] == list(question.names) and set(names) <= {*question.names, *question.about}
    if not question.names:
        return is_known and not names and "no" in _words(_plain(answer))
    return is_known and set(names) == set(question.names)


def recall(question: Question, answer: str) -> float:
    """Share of the concepts of `question.names` that an answer names."""
    return len(set(named(answer)[0]) & set(question.names)) / len(question.names)


def named(answer: str) -> tuple[list[str], bool]:
    """The concepts that an answer names, in order, and whether it says nothing else that has no place in an answer."""
    names = []

    def found(match: re.Match) -> str:
        names.append(_forms()[match[0]])
        return " "

    # "an orange car" is a car
    plain = _colour_before_a_name().sub(" ", _plain(answer))
    return names, set(_words(_any_name().sub(found, plain))) <= _FRAME


_PLACE_WORDS = ("top", "bottom", "left", "right", "middle")
_FRAME = frozenset(
    "a an the and or i see there is are this that these those it its they in on at of to side corner picture shows "
    "above below bigger larger".split()
) | {*NUMBERS, *COLOURS, *_PLACE_WORDS, *CATEGORY_NAMES.values()}


def _says(question: Question, answer: str) -> bool:
    """Whether an answer says the word of a question, and no other word of its sort."""
    words = _words(_without(question.about, _plain(answer)))
    if question.word in ("yes", "no") and question.kind != "count":
        return words[:1] == [question.word]
    if question.kind == "count":
        said = {NUMBERS[int(word)] if re.fullmatch(r"\d", word) else word for word in words}
        return _only(said, NUMBERS) == {question.word} and not any(len(word) > 1 and word.isdigit() for word in words)
    if question.kind == "colour":
        return _only(("grey" if word == "gray" else word for word in words), COLOURS) == {question.word}
    if question.kind == "place":
        return _only(words, _PLACE_WORDS) == _only(question.word.split(), _PLACE_WORDS)
    return _only(words, ("left", "right", "above", "below")) == {question.word}


def _only(words: Iterable[str], of: Sequence[str]) -> set[str]:
    return {word for word in words if word in of}


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split())


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def _without(names: Iterable[str], text: str) -> str:
    """The text without the names of concepts, whose words may be colours, numbers or places."""
    forms = [form.lower() for name in names for form in (CONCEPTS[name].plural, name)]
    return re.sub(rf"\b(?:{'|'.join(map(re.escape, forms))})\b", " ", text) if forms else text


@lru_cache(maxsize=1)
def _forms() -> dict[str, str]:
    """The concept that each name and plural means, in small letters, the longest first."""
    forms = {concept.plural.lower(): name for name, concept in CONCEPTS.items()}
    forms |= {name.lower(): name for name in CONCEPTS}
    return dict(sorted(forms.items(), key=lambda form: -len(form[0])))


@lru_cache(maxsize=1)
def _any_name() -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, _forms()))})\b")


@lru_cache(maxsize=1)
def _colour_before_a_name() -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(COLOURS)}) (?={_any_name().pattern})")
