# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer for DeCo: a grid per step, a learning rate per part, batches of one modality, exact resume."""

import math
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from trl import SFTTrainer

from ..configuration_deco import check_grid, num_image_tokens
from ..hub import base_models, model_card
from .checkpoints import CompleteCheckpoints
from .collator import DecoCollator, expand_images
from .config import DecoSFTConfig
from .distillation import as_teacher, check_teacher, kl_divergence, one_encoding, return_answer_states
from .distributed import reduce_head_gradient
from .feature_cache import CacheError, FeatureCache, features_as_pixels
from .feature_cache_maps import VideoCache, has_videos, image_cache_class
from .lengths import add_lengths
from .newline import first_newline, save_newline, train_newline
from .parts import PARTS, part_of
from .sampler import ModalityLengthSampler, SetEpoch


class DecoSFTTrainer(CompleteCheckpoints, SFTTrainer):
    """TRL's SFTTrainer with the settings of `DecoSFTConfig`, and with these differences:

    - The labels are those of `DecoCollator`. A step has one grid on all ranks, sampled from `seed` and the step.
    - `train_sampling_strategy="group_by_length"` makes batches of similar length that are all images or all text.
    - Samples longer than `max_length` are refused or dropped before training, never cut.
    - Trained parameters are kept in float32 under mixed precision, whatever the dtype of the others: a bfloat16 weight
      would lose an update of 2e-5.
    - A loss that is not finite raises an error with the step and the samples.
    - A checkpoint appears under its name only when it is complete.
    - With `feature_cache` the vision tower does not run. It stays in the model and in its checkpoints.
    - With `distill` the loss is the divergence from the model without its adapter at the full grid.

    Args:
        model: a `DecoForConditionalGeneration`.
        args: `DecoSFTConfig`.
        train_dataset: conversations, with `messages` and `images`.
        processing_class: the model's `DecoProcessor`.
        eval_dataset: of the same form, or a dict of such data sets.
        kwargs: for `SFTTrainer`.

    Raises:
        ValueError: settings contradict each other or the model, or samples are too long.
    """

    def __init__(self, model, args: DecoSFTConfig, train_dataset, processing_class, eval_dataset=None, **kwargs):
        _check_settings(model, args)
        for name, parameter in model.named_parameters():
            if part_of(name) in args.freeze:
                parameter.requires_grad_(False)
        feature_cache: FeatureCache | None = None
        video_cache: VideoCache | None = None
        if args.feature_cache is not None:
            evaluates = eval_dataset is not None
            feature_cache = image_cache_class(model, args).of_run(model, processing_class, args, evaluates)
            if has_videos(train_dataset) or has_videos(eval_dataset):
                video_cache = VideoCache.of_run(model, processing_class, args, evaluates)
            for cache in filter(None, (feature_cache, video_cache)):
                train_dataset, eval_dataset = cache.refer(train_dataset), _apply(cache.refer, eval_dataset)
        elif (is_fsdp_enabled() or is_deepspeed_zero3_enabled()) and has_videos(train_dataset):
            raise ValueError(
                "FSDP and ZeRO-3 split the vision tower, which ranks run different numbers of times for videos. Use "
                "DDP, or cache the features of the videos (--feature_cache)."
            )
        grids = [*(args.pooled_grid_sizes or ()), processing_class.pooled_grid_size]  # the last is evaluation's
        own_video_grid = model.config.pooled_video_grid
        if processing_class.pooled_video_grid_size is not None:
            own_video_grid = processing_class.pooled_video_grid_size
        video_grids = [*(args.pooled_video_grid_sizes or ()), own_video_grid]
        collator = DecoCollator(
            processing_class,
            independent_turns=args.independent_turns,
            max_length=args.max_length,
            largest_grid=max(grids, key=num_image_tokens),
            largest_video_grid=max(video_grids, key=num_image_tokens),
            max_image_tokens=None if args.max_image_tokens is None else max(args.max_image_tokens),
            tiles=args.tiles,
            add_timestamps=args.add_timestamps,
            feature_cache=feature_cache,
            video_cache=video_cache,
            grids=args.pooled_grid_sizes,
            max_positions=_max_positions(model.config),
            patches_per_image=getattr(
                processing_class.image_processor, "max_num_patches", num_image_tokens(model.config.patch_grid)
            ),
        )
        with args.main_process_first(desc="counting tokens"):
            train_dataset = add_lengths(train_dataset, collator, args)
            eval_dataset = _apply(lambda dataset: add_lengths(dataset, collator, args), eval_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )
        self._first_newline = train_newline(self.model) if is_peft_model(self.model) else None
        self._check_trained_parts()
        if not self.is_deepspeed_enabled:  # DeepSpeed keeps float32 copies itself
            self._keep_trained_parameters_in_float32(model)
        if self.is_fsdp_enabled:
            reduce_head_gradient(self._unwrapped())
        if args.distill is not None:
            check_teacher(self.model, args.freeze)
            return_answer_states(self._unwrapped())

    def _unwrapped(self):
        """The DeCo without PEFT's wrapper."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _check_trained_parts(self):
        copied = {part_of(name) for name, _ in self.model.named_parameters() if "modules_to_save" in name.split(".")}
        contradicted = ", ".join(sorted(copied & set(self.args.freeze)))
        if contradicted:
            raise ValueError(
                f"{contradicted} is in freeze and in PEFT's modules_to_save, which trains it; remove it from one."
            )
        trained = {part_of(name) for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if self.args.feature_cache is not None and "vision_tower" in trained:
            raise CacheError(
                "--feature_cache has the features of a frozen vision tower, but this run trains the tower. Add "
                "vision_tower to --freeze and keep adapters off it, or leave out --feature_cache."
            )

    def _keep_trained_parameters_in_float32(self, model):
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if model.dtype != torch.float32 and not (self.args.bf16 or self.args.fp16):
            raise ValueError(
                f"The frozen parts are in {model.dtype} and the trained ones in float32, which works only "
                f"under autocast. Set --bf16 true, or --dtype float32."
            )

    # --- batches -----------------------------------------------------------------------------------------------------

    def grid_of_step(self, step: int) -> int | None:
        """The grid of training step `step`; None means the model's grid."""
        if self.args.pooled_grid_sizes is None:
            return None
        weights = self.args.pooled_grid_weights or [1.0] * len(self.args.pooled_grid_sizes)
        rng = np.random.default_rng([self.args.seed, step])
        return int(rng.choice(self.args.pooled_grid_sizes, p=np.array(weights) / sum(weights)))

    def _budget_of_step(self, step: int) -> dict:
        """The arguments of `expand_images` for training step `step`."""

        def sample(options: list[int] | None, stream: int) -> int | None:
            return None if not options else int(np.random.default_rng([self.args.seed, step, stream]).choice(options))

        return {
            "pooled_grid_size": self.grid_of_step(step),
            "max_image_tokens": sample(self.args.max_image_tokens, 1),
            "pooled_video_grid_size": sample(self.args.pooled_video_grid_sizes, 2),
        }

    def _expanded(self, batch: dict, pooled_grid_size=None, **budget) -> dict:
        """The model's inputs and, as `teacher`, those at the full grid if the run learns from it. Arguments are those
        of `expand_images`."""
        deco = self._unwrapped().model
        inputs = expand_images(batch, pooled_grid_size, self.processing_class, **budget)
        if self.args.distill is not None:
            full_grid = deco.patch_grids(batch.get("pixel_values"), batch.get("spatial_shapes"))
            full_video_grid = deco.config.views.full_video_grid
            inputs["teacher"] = expand_images(
                batch, full_grid, self.processing_class, pooled_video_grid_size=full_video_grid
            )
        return inputs

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:  # Trainer would take more steps after a resume at the end
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # private, seen in transformers 5.19 to 5.24
    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        if "length" not in dataset.column_names:
            raise ValueError(
                "group_by_length needs the lengths of samples, which a data set with a custom transform does not have."
            )
        sampler = ModalityLengthSampler(
            dataset["length"][:],
            dataset["has_images"][:],
            batch_size=self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.order_seed,
        )
        self.add_callback(SetEpoch(sampler))
        return sampler

    # --- steps -------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        rates = {
            "multi_modal_projector": self.args.projector_learning_rate,
            "vision_tower": self.args.vision_tower_learning_rate,
        }
        parts = {id(parameter): part_of(name) for name, parameter in (model or self.model).named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for part in reversed(PARTS):  # Trainer logs the rate of the first group
                parameters = [parameter for parameter in group["params"] if parts[id(parameter)] == part]
                rate = group["lr"] if rates.get(part) is None else rates[part]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": rate})
        optimizer.param_groups = groups
        return optimizer

    def training_step(self, model, inputs, *args, **kwargs):
        sample_ids = inputs["sample_ids"]
        inputs = self._expanded(inputs, **self._budget_of_step(self.state.global_step))
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}, on samples {', '.join(sample_ids)}. "
                f"No weight was updated with them; checkpoints before this step are good."
            )
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        deco = self._unwrapped().model
        with features_as_pixels(deco) if self.data_collator.feature_cache is not None else nullcontext():
            if self.args.distill is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            return self._distillation_loss(model, inputs, *args, **kwargs)

    def _distillation_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        deco, teacher_inputs = self._unwrapped(), inputs.pop("teacher")
        tower = deco.model.vision_tower
        is_frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        with one_encoding(tower) if is_frozen else nullcontext() as encoding:
            with as_teacher(self.model), first_newline(self.model, self._first_newline):
                teacher_states = model(**teacher_inputs, answer_states=True)
            if encoding is not None:
                encoding.rewind()
            states = model(**inputs, answer_states=True)
        with self.accelerator.autocast():
            divergence = kl_divergence(states, teacher_states, deco)
        # as in TRL's loss: DDP averages gradients, and num_items_in_batch counts the tokens of all processes
        num_tokens = len(states) if num_items_in_batch is None else num_items_in_batch
        loss = divergence / torch.as_tensor(num_tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, self._expanded(inputs), *args, **kwargs)

    def end_training(self) -> None:
        """End the trackers of the run, and the process group if there is one."""
        self.accelerator.end_training()
        if self.args.world_size > 1:
            # Gloo's thread needs the GIL to free its last work, but the destructor of the group holds the GIL while it
            # waits for that thread (torch 2.13): a process that ends at once may hang.
            time.sleep(0.5)

    # --- what a run writes -------------------------------------------------------------------------------------------

    # private, seen in transformers 5.19 to 5.24
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict=state_dict)
        if is_peft_model(self.model):
            save_newline(self.model, output_dir or self.args.output_dir, state_dict)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **metadata):
        """Write DeCo's card. The example in TRL's card is for a text model."""
        if not self.is_world_process_zero():
            return
        repo_id = self.hub_model_id
        if is_peft_model(self.model):
            metadata = {"library_name": "peft", **metadata}
        card = model_card(
            self.model.config,
            model_name or Path(self.args.output_dir).name,
            repo_id or "THIS_FOLDER_OR_REPOSITORY",
            about=f"Trained by TRL {version('trl')} (`SFTTrainer`); steps: {self.state.global_step}.",
            base_model=base_models(self.model.config, repo_id) or None,
            datasets=dataset_name,
            **metadata,
        )
        tags = [tags] if isinstance(tags, str) else tags or []
        card.data.tags = list(dict.fromkeys([*card.data.tags, "generated_from_trainer", "trl", "sft", *tags]))
        card.save(Path(self.args.output_dir, "README.md"))


