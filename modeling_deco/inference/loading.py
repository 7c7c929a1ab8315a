# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint and its processor: device, dtype, quantization, adapter."""

import os
import re
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoProcessor, ProcessorMixin

from ..configuration_deco import DecoConfig
from ..llava import check_safetensors, is_llava, refusal
from ..modeling_deco import DecoForConditionalGeneration
from ..processing_deco import DecoProcessor
from ..utils.child_process import run_within_limits
from .adapters import add_adapter, check_adapter, find_adapter
from .errors import named_errors
from .folders import check_fields, check_folder, check_processor
from .lookup import checkpoint_name, has_file, read_json
from .quantization import nf4_config, quantize_to_int8
from .weights import check_tensors, check_weights, empty_model

DTYPES = ("auto", "float32", "float16", "bfloat16")


def load(
    model: str | os.PathLike,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    in_4bit: bool = False,
    in_int8: bool = False,
    image_positions: str | None = None,
) -> tuple[DecoForConditionalGeneration, ProcessorMixin]:
    """Load a checkpoint and its processor.

    It is a DeCo, a LLaVA of transformers, which is loaded as it is at its patch grid, or an adapter, which is loaded
    onto its base model.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        device: `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`. Default: the GPUs, over all of which accelerate spreads the
            model if it is installed, or the CPU if there is no GPU.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"` for the dtype of the checkpoint.
        attn_implementation: `"sdpa"`, `"flash_attention_2"`, ...; default: transformers' choice.
        in_4bit: quantize the language model's layers to NF4.
        in_int8: compute the layers that are not in 4 bits in int8, as `quantize_to_int8` does.
        image_positions: `"patch"` or `"sequence"`, see `DecoConfig`. Default: the checkpoint's.

    Raises:
        ValueError: there is no such checkpoint or device, or the checkpoint is not a DeCo, is broken, has no chat
            template, or cannot have these positions. The message is one line.
        ImportError: a library that the checkpoint needs is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    device = _check_device(device)
    arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if in_4bit:
        arguments["quantization_config"] = nf4_config()
    config = load_config(model, revision)
    adapter = find_adapter(model, revision)
    is_quantized = in_4bit or getattr(config, "quantization_config", None) is not None
    if adapter is not None and is_quantized and in_int8:
        raise ValueError(f"{model} is an adapter, which cannot be merged in 4 bits: merge it before you use --int8.")
    has_accelerate = find_spec("accelerate") is not None
    if has_accelerate and device is not None:
        arguments["device_map"] = {"": device}  # without a copy in the memory of the machine
    elif has_accelerate and torch.cuda.is_available():
        arguments["device_map"] = "auto" if torch.cuda.device_count() > 1 else {"": "cuda"}
    processor = load_processor(model, revision)
    if adapter is not None:
        arguments["pooled_grid_size"] = processor.pooled_grid_size
    loaded = load_model(model, revision, **arguments)
    if not has_accelerate:
        loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if image_positions is not None:
        loaded.config.image_positions = loaded.model.check_image_positions(image_positions)
    return quantize_to_int8(loaded) if in_int8 else loaded, processor


def _check_device(name: str | None) -> str | None:
    """Return the name of a device. Raise a ValueError if there is no such device."""
    if name is None:
        return None
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"The device must be cpu, cuda, cuda:N or mps, got {name!r}.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("There is no device 'mps': PyTorch finds no Apple GPU.")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= num_gpus:
        raise ValueError(f"There is no device {name!r}: PyTorch finds {num_gpus} CUDA GPUs.")
    return name


def load_processor(model: str | os.PathLike, revision: str | None = None) -> ProcessorMixin:
    """Load the processor of a checkpoint. If an adapter has none, load that of its base model.

    Raises:
        ValueError: there is no such checkpoint, or its processor is broken or has no chat template.
    """
    adapter = find_adapter(model, revision)
    if adapter is not None and not has_file(model, "processor_config.json", revision):
        model, revision = adapter.base, adapter.base_revision
    with named_errors(model):
        path, arguments = checkpoint_name(model), {"revision": revision or "main", "trust_remote_code": False}
        if _is_llava(model, revision):
            # a template that never ends is refused before it is rendered here
            template = run_within_limits(
                lambda: DecoProcessor.from_pretrained(path, **arguments).chat_template, "its chat template"
            )
            processor = DecoProcessor.from_pretrained(path, chat_template=template, **arguments)
        else:
            processor = AutoProcessor.from_pretrained(path, **arguments)
        if processor.chat_template is None:
            raise ValueError("it has no chat template.")
    check_processor(processor, model)
    return processor


def load_config(name: str | os.PathLike, revision: str | None = None) -> DecoConfig:
    """Load the config of a DeCo or LLaVA, a folder or Hub id. For an adapter it is that of its base model.

    Raises:
        ValueError: there is no such checkpoint, or it is neither a DeCo nor a LLaVA that DeCo supports.
    """
    path = checkpoint_name(name)
    if os.path.isdir(path):
        check_folder(path)
    adapter = find_adapter(name, revision)
    if adapter is not None:
        return load_config(adapter.base, adapter.base_revision)
    fields = read_json(name, "config.json", revision)
    if fields is None:
        raise ValueError(f"{name} is not a model: it has no config.json.")
    check_fields(fields, f"config.json of {name}")
    if is_llava(fields):
        with named_errors(name):
            return DecoConfig.from_pretrained(path, revision=revision or "main")
    check_is_deco(fields.get("model_type"), os.fspath(name))
    with named_errors(name):
        return DecoConfig.from_dict(fields)


def check_is_deco(model_type: str | None, name: str) -> None:
    """Raise a ValueError if the `model_type` of a config.json is not DeCo's. `name` is that of the model."""
    if model_type != DecoConfig.model_type:
        raise ValueError(refusal(model_type, name))


