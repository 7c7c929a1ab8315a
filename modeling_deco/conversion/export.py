# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo checkpoints to transformers' LLaVAs: the same weights without the pooling."""

import json
import logging
import re
from pathlib import Path

from transformers import (
    AutoConfig,
    GenerationConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
)

from ..configuration_deco import DecoConfig
from ..inference.loading import check_is_deco
from ..processing_deco import DecoProcessor
from ..utils.errors import InputError, as_input_errors, wrap_errors
from ..utils.staging import check_destination
from .checkpoints import check_shapes, parameter_shapes
from .output import write_checkpoint
from .sources import Source, open_source

logger = logging.getLogger(__name__)

# to the names of llava-hf on the Hub, which every version of transformers reads
_RENAMES = (
    (r"model\.vision_tower\.(.+)", r"vision_tower.vision_model.\1"),
    (r"model\.multi_modal_projector\.(.+)", r"multi_modal_projector.\1"),
    (r"model\.language_model\.(.+)", r"language_model.model.\1"),
    (r"lm_head\.weight", "language_model.lm_head.weight"),
    (r"model\.image_newline", "image_newline"),
)
_CLASSES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
}


def export(source: str | Path, destination: str | Path, overwrite: bool = False) -> dict:
    """Export a DeCo checkpoint as a llava-hf checkpoint, for programs that know LLaVA only.

    LLaVA does not pool: its language model gets all patches, and it answers as DeCo does at the patch grid. A DeCo
    that cuts images into views becomes a LLaVA-NeXT, a LLaVA-NeXT-Video or a LLaVA-OneVision, as its config asks.

    Args:
        source: folder or Hub id of a DeCo with an `avg_pool` or `mlp` projector of two layers.
        destination: folder to create. It appears when everything is written and verified.
        overwrite: replace the model in `destination`.

    Returns:
        The content of `conversion_report.json` in the destination.

    Raises:
        InputError: says in one line what is wrong and what to do. Nothing is written then.
    """
    destination = Path(destination)
    check_destination(destination, overwrite, [Path(source)] if Path(source).exists() else [])
    opened = open_source(source)
    config = _read_config(opened)
    stored = opened.read_weights()
    shapes = parameter_shapes(config, opened)
    for key in stored.keys() - shapes.keys():
        raise InputError(f"{key!r} in {stored[key].path} is an unknown key: the model of its config has none.")
    check_shapes(stored, shapes, {"source": opened})
    tensors = {_llava_name(key): tensor for key, tensor in stored.items()}
    family = _family(config, opened)
    llava_config = _llava_config(config, family)
    with wrap_errors(f"The processor of {opened.name}"):
        processor = DecoProcessor.from_pretrained(opened.folder, trust_remote_code=False)
    generation_config = opened.folder / "generation_config.json"

    def write_small_files(folder: Path) -> None:
        llava_config.save_pretrained(folder)
        _save_processor(folder, processor, config, family)
        if generation_config.exists():
            GenerationConfig.from_pretrained(opened.folder).save_pretrained(folder)

    (rows, cols), sources = config.patch_grid, {"source": opened}
    what = "image" if config.image_grid_pinpoints is None else "view of an image"
    logger.info(f"{opened.name}: LLaVA does not pool, so each {what} takes {rows * cols} tokens")
    files = {tensor.path for tensor in tensors.values()}
    facts = {"format": "llava-hf", "model_type": family, "num_image_tokens": rows * cols}
    return write_checkpoint(destination, tensors, sources, files, facts, write_small_files, overwrite=overwrite)


def _llava_name(key: str) -> str:
    return next(match.expand(new) for old, new in _RENAMES if (match := re.fullmatch(old, key)))


def _read_config(source: Source) -> DecoConfig:
    raw_config = source.read_config()
    with as_input_errors():
        check_is_deco(raw_config.get("model_type"), source.name)
    if raw_config.get("quantization_config"):
        raise InputError(f"config.json of {source.name} has a quantization_config; export the float checkpoint.")
    with wrap_errors(f"config.json of {source.name}"):
        config = DecoConfig.from_dict(raw_config)
    if config.projector_type not in ("avg_pool", "mlp"):
        raise InputError(
            f"projector_type={config.projector_type!r} in config.json of {source.name}: LLaVA has no such projector; "
            f"avg_pool and mlp can be exported."
        )
    if config.projector_num_layers != 2:
        raise InputError(
            f"projector_num_layers={config.projector_num_layers} in config.json of {source.name}: LLaVA's projector "
            f"has 2 linear layers."
        )
    if config.lm_head_bias:
        raise InputError(f"lm_head_bias in config.json of {source.name}: LLaVA's lm_head has no bias.")
    model_type = config.vision_config.model_type
    if model_type not in ("clip_vision_model", "siglip_vision_model"):
        reason = "" if config.feature_map is None else ", whose feature map no LLaVA of transformers reads"
        raise InputError(
            f"The vision tower of {source.name} is a {model_type}{reason}; CLIP and SigLIP can be exported."
        )
    return config


