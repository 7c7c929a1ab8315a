# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare a model's answers at smaller grids with its own answers at the full grid: `deco budgets`.

Agreement is not accuracy: a model that is always wrong agrees with itself. But equal answers have equal scores. So a
smaller grid changes the accuracy, whatever it is, by at most the share of answers that differ, in either direction.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from statistics import mean, median
from typing import Any

from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..configuration_deco import DecoConfig, check_grid, num_image_tokens
from ..utils.errors import one_line
from ..utils.measure import spread, time_interleaved
from .agreement import agreement, pictures_needed
from .costs import default_grids, kv_cache_bytes
from .grid_answers import Answer, EncodedPicture, Grid, GridAnswers
from .questions import Question, choose_questions

MOST_TIMED = 20  # pictures


@dataclass
class Comparison:
    """Answers to the same questions at several grids, and times.

    Args:
        grids: sorted by tokens. The last one is the patch grid, with which the others are compared.
    """

    grids: list[Grid]
    num_tokens: dict[Grid, list[int]] = field(default_factory=dict)  # of each picture
    asked: list[list[Question]] = field(default_factory=list)  # about each picture
    answers: dict[Grid, list[list[Answer]]] = field(default_factory=dict)  # about each picture
    unreadable: dict[str, str] = field(default_factory=dict)  # names of pictures, and what is wrong with them
    tower_seconds: float = 0.0
    first_token_seconds: dict[Grid, list[float]] = field(default_factory=dict)  # with the vision tower's


def grids_to_compare(config: DecoConfig, grids: Sequence[Sequence[int]] | None) -> list[Grid]:
    """The grids sorted by tokens, and the patch grid.

    Args:
        grids: `[rows, cols]` of each. Default: those of `default_grids`.

    Raises:
        ValueError: the projector has one grid only, or a grid is larger than the patch grid.
    """
    if not config.takes_any_grid:
        raise ValueError(
            f"The projector {config.projector_type!r} has one grid only, {'{} x {}'.format(*config.pooled_grid)}; "
            f"there is nothing to compare."
        )
    chosen = default_grids(config) if grids is None else [list(grid) for grid in grids]
    checked = {check_grid(grid, config.patch_grid, name="--grids") for grid in chosen}
    smaller = sorted(checked - {config.patch_grid}, key=lambda grid: (num_image_tokens(grid), grid))
    if not smaller:
        raise ValueError(f"--grids needs a grid that is smaller than {'{} x {}'.format(*config.patch_grid)}.")
    return [*smaller, config.patch_grid]


def compare(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[tuple[str, Callable[[], Image.Image]]],
    questions: list[Question],
    grids: list[Grid],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    tiles: int | None = None,
) -> Comparison:
    """Ask a model questions about pictures at several grids. Each picture goes through the vision tower once.

    Args:
        pictures: the name of each picture, and a function that reads it.
        questions: what `read_questions` reads; `choose_questions` chooses those for each picture.
        grids: from `grids_to_compare`.
        batch_size: number of questions that are answered together.
        seed: of the choice of questions.
        tiles: as in `DecoProcessor.__call__`.

    Raises:
        ValueError: no picture can be read, or a prompt is too long for the model.
    """
    found, random = Comparison(grids), Random(seed)
    found.answers, found.num_tokens = {grid: [] for grid in grids}, {grid: [] for grid in grids}
    answers = GridAnswers(model, processor, [question.text for question in questions], max_new_tokens, tiles)
    num_questions = len(choose_questions(questions, Random(seed)))
    timed: list[EncodedPicture] = []
    chunk: list[tuple[EncodedPicture, list[Question]]] = []
    tower_seconds = []
    with _progress(len(pictures) * num_questions * len(grids)) as progress:
        for number, (name, read) in enumerate(pictures, start=1):
            asked = choose_questions(questions, random)
            try:
                picture = answers.encode(read(), asked[0].text)
            except ValueError as error:  # of the reader, or of the image processor, on a strange picture
                found.unreadable[name] = one_line(error)
                progress.total -= num_questions * len(grids)
                progress.refresh()
            else:
                chunk.append((picture, asked))
                tower_seconds.append(picture.seconds)
                if len(timed) < MOST_TIMED:
                    timed.append(picture)
            if len(chunk) * num_questions >= batch_size or number == len(pictures):
                for grid in reversed(grids):  # the largest first: what does not fit shows at once
                    found.answers[grid] += _answer(answers, chunk, grid, batch_size, progress.update)
                    found.num_tokens[grid] += [answers.num_tokens(picture, grid) for picture, _ in chunk]
                found.asked += [asked for _, asked in chunk]
                chunk = []
    if not found.asked:
        name, problem = next(iter(found.unreadable.items()))
        raise ValueError(f"None of {len(pictures)} pictures can be read; the first: {problem}")
    found.tower_seconds = median(tower_seconds[1:] or tower_seconds)  # the first call is a warm-up
    for grid, seconds in _time_first_tokens(answers, timed, found.asked[0][0].text, grids).items():
        found.first_token_seconds[grid] = [found.tower_seconds + time for time in seconds]
    return found


