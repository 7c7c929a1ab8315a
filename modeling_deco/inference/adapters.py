# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters: find their base model, and add them to it."""

import os
import warnings
from importlib.util import find_spec
from typing import NamedTuple

from safetensors import safe_open

from ..modeling_deco import DecoForConditionalGeneration
from .errors import named_errors
from .lookup import checkpoint_name, find_file, read_json
from .weights import check_tensors


class Adapter(NamedTuple):
    """A PEFT adapter and its base model. `base` is a folder or Hub id."""

    name: str
    revision: str | None
    base: str
    base_revision: str | None


def find_adapter(name: str | os.PathLike, revision: str | None = None) -> Adapter | None:
    """Find the adapter of this name; None if the name is that of a whole model.

    Raises:
        ValueError: there is no such folder or repository, or the base model of the adapter is not found.
    """
    if find_file(name, "config.json", revision) is not None:
        if os.path.exists(os.path.join(checkpoint_name(name), "adapter_config.json")):
            raise ValueError(
                f"{name} has both a model (config.json) and an adapter (adapter_config.json); separate them."
            )
        return None
    fields = read_json(name, "adapter_config.json", revision)
    if fields is None:
        return None
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"adapter_config.json of {name} does not name its base model (base_model_name_or_path).")
    folder, base = checkpoint_name(name), os.path.expanduser(base)
    places = [os.path.join(folder, base)]
    if os.path.isabs(base):  # training saves the base beside the adapter, and both may have been moved since
        places += [os.path.join(folder, *up, os.path.basename(base)) for up in ([], [".."])]
    base = next((place for place in places if os.path.isdir(place)), base)
    try:
        checkpoint_name(base)
    except ValueError as error:
        raise ValueError(
            f"{name} is an adapter, and its base model is missing (base_model_name_or_path in adapter_config.json): "
            f"{error}"
        ) from None
    if find_file(base, "config.json", fields.get("revision")) is None:
        raise ValueError(f"{name} is an adapter of {base}, which is not a model: it has no config.json.")
    return Adapter(os.fspath(name), revision, base, fields.get("revision"))


def check_adapter(adapter: Adapter) -> None:
    """Raise a ValueError if PEFT is not installed, or if this kind of adapter cannot be merged."""
    if find_spec("peft") is None:
        raise ValueError(
            f"{adapter.name} is an adapter, which needs peft: pip install peft. Training with --merge_adapter true "
            f"also writes the model with the adapter merged into it."
        )
    from peft import PeftConfig

    with named_errors(adapter.name):
        config = PeftConfig.from_pretrained(checkpoint_name(adapter.name), revision=adapter.revision)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"{adapter.name} is an adapter of the kind {config.peft_type.value}, which cannot be merged.")


def add_adapter(model: DecoForConditionalGeneration, adapter: Adapter, reads_weights: bool = True):
    """Add an adapter to a model: merged into its weights or, if they are quantized, as separate layers."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    file = find_file(adapter.name, "adapter_model.safetensors", adapter.revision)
    if file is None:
        raise ValueError(f"{adapter.name} has no adapter_model.safetensors.")
    path = checkpoint_name(adapter.name)
    names = set(model.state_dict())
    with named_errors(adapter.name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about weights, which are checked here
        config = PeftConfig.from_pretrained(path, revision=adapter.revision)
        config.inference_mode = True
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)  # allocates no memory for the sizes in the config
        with safe_open(file, "pt") as tensors:
            stored = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    mismatched = {
        key: (shape, tuple(expected[key].shape))
        for key, shape in stored.items()
        if key in expected and tuple(expected[key].shape) != shape
    }
    check_tensors(
        adapter.name,
        len(expected),
        expected.keys() - stored.keys(),
        mismatched,
        [key for key in stored.keys() - expected.keys() if key.removeprefix("base_model.model.") not in names],
    )
    if not reads_weights:
        return model
    with named_errors(adapter.name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.load_adapter(path, "default", revision=adapter.revision, low_cpu_mem_usage=True)
        for module in adapted.modules():  # trained in float32, beside parts that may have 16 bits
            if isinstance(module, ModulesToSaveWrapper):
                module.modules_to_save.to(next(module.original_module.parameters()).dtype)
        newline = model.base_model.image_newline  # trained beside the adapter
        if newline is not None:
            newline.data = newline.data.to(model.dtype)
        if getattr(model.config, "quantization_config", None) is not None:
            return adapted.get_base_model()  # merging would round the weights again
        return adapted.merge_and_unload()
