# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a checkpoint on the digits world by kind of question, from the answers that the model generates.

    python -m modeling_deco.worlds.digits.evaluate --model DIR --pooled-grid-size 6 [--conversation] [--json]

Pictures have at least two digits, so that no question can be answered without looking the digit up. The standard error
is over pictures, because the questions about one picture are not independent.
"""

import json
import sys
from collections import defaultdict
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from ...configuration_deco import parse_grid
from ...inference.generation import RefuseNaN, encode
from ...inference.loading import load
from ...utils.measure import environment
from ...utils.script import run
from ..evaluation import summary
from .questions import KINDS, questions, score
from .scenes import SPLITS, render

BATCH_SIZE = 256  # questions


@torch.inference_mode()
def answer(model, processor, images, texts, pooled_grid_size=None, earlier=None) -> list[str]:
    """Greedy answers to one question per image, each after the `earlier` pairs of question and answer."""
    earlier = earlier or [[]] * len(images)
    messages = [_conversation(*asked) for asked in zip(images, earlier, texts, strict=True)]
    inputs = encode(processor, messages, pooled_grid_size).to(model.device)
    processors = LogitsProcessorList([RefuseNaN()])
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False, logits_processor=processors)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _conversation(image, earlier, text) -> list[dict]:
    turns = [("user", text)]
    for question, answer in reversed(earlier):
        turns = [("user", question), ("assistant", answer), *turns]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": words}]} for role, words in turns
    ]
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    return messages


def accuracy_by_turn(model, processor, split, num_pictures, pooled_grid_size=None, seed=0) -> dict[str, dict]:
    """Accuracy in conversations: one question of every kind about each picture, in random order.

    A question follows the earlier ones and the model's own answers to them.

    Returns:
        A row as in `accuracy_by_kind` for each position in the conversation.
    """
    model.eval()
    scenes = [render(split, index, seed=seed, min_digits=2) for index in range(num_pictures)]
    images, asked = [scene.image for scene in scenes], []
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng(index)
        of_scene = questions(scene, rng)
        asked.append([of_scene[place] for place in rng.permutation(len(KINDS))])
    earlier: list[list] = [[] for _ in scenes]
    hits: dict = {}
    for turn, row in enumerate(zip(*asked, strict=True), start=1):
        texts, answers = [question.text for question in row], []
        for start in range(0, num_pictures, BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            answers += answer(model, processor, images[batch], texts[batch], pooled_grid_size, earlier[batch])
        hits[f"question {turn}"] = [[score(*pair)] for pair in zip(row, answers, strict=True)]
        earlier = [[*turns, pair] for turns, *pair in zip(earlier, texts, answers, strict=True)]
    return {turn: summary(by_picture) for turn, by_picture in hits.items()}


def accuracy_by_kind(
    model, processor, split, num_pictures, pooled_grid_size=None, kinds=KINDS, seed=0, min_digits=2, max_digits=4
) -> dict[str, dict[str, float]]:
    """Accuracy by kind of question.

    Args:
        split: the scans to use.
        pooled_grid_size: the token budget. Default: the processor's.
        kinds: the kinds of questions about each picture, one question for each entry.
        min_digits, max_digits: number of digits in a picture.

    Returns:
        For each kind `accuracy` and `standard_error` in percent, and the number of `questions`.
    """
    was_training = model.training
    model.eval()
    asked = []
    for index in range(num_pictures):
        scene = render(split, index, seed=seed, min_digits=min_digits, max_digits=max_digits)
        asked += [(index, scene.image, question) for question in questions(scene, np.random.default_rng(index), kinds)]
    hits: dict = defaultdict(lambda: defaultdict(list))  # kind -> picture -> right or not
    for start in tqdm(range(0, len(asked), BATCH_SIZE), desc="evaluate", unit="batch", disable=None, file=sys.stderr):
        batch = asked[start : start + BATCH_SIZE]
        texts = [question.text for _, _, question in batch]
        answers = answer(model, processor, [image for _, image, _ in batch], texts, pooled_grid_size)
        for (index, _, question), text in zip(batch, answers, strict=True):
            hits[question.kind][index].append(score(question, text))
    model.train(was_training)
    return {kind: summary(by_picture.values()) for kind, by_picture in hits.items()}


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the checkpoint.")],
    pooled_grid_size: Annotated[int | None, typer.Option(help="Token budget; default: the checkpoint's.")] = None,
    split: Annotated[str, typer.Option(help=f"Scans to use: {', '.join(SPLITS)}.")] = "test",
    num_pictures: Annotated[
        int, typer.Option(min=2, help="Number of pictures, each with one question of every kind.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
    in_4bit: Annotated[
        bool, typer.Option("--4bit", help="Load the language model in 4 bits (NF4, bitsandbytes).")
    ] = False,
    in_int8: Annotated[bool, typer.Option("--int8", help="Use int8 for linear layers.")] = False,
    in_conversation: Annotated[
        bool,
        typer.Option(
            "--conversation", help="Ask the questions about a picture in one conversation; rows by position."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Print the accuracy of MODEL on handwriting that it has not seen."""
    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is not one of {', '.join(SPLITS)}", param_hint="--split")
    loaded, processor = load(model, in_4bit=in_4bit, in_int8=in_int8)
    evaluate = accuracy_by_turn if in_conversation else accuracy_by_kind
    accuracies = evaluate(loaded, processor, split, num_pictures, pooled_grid_size, seed=seed)
    if as_json:
        report = {
            "model": model,
            "pooled_grid_size": list(parse_grid(pooled_grid_size or processor.pooled_grid_size)),
            "in_4bit": in_4bit,
            "in_int8": in_int8,
            "in_conversation": in_conversation,
            "split": split,
            "num_pictures": num_pictures,
            "seed": seed,
            "accuracy": accuracies,
            "environment": environment(loaded.device),
        }
        typer.echo(json.dumps(report))
        return
    typer.echo(f"{'':10} accuracy  std. error  questions")
    for kind, row in accuracies.items():
        typer.echo(f"{kind:10} {row['accuracy']:7.1f} %  {row['standard_error']:7.1f} %  {row['questions']:9}")


if __name__ == "__main__":
    run("digits.evaluate", lambda: typer.run(main))
