# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a checkpoint on the emoji world by kind of question, from the answers that the model generates.

    python -m modeling_deco.worlds.emoji.evaluate --model DIR --pooled-grid-size 6 --pooled-grid-size 3 --json

`name` asks for every concept that the artists of the split have drawn, alone in a picture. The other kinds are asked
about scenes of one to six things, one question of a kind about a picture, so that a standard error over questions is
one over pictures. `--split openmoji` is line art, and `--split tuxpaint` photographs.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from tqdm.auto import tqdm

from ...configuration_deco import parse_grid
from ...inference.grid_answers import Grid
from ...inference.loading import load
from ...utils.measure import command, environment
from ...utils.options import parse_grid_option
from ...utils.script import run
from ..evaluation import answer_about, summary
from .art import concepts_of
from .questions import KINDS, PAIR_KINDS, Question, questions, recall, score
from .scenes import SPLITS, Scene, render, single

PICTURES_AT_A_TIME = 32
MAX_NEW_TOKENS = 128  # the description of six things takes up to 80
_MOST_PICTURES_PER_QUESTION = 20  # of a kind that few pictures allow


@dataclass(frozen=True)
class Asked:
    """A question about a picture, and the model's answer."""

    picture: str
    num_things: int
    question: Question
    answer: str = ""


def ask(
    split: str, num_questions: int, kinds: Iterable[str] = KINDS, seed: int = 0
) -> Iterator[tuple[str, Scene, list]]:
    """Pictures with their names and their questions, until each kind has `num_questions`."""
    missing = dict.fromkeys(kinds, num_questions)
    if missing.pop("name", 0):
        concepts = concepts_of(split)
        for index in range(num_questions):
            place, concept = divmod(index, len(concepts))
            scene = single(split, concepts[concept], place, seed=seed)
            yield (
                f"single-{concepts[concept]}-{place}",
                scene,
                questions(scene, np.random.default_rng(index), ["name"]),
            )
    for index in range(_MOST_PICTURES_PER_QUESTION * num_questions):
        wanted = [kind for kind, number in missing.items() if number > 0]
        if not wanted:
            return
        scene = render(split, index, seed=seed)
        found = questions(scene, np.random.default_rng(index), wanted)
        for question in found:
            missing[question.kind] -= 1
        if found:
            yield f"{split}-{index}", scene, found


def answers_by_grid(
    model,
    processor,
    split: str,
    num_questions: int,
    grids: Sequence[Grid],
    kinds: Iterable[str] = KINDS,
    seed: int = 0,
) -> dict[Grid, list[Asked]]:
    """The model's answers to `num_questions` questions of each kind, at each grid."""
    kinds = list(kinds)
    model.eval()
    found: dict[Grid, list[Asked]] = {grid: [] for grid in grids}
    with tqdm(
        total=num_questions * len(kinds), desc="evaluate", unit="question", disable=None, file=sys.stderr
    ) as bar:
        images: list[Image.Image] = []
        asked: list[tuple[int, Asked]] = []

        def flush() -> None:
            asked.sort(key=lambda pair: KINDS.index(pair[1].question.kind))
            texts = [(place, row.question.text) for place, row in asked]
            answered = answer_about(model, processor, images, texts, grids, max_new_tokens=MAX_NEW_TOKENS)
            for grid, answers in answered.items():
                found[grid] += [
                    Asked(row.picture, row.num_things, row.question, answer)
                    for (_, row), answer in zip(asked, answers, strict=True)
                ]
            bar.update(len(asked))
            images.clear()
            asked.clear()

        for name, scene, of_scene in ask(split, num_questions, kinds, seed):
            asked += [(len(images), Asked(name, len(scene.things), question)) for question in of_scene]
            images.append(scene.image)
            if len(images) == PICTURES_AT_A_TIME:
                flush()
        if images:
            flush()
    return found


