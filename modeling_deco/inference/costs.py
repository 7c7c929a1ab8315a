# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model and its answers cost: parameters and memory from the config, and measured time and memory."""

import time
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_deco import DecoConfig, num_image_tokens
from ..utils.measure import synchronize
from ..views import TokenMap, num_map_tokens, num_map_views, one_map
from .adapters import find_adapter
from .loading import check_checkpoint, load_config
from .lookup import checkpoint_name
from .weights import empty_model

# NF4 has 4 bits for each weight and a float32 scale for each block of 64 weights.
_NF4_BYTES = 0.5 + 4 / 64
# The YAML reader would take half a minute for a card of a megabyte.
_CARD_BYTES = 128 << 10
_SIDES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def kv_cache_bytes(text_config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the key-value cache for a number of tokens if every layer attends to all tokens."""
    heads = text_config.num_attention_heads
    num_key_value_heads = getattr(text_config, "num_key_value_heads", None) or heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return 2 * text_config.num_hidden_layers * num_key_value_heads * head_dim * num_tokens * dtype.itemsize


def format_size(num_bytes: float) -> str:
    """Format bytes to three digits in the largest fitting unit: `"73.7 kB"`."""
    units = ["bytes", "kB", "MB", "GB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes, units = num_bytes / 1000, units[1:]
    return f"{num_bytes:.3g} {units[0]}" if num_bytes < 1000 else f"{num_bytes:.0f} {units[0]}"


def describe(model: str, revision: str | None = None, image_positions: str | None = None) -> dict:
    """Describe a DeCo checkpoint: its licence, and what `describe_config` reads from its config.

    The names and shapes of the weights are compared with the config. The weights are not read.

    Args:
        model: folder or Hub id. For an adapter, its base model is described.
        revision: branch, tag or commit on the Hub.
        image_positions: as in `load`.

    Raises:
        ValueError: there is no such checkpoint, it is not a DeCo, or its weights do not fit its config.
    """
    config, adapter = load_config(model, revision), find_adapter(model, revision)
    config.image_positions = config.check_image_positions(image_positions)
    check_checkpoint(model, revision, config)
    card = _read_card(model, revision)
    return {
        "model": model,
        "adapter_of": None if adapter is None else adapter.base,
        "license": card.get("license"),
        "base_model": card.get("base_model"),
        **describe_config(config),
    }


def describe_config(config: DecoConfig) -> dict:
    """Describe a config: token flow, parameters of each part, memory by grid and dtype.

    Returns:
        A dict for JSON. The vision tower's `layers` are None if its output is a feature map. Grids are `[rows, cols]`.
        Tokens and positions are those of an image, of the one that takes most if the model cuts images into views.
        Memory is in bytes: `weights` by dtype, and `kv_cache`, which one image adds, by grid. `"4bit"` has the layers
        of the language model in NF4 and the rest in 16 bits. Activations need memory in addition.
    """
    empty = empty_model(config)
    in_language_layers = {id(layer.weight) for layer in _linears(empty.model.language_model)}
    num_quantized = sum(weight.numel() for weight in empty.parameters() if id(weight) in in_language_layers)
    parameters = {
        "vision_tower": _count(empty.model.vision_tower),
        "projector": _count(empty.model.multi_modal_projector),
        "language_model": _count(empty) - _count(empty.model.vision_tower, empty.model.multi_modal_projector),
    }
    total = sum(parameters.values())
    tower, text = config.vision_config, config.text_config
    maps = max(_maps_of_images(config, config.pooled_grid), key=num_map_tokens)
    tokens_of_grids = [
        (grid, max(map(num_map_tokens, _maps_of_images(config, (grid[0], grid[1]))))) for grid in default_grids(config)
    ]
    return {
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        "quantization": (getattr(config, "quantization_config", None) or {}).get("quant_method"),
        "vision_tower": {
            "type": tower.model_type,
            "layers": tower.num_hidden_layers if config.feature_map is None else None,
            "hidden_size": config.vision_hidden_size,
        },
        "patch_size": config.patch_size,
        "patch_grid": list(config.patch_grid),
        "num_views": max(map(num_map_views, _maps_of_images(config, config.pooled_grid))),
        "projector_type": config.projector_type,
        "pooled_grid_size": list(config.pooled_grid),
        "num_image_tokens": num_map_tokens(maps),
        "pooled_video_grid_size": None if config.video_token_id is None else list(config.pooled_video_grid),
        "image_positions": config.image_positions,
        "num_image_positions": sum(token_map.span for token_map in maps)
        if config.image_positions == "patch"
        else num_map_tokens(maps),
        "takes_any_grid": config.takes_any_grid,
        "language_model": {
            "type": text.model_type,
            "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
        },
        "parameters": {**parameters, "total": total},
        "weights": {
            "float32": 4 * total,
            "16bit": 2 * total,
            "4bit": round(2 * (total - num_quantized) + _NF4_BYTES * num_quantized),
        },
        "grids": [
            {
                "pooled_grid_size": grid,
                "num_image_tokens": num_tokens,
                "kv_cache": {
                    "float32": kv_cache_bytes(text, num_tokens, torch.float32),
                    "16bit": kv_cache_bytes(text, num_tokens, torch.float16),
                },
            }
            for grid, num_tokens in tokens_of_grids
        ],
    }


def _maps_of_images(config: DecoConfig, pooled_grid: tuple[int, int]) -> list[list[TokenMap]]:
    """The maps of an image of each size that the model has."""
    if config.image_grid_pinpoints is None:
        return [one_map(config.patch_grid, pooled_grid)]
    return [config.views.image_maps((height, width), pooled_grid) for height, width in config.image_grid_pinpoints]


def default_grids(config: DecoConfig) -> list[list[int]]:
    """The config's grid. If the projector takes any grid, also squares up to the patch grid, and the patch grid."""
    grids = {config.pooled_grid}
    if config.takes_any_grid:
        grids |= {(side, side) for side in _SIDES if side <= min(config.patch_grid)} | {config.patch_grid}
    return [list(grid) for grid in sorted(grids, key=num_image_tokens)]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _read_card(model: str, revision: str | None) -> dict:
    """Read the text fields of the model card, such as licence and base models; empty if there is no card.

    Other types are left out: YAML's references can expand to more than fits in memory.
    """
    model = checkpoint_name(model)
    path = Path(model, "README.md")
    if not Path(model).is_dir():
        try:
            path = Path(hf_hub_download(model, "README.md", revision=revision))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return {}
    if path.exists() and path.stat().st_size > _CARD_BYTES:
        return {}
    try:
        card = metadata_load(path) or {}
    except Exception:  # no card, or any error of the YAML reader on a malformed one
        return {}
    return {name: value for name, value in card.items() if _is_text(value)} if isinstance(card, dict) else {}


def _is_text(value) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


# --- measured --------------------------------------------------------------------------------------------------------


class PrefillClock:
    """Measure the prefill of an answer, which is the first forward pass of a model in a `with` block.

    Attributes:
        seconds: time from the inputs of the pass to the logits of the first token; 0 until then.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.seconds = 0.0
        self._start: float | None = None

    def __enter__(self):
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._hooks = [before, self.model.register_forward_hook(self._after)]
        return self

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()

    def _before(self, model, args, kwargs):
        if self._start is None:
            self._start = now(kwargs["input_ids"])

    def _after(self, model, args, output):
        if self.seconds == 0 and self._start is not None:
            self.seconds = now(output.logits) - self._start


def now(tensor: torch.Tensor) -> float:
    """`time.perf_counter` after the device of a tensor has finished its work."""
    synchronize(tensor.device)
    return time.perf_counter()


def reset_peak_gpu_memory() -> None:
    """Start a new measurement of `peak_gpu_memory`."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def peak_gpu_memory() -> int:
    """Largest number of bytes that tensors took, including weights, summed over GPUs."""
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
