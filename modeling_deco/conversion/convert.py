# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA checkpoints to DeCo checkpoints."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from .. import __version__
from ..configuration_deco import DecoConfig, parse_grid
from ..llava import suppress_placeholders
from ..processing_deco import DecoProcessor
from ..utils.errors import InputError, as_input_errors, wrap_errors
from ..utils.staging import check_destination
from .card import build_card
from .checkpoints import EMBEDDINGS, LlavaCheckpoint
from .generation_config import load_generation_config
from .output import write_checkpoint
from .parity import compare_logits
from .processor import build_processor
from .reader import read_checkpoint
from .sources import Source, open_source
from .tensors import Cast, Extended, MergedLora, OutputTensor
from .upload import check_login, upload

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")
_LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def convert(
    source: str | Path,
    destination: str | Path,
    pooled_grid_size: int | list[int] | None = None,
    vision_tower: str | Path | None = None,
    base_model: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    check_logits: bool = False,
    chat_template: str | None = None,
) -> dict:
    """Convert a LLaVA checkpoint of any format to a DeCo checkpoint.

    Args:
        source: folder or Hub id of a LLaVA-1.5, LLaVA-NeXT (1.6), LLaVA-NeXT-Video or LLaVA-OneVision: of
            transformers, or of the original code (a whole model, stage 1 or LoRA), also with the `AvgPoolProjector` of
            DeCo's authors.
        destination: folder to create. It appears when everything is written and verified.
        pooled_grid_size: DeCo's grid, an int or `[rows, cols]`, of an image or of each of its views. Default: for a
            checkpoint with the authors' projector the grid of its training; otherwise 12 x 12, or a quarter of the
            patches if that is more (14 x 14 of 27 x 27), or the patch grid if that is smaller.
        vision_tower: folder or Hub id of the vision tower; replaces the one that an original config names.
        base_model: folder or Hub id of the language model, for a projector (stage 1) or LoRA adapters.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`. Default: each tensor keeps its type.
        revision: branch, tag or commit of `source` on the Hub.
        overwrite: replace the model in `destination`.
        push_to_hub: repository that the result is uploaded to.
        check_logits: also load both models, one after the other in float32, and compare their logits; llava-hf only.
        chat_template: a name of `chat_templates.CHAT_TEMPLATES` or a Jinja file. Default: the format of the source.

    Returns:
        The content of `conversion_report.json` in the destination.

    Raises:
        InputError: says in one line what is wrong and what to do. Nothing is written then.
    """
    destination = Path(destination)
    _check_arguments(destination, overwrite, [source, vision_tower, base_model], pooled_grid_size, dtype, push_to_hub)
    opened = open_source(source, revision)
    checkpoint = read_checkpoint(opened, pooled_grid_size, vision_tower, base_model)
    if check_logits and checkpoint.format != "llava-hf":
        raise InputError(
            f"--check-logits compares with transformers' LLaVA; {opened.name} is {checkpoint.format}: omit the option."
        )
    config = checkpoint.config
    with wrap_errors(f"The tokenizer or the image processor of {opened.name}"):
        processor, origin = build_processor(checkpoint, chat_template)
    tensors = _output_tensors(checkpoint, dtype)
    config.dtype = tensors[EMBEDDINGS[0]].dtype
    config.architectures = ["DecoForConditionalGeneration"]
    generation_config = _generation_config(checkpoint, processor)

    def write_small_files(folder: Path) -> None:
        (rows, cols), num_tokens = config.patch_grid, config.num_image_tokens
        patches, what = f"{rows} x {cols} patches", "image"
        if config.image_grid_pinpoints is not None:
            patches, what = f"views of {patches}, up to {_most_views(config)} of an image", "view"
        logger.info(f"{opened.name}: {checkpoint.format}, {patches}, {num_tokens} tokens per {what}")
        config.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        for path in _licence_files(opened):
            shutil.copyfile(path, folder / path.name)
        build_card(checkpoint, __version__).save(folder / "README.md")

    def check(folder: Path) -> dict:
        if not check_logits:
            return {"parity": None}
        parity = compare_logits(opened.folder, folder, is_cast=dtype is not None)
        difference, num_logits = parity["max_abs_difference"], parity["num_logits"]
        logger.info(f"{num_logits:,} logits of LLaVA and DeCo in float32 differ by at most {difference:.3g}")
        return {"parity": parity}

    facts = {
        "format": checkpoint.format,
        "model_type": opened.read_config().get("model_type"),
        "patch_grid": list(config.patch_grid),
        "pooled_grid_size": config.pooled_grid_size,
        "num_image_tokens": config.num_image_tokens,
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "image_positions": config.image_positions,
        "chat_template": origin,
        "dropped": checkpoint.dropped,
    }
    sources, files = checkpoint.sources, checkpoint.files
    report = write_checkpoint(destination, tensors, sources, files, facts, write_small_files, check, overwrite)
    if push_to_hub:
        upload(destination, push_to_hub)
    return report


def _check_arguments(destination, overwrite, sources, pooled_grid_size, dtype, push_to_hub) -> None:
    """Refuse what can be refused before a source is opened."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.")
    folders = [Path(name) for name in sources if name is not None and Path(name).exists()]
    check_destination(destination, overwrite, folders)
    if pooled_grid_size is not None:
        with as_input_errors():
            parse_grid(pooled_grid_size)
    if push_to_hub:
        check_login(push_to_hub)


def _most_views(config: DecoConfig) -> int:
    height, width = config.view_size
    tiles = [(size[0] // height) * (size[1] // width) for size in config.image_grid_pinpoints or []]
    return max(tiles, default=0) + config.image_overview


def _generation_config(checkpoint: LlavaCheckpoint, processor: DecoProcessor | None) -> GenerationConfig:
    """The generation config of the source or, if it has none, of its base model. Image tokens are never generated."""
    has_own = (checkpoint.sources["source"].folder / "generation_config.json").exists()
    folder = (checkpoint.sources["source"] if has_own else checkpoint.tokenizer).folder
    with wrap_errors(f"generation_config.json of {folder}"):
        generation_config = load_generation_config(folder, getattr(processor, "tokenizer", None))
        suppress_placeholders(generation_config, checkpoint.config)
    return generation_config


def _licence_files(source: Source) -> list[Path]:
    """The licence files in the folder. Links are skipped, as they may lead anywhere; the Hub's lead to its cache."""
    files = [path for pattern in _LICENCE_FILES for path in source.folder.glob(pattern) if path.is_file()]
    return [path for path in files if source.revision or not path.is_symlink()]


def _output_tensors(checkpoint: LlavaCheckpoint, dtype: str | None) -> dict[str, OutputTensor]:
    """The tensors in the order of their positions in the files, with rows for new tokens, cast to `dtype` if given."""
    num_rows = checkpoint.config.text_config.vocab_size
    tensors: dict[str, OutputTensor] = {}
    for name, tensor in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].path, item[1].offset or 0)):
        if dtype is not None and isinstance(tensor, MergedLora):  # its sum is float32, so it is rounded once
            tensor = replace(tensor, dtype=getattr(torch, dtype))
        is_short = name in EMBEDDINGS and tensor.shape[0] < num_rows
        output: OutputTensor = Extended(tensor, num_rows) if is_short else tensor
        if dtype is not None and output.dtype != getattr(torch, dtype):
            output = Cast(output, getattr(torch, dtype))
        tensors[name] = output
    return tensors
