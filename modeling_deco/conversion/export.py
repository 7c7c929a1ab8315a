# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo checkpoints to transformers' LLaVA: the same weights without the pooling."""

import logging
import re
from pathlib import Path

from transformers import GenerationConfig, LlavaConfig, LlavaProcessor

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
)


def export(source: str | Path, destination: str | Path, overwrite: bool = False) -> dict:
    """Export a DeCo checkpoint as a llava-hf checkpoint, for programs that know LLaVA only.

    LLaVA does not pool: its language model gets all patches, and it answers as DeCo does at the patch grid.

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
    llava_config = _llava_config(config)
    with wrap_errors(f"The processor of {opened.name}"):
        processor = _llava_processor(opened, config)
    generation_config = opened.folder / "generation_config.json"

    def write_small_files(folder: Path) -> None:
        llava_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        if generation_config.exists():
            GenerationConfig.from_pretrained(opened.folder).save_pretrained(folder)

    (rows, cols), sources = config.patch_grid, {"source": opened}
    logger.info(f"{opened.name}: LLaVA does not pool, so each image takes {rows * cols} tokens")
    files = {tensor.path for tensor in tensors.values()}
    facts = {"format": "llava-hf", "num_image_tokens": rows * cols}
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
        raise InputError(f"The vision tower of {source.name} is a {model_type}; CLIP and SigLIP can be exported.")
    return config


def _llava_config(config: DecoConfig) -> LlavaConfig:
    rows, cols = config.patch_grid
    return LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        projector_hidden_act=config.projector_hidden_act,
        multimodal_projector_bias=config.multimodal_projector_bias,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=_select_strategy(config),
        image_seq_length=rows * cols,
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=config.dtype,
    )


def _select_strategy(config: DecoConfig) -> str:
    """LLaVA's "default" drops the first token, whether or not it is a CLS token; "full" drops none."""
    return "default" if config.num_prefix_tokens == 1 else "full"


def _llava_processor(source: Source, config: DecoConfig) -> LlavaProcessor:
    processor = DecoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=_select_strategy(config),
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=config.num_prefix_tokens,
    )
