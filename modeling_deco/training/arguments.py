# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of the recipes beyond those of TRL and `DecoSFTConfig`."""

from dataclasses import dataclass, field

from ..chat_templates import CHAT_TEMPLATES


@dataclass
class DecoArguments:
    """Model and data, beyond TRL's `ModelConfig`. Neither has a default."""

    data_path: list[str] = field(
        metadata={"help": "Folders that modeling_deco.training.data wrote, or Hub ids; several are concatenated."}
    )
    eval_data_path: list[str] | None = field(
        default=None, metadata={"help": "The same for evaluation; set --eval_strategy and --eval_steps too."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read data while training; set --max_steps too."})
    vision_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Vision tower to join to the language model --model_name_or_path by a new projector."},
    )
    pooled_grid_size: int | None = field(
        default=None, metadata={"help": "Side of the model's own grid; default: 12, or the checkpoint's."}
    )
    image_positions: str | None = field(
        default=None,
        metadata={
            "help": "Positions of image tokens, patch or sequence, see DecoConfig. Default: the checkpoint's; for two "
            "backbones patch, if the projector's tokens have places and the language model takes positions.",
            "choices": ["patch", "sequence"],
        },
    )
    image_grid_pinpoints: str | None = field(
        default=None,
        metadata={
            "help": "For two backbones: sizes [height, width] in pixels, as JSON: '[[336, 672], [672, 336]]'. A "
            "picture is resized to the best of them and cut into tiles of the tower's size. Default: one view."
        },
    )
    image_overview: bool = field(
        default=True, metadata={"help": "With image_grid_pinpoints, the whole picture is one more view."}
    )
    image_newline: bool = field(
        default=False,
        metadata={"help": "With image_grid_pinpoints, a new newline, trained with the projector, ends each row."},
    )
    vision_aspect_ratio: str | None = field(
        default=None,
        metadata={"help": "With image_grid_pinpoints: anyres (the default), or anyres_max_N, at most about N views."},
    )
    takes_videos: bool = field(default=False, metadata={"help": "For two backbones: the model takes videos, too."})
    pooled_video_grid_size: int | None = field(
        default=None, metadata={"help": "Side of the grid of a video's frame; default: 7, or the checkpoint's."}
    )
    frames_per_token_grid: int | None = field(
        default=None, metadata={"help": "Neighbouring frames that are averaged; default: 1, or the checkpoint's."}
    )
    fps: float | None = field(
        default=None, metadata={"help": "Frames per second that are read from a video; default: the processor's."}
    )
    max_frames: int | None = field(
        default=None, metadata={"help": "The most frames that are read from a video; default: the processor's."}
    )
    projector_type: str | None = field(
        default=None,
        metadata={"help": "Type of a new projector: avg_pool (the default), or one of those that DecoConfig lists."},
    )
    projector_config: str | None = field(
        default=None,
        metadata={"help": "Sizes of a new projector, as JSON: '{\"num_hidden_layers\": 2}'; default: that type's."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(CHAT_TEMPLATES)}, or the path of a Jinja file with generation marks around the "
            "answers. Default: the model's own."
        },
    )
    pad_images: bool = field(
        default=False, metadata={"help": "Pad images to a square before resizing, as LLaVA-1.5 was trained."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Write output_dir/merged: the model with the adapter merged into it."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the model and the checkpoints in output_dir."}
    )


@dataclass
class CacheArguments:
    """How a feature cache is written."""

    shard_gigabytes: float = field(
        default=1.0,
        metadata={"help": "Size of a shard. Each process holds one in memory, and loses one if it is killed."},
    )
