# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run: TRL's `SFTConfig`, and what DeCo adds."""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from .parts import PARTS


@dataclass
class DecoSFTConfig(SFTConfig):
    """TRL's `SFTConfig` with the settings of DeCo. The loss is always on the assistant's answers alone."""

    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": f"Parts that are not trained: {', '.join(PARTS)}. LoRA may adapt a frozen part."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; default: learning_rate."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; default: learning_rate."}
    )
    pooled_grid_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Elastic training: each step samples one of these grid sides. Default: the model's grid."},
    )
    pooled_grid_weights: list[float] | None = field(
        default=None, metadata={"help": "Probability of each grid, up to a factor; default: all equal."}
    )
    max_image_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "Budgets of an image in tokens, in place of grids: each step samples one, and each image gets the "
            "largest grid that fits."
        },
    )
    pooled_video_grid_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Each step samples one of these grid sides for the frames of videos. Default: the model's."},
    )
    tiles: int | None = field(
        default=None,
        metadata={
            "help": "Cut each image into this number of tiles (4, 9, ...), whose patches are pooled to the same grid. "
            "For models without image_grid_pinpoints."
        },
    )
    add_timestamps: bool = field(
        default=False, metadata={"help": "Write the time of a video's frames before their tokens."}
    )
    independent_turns: bool = field(
        default=False,
        metadata={"help": "Turns are independent questions about the same images; no turn attends to another."},
    )
    distill: str | None = field(
        default=None,
        metadata={
            "help": "logits: learn the next-token probabilities that the model without its adapter has at the full "
            "grid, at the tokens of the answers. Default: learn the answers.",
            "choices": ["logits"],
        },
    )
    overlong_samples: str = field(
        default="refuse",
        metadata={
            "help": "What to do with samples of more than max_length tokens (images and videos at the largest grid): "
            "refuse the run, or drop them. Both report their number; no sample is ever cut.",
            "choices": ["refuse", "drop"],
        },
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that recipes/cache_features.py wrote: the features of the frozen vision tower are read "
            "from there, and no image is decoded."
        },
    )

    @property
    def order_seed(self) -> int:
        """The seed of the order of samples."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # the collator needs other columns than the model
        self.logging_nan_inf_filter = False  # such a loss stops the run instead
        self.use_cache = True  # in the saved config; TRL turns it off for each call
        if self.packing:
            raise ValueError("packing=True works for texts alone, but samples have images; leave it out.")
        # The collator tokenizes; TRL would tokenize data sets without a column of images, whose messages may have some
        self.dataset_kwargs: dict[str, Any] | None = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        for name in ("pad_token", "eos_token", "pad_to_multiple_of", "completion_only_loss", "chat_template_path"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect here: the chat template marks what is learned. "
                    f"Choose a template with --chat_template."
                )
        if self.distill not in (None, "logits"):
            raise ValueError(f"distill must be 'logits' or left out, got {self.distill!r}.")
        if self.distill is not None and (self.loss_type != "nll" or self.label_smoothing_factor > 0):
            raise ValueError("--distill logits is a loss of its own; leave out loss_type and label_smoothing_factor.")
        unknown = sorted(set(self.freeze) - set(PARTS))
        if unknown:
            raise ValueError(f"freeze names {', '.join(map(repr, unknown))}; the parts are {', '.join(PARTS)}.")
        if self.max_image_tokens and self.pooled_grid_sizes:
            raise ValueError(
                "pooled_grid_sizes and max_image_tokens both choose the grids of a step; give one of them."
            )
        if self.pooled_grid_weights is not None and len(self.pooled_grid_weights) != len(self.pooled_grid_sizes or ()):
            raise ValueError(
                f"pooled_grid_weights has {len(self.pooled_grid_weights)} numbers for "
                f"{len(self.pooled_grid_sizes or ())} pooled_grid_sizes; give one for each."
            )
