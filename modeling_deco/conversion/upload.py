# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Upload a converted checkpoint to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..hub import load_card
from ..utils.errors import InputError, one_line


def check_login(repo_id: str) -> None:
    """Refuse an upload before the work: nobody is logged in to the Hub, or the name is no repository's."""
    try:
        validate_repo_id(repo_id)
        HfApi().whoami()
    except Exception as error:  # its type depends on how the network failed
        raise InputError(f"--push-to-hub {repo_id}: {one_line(error)} (log in by `hf auth login`)") from None


def upload(folder: Path, repo_id: str) -> None:
    """Upload a finished folder to the Hub. If the repository has a model card, that one is kept."""
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Convert from LLaVA",
            ignore_patterns=None if load_card(repo_id) is None else "README.md",
        )
    except Exception as error:  # its type depends on how the network failed
        raise InputError(
            f"{folder} is complete, but its upload to {repo_id!r} failed: {one_line(error)} "
            f"Try `hf upload {repo_id} {folder}`."
        ) from None
