# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco budgets`: which token budget a model can afford on a user's own pictures and questions."""

import json
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from ..utils.errors import first_names
from ..utils.options import parse_grid_option
from ..utils.program import print_error
from .common import (
    Device,
    DType,
    ImagePositions,
    In4Bit,
    InInt8,
    MaxNewTokens,
    Revision,
    Tiles,
    check_figure,
    one_line_errors,
    quiet_transformers,
    save_figure,
    table,
)
from .pictures import pictures_of

OUT_OF_MEMORY = "out of memory. Choose a smaller --batch-size, or --4bit."


def budgets(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a DeCo checkpoint.")],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES", help="Pictures: folders, files, URLs, or data sets.")
    ],
    questions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text with one question a line, or JSON with a list of wordings for each kind of question. Default: "
            "general questions.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="PERCENT", help="Share of answers that should equal those of the full grid.")
    ] = "99%",
    grids: Annotated[
        str | None,
        typer.Option(
            metavar="N|ROWSxCOLS,...", help="Grids to compare with the full one. Default: those of deco info."
        ),
    ] = None,
    tiles: Tiles = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of a data set.")] = "train",
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="Use at most N pictures, chosen at random with --seed.")
    ] = 400,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of questions that are answered together.")
    ] = 16,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of the choice of pictures and of questions' wordings.")
    ] = 0,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = "auto",
    image_positions: ImagePositions = None,
    in_4bit: In4Bit = False,
    in_int8: InInt8 = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with the environment.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw agreement and time by tokens.")] = None,
):
    """Show how many answers stay the same at smaller token budgets, what those cost, and the smallest that will do.

    Every question is asked at every grid, without sampling, and the answers are compared with those at the full grid.
    This needs no reference answers. It does not measure accuracy: a model that is always wrong agrees with itself.

    \b
    deco budgets DIR_OR_HUB_ID photos/
    deco budgets DIR_OR_HUB_ID photos/ --questions questions.txt --target 98% --plot budgets.png
    deco budgets DIR_OR_HUB_ID a.jpg b.jpg --questions kinds.json --grids 4,6,8,6x12 --json
    """
    try:
        with one_line_errors("budgets", OUT_OF_MEMORY):
            summary = _run(
                model,
                images,
                questions,
                target,
                grids,
                split,
                limit,
                {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed, "tiles": tiles},
                {
                    "revision": revision,
                    "device": device,
                    "dtype": dtype,
                    "in_4bit": in_4bit,
                    "in_int8": in_int8,
                    "image_positions": image_positions,
                },
                plot,
            )
    except KeyboardInterrupt:
        print_error("deco budgets: stopped before the end, so there is nothing to show.")
        raise typer.Exit(130) from None
    typer.echo(json.dumps(summary) if as_json else to_text(summary))


def _run(
    model: str,
    images: list[str],
    questions: Path | None,
    target: str,
    grids: str | None,
    split: str,
    limit: int,
    asking: dict[str, Any],
    loading: dict[str, Any],
    plot: Path | None,
) -> dict[str, Any]:
    chosen_grids = None if grids is None else [parse_grid_option(grid.strip()) for grid in grids.split(",")]
    if plot is not None:
        check_figure("--plot", plot)

    from ..inference.agreement import CONFIDENCE, parse_target
    from ..inference.budgets import compare, grids_to_compare, summarize
    from ..inference.loading import load, load_config
    from ..inference.questions import GENERAL_QUESTIONS, read_questions
    from ..utils.measure import environment

    share = parse_target(target)
    asked = read_questions(questions or GENERAL_QUESTIONS)
    pictures = pictures_of(images, split)
    if len(pictures) > limit:
        pictures = [pictures[place] for place in sorted(Random(asking["seed"]).sample(range(len(pictures)), limit))]
    quiet_transformers()
    compared = grids_to_compare(load_config(model, loading["revision"]), chosen_grids)
    loaded, processor = load(model, **loading)
    found = compare(loaded, processor, pictures, asked, compared, **asking)
    if found.unreadable:
        print_error(
            f"deco budgets: {len(found.unreadable)} of {len(pictures)} pictures cannot be read and are left out: "
            f"{first_names(found.unreadable)}."
        )
    summary = {
        "model": model,
        "questions": str(questions) if questions else "general",
        **summarize(found, loaded, share),
        **asking,
        "confidence": CONFIDENCE,
        "image_positions": loaded.config.image_positions,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "environment": environment(loaded.device),
    }
    if plot is not None:
        from ..inference.budgets_figure import plot_budgets

        save_figure("--plot", plot_budgets(summary), plot)
    return summary


