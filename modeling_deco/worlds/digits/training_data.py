# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Training pictures with their questions, as chat messages."""

import numpy as np
from datasets import Dataset

from .questions import TRAINING_KINDS, Question, questions
from .scenes import render


def build_dataset(num_pictures: int, seed: int, min_digits: int = 2, max_digits: int = 4) -> Dataset:
    """Training pictures by index. A row is rendered when it is read, so nothing is stored.

    Every fifth picture may have one digit less than `min_digits`.
    """

    def render_rows(rows):
        scenes = [
            render("train", index, seed=seed, min_digits=min_digits - (index % 5 == 0), max_digits=max_digits)
            for index in rows["index"]
        ]
        rngs = [np.random.default_rng([seed, index]) for index in rows["index"]]
        return {
            "index": rows["index"],
            "images": [[scene.image] for scene in scenes],
            "messages": [
                [message for question in questions(scene, rng, TRAINING_KINDS) for message in turn(question)]
                for scene, rng in zip(scenes, rngs, strict=True)
            ],
        }

    return Dataset.from_dict({"index": range(num_pictures)}).with_transform(render_rows)


def turn(question: Question) -> list[dict]:
    """A question and its answer as chat messages."""
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
