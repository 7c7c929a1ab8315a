# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From a name to the files of a checkpoint: a folder, or a repository on the Hub."""

import json
import os
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..utils.errors import one_line


def checkpoint_name(name: str | os.PathLike) -> str:
    """Check the name of a model, and return a folder's path with `~` expanded, or the Hub id.

    Raises:
        ValueError: there is no such folder, and the name is not a Hub id. The Hub is not asked.
    """
    name = os.fspath(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise ValueError(f"{name} is a file; a model is a folder or a Hub id.")
    owner, separator, _ = name.partition("/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        separator = ""
    if not separator:
        raise ValueError(f"There is no folder {name or repr(name)}; a Hub id would be owner/name.")
    if os.path.isdir(owner):
        raise ValueError(f"There is no folder {name}. The Hub is not asked, since {owner} is a folder here.")
    return name


def find_file(name: str | os.PathLike, filename: str, revision: str | None) -> str | None:
    """Path of a file of a checkpoint, downloaded if the checkpoint is on the Hub. None if there is no such file."""
    path = checkpoint_name(name)
    if os.path.isdir(path):
        file = os.path.join(path, filename)
        return file if os.path.exists(file) else None
    try:
        if not is_offline_mode() and not isinstance(
            try_to_load_from_cache(path, "config.json", revision=revision), str
        ):
            HfApi().model_info(path, revision=revision, timeout=10)  # asks once; a download would try six times
        return hf_hub_download(path, filename, revision=revision)
    except GatedRepoError:
        raise ValueError(f"{name} is gated: ask for access on its page, huggingface.co/{name}, and log in.") from None
    except RepositoryNotFoundError:
        raise ValueError(f"There is neither a folder {name} nor such a model on the Hub, or it is private.") from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision!r} on the Hub.") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if is_offline_mode() and _is_cached(path, revision):
            return None
        reason = "this is offline mode" if is_offline_mode() else "there is no connection"
        raise ValueError(f"There is no folder {name}, and the Hub cannot be asked for it: {reason}.") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # of the Hub or of the HTTP library, which differs between versions of huggingface_hub
        raise ValueError(f"There is no folder {name}, and asking the Hub for it failed: {one_line(error)}") from error


def _is_cached(repo_id: str, revision: str | None) -> bool:
    try:
        snapshot_download(repo_id, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        return False
    return True


def has_file(name: str | os.PathLike, filename: str, revision: str | None = None) -> bool:
    """Whether a checkpoint, a folder or Hub id, has a file."""
    return find_file(name, filename, revision) is not None


def read_json(name, filename: str, revision: str | None = None) -> dict | None:
    file = find_file(name, filename, revision)
    if file is None:
        return None
    try:
        fields = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{filename} of {name} is not valid JSON: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{filename} of {name} is not a JSON object.")
    return fields
