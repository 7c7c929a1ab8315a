# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From a model's name to its checkpoint: whether it is there, and whether it is a DeCo. Each error is one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from .configuration_deco import DecoConfig
from .errors import one_line


def checkpoint_name(name: str | os.PathLike) -> str:
    """What transformers is to load for a model's name: the path of a folder, `~` expanded, or a Hub id.

    Raises:
        ValueError: there is no such folder, and the name is no Hub id; the Hub is not asked.
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


def check_is_deco(model_type: str | None, name: str) -> None:
    """Raise a ValueError where the `model_type` of a config.json is not DeCo's; `name` is the model's."""
    if model_type != DecoConfig.model_type:
        raise ValueError(
            f"{name} is a {model_type!r} model, not a DeCo. deco convert makes one of a LLaVA; recipes/sft.py joins a "
            f"vision tower and a language model (--vision_model_name_or_path)."
        )


def load_config(name: str, revision: str | None = None) -> DecoConfig:
    """The config of a DeCo checkpoint, a folder or Hub id. Raises a ValueError where there is none."""
    path = checkpoint_name(name)
    with named_errors(name):  # the file alone: an Auto class might ask whether to run the code beside it
        fields, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        if not isinstance(fields, dict):
            raise ValueError("config.json is not a JSON object.")
    check_is_deco(fields.get("model_type"), name)
    with named_errors(name):
        return DecoConfig.from_dict(fields)


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """What libraries say of a checkpoint, as one line that names it: they raise errors of many kinds, and some name
    neither model nor file."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(f"{name} needs code that comes with it, and such code is not run.") from error
        raise ValueError(f"{name} cannot be loaded: {one_line(error)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is a lack of memory, of a GPU or of this machine."""
    is_named_so = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_named_so or "can't allocate memory" in str(error)  # a plain RuntimeError, on CPUs
