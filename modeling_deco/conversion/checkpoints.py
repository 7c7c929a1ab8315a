# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA checkpoints of every format, read as one thing: a DeCo config and tensors by DeCo's names.

The format is told by what the files hold: transformers' LLaVA has a `vision_config` and a `text_config`; the original
code's config has `mm_*` fields, and beside it lies a whole model, or a projector alone (stage 1), or LoRA adapters.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, LlavaConfig

from ..configuration_deco import DecoConfig, check_grid, fit_grid
from ..modeling_deco import DecoForConditionalGeneration
from ..utils.errors import ConversionError
from ..utils.files import read_json, refusing, value_errors
from .layouts import (
    COPIED_TOWER,
    LLAVA_HF,
    ORIGINAL,
    TIED,
    UNUSED_HEAD,
    UNUSED_LAYER,
    VISION_TOWER,
    Layout,
    layer_index,
)
from .sources import Source, open_source
from .tensors import MergedLora
from .weights import StoredTensor, read_weight_file, weight_entry
from .writing import digest_of

# model types of the original code, and the language models in them
_TEXT_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
# what fields of PEFT's LoraConfig are where the weight is W + B A * alpha / r
_UNSET = (None, False, [], {})
_PLAIN_LORA = {
    "use_dora": _UNSET,
    "use_rslora": _UNSET,
    "rank_pattern": _UNSET,
    "alpha_pattern": _UNSET,
    "modules_to_save": _UNSET,
    "fan_in_fan_out": _UNSET,
    "layer_replication": _UNSET,
    "lora_bias": _UNSET,
    "init_lora_weights": (*_UNSET, True, "gaussian"),  # others change W itself
}
# what the original code adds to a language model's config, and what belongs to a file and not to a model
_NOT_TEXT_FIELD = (
    r"(mm|tune_mm|freeze_mm|unfreeze_mm|use_mm|image|s2)_.*|.*query_num|tokenizer_(model_max_length|padding_side)|"
    r"model_type|architectures|auto_map|_name_or_path|transformers_version|use_cache|s2"
)


@dataclass
class LlavaCheckpoint:
    """A LLaVA checkpoint under DeCo's names.

    `tensors` has a tensor for each parameter of the model, `dropped` the keys that were left behind and why, `files`
    are the weight files they lie in. `sources` are the folders by role, of which "source" is the checkpoint itself;
    `tokenizer` and `image_processor` are the ones that have those files.
    """

    format: str
    config: DecoConfig
    sources: dict[str, Source]
    tensors: dict[str, StoredTensor | MergedLora]
    dropped: dict[str, str]
    tokenizer: Source
    image_processor: Source
    files: set[Path] = field(default_factory=set)
    is_trained_pooled: bool = False
    image_aspect_ratio: str | None = None
    extra_tokens: list[str] = field(default_factory=list)


def read_checkpoint(source: Source, pooled_grid_size=None, vision_tower=None, base_model=None) -> LlavaCheckpoint:
    """Read a LLaVA checkpoint: all that can be known without reading a tensor's values.

    Args:
        source: the checkpoint.
        pooled_grid_size: DeCo's grid, an int or `[rows, cols]`; default: the one the checkpoint was trained with
            where it is a DeCo, else 12 x 12 or the patch grid where that is smaller.
        vision_tower: folder or Hub id of the tower, in place of the one that the config names.
        base_model: folder or Hub id of the language model under a projector or LoRA adapters.

    Raises:
        ConversionError: it is no LLaVA checkpoint that a DeCo can be made of, or it is incomplete or inconsistent.
    """
    with refusing(f"config.json of {source.name}"):
        raw_config = source.read_config()
        _check_architecture(raw_config, source)
        if "vision_config" in raw_config or "text_config" in raw_config:
            checkpoint = _read_llava_hf(source, raw_config, pooled_grid_size)
        else:
            checkpoint = _read_original(source, raw_config, pooled_grid_size, vision_tower, base_model)
        _check_complete(checkpoint)
    return checkpoint


