# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pictures to ask about: a folder of pictures, a list of files, JSON, or a data set."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset, DatasetDict, IterableDataset, List, load_dataset, load_from_disk
from datasets import Image as ImageFeature

from ...inference.pictures import PICTURE_SUFFIXES
from ...utils.errors import first_names
from ..data.columns import COLUMNS
from ..data.dataset import undecoded
from ..data.llava import read_records

CONVERSATIONS = ("messages", "conversations")


class Source:
    """Rows by number, in an order that does not change.

    Args:
        name: what the user calls it.
        rows: of any layout that `Answerer` takes.
        digest: differs for other files.
        others: names of files that are not read.
        prepare: from an entry of `rows` to a row.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Any],
        digest: str,
        others: Sequence[str] = (),
        prepare: Callable[[Any], dict[str, Any]] = dict,
    ):
        self.name, self.rows, self.digest, self.others, self.prepare = name, rows, digest, others, prepare

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> dict[str, Any]:
        """A row with an `id`, its number if it has none."""
        row = self.prepare(self.rows[number])
        return {**row, "id": str(number) if row.get("id") is None else str(row["id"])}

    @property
    def has_questions(self) -> bool:
        """Whether the rows have questions of their own."""
        if isinstance(self.rows, Dataset):
            return any(name in self.rows.column_names for name in CONVERSATIONS)
        return any(isinstance(row, dict) and row.get(name) is not None for row in self.rows for name in CONVERSATIONS)


def read_source(images: str, split: str = "train", image_root: Path | None = None) -> Source:
    """Find the pictures that `--images` names.

    Args:
        images: a folder of pictures, which is searched to any depth; a folder that `datasets` opens or saved; a
            `.parquet` file; a `.json` or `.jsonl` file of rows, of LLaVA's records or of paths; a text file with a
            path a line; or the Hub id of a data set.
        split: of a data set.
        image_root: the folder that paths in a file are relative to. Default: that of the file.

    Raises:
        ValueError: there are no pictures of this name.
    """
    path = Path(images).expanduser()
    if path.is_dir():
        return _of_folder(images, path, split)
    if path.is_file():
        return _of_file(images, path, image_root or path.parent)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", images):
        raise ValueError(f"--images {images} is neither a folder, nor a file, nor the Hub id of a data set.")
    return _of_dataset(images, load_dataset(images, split=split), images)


def _of_folder(name: str, folder: Path, split: str) -> Source:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"--images {name} has no split {split!r}, but {', '.join(saved)}; choose by --split.")
            saved = saved[split]
        return _of_dataset(name, saved, _sizes(folder, ["state.json", "dataset_dict.json"]))
    files = _files(folder)
    tables = [file for file in files if file.endswith(".parquet")]
    if tables:
        return _of_dataset(name, load_dataset(str(folder), split=split), _sizes(folder, tables))
    pictures = [file for file in files if _is_picture(file)]
    others = sorted(set(files) - set(pictures))
    if not pictures:
        found = f"only {first_names(others)}" if others else "nothing"
        raise ValueError(f"--images {name} has no pictures and no data set, {found}.")
    root = os.path.abspath(folder)
    return Source(
        name,
        pictures,
        xxhash.xxh3_128_hexdigest("\0".join(pictures).encode(errors="surrogateescape")),
        others,
        lambda file: {"id": file, "images": [os.path.join(root, file)]},
    )


def _files(folder: Path) -> list[str]:
    """The files under a folder that are not hidden, sorted. Links to folders are followed, each folder once."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in seen
        )
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in files if not name.startswith(".")]
    return sorted(found)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _of_file(name: str, path: Path, root: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _of_dataset(
            name, load_dataset("parquet", data_files=str(path), split="train"), _sizes(path.parent, [path.name])
        )
    if suffix in (".json", ".jsonl"):
        records = list(read_records(path))
    elif suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--images {name} is not UTF-8 text.") from None
        records = [line.strip() for line in lines if line.strip()]
    else:
        raise ValueError(f"--images {name} must be a folder, or a .txt, .json, .jsonl or .parquet file.")
    if not records:
        raise ValueError(f"--images {name} has no pictures.")
    digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
    return Source(name, records, digest, prepare=lambda record: _row_of(record, root.absolute()))


def _row_of(record: Any, root: Path) -> dict[str, Any]:
    """The row of a JSON record, whose images are under `root`."""
    if isinstance(record, str):
        return {"id": record, "images": [_under(root, record)]}
    if not isinstance(record, dict):
        return {}  # `Answerer` reports that it has no images
    row = {column: record[column] for column in (*COLUMNS, "conversations") if record.get(column) is not None}
    for column in ("image", "images"):
        if column in row:
            row[column] = _under(root, row[column])
    return row


def _under(root: Path, image: Any) -> Any:
    if isinstance(image, list):
        return [_under(root, entry) for entry in image]
    if not isinstance(image, str) or image.startswith("data:") or "://" in image:
        return image
    return os.path.join(root, image)


def _of_dataset(name: str, dataset: Dataset | IterableDataset, digest: str) -> Source:
    assert isinstance(dataset, Dataset)
    columns = [column for column in (*COLUMNS, "conversations") if column in dataset.column_names]
    if not {"image", "images", *CONVERSATIONS} & set(columns):
        pictures = [
            column
            for column, kind in dataset.features.items()
            if isinstance(kind, ImageFeature) or (isinstance(kind, List) and isinstance(kind.feature, ImageFeature))
        ]
        if len(pictures) != 1:
            raise ValueError(
                f"--images {name} needs a column 'image' or 'images'; it has {', '.join(dataset.column_names)}."
            )
        dataset, columns = dataset.rename_column(pictures[0], "images"), [*columns, "images"]
    if len(dataset) == 0:
        raise ValueError(f"--images {name} has no rows.")
    dataset = undecoded(dataset.select_columns(columns))
    return Source(name, dataset, xxhash.xxh3_128_hexdigest(f"{digest} {len(dataset)} {dataset.features}".encode()))


def _sizes(folder: Path, names: Sequence[str]) -> str:
    """What tells files from others without reading them."""
    return " ".join(f"{name} {(folder / name).stat().st_size}" for name in names if (folder / name).is_file())
