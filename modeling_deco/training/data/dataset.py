# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole data sets in any common layout: checked, and converted to the columns of `FEATURES`."""

from dataclasses import replace
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, LargeList, List, Value, Video
from datasets import Image as ImageFeature

from .columns import CONVERSATIONS, FEATURES, MESSAGES, VIDEOS
from .images import open_image
from .rows import REFERENCES, read_row, row_name


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data set with its images and videos as `{"bytes": ..., "path": ...}`, so that an error of decoding can name
    the row."""
    if dataset.features is None:
        return dataset
    features = Features({name: _undecoded(kind) for name, kind in dataset.features.items()})
    if isinstance(dataset, IterableDataset):
        return dataset.cast(features)
    dataset = dataset.select_columns(dataset.column_names)  # a shallow copy; a cast would copy all rows
    dataset.info.features = features
    return dataset


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, (ImageFeature, Video)):
        return replace(feature, decode=False)
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return {name: _undecoded(kind) for name, kind in feature.items()} if isinstance(feature, dict) else feature


def check_rows(dataset: Dataset, name: str) -> None:
    """Check every row, without opening an image or a video.

    Args:
        name: of the data set, for the message.

    Raises:
        ValueError: rows cannot be read; the message has their number and the first of them.
    """
    dataset, faults, index = undecoded(dataset), [], 0
    for table in dataset.with_format("arrow").iter(1000):
        for row in rows_of(table, dataset.features):
            try:
                read_row(row)
            except ValueError as error:
                faults.append(f"{row_name(row, index)}: {error}")
            index += 1
    report_faults(faults, len(dataset), f" of {name}")


def report_faults(faults: list[str], num_rows: int, name: str = "") -> None:
    """Raise a ValueError with the number of faults and the first of them, if there are any."""
    if faults:
        shown = "; ".join(fault.rstrip(".") for fault in faults[:5]) + ("; ..." if len(faults) > 5 else "")
        raise ValueError(f"{len(faults):,} of {num_rows:,} rows{name} cannot be read: {shown}.")


def has_final_layout(dataset: Dataset | IterableDataset) -> bool:
    """Whether the images of a data set are in the column `images` alone, and its videos in `videos`, with the types of
    `FEATURES_WITH_VIDEOS`, so that it needs no conversion."""
    features = dataset.features
    if features is None or {"image", "video"} & set(features) or features.get("images") != List(ImageFeature()):
        return False
    if features.get("videos", VIDEOS) != VIDEOS:
        return False
    return not any(
        _may_hold(kind, features[name]) for kind in REFERENCES for name in CONVERSATIONS if name in features
    )


def may_have_videos(dataset: Dataset | IterableDataset) -> bool:
    """Whether a data set has a place for videos, by its columns alone. If they are not known, it may."""
    features = dataset.features
    if features is None or {"video", "videos"} & set(features):
        return True
    return any(_may_hold("video", features[name]) for name in CONVERSATIONS if name in features)


def _may_hold(kind: str, feature: Any) -> bool:
    """Whether the feature of a conversation may hold images or videos."""
    if isinstance(feature, dict):
        return any(name in REFERENCES[kind] or _may_hold(kind, entry) for name, entry in feature.items())
    if isinstance(feature, (List, LargeList)):
        return _may_hold(kind, feature.feature)
    return not isinstance(feature, Value) or feature.dtype == "null"


def converted(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """The data set with the columns of `FEATURES`, or with those of preferences; with `videos` if it may have some.
    Images of a streamed data set are not decoded.

    Raises:
        ValueError: rows cannot be read. For a streamed data set, this is raised when such a row is reached.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    features = {"id": Value("string"), **dict.fromkeys(CONVERSATIONS, MESSAGES)}
    features = Features(
        {name: kind for name, kind in features.items() if name in columns}
        | {"images": FEATURES["images"]}
        | ({"videos": VIDEOS} if may_have_videos(dataset) else {})
    )
    if dataset.features == features:
        return dataset
    if isinstance(dataset, Dataset):
        check_rows(dataset, name)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            read = read_row(row)
            for message in (message for column in CONVERSATIONS for message in read.get(column, ())):
                for more in message.keys() - {"role", "content"}:
                    raise ValueError(f"a message has {more!r}, which training does not use")
                message["content"] = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
            read["videos"] = [_stored(video) for video in read["videos"]]
        except ValueError as error:
            raise ValueError(f"{name}: {row_name(row, index)}: {error}.") from error
        sample_id = {"id": None if row.get("id") is None else str(row["id"])} if "id" in features else {}
        return {column: read[column] for column in features if column != "id"} | sample_id

    return undecoded(dataset).map(convert, with_indices=True, remove_columns=columns, features=features)


def _stored(video: Any) -> dict[str, Any]:
    if not isinstance(video, (str, PurePath, bytes, bytearray, dict)):
        raise ValueError("a video is given as frames; write it to a file, or hand the data set to the trainer")
    return VIDEOS.feature.encode_example(video)


def decoded(dataset: IterableDataset) -> IterableDataset:
    """A streamed data set with its images decoded; datasets does not decode what `map` returns for a streamed one."""

    def open_all(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"images": [open_image(image) for image in row["images"]]}
        except ValueError as error:
            raise ValueError(f"{row_name(row)}: {error}.") from error

    return dataset.map(open_all, features=dataset.features)


def rows_of(table: pa.Table, features: Features, with_bytes: bool = False) -> list[dict[str, Any]]:
    """The rows of an Arrow table of an `undecoded` data set. Without bytes, all are `b""`, so that none are read."""
    values_of = pa.Array.to_pylist if with_bytes else _without_bytes
    columns = {
        name: [value for chunk in table[name].chunks for value in values_of(chunk)] for name in table.column_names
    }
    columns = Features({name: features[name] for name in columns}).decode_batch(columns)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _without_bytes(array: pa.Array) -> list[Any]:
    kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [b"" if is_there else None for is_there in array.is_valid().to_pylist()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = iter(_without_bytes(array.flatten()))
        lengths = pc.list_value_length(array).to_pylist()
        return [None if length is None else [next(values) for _ in range(length)] for length in lengths]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        rows = zip(*(_without_bytes(field) for field in array.flatten()), strict=True)
        valid = array.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if ok else None for ok, row in zip(valid, rows, strict=True)]
    return array.to_pylist()
