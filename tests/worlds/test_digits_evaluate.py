# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Accuracy by kind of question and by position in a conversation."""

import numpy as np

from modeling_deco.worlds.digits import evaluate
from modeling_deco.worlds.digits.questions import KINDS, questions
from modeling_deco.worlds.digits.scenes import render


def test_a_question_follows_the_earlier_ones_and_the_models_own_answers(shipped, monkeypatch):
    asked = []

    def answer(model, processor, images, texts, pooled_grid_size, earlier):
        asked.append((list(texts), [list(turns) for turns in earlier]))
        return [f"answer to {text}" for text in texts]

    monkeypatch.setattr(evaluate, "answer", answer)
    rows = evaluate.accuracy_by_turn(*shipped, "test", 3)
    assert list(rows) == [f"question {turn}" for turn in range(1, 7)]
    assert {row["accuracy"] for row in rows.values()} == {0}
    for picture in range(3):
        history = [texts[picture] for texts, _ in asked]
        scene = render("test", picture, min_digits=2)
        assert sorted(history) == sorted(
            question.text for question in questions(scene, np.random.default_rng(picture), KINDS)
        )
        for turn, (_, earlier) in enumerate(asked):
            assert earlier[picture] == [[text, f"answer to {text}"] for text in history[:turn]]


def test_the_shipped_checkpoint_holds_a_conversation(shipped):
    rows = evaluate.accuracy_by_turn(*shipped, "test", 12, pooled_grid_size=6)
    assert np.mean([row["accuracy"] for row in rows.values()]) >= 90
