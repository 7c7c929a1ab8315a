# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Ask a model about pictures, and write its answers as training data."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
import xxhash
from tqdm.auto import tqdm

from ...configuration_deco import check_grid
from ...inference.loading import load_config
from ...inference.lookup import find_file
from ...inference.questions import GENERAL_QUESTIONS, Question, read_questions
from ...utils.errors import first_names
from ...utils.options import parse_grid_option
from .answerer import Answerer
from .engines import ENGINES, load_engine
from .output import Output
from .source import Source, read_source

logger = logging.getLogger(__name__)


def answer_data(
    model: Annotated[str, typer.Option(metavar="MODEL", help="Folder or Hub id of the checkpoint that answers.")],
    images: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|FILE|DATASET",
            help="A folder of pictures; a data set, as a folder, .parquet file or Hub id; or a .json, .jsonl or .txt "
            "file of rows or paths.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write. A run that it has is continued.")],
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A text file with one question a line, a JSON file of kinds of questions in several wordings, or the "
            "word general for those of the package. Default: the questions that the rows have, or else general.",
        ),
    ] = None,
    questions_per_image: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Questions about each picture. Default: one of each kind, or all lines."
        ),
    ] = None,
    independent_turns: Annotated[
        bool,
        typer.Option(
            "--independent-turns",
            help="Make one row of the questions about a picture, each asked alone; train with independent_turns. "
            "Otherwise each is a row of its own, and a conversation that a row has is asked turn by turn.",
        ),
    ] = False,
    grid: Annotated[
        str | None, typer.Option(metavar="N|ROWSxCOLS", help="Token budget of each image. Default: the full grid.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of the choice of questions and of sampling.")
    ] = 0,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Questions answered together. Default: 16; with vllm, 256.")
    ] = None,
    shard_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rows of --images in a shard, which is written as a whole.")
    ] = 500,
    engine: Annotated[str, typer.Option(metavar="|".join(ENGINES), help="What runs the model.")] = "transformers",
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the model.")] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of a data set.")] = "train",
    image_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that paths in a file are relative to. Default: its own.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda|cuda:N|mps", help="Default: the GPUs.")] = None,
    dtype: Annotated[str, typer.Option(metavar="auto|float32|float16|bfloat16", help="Type of the weights.")] = "auto",
    in_4bit: Annotated[bool, typer.Option("--4bit", help="Load the language model in 4 bits.")] = False,
) -> dict[str, Any] | None:
    """Write a model's own answers about pictures as a data set for the recipes.

    python -m modeling_deco.training.answer --model deco-7b --images photos/ --out data/own

    The same command continues a run that was killed, and several processes that run it at the same time share the
    work: with accelerate launch, with torchrun, or started one by one, also on machines that share a disk.
    \f
    Returns:
        The contents of `answers.json` in the folder, or None if other processes still answer.

    Raises:
        ValueError: in one line, what is wrong with the arguments, or that nothing has an answer.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    pooled_grid_size = None if grid is None else parse_grid_option(grid)
    config = load_config(model, revision)
    if pooled_grid_size is not None:
        check_grid(pooled_grid_size, config.patch_grid, name="--grid")
    out = Path(out).expanduser()
    source = read_source(images, split, image_root)
    place = Path(images).expanduser().resolve()
    if place.exists() and (out.resolve() == place or place in out.resolve().parents):
        raise ValueError(f"--out {out} is inside --images {images}, which is read; choose another folder.")
    asked, digest = _questions(questions, source)
    if asked is not None and questions_per_image is not None and questions_per_image > len(asked):
        raise ValueError(f"--questions-per-image {questions_per_image} is more than the {len(asked)} questions.")
    if asked is None and questions_per_image is not None:
        raise ValueError("--questions-per-image has no effect on rows with questions of their own; add --questions.")
    full = config.patch_grid if config.takes_any_grid else config.pooled_grid
    settings = {
        "model": model,
        "revision": _commit(model, revision),
        "engine": engine,
        "dtype": dtype,
        "in_4bit": in_4bit,
        "pooled_grid_size": list(pooled_grid_size or full),
        "image_positions": getattr(config, "image_positions", "sequence"),
        "images": images,
        "images_digest": source.digest,
        "images_rows": len(source),
        "questions": "of the rows" if asked is None else questions or "general",
        "questions_digest": digest,
        "questions_per_image": questions_per_image,
        "independent_turns": independent_turns,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    output = Output(out, settings, len(source), shard_size)
    if source.others:
        logger.info(
            f"{len(source.others):,} files are not read, since their names are not those of pictures: "
            f"{first_names(source.others)}"
        )
    if not output.is_finished and len(output.complete_shards()) < output.num_shards:
        loaded = load_engine(
            engine,
            model,
            pooled_grid_size=pooled_grid_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            revision=revision,
            device=device,
            dtype=dtype,
            in_4bit=in_4bit,
        )
        answerer = Answerer(loaded, asked, questions_per_image, independent_turns, seed)
        answer_shards(answerer, source, output)
    manifest = output.finish()
    if manifest is None:
        logger.info(f"Other processes still answer; the last one completes {out}.")
        return None
    _report(manifest, out)
    return manifest


def answer_shards(answerer: Answerer, source: Source, output: Output) -> None:
    """Answer the shards that no process has answered or is answering."""
    done = sum(len(output.rows_of(shard)) for shard in output.complete_shards())
    num_asked = 0
    is_first = os.environ.get("RANK", "0") == "0"
    with tqdm(total=len(source), initial=done, unit="row", desc="answer", disable=None if is_first else True) as bar:

        def report(num_questions: int) -> None:
            nonlocal num_asked
            num_asked += num_questions
            bar.set_postfix_str(f"{num_asked:,} questions asked")

        answerer.report = report
        for shard in range(output.num_shards):
            with output.claim(shard) as is_mine:
                if is_mine:
                    output.write(shard, answerer([source.row(number) for number in output.rows_of(shard)]))
                    bar.update(len(output.rows_of(shard)))


def _questions(name: str | None, source: Source) -> tuple[list[Question] | None, str | None]:
    """The questions to ask, None for those of the rows, and their digest."""
    if name is None and source.has_questions:
        return None, None
    asked = read_questions(GENERAL_QUESTIONS if name in (None, "general") else Path(name).expanduser())
    return asked, xxhash.xxh3_128_hexdigest(json.dumps(asked).encode())


def _commit(model: str, revision: str | None) -> str | None:
    """The commit of a model of the Hub, or what the user calls it."""
    file = find_file(model, "config.json", revision) or find_file(model, "adapter_config.json", revision)
    commit = Path(file).parent.name if file else ""
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else revision


def _report(manifest: dict[str, Any], out: Path) -> None:
    faults, counts = manifest["faults"], manifest["counts"]
    if faults:
        shown = "; ".join(faults[:5]) + ("; ..." if len(faults) > 5 else "")
        logger.warning(f"{len(faults):,} of {manifest['images_rows']:,} rows cannot be read or asked: {shown}")
    if counts["empty"]:
        logger.warning(f"{counts['empty']:,} answers are empty, and left out.")
    if counts["cut"]:
        logger.warning(
            f"{counts['cut']:,} answers were cut at --max-new-tokens {manifest['max_new_tokens']}, and teach to "
            f"stop there; raise it if they are many."
        )
    logger.info(f"{manifest['rows']:,} rows with {counts['answers']:,} answers: {out}")
