# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints come from: a folder, or a repository on the Hub at one revision."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..inference.folders import check_folder
from ..inference.lookup import checkpoint_name
from ..utils.errors import ConversionError, one_line
from ..utils.files import read_json
from .weights import StoredTensor, read_weight_map, read_weights, weight_entry

# All but the weights of a whole model, which may be there twice, as safetensors and as pickles.
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
    """A checkpoint that is read.

    `name` is as the user gave it, by the option `what`; `revision` is the commit of a repository on the Hub, None for
    a folder.
    """

    name: str
    folder: Path
    what: str
    revision: str | None = None

    @property
    def title(self) -> str:
        """Its name where others read it: no path of this machine."""
        return self.name if self.revision else self.folder.resolve().name

    def read_config(self) -> dict:
        return read_json(self.folder / "config.json")

    def read_weights(self) -> dict[str, StoredTensor]:
        """The tensors of a whole model; fetches them first where the source is on the Hub."""
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
        """`license`, `license_name` and `license_link` of its model card, those that it has."""
        try:
            card = metadata_load(self.folder / "README.md") or {}
        except Exception:  # no card, or what YAML makes of a malformed one
            card = {}
        return {
            name: card[name] for name in ("license", "license_name", "license_link") if isinstance(card.get(name), str)
        }


def open_source(name: str | Path, revision: str | None = None, what: str = "SRC") -> Source:
    """A folder, or else a repository on the Hub, of which all but the weights is fetched.

    Raises:
        ConversionError: it is neither, or cannot be fetched; `what` names the option in the message.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise ConversionError(f"{what} {name!r} is no name of a folder or a Hub repository.")
    try:
        name = checkpoint_name(name)
        folder = Path(name)
        if folder.is_dir():
            check_folder(folder)
    except ValueError as error:
        raise ConversionError(f"{what}: {error}") from None
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"--revision {revision!r} is for the Hub, and {what} {name} is a folder.")
        return Source(str(name), folder, what)
    folder = _download(str(name), revision, _SMALL_FILES, what)
    return Source(str(name), folder, what, revision=folder.name)


def _download(repo_id: str, revision: str | None, files: list[str], what: str) -> Path:
    try:
        try:
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
        except OfflineModeIsEnabled:  # huggingface_hub 1 does not look into the cache then for a commit
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files, local_files_only=True))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = one_line(error)
        raise ConversionError(
            f"{what} {repo_id!r}{at} is no folder here, and fetching it from the Hub failed: {reason}"
        ) from None
