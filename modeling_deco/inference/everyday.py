# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The checkpoint `deco-everyday`: the package has what was trained, and the language model is installed by name.

The parts lie in `checkpoints/deco-everyday`: configs and templates, `vision_tower.safetensors`,
`multi_modal_projector.safetensors`, and `adapter/`, a LoRA adapter of the language model in PEFT's format.
`worlds/emoji/ship.py` writes them. Here they become one folder in the user's cache, like any other checkpoint.
"""

import shutil
from functools import partial
from pathlib import Path

import torch

from .. import SHIPPED_CHECKPOINT
from ..utils.cache import cache, cached_folder
from ..utils.errors import InputError
from ..utils.files import read_json
from .smollm2 import INSTALL, find_smollm2, read_llama

PARTS = SHIPPED_CHECKPOINT.with_name("deco-everyday")
TOWER, PROJECTOR, ADAPTER = "vision_tower.safetensors", "multi_modal_projector.safetensors", "adapter"
_NUM_BYTES = 700_000_000


def everyday_checkpoint() -> Path:
    """The folder of `deco-everyday`, which answers in English about pictures of everyday things.

    It is assembled in the user's cache in 10 seconds, and again when it is damaged or its parts change.

    Raises:
        InputError: the language model is not installed, or this package has no parts; the message is one line.
        OSError: the cache cannot be written.
    """
    language_model = find_smollm2()
    if language_model is None or missing() is not None:
        raise InputError(f"deco-everyday cannot be assembled: {missing()}")
    code = [*sorted(PARTS.parents[1].glob("*.py")), Path(__file__), Path(__file__).with_name("smollm2.py")]
    make = partial(assemble, PARTS, language_model)
    return cached_folder(PARTS.name, [language_model, PARTS, *code], _NUM_BYTES, make)


def default_checkpoint() -> Path:
    """The checkpoint of commands that name none: `everyday_checkpoint()`, or the digits where it is not available."""
    return SHIPPED_CHECKPOINT if missing() is not None else everyday_checkpoint()


def cached_path() -> Path:
    """Where `everyday_checkpoint` assembles the folder, which may not be there yet."""
    return cache() / PARTS.name


def missing() -> str | None:
    """What `deco-everyday` lacks here, and how to install it. None if it can be assembled."""
    if not (PARTS / ADAPTER / "adapter_model.safetensors").is_file():
        return "this version of modeling_deco has no weights of it"
    return None if find_smollm2() is not None else f"its language model is not installed: {INSTALL}"


def assemble(parts: Path, language_model: Path, folder: Path) -> None:
    """Write a whole checkpoint into an empty folder.

    Args:
        parts: a folder that `worlds/emoji/ship.py` wrote.
        language_model: GGUF file of the language model.
        folder: gets the model in float32, its processor, and the code for `trust_remote_code=True`.

    Raises:
        ValueError: the parts are not those of a DeCo with this language model.
    """
    from safetensors.torch import load_file, save_file

    from ..hub import copy_remote_code
    from .loading import load_config
    from .weights import check_weights

    _, text_weights, tokenizer = read_llama(language_model)
    text_weights.pop("lm_head.weight")  # tied
    weights = {key.replace("model.", "model.language_model.", 1): weight for key, weight in text_weights.items()}
    merge_adapter(weights, parts / ADAPTER)
    for name in (TOWER, PROJECTOR):
        weights |= {key: _to_float32(weight) for key, weight in load_file(parts / name).items()}
    for path in parts.iterdir():
        if path.is_dir() and path.name != ADAPTER:
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    copy_remote_code(folder)
    check_weights(folder, None, load_config(folder))


def merge_adapter(weights: dict[str, torch.Tensor], adapter: Path) -> None:
    """Add a LoRA adapter to weights in float32, as PEFT's `merge_and_unload` does: W + B A * alpha / r.

    Raises:
        InputError: the adapter is for other weights.
    """
    from safetensors.torch import load_file

    config, matrices = read_json(adapter / "adapter_config.json"), load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for key in [key for key in matrices if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight, lora_a = weights.get(f"{module}.weight"), matrices.pop(key).float()
        lora_b = matrices.pop(key.replace(".lora_A.", ".lora_B.")).float()
        if weight is None or weight.shape != (lora_b.shape[0], lora_a.shape[1]):
            raise InputError(f"{adapter} has matrices for {module}, which the language model does not have so.")
        weight += (lora_b @ lora_a) * scale
    if matrices:
        raise InputError(f"{adapter} has more than LoRA matrices: {sorted(matrices)[:3]}.")


def _to_float32(weight: torch.Tensor) -> torch.Tensor:
    return weight.float() if weight.is_floating_point() else weight  # batch norms count their batches