def accuracy_by_kind(asked: Iterable[Asked]) -> dict[str, dict[str, Any]]:
    """Accuracy by kind of question.

    Returns:
        For each kind `accuracy` and `standard_error` in percent, and the number of `questions`. What names all things
        has the `recall` of single things too, and the accuracy by the number of things in the picture. Questions about
        two concepts have a row for the pairs that training did not ask about, `relation, unseen pairs`.
    """
    by_kind: dict[str, list[Asked]] = defaultdict(list)
    for row in asked:
        by_kind[row.question.kind].append(row)
    rows: dict[str, dict[str, Any]] = {}
    for kind in (kind for kind in KINDS if kind in by_kind):
        of_kind = by_kind[kind]
        rows[kind] = _summary(of_kind)
        if kind in ("list", "description"):
            recalls = [[recall(row.question, row.answer)] for row in of_kind]
            rows[kind]["recall"] = summary(recalls)["accuracy"]
            by_number = defaultdict(list)
            for row in of_kind:
                by_number[row.num_things].append(row)
            rows[kind]["by_number_of_things"] = {
                number: _summary(by_number[number])["accuracy"] for number in sorted(by_number)
            }
        unseen = [row for row in of_kind if row.question.is_held_out]
        if kind in PAIR_KINDS and len(unseen) > 1:
            rows[f"{kind}, unseen pairs"] = _summary(unseen)
    return rows


def _summary(asked: Iterable[Asked]) -> dict[str, Any]:
    return dict(summary([[score(row.question, row.answer)] for row in asked]))


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the checkpoint.")],
    pooled_grid_size: Annotated[
        list[str] | None, typer.Option(help="Token budget, 6 or 6x8; may be repeated; default: the checkpoint's.")
    ] = None,
    split: Annotated[str, typer.Option(help=f"Artists: {', '.join(SPLITS)}.")] = "test",
    num_questions: Annotated[int, typer.Option(min=2, help="Number of questions of each kind.")] = 1000,
    kinds: Annotated[str, typer.Option(help=f"Kinds of questions, with commas: {','.join(KINDS)}.")] = ",".join(KINDS),
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
    in_4bit: Annotated[
        bool, typer.Option("--4bit", help="Load the language model in 4 bits (NF4, bitsandbytes).")
    ] = False,
    in_int8: Annotated[bool, typer.Option("--int8", help="Use int8 for linear layers.")] = False,
    answers: Annotated[Path | None, typer.Option(help="File for all questions and answers, as JSON lines.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each grid, not a table.")] = False,
) -> None:
    """Print the accuracy of MODEL on drawings of artists that it has not seen."""
    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is not one of {', '.join(SPLITS)}", param_hint="--split")
    chosen = kinds.split(",")
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(KINDS)}", param_hint="--kinds")
    try:
        sizes = [parse_grid(parse_grid_option(size)) for size in pooled_grid_size or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--pooled-grid-size") from None
    loaded, processor = load(model, in_4bit=in_4bit, in_int8=in_int8)
    grids = list(dict.fromkeys(sizes)) or [parse_grid(processor.pooled_grid_size)]
    found = answers_by_grid(loaded, processor, split, num_questions, grids, chosen, seed)
    if answers is not None:
        with answers.open("w", encoding="utf-8") as file:
            for grid, asked in found.items():
                file.writelines(json.dumps(_record(grid, row)) + "\n" for row in asked)
    accuracies = {grid: accuracy_by_kind(asked) for grid, asked in found.items()}
    if not as_json:
        typer.echo(_table(accuracies))
        return
    for grid, accuracy in accuracies.items():
        report = {
            "model": model,
            "pooled_grid_size": list(grid),
            "in_4bit": in_4bit,
            "in_int8": in_int8,
            "split": split,
            "seed": seed,
            "accuracy": accuracy,
            "command": command(),
            "environment": environment(loaded.device),
        }
        typer.echo(json.dumps(report))


def _record(grid: Grid, row: Asked) -> dict[str, Any]:
    question = row.question
    return {
        "pooled_grid_size": list(grid),
        "picture": row.picture,
        "kind": question.kind,
        "question": question.text,
        "right_answer": question.answer,
        "answer": row.answer,
        "is_right": score(question, row.answer),
    }


def _table(accuracies: dict[Grid, dict[str, dict[str, Any]]]) -> str:
    """Percent right and standard error, a row for each kind and a column for each grid."""
    lines = [f"{'':24}{'questions':>9}" + "".join(f"{'{} x {}'.format(*grid):>16}" for grid in accuracies)]
    rows = next(iter(accuracies.values()))
    for kind in rows:
        shown = [accuracy[kind] for accuracy in accuracies.values()]
        percents = "".join(f"{row['accuracy']:9.1f} ± {row['standard_error']:<4.1f}" for row in shown)
        lines.append(f"{kind:24}{rows[kind]['questions']:>9}{percents}")
    return "\n".join(lines)


if __name__ == "__main__":
    run("emoji.evaluate", lambda: typer.run(main))
