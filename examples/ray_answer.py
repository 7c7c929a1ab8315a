# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's own answers about pictures, from many machines: `modeling_deco.training.answer` as a Ray Data pipeline.

    pip install "ray[data]"
    python examples/ray_answer.py --model deco-7b --images photos/ --out data/own --num-workers 8

Pictures are a folder, file or data set as the command takes it, on a disk that all machines share; a Parquet data set
anywhere (`s3://bucket/data.parquet`); or a folder of pictures elsewhere (`s3://bucket/photos`). Each worker has a
model, and a GPU if the cluster has any. If a worker or its machine fails, Ray asks another one about its pictures.

`--out` is on the shared disk. It gets the rows as `data/*.parquet`, and `reports`, one for each batch: which rows were
read, and what became of them. At the end the reports are counted, and the data get the card that recipes/sft.py needs.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pyarrow import fs

from modeling_deco.inference.pictures import PICTURE_SUFFIXES
from modeling_deco.inference.questions import GENERAL_QUESTIONS, read_questions
from modeling_deco.training.answer import Answerer
from modeling_deco.training.answer.engines import ENGINES, load_engine
from modeling_deco.training.answer.source import read_source
from modeling_deco.training.data.build import write_card
from modeling_deco.training.data.columns import FEATURES
from modeling_deco.utils.options import parse_grid_option
from modeling_deco.utils.program import run
from modeling_deco.utils.staging import staged_file


class Worker:
    """Answers batches of rows, with a model that is loaded once, and reports each batch."""

    def __init__(self, args: argparse.Namespace, has_questions: bool):
        path = Path(args.questions) if args.questions else GENERAL_QUESTIONS
        questions = None if has_questions else read_questions(path)
        engine = load_engine(
            args.engine,
            args.model,
            pooled_grid_size=None if args.grid is None else parse_grid_option(args.grid),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_size=None,
            revision=None,
            device=None,
            dtype="auto",
            in_4bit=False,
        )
        self.answerer = Answerer(engine, questions, args.questions_per_image, args.independent_turns, args.seed)
        self.reports = Path(args.out, "reports")

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [_row(row) for row in batch.to_pylist()]
        answered = self.answerer(rows)
        report = {
            **answered._asdict(),
            "read": [row["id"] for row in rows],
            "rows": [row["id"] for row in answered.rows],
        }
        name = xxhash.xxh3_128_hexdigest("\n".join(report["read"]).encode())
        with staged_file(self.reports / f"{name}.json") as incomplete:  # a batch that is answered again has one report
            incomplete.write_text(json.dumps(report))
        return pa.Table.from_pylist(answered.rows, schema=FEATURES.arrow_schema)


def _row(row: dict) -> dict:
    """A row as `Answerer` takes it, from a file that Ray has read or from a data set."""
    if set(row) == {"bytes", "path"}:
        return {"id": row["path"], "images": [{"bytes": row["bytes"], "path": None}]}
    if row.get("id") is None:
        row["id"] = xxhash.xxh3_128_hexdigest(repr(sorted(row.items())).encode())
    return {**row, "id": str(row["id"])}


def read(images: str, split: str):
    """The rows as a data set of Ray, their number, and whether they have questions of their own."""
    import ray

    if images.endswith(".parquet"):
        rows = ray.data.read_parquet(images)
        return rows, rows.count(), "messages" in rows.schema().names
    if "://" in images:
        filesystem, folder = fs.FileSystem.from_uri(images)
        files = [file.path for file in filesystem.get_file_info(fs.FileSelector(folder, recursive=True))]
        pictures = [file for file in files if PurePosixPath(file).suffix.lower() in PICTURE_SUFFIXES]
        return ray.data.read_binary_files(pictures, filesystem=filesystem, include_paths=True), len(pictures), False
    source = read_source(images, split)
    rows = ray.data.from_items([source.row(number) for number in range(len(source))])
    return rows, len(source), source.has_questions


def check(out: Path, num_rows: int) -> dict:
    """Count the reports and the data. An error says if rows were lost or answered twice."""
    reports = [json.loads(path.read_text()) for path in sorted((out / "reports").glob("*.json"))]
    counts = Counter()
    for report in reports:
        counts.update(report["counts"])
    num_read = sum(len(report["read"]) for report in reports)
    expected = Counter(name for report in reports for name in report["rows"])
    found = Counter(
        name
        for path in (out / "data").glob("*.parquet")
        for name in pq.read_table(path, columns=["id"])["id"].to_pylist()
    )
    if num_read != num_rows or expected != found:
        raise RuntimeError(
            f"{num_read:,} of {num_rows:,} rows were read; {(expected - found).total():,} rows with answers are "
            f"missing, and {(found - expected).total():,} are there twice."
        )
    return {
        "rows": found.total(),
        "counts": counts,
        "faults": [fault for report in reports for fault in report["faults"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model's own answers about pictures with Ray Data.")
    parser.add_argument("--model", required=True, help="folder or Hub id of the checkpoint that answers")
    parser.add_argument("--images", required=True, help="folder, file or data set of pictures")
    parser.add_argument("--out", required=True, type=Path, help="folder to write, empty or new")
    parser.add_argument("--questions", help="file of questions (default: those of the rows, or general ones)")
    parser.add_argument("--questions-per-image", type=int, help="questions about each picture")
    parser.add_argument("--independent-turns", action="store_true", help="one row for each picture")
    parser.add_argument("--grid", help="token budget of each image, N or ROWSxCOLS (default: the full grid)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum length of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default: greedy)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of questions and of sampling")
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="what runs the model")
    parser.add_argument("--split", default="train", help="of a data set")
    parser.add_argument("--num-workers", type=int, default=1, help="models that answer at the same time")
    parser.add_argument("--batch-size", type=int, default=256, help="rows that a worker takes at a time")
    args = parser.parse_args()

    import ray
    from ray.data import ActorPoolStrategy
    from ray.data.datasource import FilenameProvider

    args.out = args.out.absolute()
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} is not empty; name a new folder.")
    (args.out / "reports").mkdir(parents=True, exist_ok=True)

    ray.init()
    rows, num_rows, has_questions = read(args.images, args.split)
    answers = rows.map_batches(
        Worker,
        fn_constructor_args=(args, has_questions and args.questions is None),
        batch_size=args.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=args.num_workers),
        num_gpus=1 if ray.cluster_resources().get("GPU") else None,
    )
    answers.write_parquet(str(args.out / "data"), filename_provider=FilenameProvider("train-answers", "parquet"))

    manifest = {"model": args.model, "images": args.images, **check(args.out, num_rows)}
    (args.out / "answers.json").write_text(json.dumps(manifest, indent=1) + "\n")
    digest = xxhash.xxh3_128_hexdigest(json.dumps(manifest).encode())
    write_card(args.out, args.images, f"Answers of {args.model}: {manifest['rows']:,} rows.", digest)
    sys.stdout.write(f"{manifest['rows']:,} rows: {args.out}\n")
    sys.stdout.write(f"{len(manifest['faults']):,} of {num_rows:,} rows of --images cannot be read or asked\n")


if __name__ == "__main__":
    run("ray_answer", main, bad_input=(ValueError,))
