# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Lengths of samples in tokens, counted before training, so that samples that are too long are found then."""

import logging

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from .collator import DecoCollator
from .config import DecoSFTConfig
from .data.dataset import report_faults, rows_without_bytes, undecoded

logger = logging.getLogger(__name__)


def add_lengths(dataset, collator: DecoCollator, args: DecoSFTConfig):
    """Add the columns `length` (in tokens, images at the largest grid) and `has_images`.

    With `overlong_samples="drop"`, samples longer than `max_length` are left out. Images are not decoded, here or in
    the result. A streamed data set is filtered while it is read. A data set with a custom transform is returned as it
    is; the collator checks its lengths.

    Raises:
        ValueError: samples cannot be read, or are longer than `max_length` with `overlong_samples="refuse"`.
    """
    if not isinstance(dataset, Dataset):
        if args.overlong_samples == "refuse" or args.max_length is None:
            return dataset
        return dataset.filter(lambda example: _fits(example, collator))
    if dataset.format["type"] == "custom":
        return dataset

    dataset = undecoded(dataset)
    features = dataset.features

    def measure(table: pa.Table) -> pa.Table:
        columns: dict[str, list] = {"length": [], "has_images": [], "fault": []}
        for row in rows_without_bytes(table, features):
            length, has_images, fault = 0, False, ""
            try:
                example = collator.read(row)
                length, has_images = collator.count_tokens(collator.tokenize(example)), bool(example["images"])
            except ValueError as error:
                fault = str(error)
            for column, value in zip(columns.values(), (length, has_images, fault), strict=True):
                column.append(value)
        return pa.table(columns)

    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [f"row {index}" for index in range(len(dataset))])
        features = dataset.features
    measurements = dataset.with_format("arrow").map(
        measure,
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=args.dataset_num_proc,
        desc="Counting tokens",
    )
    measurements = measurements.with_format(None)
    report_faults([fault for fault in measurements["fault"][:] if fault], len(dataset))
    dataset = concatenate_datasets([dataset, measurements.remove_columns("fault")], axis=1)
    if args.pooled_grid_sizes and collator.feature_cache is None:
        collator.check_grids(dataset, args.pooled_grid_sizes)
    if args.max_length is None:
        return dataset
    lengths = np.array(dataset["length"][:])
    overlong = np.flatnonzero(lengths > args.max_length)
    if len(overlong) == 0:
        return dataset
    shown = ", ".join(f"{dataset[int(row)]['id']} ({lengths[row]} tokens)" for row in overlong[:5])
    report = (
        f"{len(overlong)} of {len(dataset)} samples are longer than max_length={args.max_length}, images at the "
        f"largest grid: {shown}{', ...' if len(overlong) > 5 else ''}"
    )
    if args.overlong_samples == "refuse" or len(overlong) == len(dataset):
        raise ValueError(
            f"{report}. Raise --max_length, choose smaller grids, or drop such samples with --overlong_samples drop."
        )
    logger.warning("%s. They are dropped.", report)
    return dataset.select(np.flatnonzero(lengths <= args.max_length))


def _fits(example, collator: DecoCollator) -> bool:
    length = collator.count_tokens(collator.tokenize(collator.read(example)))
    if collator.max_length is None or length <= collator.max_length:
        return True
    logger.warning("Sample %r is dropped: %d tokens, max_length=%d.", example.get("id"), length, collator.max_length)
    return False
