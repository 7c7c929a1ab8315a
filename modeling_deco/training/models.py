# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Models to train: loaded, joined from two backbones, or merged with their adapter."""

import json
import shutil
from copy import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config, get_quantization_config

from .. import DecoForConditionalGeneration, DecoProcessor
from ..chat_templates import read_chat_template
from ..inference.adapters import find_adapter
from ..inference.loading import load_model
from ..utils.image_processors import pad_to_square
from ..utils.staging import INCOMPLETE
from .arguments import DecoArguments
from .config import DecoSFTConfig
from .distributed import on_first_process
from .output_dir import BASE, clear_output_dir

IMAGE_POSITIONS = "patch"  # of models that are joined from two backbones


def load_model_and_processor(
    args: DecoArguments, model_args: ModelConfig
) -> tuple[DecoForConditionalGeneration, DecoProcessor]:
    """Load a DeCo, or join two backbones by a new projector.

    Raises:
        ValueError: the arguments contradict each other or the model.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("No model is named; set --model_name_or_path.")
    chat_template = None if args.chat_template is None else read_chat_template(args.chat_template)
    if args.vision_model_name_or_path is not None:
        model, processor = _join(
            args.vision_model_name_or_path, model_args.model_name_or_path, args, model_args, chat_template
        )
    else:
        model, processor = _load(args, model_args)
    if chat_template is not None:
        processor.chat_template = chat_template
    _set_video_options(args, model, processor)
    if args.pad_images and model.config.image_grid_pinpoints is not None:
        raise ValueError("--pad_images is for models of one view; leave it out with image_grid_pinpoints.")
    if args.pad_images:
        processor.image_processor = pad_to_square(processor.image_processor)
    return model, processor


def _join(vision_model: str, text_model: str, args: DecoArguments, model_args: ModelConfig, chat_template: str | None):
    if get_quantization_config(model_args) is not None or model_args.model_revision != "main":
        raise ValueError(
            "Two backbones are joined without quantization and at their main revision. Train the projector first "
            "(stage 1), then quantize the result; for another --model_revision, download it and name its folder."
        )
    grid = _grid(args)
    views = _views(args)
    projector: dict[str, Any] = {} if args.projector_type is None else {"projector_type": args.projector_type}
    if args.projector_config is not None:
        projector["projector_config"] = read_sizes(args.projector_config)
    model = DecoForConditionalGeneration.from_vision_text_pretrained(
        vision_model, text_model, dtype=model_args.dtype, takes_videos=args.takes_videos, **grid, **views, **projector
    )
    try:
        _set_image_positions(model, args.image_positions or IMAGE_POSITIONS)
    except ValueError:
        if args.image_positions is not None:
            raise
    if model_args.attn_implementation is not None:
        model.set_attn_implementation(model_args.attn_implementation)
    has_views = model.config.image_grid_pinpoints is not None or model.config.video_token_id is not None
    return model, DecoProcessor.from_vision_text_pretrained(
        vision_model,
        text_model,
        pooled_grid_size=model.config.pooled_grid_size,
        chat_template=chat_template,
        config=model.config if has_views else None,
    )


def _load(args: DecoArguments, model_args: ModelConfig):
    name, revision, grid = model_args.model_name_or_path, model_args.model_revision, _grid(args)
    if grid and model_args.use_peft and not args.merge_adapter:
        raise ValueError("An adapter keeps its model's grid. With --pooled_grid_size, set --merge_adapter true too.")
    if args.projector_type is not None or args.projector_config is not None:
        raise ValueError(
            f"{name} has a projector already. Leave out --projector_type and --projector_config, or join two "
            f"backbones with --vision_model_name_or_path."
        )
    if _views(args) or args.takes_videos:
        raise ValueError(
            f"image_grid_pinpoints and takes_videos are for two backbones (--vision_model_name_or_path); {name} keeps "
            f"its own. A model of one view looks at tiles with --tiles."
        )
    if find_adapter(name, revision) is not None:
        raise ValueError(f"{name} is an adapter. Merge it first (--merge_adapter true), then train the result.")
    model = load_model(
        name,
        revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        **grid,
    )
    if args.image_positions not in (None, model.config.image_positions):
        if model_args.use_peft and not args.merge_adapter:
            raise ValueError(
                f"An adapter keeps its model's image_positions, which are {model.config.image_positions!r} in {name}. "
                f"With --image_positions {args.image_positions}, set --merge_adapter true too."
            )
        _set_image_positions(model, args.image_positions)
    return model, DecoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False, **grid)


def _views(args: DecoArguments) -> dict[str, Any]:
    """The fields of `DecoConfig` that say how pictures are cut into views."""
    if args.image_grid_pinpoints is None:
        if not args.image_overview or args.image_newline or args.vision_aspect_ratio is not None:
            raise ValueError(
                "image_overview, image_newline and vision_aspect_ratio have no effect without image_grid_pinpoints; "
                "set it, or leave them out."
            )
        return {}
    pinpoints: Any = args.image_grid_pinpoints  # from a YAML file it is a list already
    if isinstance(pinpoints, str):
        try:
            pinpoints = json.loads(pinpoints)
        except json.JSONDecodeError:
            raise ValueError(
                f"--image_grid_pinpoints must be JSON, such as [[336, 672], [672, 336]], got {pinpoints!r}."
            ) from None
    fields = {"image_grid_pinpoints": pinpoints, "image_overview": args.image_overview}
    fields |= {"image_newline": args.image_newline}
    return fields | ({} if args.vision_aspect_ratio is None else {"vision_aspect_ratio": args.vision_aspect_ratio})


def _set_video_options(args: DecoArguments, model: DecoForConditionalGeneration, processor: DecoProcessor) -> None:
    """Set how videos are read. The processor's values reach the model with every call; those of the config are for
    calls without them."""
    names = ("pooled_video_grid_size", "frames_per_token_grid", "fps", "max_frames")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and processor.video_token is None:
        raise ValueError(f"--{next(iter(given))} is for models that take videos, and this one takes none.")
    for name, value in given.items():
        if value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}.")
        setattr(processor, name, value)
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    if given:
        processor.video_size(1, processor.frame_size)  # refuses a grid that is too large


def _grid(args: DecoArguments) -> dict[str, Any]:
    return {} if args.pooled_grid_size is None else {"pooled_grid_size": args.pooled_grid_size}


def _set_image_positions(model: DecoForConditionalGeneration, image_positions: str) -> None:
    model.config.image_positions = model.model.check_image_positions(image_positions)


def read_sizes(projector_config: str) -> dict[str, int]:
    """The JSON object of `--projector_config`."""
    try:
        sizes = json.loads(projector_config)
    except json.JSONDecodeError:
        sizes = None
    if not isinstance(sizes, dict):
        raise ValueError(
            f'--projector_config must be a JSON object, such as {{"num_hidden_layers": 2}}, got {projector_config!r}.'
        )
    return sizes


# --- adapters --------------------------------------------------------------------------------------------------------


def peft_config_of(model_args: ModelConfig) -> PeftConfig | None:
    """TRL's PEFT config, with the revision of the model, which is saved with the adapter."""
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.revision = model_args.model_revision
    return peft_config