def _check_architecture(raw_config: dict, source: Source) -> None:
    model_type, where = raw_config.get("model_type"), f"config.json of {source.name}"
    if model_type == "deco":
        raise ConversionError(f"{source.name} is a DeCo checkpoint already; nothing is left to convert.")
    if not isinstance(model_type, str) or model_type not in _TEXT_MODELS:
        raise ConversionError(
            f"model_type {model_type!r} in {where} is not LLaVA-1.5's; convertible are {', '.join(_TEXT_MODELS)}."
        )
    if raw_config.get("quantization_config"):
        raise ConversionError(
            f"{where} has a quantization_config: quantized weights cannot be converted; use the float checkpoint "
            f"that they were made from."
        )
    if raw_config.get("s2") or raw_config.get("mm_vision_s2"):
        raise ConversionError(f"s2 in {where}: DeCo has no multi-scale (S2) features.")
    aspect_ratio = raw_config.get("image_aspect_ratio") or "square"
    if aspect_ratio not in ("square", "pad"):
        raise ConversionError(
            f"image_aspect_ratio {aspect_ratio!r} in {where}: DeCo sees one view of an image ('pad' or 'square'), no "
            f"anyres."
        )
    merge_type = raw_config.get("mm_patch_merge_type") or "flat"
    if merge_type != "flat":
        raise ConversionError(f"mm_patch_merge_type {merge_type!r} in {where}: DeCo has 'flat' only, no anyres.")
    if raw_config.get("mm_resampler_type"):
        raise ConversionError(f"mm_resampler_type {raw_config['mm_resampler_type']!r} in {where}: DeCo has none.")


def _read_llava_hf(source: Source, raw_config: dict, pooled_grid_size) -> LlavaCheckpoint:
    layer = raw_config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ConversionError(
            f"vision_feature_layer {layer} in config.json of {source.name} joins several layers; DeCo reads one."
        )
    llava_config = LlavaConfig.from_dict(raw_config)
    checkpoint = LlavaCheckpoint("llava-hf", None, {"source": source}, {}, {}, source, source)
    _add_tensors(checkpoint, source.read_weights(), LLAVA_HF)
    checkpoint.config = _build_config(
        pooled_grid_size,
        vision_config=llava_config.vision_config,
        text_config=llava_config.text_config,
        image_token_id=llava_config.image_token_index,
        projector_hidden_act=llava_config.projector_hidden_act,
        multimodal_projector_bias=llava_config.multimodal_projector_bias,
        vision_feature_layer=layer,
        vision_feature_select_strategy=llava_config.vision_feature_select_strategy,
        tie_word_embeddings=raw_config.get("tie_word_embeddings", False),
    )
    return checkpoint


def _read_original(source: Source, raw_config: dict, pooled_grid_size, vision_tower, base_model) -> LlavaCheckpoint:
    checkpoint = LlavaCheckpoint("original", None, {"source": source}, {}, {}, source, source)
    _read_original_tensors(checkpoint, raw_config, base_model)
    projector_num_layers = _check_projector(checkpoint, raw_config)

    tower = vision_tower or raw_config.get("mm_vision_tower") or raw_config.get("vision_tower")
    if not isinstance(tower, str | Path) or not tower:
        raise ConversionError(f"config.json of {source.name} names no mm_vision_tower; name it by --vision-tower.")
    tower = open_source(tower, what="--vision-tower")
    checkpoint.sources["vision_tower"] = checkpoint.image_processor = tower
    _read_tower(checkpoint, tower, is_trained=bool(raw_config.get("unfreeze_mm_vision_tower")))

    grid_name = "--pooled-grid-size"
    if _is_average_pooling(checkpoint):
        checkpoint.format += " with AvgPoolProjector"
        checkpoint.is_trained_pooled = True
        if pooled_grid_size is None:
            grid_name = f"The grid of query_num in config.json of {source.name}"
            pooled_grid_size = _grid_of_query_num(raw_config, source)
    checkpoint.image_aspect_ratio = raw_config.get("image_aspect_ratio")
    if raw_config.get("mm_use_im_patch_token"):  # in the order in which the original code adds them
        checkpoint.extra_tokens += ["<im_patch>"]
    if raw_config.get("mm_use_im_start_end"):
        checkpoint.extra_tokens += ["<im_start>", "<im_end>"]
    select_feature = str(raw_config.get("mm_vision_select_feature", "patch"))
    checkpoint.config = _build_config(
        pooled_grid_size,
        grid_name,
        vision_config=_read_vision_config(tower),
        text_config=_text_config(raw_config, checkpoint),
        image_token_id=0,  # until the tokenizer has one
        projector_num_layers=projector_num_layers,
        vision_feature_layer=raw_config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}.get(select_feature, select_feature),
    )
    return checkpoint


