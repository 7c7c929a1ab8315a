# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders in the user's cache that are made once from other files, and made again when those files change."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash
from filelock import FileLock
from huggingface_hub import constants

from .staging import staged_folder

_MADE_FROM = "made_from.json"  # lies in the folder: the digests of its sources and of its own files


def cache() -> Path:
    """The user's cache: the folder `modeling_deco` of Hugging Face's, `HF_HOME` or `~/.cache/huggingface`."""
    return Path(constants.HF_HOME).expanduser() / "modeling_deco"


def cached_folder(name: str, sources: Iterable[Path], num_bytes: int, make: Callable[[Path], object]) -> Path:
    """A complete folder in the user's cache. It is made if it is missing, damaged, or made from other sources.

    Processes that ask for the same folder at once wait for the one that makes it.

    Args:
        name: name of the folder.
        sources: files and folders that it is made from.
        num_bytes: free space that it needs, in bytes.
        make: writes the files into the new folder that it is given.

    Raises:
        InputError: the disk is full.
        OSError: the cache cannot be written.
    """
    folder = cache() / name
    made_from = _digest(sources)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not _is_complete(folder, made_from):
            with staged_folder(folder, num_bytes, check=lambda: None) as incomplete:
                make(incomplete)
                stamp = {"sources": made_from, "files": _digest([incomplete])}
                (incomplete / _MADE_FROM).write_text(json.dumps(stamp))
    return folder


def _is_complete(folder: Path, made_from: str) -> bool:
    try:
        stamp = json.loads((folder / _MADE_FROM).read_bytes())
    except (OSError, ValueError):
        return False
    return stamp == {"sources": made_from, "files": _digest([folder])}


def _digest(sources: Iterable[Path]) -> str:
    """Digest of the names and contents of files, and of all files in folders. It reads 4 GB a second."""
    digest = xxhash.xxh3_128()
    for source in sources:
        files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        for path in files:
            if path.name == _MADE_FROM or "__pycache__" in path.parts:
                continue
            name = path.name if path == source else path.relative_to(source).as_posix()
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