def _is_llava(name: str | os.PathLike, revision: str | None) -> bool:
    return is_llava(read_json(name, "config.json", revision) or {})


def load_model(name: str | os.PathLike, revision: str | None = None, **arguments) -> DecoForConditionalGeneration:
    """Load a DeCo or LLaVA and check that no weights are missing.

    For an adapter, load its base model and merge the adapter into it. If the weights are quantized, keep the adapter
    as separate layers.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        arguments: arguments of `DecoForConditionalGeneration.from_pretrained`.

    Raises:
        ValueError: there is no such checkpoint, it is neither a DeCo nor a LLaVA, or its weights are not those of its
            config.
    """
    adapter = find_adapter(name, revision)
    if adapter is not None:
        check_adapter(adapter)
        return add_adapter(load_model(adapter.base, adapter.base_revision, **arguments), adapter)
    config = load_config(name, revision)
    path = checkpoint_name(name)
    if os.path.isdir(path):
        if _is_llava(name, revision):
            check_safetensors(path)
        check_weights(name, revision, config)  # before memory is allocated for the sizes in the config
    with named_errors(name):
        model, info = DecoForConditionalGeneration.from_pretrained(
            path,
            revision=revision or "main",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            **arguments,
        )
    is_quantized = getattr(config, "quantization_config", None) is not None
    check_tensors(
        name,
        len(model.state_dict()),
        info["missing_keys"],
        {key: shapes for key, *shapes in info["mismatched_keys"]},
        () if is_quantized else info["unexpected_keys"],
    )
    return model


def check_checkpoint(name: str, revision: str | None, config: DecoConfig) -> None:
    """Compare a checkpoint's weights, and those of its adapter, with the model of its config, without reading them.

    Raises:
        ValueError: weights are missing, have another shape, or have no place in the model.
    """
    adapter = find_adapter(name, revision)
    if adapter is None:
        return check_weights(name, revision, config)
    check_adapter(adapter)
    check_weights(adapter.base, adapter.base_revision, config)
    add_adapter(empty_model(config), adapter, reads_weights=False)