def _read_tower(checkpoint: LlavaCheckpoint, tower: Source, is_trained: bool) -> None:
    """The vision tower that the original code runs: the one in the checkpoint if it was trained, else the one that the
    config names. A frozen one in the checkpoint is a copy, rounded to the type that was trained in."""
    inside = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.vision_tower.")}
    if inside and is_trained:
        return
    named = LlavaCheckpoint("vision tower", None, {}, {}, {}, tower, tower)
    is_whole = "model.vision_tower.embeddings.patch_embedding.weight" in inside  # LoRA's trained biases alone are not
    try:
        _add_tensors(named, tower.read_weights(), VISION_TOWER)
    except ConversionError:
        if is_whole:  # the copy is all there is
            return
        raise
    if is_whole and not all(_is_rounded(tensor, named.tensors.get(name)) for name, tensor in inside.items()):
        return
    checkpoint.dropped |= named.dropped | {tensor.key: COPIED_TOWER for tensor in inside.values()}
    checkpoint.files |= named.files
    checkpoint.tensors |= named.tensors


def _is_rounded(tensor: StoredTensor, original: StoredTensor | None) -> bool:
    if original is None or original.shape != tensor.shape:
        return False
    return torch.equal(original.read().to(tensor.dtype), tensor.read())


def _read_original_tensors(checkpoint: LlavaCheckpoint, raw_config: dict, base_model) -> None:
    """A whole model's tensors, or a base model's with what was trained over it."""
    source, projector_type = checkpoint.sources["source"], raw_config.get("mm_projector_type")
    adapter_config, stage_1 = source.folder / "adapter_config.json", source.folder / "mm_projector.bin"
    is_lora, is_stage_1 = adapter_config.exists(), stage_1.exists()
    # of a whole model on the Hub only the index is fetched yet, if it has one
    is_whole = weight_entry(source.folder) is not None or (source.revision and not is_lora and not is_stage_1)
    if is_whole and is_lora:
        raise ConversionError(f"{source.name} holds a whole model and adapter_config.json; remove what is not meant.")
    if is_whole or not (is_lora or is_stage_1):
        _add_tensors(checkpoint, source.read_weights(), ORIGINAL, projector_type)
        return

    base_name, adapters = base_model or raw_config.get("_name_or_path"), {}
    if is_lora:
        checkpoint.format = "original LoRA"
        adapter_config = read_json(adapter_config)
        base_name = base_model or adapter_config.get("base_model_name_or_path") or base_name
        adapters, trained = _read_adapters(source, adapter_config)
    else:
        checkpoint.format = "original stage 1"
        trained = read_weight_file(stage_1)
    if not base_name:
        raise ConversionError(f"{source.name} does not say what it was trained from; name it by --base-model.")
    base = checkpoint.sources["base_model"] = open_source(base_name, what="--base-model")
    _add_tensors(checkpoint, base.read_weights(), ORIGINAL)
    trained = {key.removeprefix("base_model.model."): tensor for key, tensor in trained.items()}
    _add_tensors(checkpoint, trained, ORIGINAL, projector_type, may_replace=True)
    _merge_adapters(checkpoint, adapters)
    if not any((source.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        checkpoint.tokenizer = base


def _read_adapters(source: Source, adapter_config: dict):
    """LoRA's pairs of matrices by the module they belong to, and the tensors that were trained as a whole."""
    if adapter_config.get("peft_type", "LORA") != "LORA":
        raise ConversionError(
            f"peft_type {adapter_config['peft_type']!r} in adapter_config.json of {source.name} is not 'LORA'."
        )
    for name, values in _PLAIN_LORA.items():
        if adapter_config.get(name) not in values:
            raise ConversionError(
                f"{name}={adapter_config[name]!r} in adapter_config.json of {source.name} is not what LLaVA's "
                f"training writes; merge the adapters with PEFT first."
            )
    rank, alpha = adapter_config.get("r"), adapter_config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ConversionError(f"adapter_config.json of {source.name} has r={rank!r} and lora_alpha={alpha!r}.")
    folder = source.folder
    names = ("adapter_model.safetensors", "adapter_model.bin")
    file = next((name for name in names if (folder / name).exists()), None)
    if file is None:
        raise ConversionError(f"{source.name} has adapter_config.json, and no adapter_model.safetensors or .bin.")
    adapters, trained = {}, read_weight_file(folder / "non_lora_trainables.bin")
    for key, tensor in read_weight_file(folder / file).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match:
            adapters.setdefault(match[1], {"scale": alpha / rank})[f"lora_{match[2].lower()}"] = tensor
        else:
            trained[key] = tensor
    if not adapters:
        raise ConversionError(f"{file} of {source.name} holds no LoRA matrices.")
    for module, adapter in adapters.items():
        if adapter.keys() != {"scale", "lora_a", "lora_b"}:
            raise ConversionError(f"{file} of {source.name} has only one of lora_A and lora_B for {module!r}.")
        shape_a, shape_b = adapter["lora_a"].shape, adapter["lora_b"].shape
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != rank or shape_b[1] != rank:
            raise ConversionError(
                f"{module!r} in {file} of {source.name}: lora_A {shape_a} and lora_B {shape_b} are not matrices of "
                f"rank r={rank}."
            )
    return adapters, trained


def _merge_adapters(checkpoint: LlavaCheckpoint, adapters: dict) -> None:
    for module, matrices in adapters.items():
        name, _ = ORIGINAL.rename(f"{module}.weight")
        weight = checkpoint.tensors.get(name)
        if weight is None:
            raise ConversionError(f"The LoRA adapters belong to {module!r}, which the base model does not have.")
        shape = (matrices["lora_b"].shape[0], matrices["lora_a"].shape[1])
        if weight.shape != shape:
            raise ConversionError(
                f"The LoRA adapters of {module!r} are for a weight of shape {shape}, and the base model "
                f"{weight.path.parent}'s is {weight.shape}; name the right one by --base-model."
            )
        checkpoint.files.add(matrices["lora_a"].path)
        checkpoint.tensors[name] = MergedLora(weight, **matrices, dtype=weight.dtype)


def _add_tensors(
    checkpoint: LlavaCheckpoint, stored: dict, layout: Layout, projector_type=None, may_replace=False
) -> None:
    added, named = {}, f" (mm_projector_type {projector_type!r})" if projector_type else ""
    checkpoint.files |= {tensor.path for tensor in stored.values()}
    for key, tensor in stored.items():
        name, reason = layout.rename(key)
        where = f"{tensor.path.name} of {tensor.path.parent}"
        if reason is not None:
            checkpoint.dropped[key] = reason
        elif key.endswith("image_newline"):
            raise ConversionError(f"{key!r} in {where} belongs to anyres (LLaVA-1.6), which DeCo does not have.")
        elif name is None and re.search(r"projector|resampler", key):
            raise ConversionError(
                f"{key!r} in {where}: the projector{named} is not Linear-GELU-Linear, which DeCo's is."
            )
        elif name is None:
            raise ConversionError(f"{key!r} in {where} is an unknown key.")
        elif name in added or (name in checkpoint.tensors and not may_replace):
            other = added.get(name) or checkpoint.tensors[name]
            raise ConversionError(f"{key!r} in {where} is a duplicate of {other.key!r}: both are {name!r}.")
        elif not tensor.dtype.is_floating_point:
            raise ConversionError(f"{key!r} in {where} is {tensor.dtype}; weights must be float.")
        else:
            added[name] = tensor
    checkpoint.tensors |= added


def _is_average_pooling(checkpoint: LlavaCheckpoint) -> bool:
    return any("mm_projector.mlp_projector." in tensor.key for tensor in _projector(checkpoint).values())


def _projector(checkpoint: LlavaCheckpoint) -> dict[str, StoredTensor]:
    prefix = "model.multi_modal_projector."
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)}