def _family(config: DecoConfig, source: Source) -> str:
    """The model type of transformers' LLaVA that reads images, and videos if DeCo does, as DeCo does at full grids.

    A DeCo with one view of an image becomes a LLaVA, which takes no videos.
    """
    if config.image_grid_pinpoints is None:
        return "llava"
    views = (config.image_overview, config.image_newline)
    videos = (config.spatial_pool_mode, config.spatial_pool_stride, config.video_newline)
    has_cap = config.vision_aspect_ratio != "anyres"
    if views == (True, True) and has_cap and (videos == ("bilinear", 2, True) or config.video_token_id is None):
        return "llava_onevision"
    if views == (True, True) and not has_cap and videos[::2] == ("average", False):
        return "llava_next" if config.spatial_pool_stride == 1 else "llava_next_video"
    raise InputError(
        f"config.json of {source.name}: no LLaVA of transformers has image_overview={views[0]}, image_newline="
        f"{views[1]}, vision_aspect_ratio={config.vision_aspect_ratio!r}, spatial_pool_mode={videos[0]!r}, "
        f"spatial_pool_stride={videos[1]} and video_newline={videos[2]}."
    )


def _llava_config(config: DecoConfig, family: str) -> PreTrainedConfig:
    rows, cols = config.patch_grid
    fields = {
        "vision_config": config.vision_config,
        "text_config": config.text_config,
        "image_token_index": config.image_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": _select_strategy(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "architectures": [f"{_CLASSES[family]}ForConditionalGeneration"],
        "dtype": config.dtype,
    }
    if family != "llava":
        fields["image_grid_pinpoints"] = config.image_grid_pinpoints
    if family != "llava_onevision":
        fields["image_seq_length"] = rows * cols
    else:
        fields["vision_aspect_ratio"] = config.vision_aspect_ratio
    if family == "llava_next_video":
        fields["spatial_pool_mode"], fields["spatial_pool_stride"] = "average", config.spatial_pool_stride
        fields["video_seq_length"] = (rows // config.spatial_pool_stride) * (cols // config.spatial_pool_stride)
    if family in ("llava_next_video", "llava_onevision") and config.video_token_id is not None:
        fields["video_token_index"] = config.video_token_id
    return AutoConfig.for_model(family, **fields)


def _select_strategy(config: DecoConfig) -> str:
    """LLaVA's "default" drops the first token, whether or not it is a CLS token; "full" drops none."""
    return "default" if config.num_prefix_tokens == 1 else "full"


def _save_processor(folder: Path, processor: DecoProcessor, config: DecoConfig, family: str) -> None:
    """Save the processor of the family. One for videos cannot be built without torchvision, so its files are written
    one by one."""
    rows, cols = config.patch_grid
    settings = {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": _select_strategy(config),
        "image_token": processor.image_token,
        "num_additional_image_tokens": config.num_prefix_tokens,
    }
    if family in ("llava", "llava_next"):
        processor_class = LlavaProcessor if family == "llava" else LlavaNextProcessor
        parts = (processor.image_processor, processor.tokenizer)
        processor_class(*parts, chat_template=processor.chat_template, **settings).save_pretrained(folder)
        return
    if family == "llava_onevision":
        settings = {"num_image_tokens": rows * cols, "vision_aspect_ratio": config.vision_aspect_ratio, **settings}
        del settings["patch_size"], settings["num_additional_image_tokens"]
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    name = _CLASSES[family]
    image_settings = json.loads(processor.image_processor.to_json_string())
    names = ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample", "rescale_factor")
    video_settings = {name: image_settings[name] for name in names if image_settings.get(name) is not None}
    contents = {
        "processor_config.json": {**settings, "video_token": "<video>", "processor_class": f"{name}Processor"},
        "video_preprocessor_config.json": {**video_settings, "video_processor_type": f"{name}VideoProcessor"},
    }
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    if processor.chat_template is not None:
        (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
