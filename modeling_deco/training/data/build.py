# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From LLaVA-format JSON to a folder that `datasets.load_dataset` opens: parquet shards, a report and a card.

A row has an `id`, its `images` in order, and `messages`, whose contents are lists of parts: of type `"text"` with a
`text`, or of type `"image"`. If any record has a video, the rows also have `videos`, and parts of type `"video"`.
"""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import xxhash
from datasets import DatasetInfo, Features
from datasets.info import DatasetInfosDict  # private, seen in datasets 5.2
from huggingface_hub import DatasetCard, DatasetCardData

from ... import __version__
from ...utils.errors import InputError, one_line
from ...utils.staging import check_destination, staged_folder
from .columns import FEATURES, FEATURES_WITH_VIDEOS
from .image_checks import check_files, start_worker
from .llava import DataError, Sample, quote, read_records, read_sample

logger = logging.getLogger(__name__)

REPORT = "report.json"
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 1000, 64 << 20
SHARD_ROWS, SHARD_BYTES = 20_000, 256 << 20


@dataclass
class _Report:
    """The number of samples, rows and references to images, and the ids of bad samples by kind of fault."""

    samples: int = 0
    bad_samples: int = 0
    rows: int = 0
    text_only_rows: int = 0
    images: int = 0
    videos: int = 0
    repeated_ids: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self):
        self._ids, self._examples = set(), defaultdict(list)

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.bad_samples += bool(sample.faults)
        self.repeated_ids += sample.id in self._ids
        self._ids |= {sample.id} - {None}
        for kind, detail in sample.faults.items():
            self.faults.setdefault(kind, []).append(sample.name)
            if len(self.faults[kind]) <= 5:
                self._examples[kind].append(f"{quote(sample.name)} ({detail})" if detail else quote(sample.name))

    def lines(self) -> Iterator[str]:
        yield f"{self.samples:,} samples, {self.bad_samples:,} bad, {self.repeated_ids:,} with the id of another"
        for kind, names in self.faults.items():
            more = ", ..." if len(names) > 5 else ""
            yield f"{len(names):9,} {kind}: {', '.join(self._examples[kind])}{more}"


def _check_out(out: Path, overwrite: bool, sources: list[Path]) -> None:
    if any(out in (source, *source.parents) for source in sources):
        raise DataError(f"--out {out} contains SRC or the images; choose another folder.")
    if not (overwrite and out.is_dir() and any(out.iterdir())):
        check_destination(out, overwrite=False, sources=[])
    elif not (out / REPORT).is_file():
        raise DataError(f"--out {out} has no {REPORT} of earlier data, so it is not overwritten; remove it yourself.")


def _parse_limit(max_bad: str) -> int | Fraction:
    """The number of samples, or the percentage as a fraction of all samples."""
    match = re.fullmatch(r"([0-9]{1,18})|([0-9]{1,3}(?:\.[0-9]{1,9})?)%", max_bad)
    if match is None:
        raise DataError(f"--max-bad {max_bad!r} is neither a number of samples (20) nor a percentage (0.1%).")
    return int(match[1]) if match[1] else Fraction(match[2]) / 100


def _take_rows(
    samples: Iterable[Sample], report: _Report, max_bad: float, images: Path, videos: Path, embed: bool
) -> Iterator[dict[str, Any]]:
    """The rows of the good samples, as long as at most `max_bad` are bad."""

    def references(folder: Path, names: list[str]) -> list[dict[str, Any]]:
        paths = [folder / name for name in names]
        if embed:
            return [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        return [{"bytes": None, "path": str(path)} for path in paths]

    for sample in samples:
        report.add(sample)
        if sample.faults or report.bad_samples > max_bad:
            continue
        report.rows += 1
        report.images += len(sample.images)
        report.videos += len(sample.videos)
        report.text_only_rows += not sample.files
        yield {
            "id": sample.id,
            "images": references(images, sample.images),
            "videos": references(videos, sample.videos),
            "messages": sample.messages,
        }


def row_groups(rows: Iterator[dict[str, Any]], features: Features = FEATURES) -> Iterator[pa.Table]:
    """Rows with the columns of `features` as tables, which are small enough for a row group."""
    group, num_bytes = [], 0
    for row in rows:
        group.append(row)
        num_bytes += sum(len(file["bytes"] or "") for file in (*row["images"], *row.get("videos", ())))
        if len(group) == ROW_GROUP_ROWS or num_bytes > ROW_GROUP_BYTES:
            yield pa.Table.from_pylist(group, schema=features.arrow_schema)
            group, num_bytes = [], 0
    if group:
        yield pa.Table.from_pylist(group, schema=features.arrow_schema)


def _write_shards(groups: Iterator[pa.Table], folder: Path) -> str:
    """Write `train-*-of-*.parquet` and return their digest. Shards are small: many processes can share them."""
    paths: list[Path] = []
    group = next(groups, None)
    while group is not None:
        paths.append(folder / f"{len(paths)}.parquet")
        num_rows = num_bytes = 0
        with pq.ParquetWriter(paths[-1], group.schema) as writer:
            while group is not None and num_rows < SHARD_ROWS and num_bytes < SHARD_BYTES:
                writer.write_table(group)
                num_rows, num_bytes = num_rows + len(group), num_bytes + group.nbytes
                group = next(groups, None)
    digest = xxhash.xxh3_128()
    for index, path in enumerate(paths):
        digest.update(pa.memory_map(str(path)).read_buffer())
        path.rename(folder / f"train-{index:05d}-of-{len(paths):05d}.parquet")
    return digest.hexdigest()


def write_card(folder: Path, title: str, about: str, digest: str, features: Features = FEATURES) -> None:
    """Write the card of a data set, `README.md`, which says where its shards are.

    datasets (5.2) finds a local folder in its cache by the folder's last name and by the config in the card. Without
    the digest of the shards it would load other data that once were in a folder of that name.
    """
    config: dict[str, Any] = {"config_name": "default", "description": f"xxh3_128 of the shards: {digest}"}
    config["data_files"] = [{"split": "train", "path": "data/train-*"}]
    kinds = ["image", "video"] if "videos" in features else ["image"]
    data = DatasetCardData(configs=[config], task_categories=[f"{kind}-text-to-text" for kind in kinds])
    DatasetInfosDict({"default": DatasetInfo(features=features)}).to_dataset_card_data(data)
    DatasetCard(f"---\n{data.to_yaml()}\n---\n\n# {quote(title)}\n\n{about}\n").save(folder / "README.md")


def _files_in_words(facts: dict[str, Any]) -> str:
    return f"{facts['images']:,} images" + (f", {facts['videos']:,} videos" if "videos" in facts else "")


def _about(facts: dict[str, Any]) -> str:
    where = "in the rows" if facts["images_embedded"] else "paths on one machine (upload needs `--embed-images`)"
    return f"""Built from LLaVA-format JSON by modeling-deco {__version__}.

