# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets for training, from folders or from the Hub, in any common layout."""

import re
from pathlib import Path

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset

from .columns import COLUMNS
from .dataset import check_rows, converted, decoded, has_final_layout, undecoded

SHUFFLE_BUFFER_SIZE = 1000  # rows, whose images are not decoded
COMMAND = "python -m modeling_deco.training.data SRC.json --images DIR --out OUT"


def load_data(
    paths: str | list[str], streaming: bool = False, split: str = "train", decode: bool = True
) -> Dataset | IterableDataset:
    """Load rows for TRL: `messages` for SFTTrainer, or `chosen` and `rejected` for DPOTrainer, with `images`,
    and with `videos` if a data set may have some.

    Args:
        paths: folders or Hub ids of data sets in any of the layouts of `modeling_deco.training.data.rows`. Several
            data sets are concatenated.
        streaming: read rows when they are needed, also from the Hub, instead of copying the data set to the disk.
        split: the name of a split that each data set has.
        decode: whether to decode images. `DecoSFTTrainer` decodes images that are not, and names the row if it cannot.
            Videos stay as they are stored.

    Raises:
        ValueError: a data set has other columns, or rows that cannot be read; the message says which, and how many.
            For a streamed data set, a row is checked when it is reached.
    """
    datasets, any_converted = [], False
    paths = [paths] if isinstance(paths, str) else paths
    for path in paths:
        # For a name that it does not find, datasets loads what its cache has of any folder of that name.
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
        if not is_hub_id and not Path(path).is_dir():
            raise ValueError(f"{path} is neither a folder of data nor a Hub id. Make such a folder with `{COMMAND}`.")
        dataset = load_dataset(path, split=split, streaming=streaming)
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if "messages" not in columns and not {"chosen", "rejected"} <= set(columns):
            raise ValueError(
                f"{path} has no column 'messages', but {', '.join(columns)}. Convert LLaVA's JSON with `{COMMAND}`."
            )
        has_more = not set(columns) <= set(COLUMNS)  # other columns may have media
        if not has_final_layout(dataset) or (streaming and has_more):
            dataset, any_converted = converted(dataset, path), True
        elif has_more:
            check_rows(dataset, path)
        datasets.append(dataset.select_columns([name for name in COLUMNS if name in dataset.column_names]))
    if any(_without_videos(dataset) != _without_videos(datasets[0]) for dataset in datasets):
        datasets = [converted(dataset, path) for dataset, path in zip(datasets, paths, strict=True)]
        any_converted = True
    if decode and not (streaming and any_converted):
        return concatenate_datasets(datasets)
    rows = concatenate_datasets([undecoded(dataset) for dataset in datasets])
    return decoded(rows) if decode else rows


def _without_videos(dataset: Dataset | IterableDataset) -> dict | None:
    """The features of a data set except `videos`, which data sets that are concatenated may lack."""
    features = dataset.features
    return None if features is None else {name: kind for name, kind in features.items() if name != "videos"}


def repeat_and_shuffle(dataset: IterableDataset, seed: int) -> IterableDataset:
    """Make one endless, shuffled pass of a streamed data set. Trainer knows how much of it a resumed run has seen."""
    return dataset.repeat(None).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_SIZE)
