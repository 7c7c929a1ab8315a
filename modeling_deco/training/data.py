# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Training data: LLaVA-format JSON, checked, as a folder that `datasets.load_dataset` opens.

    python -m modeling_deco.training.data llava.json --images images/ --out data/

A record is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
{"from": "gpt", "value": "A cat."}]}`; `image`, or `images`, may be a list, or absent. A row has `id`, `images` in
their order, and `messages`, whose contents are lists of parts: of type `"text"`, or `"image"` and without text.
"""

import json
import logging
import multiprocessing
import os
import re
import signal
import stat
import threading
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import xxhash
from datasets import Dataset, DatasetInfo, IterableDataset, concatenate_datasets, load_dataset
from datasets.info import DatasetInfosDict  # private, seen in datasets 5.2
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image, ImageOps
from tqdm import tqdm

from .. import __version__
from ..utils.decoding import UNTRUSTED_FORMATS
from ..utils.errors import ConversionError, one_line
from ..utils.script import run
from ..utils.staging import check_destination, staged
from .records import (
    COLUMNS,
    FEATURES,
    check_rows,
    converted,
    decoded,
    is_media,
    is_read_as_it_is,
    to_parts,
    undecoded,
    unread_media,
)

logger = logging.getLogger(__name__)

REPORT = "report.json"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

_SURROGATE = re.compile("[\ud800-\udfff]")
_WINDOW, _MAX_RECORD = 1 << 20, 64 << 20  # characters
_BATCH = 1000  # records that are read together, and rows of a row group
_ROW_GROUP_BYTES, _SHARD_BYTES, _SHARD_ROWS = 64 << 20, 256 << 20, 20_000


class DataError(ValueError):
    """Data cannot be made. The message is one line that names the thing, its value and what to do."""


@dataclass
class Sample:
    """A record as it was read: `name` is for reports, `images` are paths, `faults` have a detail for each kind."""

    id: str | None
    name: str
    images: list[str] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)


# --- records ---------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, or the values of JSON Lines, of which a few are held at a time.

    Lone surrogates are kept, and bytes that are not UTF-8 become such: they are a sample's fault, and not the file's.
    (yajl, under ijson, makes "?" of them without a word, and dies of an integer of 5,000 digits.)

    Raises:
        DataError: what is not JSON and where, or a record of more than 64 Mi characters.
    """
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    with (
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar,
    ):
        window, at_end = file.read(_WINDOW), False
        opening = re.match(r"[ \t\r\n]*\[([ \t\r\n]*\])?", window)
        separator = re.compile(r"[ \t\r\n]*([,\]])" if opening else r"[ \t\r]*(\n|\Z)")
        position, is_closed = (opening.end(), bool(opening[1])) if opening else (0, False)
        num_lines = num_characters = 0  # before the window
        while True:
            position = blank.match(window, position).end()
            if at_end and position == len(window) and (is_closed or not opening):
                return
            try:
                if is_closed:
                    raise json.JSONDecodeError("Extra data", window, position)
                record, end = decode(window, position)
                separated = separator.match(window, end)
                if separated is None or (separated.end() == len(window) and not at_end):
                    raise json.JSONDecodeError("Expecting a separator", window, end)
            except (ValueError, RecursionError) as error:
                # Numbers of too many digits and too deep nesting stay what they are, whatever follows.
                is_final = at_end or not isinstance(error, json.JSONDecodeError)
                if is_final or len(window) - position > _MAX_RECORD:
                    at, problem = getattr(error, "pos", position), getattr(error, "msg", error)
                    line, character = num_lines + window.count("\n", 0, at) + 1, num_characters + at + 1
                    raise DataError(f"{path}: bad JSON in line {line}, character {character}: {problem}") from None
            else:
                yield record
                position, is_closed = separated.end(), bool(opening) and separated[1] == "]"
                continue
            num_lines, num_characters = num_lines + window.count("\n", 0, position), num_characters + position
            more = file.read(max(_WINDOW, len(window) - position))  # the record is not wholly in the window, maybe
            window, position, at_end = window[position:] + more, 0, not more
            bar.update(file.buffer.tell() - bar.n)


def read_sample(index: int, record: Any) -> Sample:
    """The sample of a record, with all its faults but those of image files."""
    raw_id = record.get("id") if isinstance(record, dict) else None
    name = str(raw_id) if isinstance(raw_id, (str, int)) else f"index {index}"
    try:
        sample_id, images, turns = _take_apart(record)
    except TypeError as error:
        return Sample(None, name, faults={"malformed record": str(error)})
    media = unread_media({key: value for key, value in record.items() if key != "conversations"}, bool(images))
    for turn in record["conversations"]:
        media += [key for key, value in turn.items() if key not in ("from", "value") and is_media(key, value)]
    all_text = "".join([name, *images, *(text for _, text in turns)])
    roles = [role for role, _ in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    empty = {role for role, text in turns if not text.strip()}
    num_tokens = sum(text.count("<image>") for role, text in turns if role == "user")
    faults = {
        "invalid Unicode": _SURROGATE.search(all_text) is not None,
        "empty conversation": not dialogue,
        "starts with the assistant": dialogue[:1] == ["assistant"],
        "roles do not alternate": "system" in dialogue or any(role == after for role, after in pairwise(dialogue)),
        "ends without an answer": bool(dialogue) and dialogue[-1] != "assistant",
        "empty question": "user" in empty,
        "empty answer": "assistant" in empty,
        "empty system message": "system" in empty,
        "<image> outside a question": any("<image>" in text for role, text in turns if role != "user"),
        "<image> without an image": num_tokens > 0 and not images,
        "image without <image>": num_tokens == 0 and bool(images),
        "<image> and images differ in number": 0 < num_tokens != len(images) > 0,
    }
    messages = [{"role": role, "content": to_parts(text)} for role, text in turns]
    found = {kind: "" for kind, is_there in faults.items() if is_there}
    if media:
        found["media that are not read"] = ", ".join(map(_quote, media))
    return Sample(sample_id, name, images, messages, found)


def _take_apart(record: Any) -> tuple[str | None, list[str], list[tuple[str, str]]]:
    """Id, paths of images, and turns as role and text. A TypeError says what has another form."""

    def check(value, kinds, what):
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{what} is {type(value).__name__}")
        return value

    check(record, dict, "the record")
    sample_id = check(record.get("id"), (str, int, type(None)), "id")
    found = []
    for name in ("image", "images"):
        images = check(record.get(name), (str, list, type(None)), name)
        found += [[check(image, str, "an image") for image in ([images] if isinstance(images, str) else images or [])]]
    if found[0] and found[1] and found[0] != found[1]:
        raise TypeError("image and images differ")
    images = found[0] or found[1]
    turns = []
    for turn in check(record.get("conversations"), list, "conversations"):
        speaker = check(check(turn, dict, "a turn").get("from"), str, "from")
        if speaker not in ROLES:
            raise TypeError(f"from is {_quote(speaker)}")
        turns.append((ROLES[speaker], check(turn.get("value"), str, "value")))
    return None if sample_id is None else str(sample_id), images, turns


def _quote(text: str) -> str:
    """Text of the data, which may hold anything: short, in one line, without control characters."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


# --- images ----------------------------------------------------------------------------------------------------------


def check_image(folder: str, name: str) -> str:
    """Decode an image below `folder`: the kind of its fault, or `""`. Links are the folder's owner's, and may lead out
    of it; names are the data's, and may not."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        return "image outside DIR"
    path = os.path.join(folder, name)
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # names that the system refuses are those of no file
        return "image missing"
    if not stat.S_ISREG(status.st_mode):  # to open a FIFO is to wait for its writer
        return "image is no file"
    if status.st_size == 0:
        return "image of zero bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=UNTRUSTED_FORMATS) as image:
                image.draft(None, (1, 1))  # a JPEG at an eighth of its size, for which all of the file is read, too
                image.load()
                ImageOps.exif_transpose(image)  # as datasets does
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "decompression bomb"
    except Exception as error:  # Pillow's readers raise whatever broken bytes lead to
        return "truncated image" if "truncated" in str(error).lower() else "unreadable image"
    return ""


def _start_worker() -> None:
    """Ctrl-C is for the parent to answer, and without a parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _check_images(samples: Iterator[Sample], folder: Path, executor: ProcessPoolExecutor) -> Iterator[Sample]:
    """The samples in their order, with the faults of their images added; each image is decoded once."""
    checked: dict[str, str | None] = {}  # None: under way
    pending = deque()

    def finish_oldest():
        batch, names, results = pending.popleft()
        checked.update(zip(names, results, strict=True))
        for sample in batch:
            sample.faults |= {checked[name]: _quote(name) for name in sample.images if checked[name]}
            yield sample

    while batch := list(islice(samples, _BATCH)):
        names = list(dict.fromkeys(name for sample in batch for name in sample.images if name not in checked))
        checked.update(dict.fromkeys(names))
        pending.append((batch, names, executor.map(partial(check_image, str(folder)), names, chunksize=8)))
        if len(pending) > 4:  # so many that no worker waits while a shard is written
            yield from finish_oldest()
    while pending:
        yield from finish_oldest()


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass
class _Report:
    """Counts of samples, and of references to images; ids of samples by kind of fault."""

    samples: int = 0
    bad_samples: int = 0
    rows: int = 0
    text_only_rows: int = 0
    images: int = 0
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
                self._examples[kind].append(f"{_quote(sample.name)} ({detail})" if detail else _quote(sample.name))

    def lines(self) -> Iterator[str]:
        yield f"{self.samples:,} samples, {self.bad_samples:,} bad, {self.repeated_ids:,} with the id of another"
        for kind, names in self.faults.items():
            more = ", ..." if len(names) > 5 else ""
            yield f"{len(names):9,} {kind}: {', '.join(self._examples[kind])}{more}"


def _check_out(out: Path, overwrite: bool, sources: list[Path]) -> None:
    if any(out in (source, *source.parents) for source in sources):
        raise DataError(f"--out {out} holds SRC or the images; choose another.")
    if not (overwrite and out.is_dir() and any(out.iterdir())):
        check_destination(out, overwrite=False, sources=[])
    elif not (out / REPORT).is_file():
        raise DataError(f"--out {out} has no {REPORT} of earlier data and is not overwritten; remove it yourself.")


def _parse_limit(max_bad: str) -> int | Fraction:
    """A number of samples, or a share of all."""
    match = re.fullmatch(r"([0-9]{1,18})|([0-9]{1,3}(?:\.[0-9]{1,9})?)%", max_bad)
    if match is None:
        raise DataError(f"--max-bad {max_bad!r} is neither a number of samples (20) nor a percentage (0.1%).")
    return int(match[1]) if match[1] else Fraction(match[2]) / 100


def _take_rows(
    samples: Iterable[Sample], report: _Report, max_bad: float, images: Path, embed_images: bool
) -> Iterator[dict[str, Any]]:
    """Rows of the good samples, while no more than `max_bad` are bad."""
    for sample in samples:
        report.add(sample)
        if sample.faults or report.bad_samples > max_bad:
            continue
        report.rows += 1
        report.images += len(sample.images)
        report.text_only_rows += not sample.images
        paths = [images / name for name in sample.images]
        if embed_images:
            references = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        else:
            references = [{"bytes": None, "path": str(path)} for path in paths]
        yield {"id": sample.id, "images": references, "messages": sample.messages}


def _row_groups(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    group, num_bytes = [], 0
    for row in rows:
        group.append(row)
        num_bytes += sum(len(image["bytes"] or "") for image in row["images"])
        if len(group) == _BATCH or num_bytes > _ROW_GROUP_BYTES:
            yield pa.Table.from_pylist(group, schema=FEATURES.arrow_schema)
            group, num_bytes = [], 0
    if group:
        yield pa.Table.from_pylist(group, schema=FEATURES.arrow_schema)


def _write_shards(groups: Iterator[pa.Table], folder: Path) -> str:
    """Write `train-*-of-*.parquet`, rather many, for the processes that share them when they load; their digest."""
    paths, group = [], next(groups, None)
    while group is not None:
        paths.append(folder / f"{len(paths)}.parquet")
        num_rows = num_bytes = 0
        with pq.ParquetWriter(paths[-1], FEATURES.arrow_schema) as writer:
            while group is not None and num_rows < _SHARD_ROWS and num_bytes < _SHARD_BYTES:
                writer.write_table(group)
                num_rows, num_bytes = num_rows + len(group), num_bytes + group.nbytes
                group = next(groups, None)
    digest = xxhash.xxh3_128()
    for index, path in enumerate(paths):
        digest.update(pa.memory_map(str(path)).read_buffer())
        path.rename(folder / f"train-{index:05d}-of-{len(paths):05d}.parquet")
    return digest.hexdigest()


def _write_card(folder: Path, facts: dict[str, Any]) -> None:
    # datasets (5.2) knows a local folder in its cache by its last name and this: without the digest, other data that
    # once were in a folder called so would be loaded.
    config = {"config_name": "default", "description": f"xxh3_128 of the shards: {facts['xxh3_128']}"}
    config["data_files"] = [{"split": "train", "path": "data/train-*"}]
    data = DatasetCardData(configs=[config], task_categories=["image-text-to-text"])
    DatasetInfosDict({"default": DatasetInfo(features=FEATURES)}).to_dataset_card_data(data)
    where = "inside" if facts["images_embedded"] else "paths on one machine; `--embed-images` makes a folder to upload"
    DatasetCard(f"""---
{data.to_yaml()}
---

# {_quote(facts["source"])}

Made of LLaVA-format JSON by modeling-deco {__version__}.

- {facts["rows"]:,} rows, {facts["text_only_rows"]:,} of them of text only
- {facts["images"]:,} images, which are {where}
- {facts["bad_samples"]:,} of {facts["samples"]:,} samples were bad and are left out; `{REPORT}` names them
""").save(folder / "README.md")


def build_data(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="LLaVA-format JSON, or JSON Lines.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder that the images' paths start from.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make.")],
    max_bad: Annotated[
        str, typer.Option(metavar="N|P%", help="Leave out up to so many bad samples; more stop the run.")
    ] = "0",
    embed_images: Annotated[bool, typer.Option("--embed-images", help="Put the images into the folder.")] = False,
    num_proc: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode images; by default one for each CPU.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the data that --out holds.")] = False,
) -> dict[str, Any]:
    """Check LLaVA-format JSON and each of its images, and make a folder that datasets.load_dataset opens.

    python -m modeling_deco.training.data llava_v1_5_mix665k.json --images llava/ --out mix665k/ --max-bad 0.1%

    To train from the Hub, on data that may be larger than the disk:

    python -m modeling_deco.training.data own.json --images photos/ --out own/ --embed-images

    hf upload YOU/own own/ --repo-type dataset
    \f
    Returns:
        What `report.json` in the folder holds: counts, and for each kind of fault its count and all ids.

    Raises:
        DataError: in one line, what is wrong and what to do. Nothing is written then, and what `out` held is kept.
    """
    source, images, out = Path(source).resolve(), Path(images).resolve(), Path(out).resolve()
    limit, report = _parse_limit(str(max_bad)), _Report()
    if not source.is_file():
        raise DataError(f"SRC {source} is no file.")
    if not images.is_dir():
        raise DataError(f"--images {images} is no folder.")
    executor = ProcessPoolExecutor(num_proc, initializer=_start_worker)
    try:
        executor.submit(os.getpid).result()  # workers start before there are threads, or a lock, to inherit
        _check_out(out, overwrite, [source, images])
        with staged(out, source.stat().st_size, overwrite) as folder:
            (folder / "data").mkdir()
            samples = _check_images(map(read_sample, count(), read_records(source)), images, executor)
            worth_writing = limit if isinstance(limit, int) else float("inf")
            rows = _take_rows(samples, report, worth_writing, images, embed_images)
            try:
                digest = _write_shards(_row_groups(rows), folder / "data")
            except (OSError, pa.ArrowException) as error:  # a full disk, before `staged` says how little it asked for
                raise DataError(f"{source.name} to {out}: {one_line(error)}") from error
            for line in report.lines():
                logger.info(line)
            if report.bad_samples > (limit if isinstance(limit, int) else limit * report.samples):
                raise DataError(
                    f"{report.bad_samples:,} of {report.samples:,} are bad, more than --max-bad {max_bad}; nothing "
                    f"is written. Mend them, or allow so many, and {REPORT} lists their ids."
                )
            if not report.rows:
                raise DataError(f"{source.name} has no good samples. Nothing is written.")
            facts = {"source": source.name, "max_bad": str(max_bad), "images_embedded": embed_images, **asdict(report)}
            facts["xxh3_128"] = digest
            facts["faults"] = {kind: {"count": len(names), "ids": names} for kind, names in report.faults.items()}
            (folder / REPORT).write_text(json.dumps(facts, indent=1) + "\n")
            _write_card(folder, facts)
            if overwrite and out.exists():
                out.rename(folder.parent / "replaced")  # from where `staged` puts it back if it fails from here on
    except BrokenProcessPool:
        raise DataError("A process that decodes images was killed, maybe for its memory: lower --num-proc.") from None
    except (OSError, ConversionError) as error:
        raise DataError(f"{source.name} to {out}: {one_line(error)}") from error
    finally:
        executor.shutdown(cancel_futures=True)
    logger.info(f"{report.rows:,} rows, {report.text_only_rows:,} of text only, {report.images:,} images: {out}")
    return facts


# --- loading ---------------------------------------------------------------------------------------------------------


def load_data(
    paths: str | list[str], streaming: bool = False, split: str = "train", decode: bool = True
) -> Dataset | IterableDataset:
    """Rows for TRL: `messages` for SFTTrainer, or `chosen` and `rejected` for DPOTrainer, always with `images`.

    Args:
        paths: folders or Hub ids of data sets in one of the layouts of `modeling_deco.training.records`; several are
            concatenated.
        streaming: read rows when they are needed, also from the Hub, in place of a copy on the disk.
        split: one that each of them has.
        decode: whether images are decoded. `DecoSFTTrainer` decodes what is not, and names the row where it cannot.

    Raises:
        ValueError: a data set has other columns, or rows that cannot be read (streamed, when such a row is reached);
            the message says which, and how many.
    """
    command = "python -m modeling_deco.training.data SRC.json --images DIR --out OUT"
    datasets, any_converted = [], False
    paths = [paths] if isinstance(paths, str) else paths
    for path in paths:
        # For other names that it does not find, datasets takes what it once cached of a folder called so.
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
        if not is_hub_id and not Path(path).is_dir():
            raise ValueError(f"{path} is neither a folder of data nor a Hub id; make one by `{command}`.")
        dataset = load_dataset(path, split=split, streaming=streaming)
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if "messages" not in columns and not {"chosen", "rejected"} <= set(columns):
            raise ValueError(f"{path} has no column 'messages' but {', '.join(columns)}; make it by `{command}`.")
        has_more = not set(columns) <= set(COLUMNS)  # which may have media
        if not is_read_as_it_is(dataset) or (streaming and has_more):
            dataset, any_converted = converted(dataset, path), True
        elif has_more:
            check_rows(dataset, path)
        datasets.append(dataset.select_columns([name for name in COLUMNS if name in dataset.column_names]))
    if any(dataset.features != datasets[0].features for dataset in datasets):
        datasets = [converted(dataset, path) for dataset, path in zip(datasets, paths, strict=True)]
        any_converted = True
    if decode and not (streaming and any_converted):
        return concatenate_datasets(datasets)
    rows = concatenate_datasets([undecoded(dataset) for dataset in datasets])
    return decoded(rows) if decode else rows


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run("data", lambda: typer.run(build_data))


if __name__ == "__main__":
    main()