- {facts["rows"]:,} rows, {facts["text_only_rows"]:,} of them of text only
- {_files_in_words(facts)}: {where}
- {facts["bad_samples"]:,} of {facts["samples"]:,} samples were bad and are left out; `{REPORT}` lists them"""


def build_data(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="LLaVA-format JSON, or JSON Lines.")],
    images: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder that the paths of images and videos are relative to.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    videos: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the videos, if it is another.")] = None,
    max_bad: Annotated[
        str, typer.Option(metavar="N|P%", help="Leave out at most this many bad samples; fail if there are more.")
    ] = "0",
    embed_images: Annotated[
        bool, typer.Option("--embed-images", help="Store the images and videos themselves, not their paths.")
    ] = False,
    num_proc: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode images and videos; by default one for each CPU.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the data in --out.")] = False,
) -> dict[str, Any]:
    """Check LLaVA-format JSON and each of its images and videos, and write a folder that datasets.load_dataset opens.

    python -m modeling_deco.training.data llava_v1_5_mix665k.json --images llava/ --out mix665k/ --max-bad 0.1%

    python -m modeling_deco.training.data 0_30_s_academic_oe_v0_1.json --images LLaVA-Video-178K/ --out video/

    To train from the Hub, also on data that are larger than the disk:

    python -m modeling_deco.training.data own.json --images photos/ --out own/ --embed-images

    hf upload YOU/own own/ --repo-type dataset
    \f
    Returns:
        The contents of `report.json` in the folder: counts, and for each kind of fault the ids of its samples.

    Raises:
        DataError: in one line, what is wrong and what to do. Then nothing is written, and `out` stays as it was.
    """
    source, images, out = Path(source).resolve(), Path(images).resolve(), Path(out).resolve()
    videos = images if videos is None else Path(videos).resolve()
    _parse_limit(str(max_bad))  # an invalid one is refused before any work
    if not source.is_file():
        raise DataError(f"SRC {source} is not a file.")
    if not images.is_dir():
        raise DataError(f"--images {images} is not a folder.")
    if not videos.is_dir():
        raise DataError(f"--videos {videos} is not a folder.")
    check = partial(_check_out, out, overwrite, [source, images, videos])
    executor = ProcessPoolExecutor(num_proc, initializer=start_worker)
    try:
        executor.submit(os.getpid).result()  # starts the workers now, before they could inherit threads or a lock
        check()
        with staged_folder(out, source.stat().st_size, check) as folder:
            features = FEATURES_WITH_VIDEOS if _has_videos(source) else FEATURES
            samples = check_files(map(read_sample, count(), read_records(source)), images, videos, executor)
            rows = partial(_take_rows, images=images, videos=videos, embed=embed_images)
            try:
                facts = _write_data(folder, samples, source.name, rows, str(max_bad), embed_images, features)
            except (OSError, pa.ArrowException) as error:  # a full disk; the number of bytes above is only a guess
                raise DataError(f"{source.name} to {out}: {one_line(error)}") from error
    except BrokenProcessPool:
        raise DataError(
            "A process that decodes files was killed, maybe for lack of memory; lower --num-proc."
        ) from None
    except (OSError, InputError) as error:
        raise DataError(f"{source.name} to {out}: {one_line(error)}") from error
    finally:
        executor.shutdown(cancel_futures=True)
    logger.info(f"{facts['rows']:,} rows, {facts['text_only_rows']:,} of text only, {_files_in_words(facts)}: {out}")
    return facts


def _has_videos(source: Path) -> bool:
    """Whether any record names a video. The columns must be known before the first row is written."""
    records = (record for record in read_records(source) if isinstance(record, dict))
    return any("video" in record or "videos" in record for record in records)


def _write_data(
    folder: Path,
    samples: Iterator[Sample],
    source_name: str,
    take_rows: Callable[..., Iterator[dict[str, Any]]],
    max_bad: str,
    embed_images: bool,
    features: Features,
) -> dict[str, Any]:
    """Write shards, report and card; returns what the report has.

    Raises:
        DataError: more samples are bad than `max_bad` allows, or none is good.
    """
    limit, report = _parse_limit(max_bad), _Report()
    (folder / "data").mkdir()
    worth_writing = limit if isinstance(limit, int) else float("inf")
    rows = take_rows(samples, report, worth_writing)
    digest = _write_shards(row_groups(rows, features), folder / "data")
    for line in report.lines():
        logger.info(line)
    if report.bad_samples > (limit if isinstance(limit, int) else limit * report.samples):
        raise DataError(
            f"{report.bad_samples:,} of {report.samples:,} samples are bad, more than --max-bad {max_bad}. Nothing is "
            f"written. Fix them, or raise --max-bad; {REPORT} then lists their ids."
        )
    if not report.rows:
        raise DataError(f"{source_name} has no good samples. Nothing is written.")
    facts = {"source": source_name, "max_bad": max_bad, "images_embedded": embed_images, **asdict(report)}
    facts["xxh3_128"] = digest
    if "videos" not in features:
        del facts["videos"]
    facts["faults"] = {kind: {"count": len(names), "ids": names} for kind, names in report.faults.items()}
    (folder / REPORT).write_text(json.dumps(facts, indent=1) + "\n")
    write_card(folder, facts["source"], _about(facts), digest, features)
    return facts
