# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of the original code, which are merged into the language model."""

import math
import re

from ..utils.errors import InputError
from .checkpoints import LlavaCheckpoint
from .layouts import ORIGINAL
from .sources import Source
from .stored import StoredTensor
from .tensors import MergedLora
from .weights import read_weight_file

# The fields of PEFT's LoraConfig have these values if the merged weight is W + B A * alpha / r.
_UNSET: tuple = (None, False, [], {})
_PLAIN_LORA = {
    "use_dora": _UNSET,
    "use_rslora": _UNSET,
    "rank_pattern": _UNSET,
    "alpha_pattern": _UNSET,
    "modules_to_save": _UNSET,
    "fan_in_fan_out": _UNSET,
    "layer_replication": _UNSET,
    "lora_bias": _UNSET,
    "init_lora_weights": (*_UNSET, True, "gaussian"),  # other values change W itself
}


def read_adapters(source: Source, adapter_config: dict) -> tuple[dict[str, dict], dict[str, StoredTensor]]:
    """The pairs of LoRA matrices by module, and the tensors that were trained without LoRA."""
    if adapter_config.get("peft_type", "LORA") != "LORA":
        raise InputError(
            f"peft_type {adapter_config['peft_type']!r} in adapter_config.json of {source.name} is not 'LORA'."
        )
    for name, values in _PLAIN_LORA.items():
        if adapter_config.get(name) not in values:
            raise InputError(
                f"{name}={adapter_config[name]!r} in adapter_config.json of {source.name} is not what LLaVA's "
                f"training writes; merge the adapters with PEFT first."
            )
    rank, alpha = adapter_config.get("r"), adapter_config.get("lora_alpha")
    if (
        type(rank) is not int
        or rank < 1
        or isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not math.isfinite(alpha)
    ):
        raise InputError(
            f"adapter_config.json of {source.name} has r={rank!r} and lora_alpha={alpha!r}; they must be numbers, "
            f"and r at least 1."
        )
    folder = source.folder
    names = ("adapter_model.safetensors", "adapter_model.bin")
    file = next((name for name in names if (folder / name).exists()), None)
    if file is None:
        raise InputError(f"{source.name} has adapter_config.json, but no adapter_model.safetensors or .bin.")
    adapters: dict[str, dict] = {}
    trained = read_weight_file(folder / "non_lora_trainables.bin")
    for key, tensor in read_weight_file(folder / file).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match:
            adapters.setdefault(match[1], {"scale": alpha / rank})[f"lora_{match[2].lower()}"] = tensor
        else:
            trained[key] = tensor
    if not adapters:
        raise InputError(f"{file} of {source.name} holds no LoRA matrices.")
    for module, adapter in adapters.items():
        if adapter.keys() != {"scale", "lora_a", "lora_b"}:
            raise InputError(f"{file} of {source.name} has only one of lora_A and lora_B for {module!r}.")
        shape_a, shape_b = adapter["lora_a"].shape, adapter["lora_b"].shape
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != rank or shape_b[1] != rank:
            raise InputError(
                f"{module!r} in {file} of {source.name}: lora_A {shape_a} and lora_B {shape_b} are not matrices of "
                f"rank r={rank}."
            )
    return adapters, trained


def merge_adapters(checkpoint: LlavaCheckpoint, adapters: dict[str, dict]) -> None:
    """Replace the weights that have adapters by the merged ones."""
    for module, matrices in adapters.items():
        name, _ = ORIGINAL.rename(f"{module}.weight")
        if name is None or name not in checkpoint.tensors:
            raise InputError(f"The LoRA adapters are for {module!r}, which the base model does not have.")
        weight = checkpoint.tensors[name]
        shape = (matrices["lora_b"].shape[0], matrices["lora_a"].shape[1])
        if weight.shape != shape:
            raise InputError(
                f"The LoRA adapters of {module!r} are for a weight of shape {shape}, and that of the base model "
                f"{weight.path.parent} is {weight.shape}; pass the right --base-model."
            )
        checkpoint.files.add(matrices["lora_a"].path)
        checkpoint.tensors[name] = MergedLora(weight, **matrices, dtype=weight.dtype)