def _check_settings(model, args: DecoSFTConfig) -> None:
    if args.pooled_grid_sizes and not model.config.takes_any_grid:
        raise ValueError(
            f"pooled_grid_sizes samples a grid per step, but projector_type={model.config.projector_type!r} has one "
            f"grid; avg_pool and c_abstractor take any."
        )
    rows, cols = model.config.patch_grid
    tiles_per_side = math.isqrt(args.tiles or 1)
    for side in args.pooled_grid_sizes or ():
        check_grid(side, (tiles_per_side * rows, tiles_per_side * cols), name="pooled_grid_sizes")
    for side in args.pooled_video_grid_sizes or ():
        check_grid(side, model.config.patch_grid, of="a frame", name="pooled_video_grid_sizes")
    if args.max_image_tokens and not model.config.takes_any_grid:
        raise ValueError(
            f"max_image_tokens chooses a grid per image, but projector_type={model.config.projector_type!r} has one "
            f"grid; avg_pool and c_abstractor take any."
        )
    if args.tiles is not None and model.config.image_grid_pinpoints is not None:
        raise ValueError(f"tiles={args.tiles}: the model has image_grid_pinpoints, which cut images; leave tiles out.")
    if args.tiles is not None and (args.tiles < 1 or tiles_per_side**2 != args.tiles):
        raise ValueError(f"tiles must be a square number, 1, 4, 9, ..., got {args.tiles}.")
    # private, seen in transformers 5.19 to 5.24
    if args.independent_turns and model.config.get_text_config()._attn_implementation != "sdpa":
        raise ValueError(
            "independent_turns needs an attention mask that only sdpa attention takes; set --attn_implementation sdpa."
        )


def _max_positions(config) -> int | None:
    """The positions of the language model, if images keep those of their patches and can so exceed them."""
    if config.image_positions == "sequence":
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _apply(function, dataset):
    """The function of a data set, or of each data set of a dict; None stays None."""
    if isinstance(dataset, dict):
        return {name: function(entry) for name, entry in dataset.items()}
    return None if dataset is None else function(dataset)
