# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Read a LLaVA checkpoint of any format.

The files of a checkpoint show its format: the config of transformers' LLaVA has a `vision_config` and a
`text_config`; the config of the original code has `mm_*` fields.
"""

from ..llava import LLAVA_TYPES, check_features, is_llava, reason_against
from ..utils.errors import InputError, as_input_errors, wrap_errors
from .checkpoints import LlavaCheckpoint, check_complete
from .llava_hf import read_llava_hf
from .original import TEXT_MODELS, read_original
from .sources import Source


def read_checkpoint(source: Source, pooled_grid_size=None, vision_tower=None, base_model=None) -> LlavaCheckpoint:
    """Read a LLaVA checkpoint: its config, and the names, types and shapes of its tensors.

    Args:
        source: the checkpoint.
        pooled_grid_size: as in `convert`.
        vision_tower: folder or Hub id of the vision tower; replaces the one that the config names.
        base_model: folder or Hub id of the language model under a projector or LoRA adapters.

    Raises:
        InputError: it is no LLaVA checkpoint that can be converted, or it is incomplete or inconsistent.
    """
    with wrap_errors(f"config.json of {source.name}"):
        raw_config = source.read_config()
        _check_architecture(raw_config, source)
        if is_llava(raw_config):
            checkpoint = read_llava_hf(source, raw_config, pooled_grid_size)
        else:
            checkpoint = read_original(source, raw_config, pooled_grid_size, vision_tower, base_model)
        check_complete(checkpoint)
    return checkpoint


def _check_architecture(raw_config: dict, source: Source) -> None:
    model_type, where = raw_config.get("model_type"), f"config.json of {source.name}"
    if model_type == "deco":
        raise InputError(f"{source.name} is a DeCo checkpoint already; there is nothing to convert.")
    if not is_llava(raw_config) and (not isinstance(model_type, str) or model_type not in TEXT_MODELS):
        raise InputError(
            f"model_type {model_type!r} in {where} cannot be converted{reason_against(model_type)}. deco convert "
            f"takes {', '.join(LLAVA_TYPES)} of transformers, and {', '.join(TEXT_MODELS)} of the original code."
        )
    with as_input_errors():
        check_features(raw_config, where)
