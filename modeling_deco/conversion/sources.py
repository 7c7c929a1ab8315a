# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The source of a checkpoint: a folder, or a repository on the Hub at one revision."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..inference.folders import check_folder
from ..inference.lookup import checkpoint_name
from ..utils.errors import InputError, one_line
from ..utils.files import read_json
from .stored import StoredTensor
from .weights import read_weight_map, read_weights, weight_entry

# All files but the weights of a whole model, which a repository may have twice, as safetensors and as pickles.
_SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "adapter_model.*",
    "mm_projector.bin",
    "non_lora_trainables.bin",
]


@dataclass(frozen=True)
class Source:
    """A checkpoint to read.

    Attributes:
        name: as the user gave it.
        folder: where its files are on this machine.
        what: the option that `name` was given by.
        revision: the commit of a repository on the Hub; None for a folder.
    """

    name: str
    folder: Path
    what: str
    revision: str | None = None

    @property
    def title(self) -> str:
        """Its name for a model card, without a path of this machine."""
        return self.name if self.revision else self.folder.resolve().name

    def read_config(self) -> dict:
        return read_json(self.folder / "config.json")

    def read_weights(self) -> dict[str, StoredTensor]:
        """The tensors of a whole model. They are downloaded first if the source is on the Hub."""
        if self.revision:
            for name in ("model.safetensors", "pytorch_model.bin"):
                index = self.folder / f"{name}.index.json"
                _download(self.name, self.revision, [name], self.what)
                if not (self.folder / name).exists() and index.exists():
                    _download(self.name, self.revision, sorted(set(read_weight_map(index).values())), self.what)
                if weight_entry(self.folder):
                    break
        return read_weights(self.folder)

    @property
    def licence(self) -> dict[str, str]:
        """`license`, `license_name` and `license_link` of its model card, if it has them."""
        try:
            card = metadata_load(self.folder / "README.md") or {}
        except Exception:  # no card, or a malformed one
            card = {}
        return {
            name: card[name] for name in ("license", "license_name", "license_link") if isinstance(card.get(name), str)
        }


def open_source(name: str | Path, revision: str | None = None, what: str = "SRC") -> Source:
    """Open a folder, or a repository on the Hub, of which everything but the weights is downloaded.

    Raises:
        InputError: there is no such folder or repository, or the download failed. The message names `what`.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise InputError(f"{what} {name!r} is not the name of a folder or of a Hub repository.")
    try:
        name = checkpoint_name(name)
        folder = Path(name)
        if folder.is_dir():
            check_folder(folder)
    except ValueError as error:
        raise InputError(f"{what}: {error}") from None
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision!r} is for the Hub, but {what} {name} is a folder.")
        return Source(str(name), folder, what)
    folder = _download(str(name), revision, _SMALL_FILES, what)
    return Source(str(name), folder, what, revision=folder.name)


def _download(repo_id: str, revision: str | None, files: list[str], what: str) -> Path:
    try:
        try:
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
        except OfflineModeIsEnabled:  # then huggingface_hub 1 does not look up a commit in the cache
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files, local_files_only=True))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = one_line(error)
        raise InputError(
            f"{what} {repo_id!r}{at} is not a folder, and its download from the Hub failed: {reason}"
        ) from None
