# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder that appears only when it is complete."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import ConversionError


def check_destination(destination: Path, overwrite: bool, sources: list[Path]) -> None:
    """Refuse a destination that holds something, or that the conversion reads from.

    Raises:
        ConversionError: what is in the way, and what to do.
    """
    destination = destination.resolve()
    for source in sources:
        if source.resolve().is_relative_to(destination) or destination.is_relative_to(source.resolve()):
            raise ConversionError(
                f"DST {destination} and the source {source} are one inside the other; choose another."
            )
    if destination.exists() and not destination.is_dir():
        raise ConversionError(f"DST {destination} is a file; choose another name.")
    if os.path.ismount(destination):
        raise ConversionError(f"DST {destination} is a mount point; choose a folder inside it.")
    if destination.exists() and any(destination.iterdir()):
        if not overwrite:
            raise ConversionError(
                f"DST {destination} is not empty; choose another, or pass --overwrite to replace it."
            )
        if not (destination / "config.json").exists():
            raise ConversionError(
                f"DST {destination} has no config.json, so it is no model and is not overwritten; remove it yourself."
            )


@contextmanager
def staged(destination: Path, num_bytes: int) -> Iterator[Path]:
    """A new folder beside `destination` that takes its place when the block ends, and is removed when it fails.

    What a killed run left behind is removed first; a destination that it had moved aside is put back.

    Raises:
        ConversionError: there is no room for `num_bytes`, the disk fills up meanwhile, or another run writes the same
            destination.
    """
    destination = destination.resolve()
    missing_parents = [parent for parent in destination.parents if not parent.exists()]
    existing_parent = destination.parents[len(missing_parents)]
    free = shutil.disk_usage(existing_parent).free
    if num_bytes > free:
        raise ConversionError(
            f"DST {destination} needs {num_bytes:,} bytes, and its disk has {free:,} free; make room there."
        )
    room = destination.parent / f".{destination.name}.incomplete"
    folder, replaced = room / "new", room / "replaced"
    try:
        room.mkdir(parents=True, exist_ok=True)
        with FileLock(room / "lock", timeout=0):
            try:
                _put_back(replaced, destination)
                for left_over in (folder, replaced):
                    shutil.rmtree(left_over, ignore_errors=True)
                folder.mkdir()
                yield folder
                _sync(folder)
                if destination.exists() and any(destination.iterdir()):
                    destination.rename(replaced)
                folder.rename(destination)
                _sync_directory(destination.parent)
            finally:
                _put_back(replaced, destination)
                shutil.rmtree(room)
    except Timeout:
        raise ConversionError(
            f"Another conversion is writing {destination}; wait for it, or choose another."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(existing_parent).free
        raise ConversionError(
            f"DST {destination} needs {num_bytes:,} bytes, and its disk became full; {free:,} are free now."
        ) from None
    finally:
        with suppress(OSError):  # empty where the lock was not even made
            room.rmdir()
        if not destination.exists():
            for parent in missing_parents:
                with suppress(OSError):
                    parent.rmdir()


def _put_back(replaced: Path, destination: Path) -> None:
    if replaced.exists() and not destination.exists():
        replaced.rename(destination)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
