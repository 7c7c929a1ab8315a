# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Accuracy in the course of training, measured without generation."""

import time
from itertools import pairwise

import numpy as np
import torch
from transformers import TrainerCallback

from ...training.collator import IGNORE_INDEX, DecoCollator, expand_images
from .comparison import CompareArguments
from .questions import KINDS, questions, score
from .scenes import render
from .training_data import turn


@torch.inference_mode()
def forced_accuracy(model, processor, pictures: list[tuple]) -> dict[str, float]:
    """Accuracy by kind of question in percent, from the most likely token at each position of the reference answer.

    It takes a fraction of the time of generation. If all these tokens are the reference's, greedy generation writes
    the reference too, so for exact matches the two accuracies are equal. For boxes they can differ, because here a
    wrong number does not change the input of the next one.

    Args:
        pictures: pairs `(scene, questions)`.
    """
    was_training = model.training
    model.eval()
    collator = DecoCollator(processor, independent_turns=True)
    hits: dict[str, list] = {kind: [] for kind in KINDS}
    for start in range(0, len(pictures), 32):
        chunk = pictures[start : start + 32]
        examples = [
            {"images": [scene.image], "messages": [message for question in asked for message in turn(question)]}
            for scene, asked in chunk
        ]
        inputs = expand_images(collator(examples), None, processor)
        labels = inputs.pop("labels")
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        predictions = model(**inputs).logits.argmax(-1).cpu()
        for (_, asked), row, predicted in zip(chunk, labels, predictions, strict=True):
            answers = torch.nonzero(row != IGNORE_INDEX).flatten().tolist()
            ends = [position for position, after in pairwise([*answers, -1]) if after != position + 1]
            starts = [position for before, position in pairwise([-1, *answers]) if before != position - 1]
            for question, first, last in zip(asked, starts, ends, strict=True):
                text = processor.decode(predicted[first - 1 : last], skip_special_tokens=True)
                hits[question.kind].append(score(question, text))
    model.train(was_training)
    return {kind: round(100 * float(np.mean(found)), 2) for kind, found in hits.items()}


class Curve(TrainerCallback):
    """Measures the accuracy before the first step, every `eval_steps` steps, and after the last step."""

    def __init__(self, args: CompareArguments, processor):
        self.args, self.processor = args, processor
        self.points: list = []
        self.seconds = 0.0
        scenes = [
            render("validation", index, min_digits=args.min_digits, max_digits=args.max_digits)
            for index in range(args.num_eval_pictures)
        ]
        self.pictures = [(scene, questions(scene, np.random.default_rng(index))) for index, scene in enumerate(scenes)]

    def measure(self, model, step: int):
        began = time.perf_counter()
        self.points.append({"step": step, "accuracy": forced_accuracy(model, self.processor, self.pictures)})
        self.seconds += time.perf_counter() - began

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.args.eval_steps == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)
