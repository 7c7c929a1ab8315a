# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Lengths of samples in tokens, counted before training, so that samples that are too long are found then."""

import logging

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from .collator import POSITIONS_ADVICE, DecoCollator
from .config import DecoSFTConfig
from .data.dataset import report_faults, rows_of, undecoded

logger = logging.getLogger(__name__)


def add_lengths(dataset, collator: DecoCollator, args: DecoSFTConfig):
    """Add the columns `length` (in tokens, images and videos at the largest grid), `num_positions` and `has_images`,
    which is true of videos too.

    With `overlong_samples="drop"`, samples that are longer than `max_length` or take more positions than the language
    model has are left out. Images are not decoded, here or in the result. A streamed data set is filtered while it is
    read. A data set with a custom transform is returned as it is; the collator checks its lengths.

    Raises:
        ValueError: samples cannot be read, or are too long with `overlong_samples="refuse"`.
    """
    if not isinstance(dataset, Dataset):
        if args.overlong_samples == "refuse" or collator.max_length is collator.max_positions is None:
            return dataset
        return dataset.filter(lambda example: _fits(example, collator))
    if dataset.format["type"] == "custom":
        return dataset

    dataset = undecoded(dataset)
    features = dataset.features

    def measure(table: pa.Table) -> pa.Table:
        columns: dict[str, list] = {"length": [], "num_positions": [], "has_images": [], "fault": []}
        for row in rows_of(table, features, with_bytes=collator.costs.has_views):
            length, positions, has_images, fault = 0, 0, False, ""
            try:
                example = collator.read(row)
                tokens, has_images = collator.tokenize(example), bool(example["images"] or example["videos"])
                length, positions = collator.count_tokens(tokens), collator.count_positions(tokens)
            except ValueError as error:
                fault = str(error)
            for column, value in zip(columns.values(), (length, positions, has_images, fault), strict=True):
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
    for column, most, what, advice in (
        (
            "length",
            collator.max_length,
            f"are longer than max_length={collator.max_length}, images and videos at the largest grid",
            "Raise --max_length, choose smaller grids, or drop such samples with --overlong_samples drop.",
        ),
        (
            "num_positions",
            collator.max_positions,
            f"take more positions than the language model has (max_position_embeddings={collator.max_positions}), "
            "because images keep those of all their patches",
            POSITIONS_ADVICE,
        ),
    ):
        if most is not None:
            dataset = _at_most(most, dataset, column, what, advice, args)
    return dataset


def _at_most(most: int, dataset: Dataset, column: str, what: str, advice: str, args: DecoSFTConfig) -> Dataset:
    """The samples with at most this number in a column. If others are not to be dropped, a ValueError says `what`
    they do, and gives the advice."""
    numbers, unit = np.array(dataset[column][:]), {"length": "tokens", "num_positions": "positions"}[column]
    overlong = np.flatnonzero(numbers > most)
    if len(overlong) == 0:
        return dataset
    shown = ", ".join(f"{dataset[int(row)]['id']} ({numbers[row]} {unit})" for row in overlong[:5])
    report = f"{len(overlong)} of {len(dataset)} samples {what}: {shown}{', ...' if len(overlong) > 5 else ''}"
    if args.overlong_samples == "refuse" or len(overlong) == len(dataset):
        raise ValueError(f"{report}. {advice}")
    logger.warning("%s. They are dropped.", report)
    return dataset.select(np.flatnonzero(numbers <= most))


def _fits(example, collator: DecoCollator) -> bool:
    example = collator.read(example)
    row = collator.tokenize(example)
    length = collator.count_tokens(row)
    if collator.max_length is not None and length > collator.max_length:
        logger.warning(
            "Sample %r is dropped: %d tokens, max_length=%d.", example.get("id"), length, collator.max_length
        )
        return False
    try:
        collator.check_positions(example, row)
    except ValueError as error:
        logger.warning("%s It is dropped.", str(error).removesuffix(f" {POSITIONS_ADVICE}"))
        return False
    return True
