# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of questions: what they may contain, and which of their questions a picture is asked."""

import json
from collections import Counter
from random import Random

import pytest

from modeling_deco.inference.questions import GENERAL_QUESTIONS, Question, choose_questions, read_questions


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_all_lines_of_a_text_file_are_asked(tmp_path):
    path = write(tmp_path / "questions.txt", "\ufeff What is this? \r\n\nIs there a cat?\nWhat is this?\n")
    expected = [Question("", "What is this?"), Question("", "Is there a cat?")]
    assert read_questions(path) == expected
    assert choose_questions(expected, Random(0)) == expected


def test_one_wording_of_each_kind_is_asked_by_chance(tmp_path):
    path = write(tmp_path / "questions.JSON", {"read": ["Read.", " Write. "], "count": ["How many?"]})
    questions = read_questions(path)
    assert questions == [("read", "Read."), ("read", "Write."), ("count", "How many?")]
    random = Random(0)
    chosen = [choose_questions(questions, random) for _ in range(200)]
    assert all([question.kind for question in asked] == ["read", "count"] for asked in chosen)
    wordings = Counter(asked[0].text for asked in chosen)
    assert wordings.keys() == {"Read.", "Write."}
    assert min(wordings.values()) > 70


def test_general_questions_come_with_the_package():
    questions = read_questions()
    assert GENERAL_QUESTIONS.is_file()
    kinds = Counter(question.kind for question in questions)
    assert {"describe", "read", "count", "where", "colour", "yes or no"} <= kinds.keys()
    assert min(kinds.values()) >= 4
    assert len({question.text for question in questions}) == len(questions)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot be read: No such file or directory"),
        ("empty.txt", "\n \n", "has no questions; write one a line"),
        ("empty.json", {}, "has no questions"),
        ("broken.json", '{"read": [', "are not valid JSON: Expecting value"),
        ("twice.json", '{"read": ["a"], "read": ["b"]}', "duplicate key 'read'"),
        ("list.json", ["What is this?"], "hold a JSON list; write"),
        ("text.json", {"read": "Read."}, "the kind 'read' needs a name and a list of questions"),
        ("none.json", {"read": []}, "the kind 'read' needs"),
        ("number.json", {"read": [1]}, "the kind 'read' needs"),
        ("unnamed.json", {" ": ["Read."]}, "the kind ' ' needs a name"),
    ],
)
def test_a_broken_file_is_refused_by_name(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(ValueError, match=message) as error:
        read_questions(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"picture\.png' are not UTF-8 text"):
        read_questions(path)
