# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The generation config of a converted checkpoint."""

from pathlib import Path

from transformers import GenerationConfig

from ..utils.errors import InputError, one_line
from ..utils.files import read_settings

# Settings that have an effect only with sampling or with beams. Without these, transformers refuses to save them.
_SAMPLING_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_BEAM_SETTINGS = ("early_stopping", "length_penalty")


def load_generation_config(folder, tokenizer) -> GenerationConfig:
    """The settings in `generation_config.json`, or new ones without the file.

    Special tokens that the file does not set are those of the tokenizer, if there is one; so is the padding token.
    Settings without effect, such as the temperature without sampling in Vicuna's file, are left out: transformers does
    not save them.

    Raises:
        InputError: settings in the file contradict each other.
    """
    path = Path(folder) / "generation_config.json"
    settings = read_settings(path)
    if tokenizer is not None:
        settings = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **settings}
        settings["pad_token_id"] = tokenizer.pad_token_id
    idle = ["transformers_version", "_from_model_config"]  # of the program that wrote the file
    if not settings.get("do_sample"):
        idle += _SAMPLING_SETTINGS
    if settings.get("num_beams", 1) == 1:
        idle += _BEAM_SETTINGS
    try:
        config = GenerationConfig(**{name: value for name, value in settings.items() if name not in idle})
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not valid ({one_line(error)}); fix it or remove it.") from error
    return config