def _check_projector(checkpoint: LlavaCheckpoint, raw_config: dict) -> int:
    """The number of linear layers; the projector must be Linear-GELU-Linear..."""
    source, projector = checkpoint.sources["source"], _projector(checkpoint)
    projector_type = raw_config.get("mm_projector_type", "linear")
    match = re.fullmatch(r"mlp(\d+)x_gelu", str(projector_type))
    if not _is_average_pooling(checkpoint) and match is None:
        raise ConversionError(
            f"mm_projector_type {projector_type!r} in config.json of {source.name} is not Linear-GELU-Linear "
            f"('mlp2x_gelu'), which DeCo's projector is."
        )
    num_layers = len(projector) // 2
    expected = {
        f"model.multi_modal_projector.linear_{index + 1}.{kind}"
        for index in range(num_layers)
        for kind in ("weight", "bias")
    }
    if not projector or projector.keys() != expected or (match and int(match[1]) != num_layers):
        keys = sorted(tensor.key for tensor in projector.values())
        raise ConversionError(
            f"The projector of {source.name} is no {projector_type}, Linear-GELU-Linear: it has the keys {keys}."
        )
    return num_layers


def _grid_of_query_num(raw_config: dict, source: Source) -> int:
    """The grid that the authors' AvgPoolProjector was trained with, from its number of queries."""
    name = next((name for name in raw_config if name.endswith("query_num")), None)
    if name is None:
        raise ConversionError(
            f"{source.name} has the DeCo authors' AvgPoolProjector, and its config.json no query_num; say the grid by "
            f"--pooled-grid-size (12 where query_num was 144)."
        )
    query_num = raw_config[name]
    if not isinstance(query_num, int) or query_num < 1 or math.isqrt(query_num) ** 2 != query_num:
        raise ConversionError(
            f"{name}={query_num!r} in config.json of {source.name} is no square; say the grid by --pooled-grid-size."
        )
    return math.isqrt(query_num)


