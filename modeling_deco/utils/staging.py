# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear only when they are complete: they are written beside their place, then renamed."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from .errors import InputError
from .files import read_json

INCOMPLETE = ".incomplete"  # ends the name of what is not complete yet


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`. The file written there replaces `path`, or is removed after an error."""
    incomplete = path.with_name(path.name + INCOMPLETE)
    try:
        yield incomplete
        os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)


def replace_folder(destination: Path, complete: Path, replaced: Path) -> None:
    """Rename `complete` to `destination`. A folder that was there is first renamed to `replaced`."""
    if destination.exists() and any(destination.iterdir()):
        destination.rename(replaced)
    complete.rename(destination)


@contextmanager
def staged_folder(destination: Path, num_bytes: int, check: Callable[[], object]) -> Iterator[Path]:
    """Yield a new folder beside `destination`, which replaces it when the block ends and is removed after an error.

    If a run is killed, the next one removes what it left behind, and restores a destination that was half replaced.

    Args:
        num_bytes: the disk must have so many bytes free.
        check: is called before `destination` is replaced, which may have changed since the block began. An error that
            it raises leaves `destination` as it is.

    Raises:
        InputError: the disk has too little space or becomes full, or another process is writing `destination`.
    """
    destination = destination.resolve()
    missing_parents = [parent for parent in destination.parents if not parent.exists()]
    workspace = destination.parent / f".{destination.name}{INCOMPLETE}"
    folder, replaced = workspace / "new", workspace / "replaced"
    free = shutil.disk_usage(destination.parents[len(missing_parents)]).free
    with suppress(OSError):  # another run may be moving these files
        free += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # left by a killed run
    if num_bytes > free:
        raise InputError(
            f"{destination} needs {num_bytes:,} bytes, but its disk has {free:,} bytes free; free some space."
        )
    try:
        with _lock(workspace):
            try:
                _put_back(replaced, destination)
                _remove(folder, replaced)
                folder.mkdir()
                yield folder
                _sync(folder)
                check()
                replace_folder(destination, folder, replaced)
                _sync_directory(destination.parent)
            finally:
                _put_back(replaced, destination)
                _remove(folder, replaced)
                with suppress(OSError):  # while the lock is held, so that no other run can hold it
                    (workspace / "lock").unlink()
    except Timeout:
        raise InputError(f"Another process is writing {destination}; wait until it has finished.") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{destination} needs {num_bytes:,} bytes, but its disk became full; free some space."
        ) from None
    finally:
        with suppress(OSError):
            workspace.rmdir()
        if not destination.exists():
            for parent in missing_parents:
                with suppress(OSError):
                    parent.rmdir()


def check_destination(destination: Path, overwrite: bool, sources: list[Path]) -> None:
    """Check that a model may be written to `destination`.

    Args:
        overwrite: whether a model that is there may be replaced.
        sources: folders that are read, which must lie neither inside the destination nor around it.

    Raises:
        InputError: it may not; the message says what to do.
    """
    destination = destination.resolve()
    for source in sources:
        if _is_within(source.resolve(), destination) or _is_within(destination, source.resolve()):
            raise InputError(f"{destination} and the source {source} are one inside the other; choose another folder.")
    if destination.exists() and not destination.is_dir():
        raise InputError(f"{destination} is a file; choose another name.")
    if os.path.ismount(destination):
        raise InputError(f"{destination} is a mount point; choose a folder inside it.")
    if destination.exists() and any(destination.iterdir()):
        if not overwrite:
            raise InputError(f"{destination} is not empty; choose another, or pass --overwrite to replace it.")
        config = destination / "config.json"
        if not config.is_file() or "model_type" not in read_json(config):
            raise InputError(
                f"{destination} is not overwritten: it has no config.json of a model. Remove it yourself."
            )


def _is_within(path: Path, folder: Path) -> bool:
    """Compare files by their identity: the same file has several names through mounts and on some disks by case."""
    return folder.exists() and any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


def _lock(workspace: Path) -> AcquireReturnProxy:
    lock = FileLock(workspace / "lock", timeout=0)
    for attempt in range(100):
        try:
            workspace.mkdir(parents=True, exist_ok=True)
            return lock.acquire()
        except FileNotFoundError:  # a run that ended has just removed the workspace
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
