# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of either direction: its small files, its weights and the report, into a staged folder."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..utils.errors import first_names
from ..utils.staging import check_destination, staged_folder
from .report import REPORT, build_report
from .sources import Source
from .tensors import OutputTensor
from .writing import write_weights

logger = logging.getLogger(__name__)

_SMALL_FILES_BYTES = 64 << 20  # room for tokenizer, configs and code


def write_checkpoint(
    destination: Path,
    tensors: Mapping[str, OutputTensor],
    sources: dict[str, Source],
    files: set[Path],
    facts: dict,
    write_small_files: Callable[[Path], None],
    check: Callable[[Path], dict] | None = None,
    overwrite: bool = False,
) -> dict:
    """Make the destination: its small files, its weights, and `conversion_report.json`.

    Args:
        destination: see `staged_folder`.
        tensors: see `write_weights`.
        sources: the folders of the tensors, by role.
        files: the weight files of the tensors. The report has their digests.
        facts: more entries of the report.
        write_small_files: called with the staged folder.
        check: called with the staged folder after the weights are written; returns more entries of the report.
        overwrite: see `check_destination`.

    Returns:
        The report.
    """
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    read_files = sorted(files | {source.folder / "config.json" for source in sources.values()})
    check_again = partial(check_destination, destination, overwrite, sources=[])
    with staged_folder(destination, num_bytes + _SMALL_FILES_BYTES, check_again) as folder:
        write_small_files(folder)
        with _progress(num_bytes) as progress:
            digests = write_weights(tensors, folder, read_files, progress)
        if check is not None:
            facts = facts | check(folder)
        report = build_report(tensors, sources, read_files, facts, digests)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if digests.nonfinite:
        count, names = sum(digests.nonfinite.values()), sorted(digests.nonfinite)
        logger.warning(
            f"{destination}: {count:,} weights of {len(names)} tensors are NaN or infinite as in the source: "
            f"{first_names(names)}. Such a model does not answer."
        )
    size = tqdm.format_sizeof(num_bytes, "B")
    logger.info(f"{destination}: {len(tensors)} tensors, {size}, read back and equal to the source's")
    return report


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on a terminal; elsewhere a line in the log for each tenth."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None) as bar:
        written = 0

        def progress(num_new: int) -> None:
            nonlocal written
            bar.update(num_new)
            tenths_before, written = 10 * written // num_bytes, written + num_new
            if bar.disable and 10 * written // num_bytes > tenths_before:
                logger.info(f"{tqdm.format_sizeof(written, 'B')} of {tqdm.format_sizeof(num_bytes, 'B')}")

        yield progress
