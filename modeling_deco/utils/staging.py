# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder that appears only when it is complete."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from .errors import InputError
from .files import read_json


def check_destination(destination: Path, overwrite: bool, sources: list[Path]) -> None:
    """Refuse a destination that holds something, or that the conversion reads from.

    Raises:
        InputError: what is in the way, and what to do.
    """
    destination = destination.resolve()
    for source in sources:
        if _is_within(source.resolve(), destination) or _is_within(destination, source.resolve()):
            raise InputError(f"DST {destination} and the source {source} are one inside the other; choose a DST.")
    if destination.exists() and not destination.is_dir():
        raise InputError(f"DST {destination} is a file; choose another name.")
    if os.path.ismount(destination):
        raise InputError(f"DST {destination} is a mount point; choose a folder inside it.")
    if destination.exists() and any(destination.iterdir()):
        if not overwrite:
            raise InputError(f"DST {destination} is not empty; choose another, or pass --overwrite to replace it.")
        config = destination / "config.json"
        if not config.is_file() or "model_type" not in read_json(config):
            raise InputError(
                f"DST {destination} has no config.json of a model and is not overwritten; remove it yourself."
            )


def _is_within(path: Path, folder: Path) -> bool:
    """By the files' identity: names differ through mounts, and in letter case on some disks."""
    return folder.exists() and any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


@contextmanager
def staged(destination: Path, num_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `destination` that takes its place when the block ends, and is removed when it fails.

    What a killed run left behind is removed first; a destination that it had moved aside is put back.

    Raises:
        InputError: there is no room for `num_bytes`, the disk fills up meanwhile, another run writes the same
            destination, or something has come to be there that `check_destination` refuses.
    """
    destination = destination.resolve()
    missing_parents = [parent for parent in destination.parents if not parent.exists()]
    room = destination.parent / f".{destination.name}.incomplete"
    folder, replaced = room / "new", room / "replaced"
    free = shutil.disk_usage(destination.parents[len(missing_parents)]).free
    with suppress(OSError):  # another run may be moving it
        free += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # what a killed run left
    if num_bytes > free:
        raise InputError(
            f"DST {destination} needs {num_bytes:,} bytes, and its disk has {free:,} free; make room there."
        )
    try:
        with _lock(room):
            try:
                _put_back(replaced, destination)
                _remove(folder, replaced)
                folder.mkdir()
                yield folder
                _sync(folder)
                check_destination(destination, overwrite, sources=[])  # it may have come to be meanwhile
                if destination.exists() and any(destination.iterdir()):
                    destination.rename(replaced)
                folder.rename(destination)
                _sync_directory(destination.parent)
            finally:
                _put_back(replaced, destination)
                _remove(folder, replaced)
                with suppress(OSError):  # while it is held, so that no other run can have it
                    (room / "lock").unlink()
    except Timeout:
        raise InputError(f"Another conversion is writing DST {destination}; wait for it.") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"DST {destination} needs {num_bytes:,} bytes, and its disk became full; make room there."
        ) from None
    finally:
        with suppress(OSError):
            room.rmdir()
        if not destination.exists():
            for parent in missing_parents:
                with suppress(OSError):
                    parent.rmdir()


def _lock(room: Path) -> AcquireReturnProxy:
    lock = FileLock(room / "lock", timeout=0)
    for attempt in range(100):
        try:
            room.mkdir(parents=True, exist_ok=True)
            return lock.acquire()
        except FileNotFoundError:  # a run that ended has cleared the room away in this moment
            if attempt == 99:
                raise


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _put_back(replaced: Path, destination: Path) -> None:
    if replaced.exists() and not destination.exists():
        replaced.rename(destination)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