# --- text ------------------------------------------------------------------------------------------------------------


def to_text(summary: dict[str, Any]) -> str:
    """The summary as tables and sentences."""
    from ..inference.costs import format_size

    *smaller, full = summary["grids"]
    lines = [
        f"{_counted(summary['num_answers'], 'answer')} about {_counted(summary['num_pictures'], 'picture')} at each "
        f"grid, compared with those at {_grid(full)}",
        "",
    ]
    header = ("grid", "tokens", "equal answers", "accuracy changes by at most", "first token", "cache")
    lines += table(header, [_cells(row, format_size(row["kv_cache_bytes"])) for row in summary["grids"]])
    kinds = list(smaller[0]["agreement_by_kind"])
    if kinds:
        rows = [(kind, *(_short(row["agreement_by_kind"][kind]) for row in smaller)) for kind in kinds]
        lines += ["", *table(("equal answers, %", *map(_grid, smaller)), rows)]
    return "\n".join([*lines, "", *_verdict(summary), "", *_notes(summary)])


def _cells(row: dict[str, Any], cache: str) -> tuple[str, ...]:
    first_token = f"{1000 * row['first_token_seconds']['median']:.3g} ms ({row['first_token_ratio']['median']:.2f} x)"
    agreed, change = "full grid", ""
    if "agreement" in row:
        share, low, high = (100 * row["agreement"][name] for name in ("share", "low", "high"))
        agreed = f"{share:.1f} % ({low:.1f} to {high:.1f})"
        at_most, highest = (100 * row["accuracy_change"][name] for name in ("at_most", "high"))
        change = f"{at_most:.1f} points (up to {highest:.1f})"
    return _grid(row), str(row["num_image_tokens"]), agreed, change, first_token, cache


def _short(agreed: dict[str, Any]) -> str:
    share, low, high = (100 * agreed[name] for name in ("share", "low", "high"))
    return f"{share:.1f} ({low:.0f}-{high:.0f})"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _grid(row: dict[str, Any]) -> str:
    return "{} x {}".format(*row["pooled_grid_size"])


def _verdict(summary: dict[str, Any]) -> list[str]:
    target, (*smaller, full) = f"{100 * summary['target']:.4g} %", summary["grids"]
    row = next((row for row in smaller if row["meets_target"]), None)
    if row is not None:
        times = f"{full['num_image_tokens'] / row['num_image_tokens']:.3g} times fewer tokens"
        lines = [f"The smallest grid that meets {target} is {_grid(row)}, with {times}."]
        low = [kind for kind, agreed in row["agreement_by_kind"].items() if agreed["share"] < summary["target"]]
        return [*lines, *([f"Below {target} there: {', '.join(low)}."] if low else [])]
    lines = [f"No grid below {_grid(full)} meets {target} with these pictures."]
    helped = [row for row in smaller if row["pictures_needed"] is not None]
    if not helped:
        return [
            *lines,
            f"More pictures would not help: at each of these grids, at most {target} of answers are equal.",
        ]
    needed = "; ".join(
        f"{_grid(row)} with {row['pictures_needed']} ({row['pictures_needed'] - summary['num_pictures']} more)"
        for row in helped
    )
    return [*lines, f"If the shares stay the same, more pictures show that it is met: {needed}."]


def _notes(summary: dict[str, Any]) -> list[str]:
    confidence, tower = 100 * summary["confidence"], 1000 * summary["vision_tower_seconds"]
    notes = [
        f"equal answers: share and {confidence:.0f} % interval. A grid meets the target if its whole interval does.",
        "  Answers about one picture are not independent, so the interval counts pictures, not answers.",
        "accuracy changes by at most: equal answers have equal scores, so only those that differ can change it.",
        "  This is not the accuracy: a model that is always wrong agrees with itself.",
        f"first token: median time, with {tower:.3g} ms for the vision tower at each grid; ratio to the full grid's.",
        "cache: keys and values of one image's tokens.",
    ]
    num_cut = sum(row["cut_answers"] for row in summary["grids"])
    if num_cut:
        notes.append(
            f"{num_cut} of {summary['num_answers'] * len(summary['grids'])} answers were cut at "
            f"{summary['max_new_tokens']} tokens and compared so far; raise --max-new-tokens to compare them whole."
        )
    return notes
