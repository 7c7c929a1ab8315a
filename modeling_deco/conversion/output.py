# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What both directions share: a staged folder with verified weights and a report, and its upload."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from .. import __version__
from ..hub import load_card
from ..utils.errors import ConversionError, first_names, one_line
from ..utils.staging import staged
from .sources import Source
from .writing import write_weights

logger = logging.getLogger(__name__)

REPORT = "conversion_report.json"
_SMALL_FILES_BYTES = 64 << 20  # room for tokenizer, configs and code


def write_checkpoint(
    destination: Path,
    tensors: dict,
    sources: dict[str, Source],
    files: set[Path],
    facts: dict,
    write_small_files: Callable[[Path], None],
    check: Callable[[Path], dict] | None = None,
    overwrite: bool = False,
) -> dict:
    """Make the destination: its small files, its weights, and `conversion_report.json`.

    Args:
        destination: see `staged`.
        tensors: see `write_weights`.
        sources: where the tensors are from, by role.
        files: the weight files they lie in, whose digests are reported.
        facts: more for the report.
        write_small_files: called with the staged folder.
        check: called with it when the weights are there; what it returns is reported too.
        overwrite: see `check_destination`.

    Returns:
        The report.
    """
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    files = sorted(files | {source.folder / "config.json" for source in sources.values()})
    with staged(destination, num_bytes + _SMALL_FILES_BYTES, overwrite) as folder:
        write_small_files(folder)
        with _progress(num_bytes) as progress:
            written = write_weights(tensors, folder, files, progress)
        if check is not None:
            facts = facts | check(folder)
        report = {
            "source": sources["source"].name,
            "revision": sources["source"].revision,
            **facts,
            "sources": {
                role: {
                    "name": source.name,
                    "revision": source.revision,
                    "files": {
                        path.name: {"bytes": path.stat().st_size, "xxh3_128": written.source_files[path]}
                        for path in files
                        if path.parent == source.folder
                    },
                }
                for role, source in sources.items()
            },
            "written": written.files,
            "nonfinite": written.nonfinite,
            "tensors": {
                name: {
                    "key": tensor.key,
                    "file": tensor.path.name,
                    "how": tensor.how,
                    "xxh3_128": written.tensors[name],
                }
                for name, tensor in tensors.items()
            },
            "versions": {
                "modeling-deco": __version__,
                "python": sys.version.split()[0],
                **{name: version(name) for name in ("torch", "transformers", "safetensors", "huggingface_hub")},
            },
        }
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if written.nonfinite:
        names = sorted(written.nonfinite)
        count, first = sum(written.nonfinite.values()), first_names(names)
        logger.warning(
            f"{destination}: {count:,} weights of {len(names)} tensors are NaN or infinite as in the source: {first}. "
            f"Such a model does not answer."
        )
    size = tqdm.format_sizeof(num_bytes, "B")
    logger.info(f"{destination}: {len(tensors)} tensors, {size}, read back and equal to the source's")
    return report


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar in bytes on a terminal, a line in the log at each tenth elsewhere."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None) as bar:
        written = 0

        def progress(num_new: int) -> None:
            nonlocal written
            bar.update(num_new)
            tenths_before, written = 10 * written // num_bytes, written + num_new
            if bar.disable and 10 * written // num_bytes > tenths_before:
                logger.info(f"{tqdm.format_sizeof(written, 'B')} of {tqdm.format_sizeof(num_bytes, 'B')}")

        yield progress


def check_login(repo_id: str) -> None:
    """Refuse an upload before the work, and not after it: where nobody is logged in to the Hub, or to no such name."""
    try:
        validate_repo_id(repo_id)
        HfApi().whoami()
    except Exception as error:  # of many kinds, by the network
        raise ConversionError(f"--push-to-hub {repo_id}: {one_line(error)} (log in by `hf auth login`)") from None


def upload(folder: Path, repo_id: str) -> None:
    """Upload a finished folder to the Hub, where a model card that the repository has stays."""
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Convert from LLaVA",
            ignore_patterns=None if load_card(repo_id) is None else "README.md",
        )
    except Exception as error:  # of many kinds, by the network
        raise ConversionError(
            f"{folder} is complete, but its upload to {repo_id!r} failed: {one_line(error)} "
            f"Try `hf upload {repo_id} {folder}`."
        ) from None