def save_joined_backbones(
    args: DecoArguments, training_args: DecoSFTConfig, model_args: ModelConfig
) -> tuple[DecoArguments, ModelConfig]:
    """Join two backbones and write the result to `output_dir/base`: an adapter needs its base model on the disk.

    Every process of a launch must call it; the first one writes. A resumed run keeps the base of the first run.

    Returns:
        Arguments that name the written model in place of the backbones.

    Raises:
        ValueError: the adapter would be pushed without its base, or the weights are split over processes.
    """
    if training_args.push_to_hub or is_deepspeed_zero3_enabled():
        raise ValueError(
            "LoRA on two backbones needs a base model that is on this disk alone and is written by one process. Train "
            "the projector first (stage 1), or leave out --push_to_hub and ZeRO-3."
        )
    clear_output_dir(args, training_args)
    base = Path(training_args.output_dir, BASE).resolve()
    on_first_process(training_args, _write_base, args, model_args, base)
    args, model_args = copy(args), copy(model_args)
    args.vision_model_name_or_path = args.projector_type = args.projector_config = None
    args.pooled_grid_size = args.image_positions = args.image_grid_pinpoints = args.vision_aspect_ratio = None
    args.image_overview = True
    args.pad_images = args.overwrite_output_dir = args.image_newline = args.takes_videos = False
    model_args.model_name_or_path = str(base)
    return args, model_args


def _write_base(args: DecoArguments, model_args: ModelConfig, base: Path) -> None:
    if base.is_dir():  # this run is resumed
        return
    staged = base.with_name(INCOMPLETE) / BASE
    shutil.rmtree(staged, ignore_errors=True)
    model, processor = load_model_and_processor(args, model_args)
    model.save_pretrained(staged)
    processor.save_pretrained(staged)
    staged.rename(base)


def merge_adapter(adapter_dir: str, image_positions: str | None = None) -> None:
    """Write `adapter_dir/merged`: the adapter's base model with the adapter merged into it.

    Args:
        adapter_dir: a folder that training wrote.
        image_positions: with which the adapter was trained. Default: the base model's.

    Raises:
        ValueError: the folder has no adapter.
    """
    processor = DecoProcessor.from_pretrained(adapter_dir, trust_remote_code=False)
    adapter = find_adapter(adapter_dir)
    if adapter is None:
        raise ValueError(f"{adapter_dir} has no adapter; name a folder that was trained with --use_peft.")
    model = load_model(adapter.base, adapter.base_revision, dtype="auto", pooled_grid_size=processor.pooled_grid_size)
    if image_positions is not None:
        _set_image_positions(model, image_positions)
    merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    merged.save_pretrained(Path(adapter_dir, "merged"))
    processor.save_pretrained(Path(adapter_dir, "merged"))
