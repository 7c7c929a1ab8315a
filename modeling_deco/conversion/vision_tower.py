# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The vision tower of a checkpoint of the original code."""

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..utils.errors import InputError, wrap_errors
from .checkpoints import LlavaCheckpoint, add_tensors
from .layouts import COPIED_TOWER, VISION_TOWER
from .sources import Source
from .tensors import SourceTensor


def read_vision_tower(checkpoint: LlavaCheckpoint, tower: Source, is_trained: bool) -> None:
    """Take the vision tower that the original code runs.

    It is the tower in the checkpoint if it was trained, otherwise the one that the config names. A tower in the
    checkpoint that was not trained is a copy of that one, rounded to the type of the training.
    """
    inside = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.vision_tower.")}
    if inside and is_trained:
        return
    named = LlavaCheckpoint("vision tower", {}, {}, {}, tower, tower)
    is_whole = "model.vision_tower.embeddings.patch_embedding.weight" in inside  # LoRA may train its biases alone
    try:
        add_tensors(named, tower.read_weights(), VISION_TOWER)
    except InputError:
        if is_whole:  # then the copy is the only tower
            return
        raise
    if is_whole and not all(_is_rounded(tensor, named.tensors.get(name)) for name, tensor in inside.items()):
        return
    checkpoint.dropped |= named.dropped | {tensor.key: COPIED_TOWER for tensor in inside.values()}
    checkpoint.files |= named.files
    checkpoint.tensors |= named.tensors


def _is_rounded(tensor: SourceTensor, original: SourceTensor | None) -> bool:
    """Whether a tensor is the original, rounded to the type of the tensor."""
    if original is None or original.shape != tensor.shape:
        return False
    return torch.equal(original.read().to(tensor.dtype), tensor.read())


def read_vision_config(tower: Source) -> PreTrainedConfig:
    """The vision config in a folder of a vision tower alone, or of a whole CLIP or SigLIP."""
    with wrap_errors(f"config.json of --vision-tower {tower.name}"):
        config = AutoConfig.from_pretrained(tower.folder, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    config.name_or_path = ""  # it may be a path of this machine
    return config
