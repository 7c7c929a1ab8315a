# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the original code (haotian-liu/LLaVA): a whole model, a projector alone (stage 1), or LoRA adapters.

Where a projector or adapters lie alone, the language model comes from the base model. The vision tower is in a folder
of its own.
"""

import re
from pathlib import Path

from ..utils.errors import InputError
from ..utils.files import read_json
from .checkpoints import EMBEDDINGS, LlavaCheckpoint, add_tensors, build_config
from .layouts import ORIGINAL
from .lora import merge_adapters, read_adapters
from .mm_projector import count_layers, grid_of_query_num, is_average_pooling
from .sources import Source, open_source
from .views import view_fields
from .vision_tower import read_vision_config, read_vision_tower
from .weights import read_weight_file, weight_entry

# model types of the original code, and the language models of its classes; "llava" may be any of them
TEXT_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_ARCHITECTURES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}

# fields that the original code adds to the config of a language model, and fields of the file itself
_NOT_TEXT_FIELD = (
    r"(mm|tune_mm|freeze_mm|unfreeze_mm|use_mm|image|use_image|s2)_.*|.*query_num|"
    r"tokenizer_(model_max_length|padding_side)|(use_)?pos_skipping(_range)?|vision_tower.*|"
    r"add_faster_video|faster_token_stride|add_time_instruction|force_sample|frames_upbound|model_type|architectures|auto_map|_name_or_path|transformers_version|use_cache|s2"
)


def read_original(source: Source, raw_config: dict, pooled_grid_size, vision_tower, base_model) -> LlavaCheckpoint:
    """Read a checkpoint of the original code. The arguments are those of `read_checkpoint`."""
    checkpoint = LlavaCheckpoint("original", {"source": source}, {}, {}, source, source)
    _read_tensors(checkpoint, raw_config, base_model)
    projector_num_layers = count_layers(checkpoint, raw_config)

    tower = vision_tower or raw_config.get("mm_vision_tower") or raw_config.get("vision_tower")
    if not isinstance(tower, str | Path) or not tower:
        raise InputError(f"config.json of {source.name} names no mm_vision_tower; pass --vision-tower.")
    tower = open_source(tower, what="--vision-tower")
    checkpoint.sources["vision_tower"] = checkpoint.image_processor = tower
    read_vision_tower(checkpoint, tower, is_trained=_is_tower_trained(raw_config))
    vision_config = read_vision_config(tower)
    view_size = getattr(vision_config, "image_size", 0)  # a SigLIP 2 has none, and no views
    views = view_fields(raw_config, view_size, f"config.json of {source.name}")

    grid_name = "--pooled-grid-size"
    if is_average_pooling(checkpoint):
        checkpoint.format += " with AvgPoolProjector"
        checkpoint.is_trained_pooled = True
        if views:
            raise InputError(
                f"{source.name} has the DeCo authors' AvgPoolProjector and image_aspect_ratio "
                f"{raw_config['image_aspect_ratio']!r}: it pools each tile alone, and DeCo pools the stitched map."
            )
        if pooled_grid_size is None:
            grid_name = f"The grid of query_num in config.json of {source.name}"
            pooled_grid_size = grid_of_query_num(raw_config, source)
    checkpoint.image_aspect_ratio = raw_config.get("image_aspect_ratio")
    if raw_config.get("mm_use_im_patch_token"):  # the original code adds the tokens in this order
        checkpoint.extra_tokens += ["<im_patch>"]
    if raw_config.get("mm_use_im_start_end"):
        checkpoint.extra_tokens += ["<im_start>", "<im_end>"]
    select_feature = str(raw_config.get("mm_vision_select_feature", "patch"))
    checkpoint.config = build_config(
        pooled_grid_size,
        grid_name,
        image_positions="sequence" if checkpoint.is_trained_pooled else "patch",
        vision_config=vision_config,
        text_config=_text_config(raw_config, checkpoint),
        image_token_id=0,  # `build_processor` sets it
        projector_num_layers=projector_num_layers,
        vision_feature_layer=raw_config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}.get(select_feature, select_feature),
        **views,
    )
    return checkpoint


def _read_tensors(checkpoint: LlavaCheckpoint, raw_config: dict, base_model) -> None:
    """Add the tensors of a whole model, or those of a base model and of what was trained on top of it."""
    source, projector_type = checkpoint.sources["source"], raw_config.get("mm_projector_type")
    adapter_file, stage_1 = source.folder / "adapter_config.json", source.folder / "mm_projector.bin"
    is_lora, is_stage_1 = adapter_file.exists(), stage_1.exists()
    # from the Hub, only the index of a whole model has been fetched so far, if there is one
    is_whole = weight_entry(source.folder) is not None or (source.revision and not is_lora and not is_stage_1)
    if is_whole and is_lora:
        raise InputError(f"{source.name} holds a whole model and adapter_config.json; remove one of them.")
    if is_whole or not (is_lora or is_stage_1):
        add_tensors(checkpoint, source.read_weights(), ORIGINAL, projector_type)
        return

    base_name = base_model or raw_config.get("_name_or_path")
    adapters: dict[str, dict] = {}
    if is_lora:
        checkpoint.format = "original LoRA"
        adapter_config = read_json(adapter_file)
        base_name = base_model or adapter_config.get("base_model_name_or_path") or base_name
        adapters, trained = read_adapters(source, adapter_config)
    else:
        checkpoint.format = "original stage 1"
        trained = read_weight_file(stage_1)
    if not base_name:
        raise InputError(f"{source.name} does not name its language model; pass --base-model.")
    base = checkpoint.sources["base_model"] = open_source(base_name, what="--base-model")
    add_tensors(checkpoint, base.read_weights(), ORIGINAL)
    trained = {key.removeprefix("base_model.model."): tensor for key, tensor in trained.items()}
    add_tensors(checkpoint, trained, ORIGINAL, projector_type, may_replace=True)
    merge_adapters(checkpoint, adapters)
    if not any((source.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        checkpoint.tokenizer = base


def _text_config(raw_config: dict, checkpoint: LlavaCheckpoint) -> dict:
    """The config of the language model: that of the checkpoint without the fields of the original code."""
    fields = {name: value for name, value in raw_config.items() if not re.fullmatch(_NOT_TEXT_FIELD, name)}
    embeddings = checkpoint.tensors.get(EMBEDDINGS[0])
    if embeddings is not None:  # the embeddings may have grown after the config was written
        fields["vocab_size"] = embeddings.shape[0] if embeddings.shape else 0
    architectures = raw_config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    return {"model_type": _ARCHITECTURES.get(str(named), TEXT_MODELS[raw_config["model_type"]]), **fields}


def _is_tower_trained(raw_config: dict) -> bool:
    return bool(raw_config.get("unfreeze_mm_vision_tower")) or "mm_vision_tower" in str(
        raw_config.get("mm_tunable_parts")
    )
