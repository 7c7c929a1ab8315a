# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Write pictures and questions of the digits world as data in LLaVA's format.

    python -m modeling_deco.worlds.digits.world --split test --num-pictures 200 --out digits-test

writes the pictures as PNG files and their questions as one JSON file.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ...utils.program import run
from .questions import TRAINING_KINDS, Question, questions
from .scenes import SPLITS, render

logger = logging.getLogger(__name__)


def write_llava_data(
    out: Path,
    split: str,
    num_pictures: int,
    seed: int,
    min_digits: int,
    one_record_per_picture: bool = False,
    max_turns: int = len(TRAINING_KINDS),
) -> Path:
    """Write `images/*.png` and `{split}.json` into `out`. Returns the path of the JSON file.

    By default each question is a record of its own, because in a conversation earlier answers reveal later ones.

    Args:
        one_record_per_picture: write one record per picture, with the questions of `TRAINING_KINDS` as its turns, for
            training with independent turns.
        max_turns: with `one_record_per_picture`, the most turns of a record. Below `len(TRAINING_KINDS)` each record
            has a random number of turns in random order: a conversation.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in tqdm(range(num_pictures), unit="picture"):
        scene = render(split, index, seed=seed, min_digits=min_digits)
        name = f"{split}-{seed}-{index:06d}"
        scene.image.save(out / "images" / f"{name}.png")
        rng = np.random.default_rng([SPLITS.index(split), seed, index])
        if one_record_per_picture:
            asked = questions(scene, rng, TRAINING_KINDS)
            if max_turns < len(TRAINING_KINDS):
                asked = [asked[order] for order in rng.permutation(len(asked))[: rng.integers(1, max_turns + 1)]]
            turns = _turns(asked)
            records.append({"id": name, "image": f"{name}.png", "conversations": turns})
            continue
        for question in questions(scene, rng):
            record = {"id": f"{name}-{question.kind}", "image": f"{name}.png", "conversations": _turns([question])}
            records.append(record)
    path = out / f"{split}.json"
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    logger.info("wrote %d pictures to %s and %d records to %s", num_pictures, out / "images", len(records), path)
    return path


def _turns(asked: Sequence[Question]) -> list[dict[str, str]]:
    turns = []
    for question in asked:
        turns += [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write pictures and questions of the digits world in LLaVA's format.")
    parser.add_argument("--split", choices=SPLITS, required=True, help="the scans to use")
    parser.add_argument("--num-pictures", type=int, required=True, help="number of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for images/ and SPLIT.json")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures (default: 0)")
    parser.add_argument("--min-digits", type=int, default=1, help="fewest digits in a picture (default: 1)")
    parser.add_argument(
        "--one-record-per-picture",
        action="store_true",
        help="write the questions about a picture as turns of one record",
    )
    parser.add_argument(
        "--max-turns",
        type=int,
        default=len(TRAINING_KINDS),
        help="with --one-record-per-picture: write conversations of 1 to MAX_TURNS random turns "
        "(default: all questions, in order)",
    )
    args = parser.parse_args(argv)
    if not 1 <= args.max_turns <= len(TRAINING_KINDS):
        parser.error(f"--max-turns must be 1 to {len(TRAINING_KINDS)}, got {args.max_turns}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_llava_data(
        args.out,
        args.split,
        args.num_pictures,
        args.seed,
        args.min_digits,
        args.one_record_per_picture,
        args.max_turns,
    )


if __name__ == "__main__":
    run("digits.world", main, bad_input=(ValueError,))