def _progress(total: int) -> tqdm:
    return tqdm(total=total, desc="budgets", unit=" answers", disable=None, file=sys.stderr, leave=False)


def _answer(
    answers: GridAnswers,
    chunk: list[tuple[EncodedPicture, list[Question]]],
    grid: Grid,
    batch_size: int,
    report: Callable[[int], Any],
) -> Iterator[list[Answer]]:
    """The answers about each picture of a chunk."""
    asked = [(picture, question.text) for picture, questions in chunk for question in questions]
    given: list[Answer] = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        given += answers.answer(batch, grid)
        report(len(batch))
    remaining = iter(given)
    for _, questions in chunk:
        yield [next(remaining) for _ in questions]


def _time_first_tokens(
    answers: GridAnswers, pictures: list[EncodedPicture], text: str, grids: list[Grid]
) -> dict[Grid, list[float]]:
    """Seconds from the vision tower's output to the first token, at each grid for each picture. The question is always
    the same, because the first pass for another number of tokens takes longer."""

    def run(grid: Grid, queue: Iterator[EncodedPicture]) -> None:
        answers.first_token(next(queue), text, grid)

    rounds = [pictures[0], *pictures]  # the first round is a warm-up
    runs: dict[str, Callable[[], object]] = {str(grid): partial(run, grid, iter(rounds)) for grid in grids}
    times = time_interleaved(runs, repeats=len(pictures), device=answers.model.device)
    return {grid: times[str(grid)] for grid in grids}


# --- the report ------------------------------------------------------------------------------------------------------


def summarize(found: Comparison, model: PreTrainedModel, target: float) -> dict[str, Any]:
    """What a comparison shows, as a dict for JSON.

    Args:
        target: the share of equal answers that a grid should have.
    """
    full_grid = found.grids[-1]
    full_seconds = found.first_token_seconds[full_grid]
    rows = []
    for grid in found.grids:
        equal = [
            [answer.text == reference.text for answer, reference in zip(*pair, strict=True)]
            for pair in zip(found.answers[grid], found.answers[full_grid], strict=True)
        ]
        agreed, seconds = agreement(equal), found.first_token_seconds[grid]
        num_tokens = mean(found.num_tokens[grid])
        row: dict[str, Any] = {
            "pooled_grid_size": list(grid),
            "num_image_tokens": round(num_tokens),
            "kv_cache_bytes": kv_cache_bytes(model.config.text_config, round(num_tokens), model.dtype),
            "first_token_seconds": spread(seconds),
            "first_token_ratio": spread([part / full for part, full in zip(seconds, full_seconds, strict=True)]),
            "cut_answers": sum(answer.is_cut for given in found.answers[grid] for answer in given),
        }
        if grid != full_grid:
            row |= {
                "agreement": agreed,
                "agreement_by_kind": _by_kind(found.asked, equal),
                "accuracy_change": {"at_most": 1 - agreed["share"], "high": 1 - agreed["low"]},
                "meets_target": agreed["low"] >= target,
                "pictures_needed": pictures_needed(agreed["share"], target),
            }
        rows.append(row)
    met = [row["pooled_grid_size"] for row in rows[:-1] if row["meets_target"]]
    return {
        "target": target,
        "smallest_grid": met[0] if met else None,
        "pictures_needed_if_all_agree": pictures_needed(1.0, target),
        "num_pictures": len(found.asked),
        "num_answers": sum(map(len, found.asked)),
        "num_timed_pictures": len(full_seconds),
        "unreadable": found.unreadable,
        "vision_tower_seconds": float(f"{found.tower_seconds:.4g}"),
        "grids": rows,
    }


def _by_kind(asked: list[list[Question]], equal: list[list[bool]]) -> dict[str, Any]:
    """The agreement of each kind of question; empty if the questions have no kinds."""
    by_kind: dict[str, list[list[bool]]] = {}
    for questions, results in zip(asked, equal, strict=True):
        for question, result in zip(questions, results, strict=True):
            if question.kind:
                by_kind.setdefault(question.kind, []).append([result])
    return {kind: agreement(results) for kind, results in by_kind.items()}
