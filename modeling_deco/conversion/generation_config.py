# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The generation config of a converted checkpoint."""

from pathlib import Path

from transformers import GenerationConfig

from ..llava import generation_config_of
from ..utils.errors import InputError, one_line
from ..utils.files import read_settings


def load_generation_config(folder, tokenizer) -> GenerationConfig:
    """The settings in `generation_config.json` of a folder, or new ones, as `llava.generation_config_of` takes them.

    Raises:
        InputError: settings in the file contradict each other.
    """
    path = Path(folder) / "generation_config.json"
    settings = read_settings(path)
    try:
        return generation_config_of(settings, tokenizer)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not valid ({one_line(error)}); fix it or remove it.") from error
