# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Write pictures and questions of the emoji world as data in LLaVA's format.

    python -m modeling_deco.worlds.emoji.world --split train --num-pictures 20000 --seed 1 --out DIR [--captions]

writes the pictures as JPEG files, and one JSON file with a record for each picture. Its turns are the questions about
the picture, for training with `independent_turns: true`; with `--captions` its one turn is a caption, for stage 1. A
run that was stopped is continued by the same command. Training never asks about the held-out pairs of concepts.
"""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ...utils.errors import InputError
from ...utils.program import run
from ...utils.staging import staged_file
from .questions import caption, training_questions
from .scenes import SPLITS, render

logger = logging.getLogger(__name__)

_SHARD = 100  # pictures that one process writes at a time


def write_llava_data(
    out: Path,
    split: str,
    num_pictures: int,
    seed: int = 0,
    with_captions: bool = False,
    max_things: int = 6,
    num_processes: int | None = None,
) -> Path:
    """Write `images/*.jpg` and `{split}.json`, or `{split}-captions.json`, into `out`.

    Args:
        with_captions: write a caption for each picture instead of questions.
        max_things: the most things in a picture.
        num_processes: how many render pictures. Default: one for each CPU.

    Returns:
        The path of the JSON file.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    path = out / f"{split}{'-captions' if with_captions else ''}.json"
    shards = out / f".{path.stem}-{seed}-{max_things}"
    shards.mkdir(exist_ok=True)
    ranges = [range(start, min(start + _SHARD, num_pictures)) for start in range(0, num_pictures, _SHARD)]
    write = partial(_write_shard, out / "images", shards, split, seed, with_captions, max_things)
    with Pool(num_processes) as pool, tqdm(total=num_pictures, unit="picture") as bar:
        for number in pool.imap_unordered(write, ranges):
            bar.update(number)
    with staged_file(path) as incomplete, incomplete.open("w", encoding="utf-8") as file:
        records = [record for part in ranges for record in json.loads(_shard(shards, part).read_bytes())]
        json.dump(records, file, indent=1)
        file.write("\n")
    shutil.rmtree(shards)
    logger.info("wrote %d pictures to %s and their records to %s", num_pictures, out / "images", path)
    return path


def _shard(folder: Path, indices: range) -> Path:
    return folder / f"{indices.start}-{indices.stop}.json"


def _write_shard(
    images: Path, shards: Path, split: str, seed: int, with_captions: bool, max_things: int, indices: range
) -> int:
    """Write some pictures, then their records, unless an earlier run has. Returns the number of pictures."""
    path = _shard(shards, indices)
    if not path.exists():
        records = [_write_picture(images, split, seed, with_captions, max_things, index) for index in indices]
        with staged_file(path) as incomplete:
            incomplete.write_text(json.dumps(records), encoding="utf-8")
    return len(indices)


def _write_picture(images: Path, split: str, seed: int, with_captions: bool, max_things: int, index: int) -> dict:
    scene = render(split, index, seed=seed, max_things=max_things)
    name = f"{split}-{seed}-{max_things}-{index:06d}"
    scene.image.save(images / f"{name}.jpg", quality=92)
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    if with_captions:
        pairs = [("", caption(scene, rng))]
    else:
        asked = training_questions(scene, rng, with_held_out=split != "train")
        pairs = [(question.text, question.answer) for question in asked]
    turns = [
        {"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}".strip()
    return {"id": name, "image": f"{name}.jpg", "conversations": turns}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write pictures and questions of the emoji world in LLaVA's format.")
    parser.add_argument("--split", choices=SPLITS, required=True, help="the artists")
    parser.add_argument("--num-pictures", type=int, required=True, help="number of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for images/ and the JSON file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures (default: 0)")
    parser.add_argument("--captions", action="store_true", help="write captions for stage 1 instead of questions")
    parser.add_argument("--max-things", type=int, default=6, help="most things in a picture (default: 6)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each CPU")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_llava_data(
        args.out, args.split, args.num_pictures, args.seed, args.captions, args.max_things, args.processes
    )


if __name__ == "__main__":
    run("emoji.world", main, bad_input=(InputError,))