def _read_vision_config(tower: Source):
    with refusing(f"config.json of --vision-tower {tower.name}"):
        config = AutoConfig.from_pretrained(tower.folder, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    config.name_or_path = ""  # a folder of this machine, maybe
    return config


def _text_config(raw_config: dict, checkpoint: LlavaCheckpoint) -> dict:
    fields = {name: value for name, value in raw_config.items() if not re.fullmatch(_NOT_TEXT_FIELD, name)}
    embeddings = checkpoint.tensors.get(EMBEDDINGS[0])
    if embeddings is not None:  # the tokenizer may have grown since
        fields["vocab_size"] = embeddings.shape[0] if embeddings.shape else 0
    return {"model_type": _TEXT_MODELS[raw_config["model_type"]], **fields}


def _build_config(pooled_grid_size, grid_name="--pooled-grid-size", **fields) -> DecoConfig:
    patch_grid = DecoConfig(**fields, pooled_grid_size=1).patch_grid
    if pooled_grid_size is None:
        rows, cols = fit_grid((12, 12), patch_grid)
    else:
        with value_errors():
            rows, cols = check_grid(pooled_grid_size, patch_grid, name=grid_name)
    return DecoConfig(**fields, pooled_grid_size=rows if rows == cols else [rows, cols])


def _check_complete(checkpoint: LlavaCheckpoint) -> None:
    """Leave behind what the model does not have, and check that all else is there, in the model's shapes."""
    config, tensors, source = checkpoint.config, checkpoint.tensors, checkpoint.sources["source"]
    model_type = config.vision_config.model_type
    if model_type.startswith("dinov2"):
        raise ConversionError(f"The vision tower of {source.name} is a {model_type}; CLIP and SigLIP are convertible.")
    for part, part_config in (("vision_tower", config.vision_config), ("language_model", config.text_config)):
        num_layers = len({layer_index(name, part) for name in tensors} - {None})
        if part_config.num_hidden_layers > num_layers:  # found before a model of a million layers is built
            raise ConversionError(
                f"{source.name} is not complete: its config has {part_config.num_hidden_layers} "
                f"layers of the {part}, layers.0 and on, and its weights {num_layers}; some are missing."
            )
    if config.tie_word_embeddings and not _is_tied(tensors):
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    shapes = parameter_shapes(config, source)
    for name in [name for name in tensors if name not in shapes]:
        key, layer = tensors[name].key, layer_index(name, "vision_tower")
        if layer is not None and layer >= config.vision_config.num_hidden_layers:
            checkpoint.dropped[key] = UNUSED_LAYER
        elif name.startswith("model.vision_tower.head."):
            checkpoint.dropped[key] = UNUSED_HEAD
        elif name == "lm_head.weight":
            checkpoint.dropped[key] = TIED
        else:
            raise ConversionError(f"{key!r} in {tensors[name].path} is an unknown key: the model has no {name!r}.")
        del tensors[name]
    check_shapes(tensors, shapes, checkpoint.sources)


def _is_tied(tensors: dict) -> bool:
    """Whether the head is the embeddings, as the config says: transformers believes the weights where both are."""
    embeddings, head = (tensors.get(name) for name in EMBEDDINGS)
    return embeddings is None or head is None or digest_of(embeddings) == digest_of(head)


def parameter_shapes(config: DecoConfig, source: Source) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that a checkpoint of the config has."""
    with refusing(f"config.json of {source.name}"), torch.device("meta"):
        model = DecoForConditionalGeneration(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_shapes(tensors: dict, shapes: dict[str, tuple[int, ...]], sources: dict[str, Source]) -> None:
    """Refuse a checkpoint that lacks a parameter, or has one in another shape; both shapes are named."""
    name_of_source = sources["source"].name
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise ConversionError(
            f"{name_of_source} is not complete: {len(missing)} parameters are missing, such as {missing[0]!r}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            role = next(role for role, source in sources.items() if source.folder == tensor.path.parent)
            mend = "" if role == "source" else f"; name the right one by --{role.replace('_', '-')}"
            raise ConversionError(
                f"{tensor.key!r} in {tensor.path} has the shape {tensor.shape}, and the config of {name_of_source} "
                f"wants {shapes[name]}{mend}."
            )
