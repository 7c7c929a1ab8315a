# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of questions that are asked about every picture.

A text file has one question a line, and all of them are asked. A JSON file has kinds of questions, each in several
wordings: `{"read": ["What does the text say?", "Read all text."], ...}`. Each picture is asked one question of each
kind, in a wording chosen at random.
"""

import json
from pathlib import Path
from random import Random
from typing import NamedTuple

from ..utils.errors import one_line
from ..utils.files import without_duplicates

GENERAL_QUESTIONS = Path(__file__).with_name("general_questions.json")


class Question(NamedTuple):
    """A question, and its kind; the questions of a text file have no kind (`""`)."""

    kind: str
    text: str


def read_questions(path: Path = GENERAL_QUESTIONS) -> list[Question]:
    """Read all questions of a file. Default: the general ones that come with the package.

    Args:
        path: a file whose name ends in `.json`, or a text file.

    Raises:
        ValueError: the file cannot be read, has no questions, or is no JSON object of kinds with lists of questions.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"The questions {str(path)!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"The questions {str(path)!r} are not UTF-8 text.") from None
    questions = _from_json(content, path) if path.suffix.lower() == ".json" else _from_lines(content)
    if not questions:
        raise ValueError(f"{str(path)!r} has no questions; write one a line.")
    return questions


def _from_lines(content: str) -> list[Question]:
    lines = (line.strip() for line in content.splitlines())
    return [Question("", line) for line in dict.fromkeys(lines) if line]


def _from_json(content: str, path: Path) -> list[Question]:
    try:
        kinds = json.loads(content, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The questions {str(path)!r} are not valid JSON: {one_line(error)}") from None
    if not isinstance(kinds, dict):
        raise ValueError(
            f"The questions {str(path)!r} hold a JSON {type(kinds).__name__}; write "
            f'{{"kind": ["question", ...], ...}}.'
        )
    for kind, texts in kinds.items():
        is_list = isinstance(texts, list) and len(texts) > 0
        if not kind.strip() or not is_list or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"The questions {str(path)!r}: the kind {kind!r} needs a name and a list of questions.")
    return [Question(kind, text) for kind, texts in kinds.items() for text in dict.fromkeys(map(str.strip, texts))]


def choose_questions(questions: list[Question], random: Random) -> list[Question]:
    """The questions to ask about one picture: one of each kind, and all that have no kind."""
    kinds: dict[str, list[Question]] = {}
    for question in questions:
        kinds.setdefault(question.kind, []).append(question)
    return [
        question for kind, wordings in kinds.items() for question in ([random.choice(wordings)] if kind else wordings)
    ]
