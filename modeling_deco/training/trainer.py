"""TRL's SFTTrainer for DeCo: token budgets drawn per step, a learning rate for each part, batches of one modality,
runs that stop at a bad loss and go on where they were killed."""

import copy
import functools
import logging
import math
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from torch.distributed.tensor import DTensor, Partial
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME  # private, seen in transformers 5.19 to 5.24
from transformers.trainer_pt_utils import get_length_grouped_indices  # private, seen in transformers 5.19 to 5.24
from transformers.trainer_utils import (  # private, seen in transformers 5.19 to 5.24
    PREFIX_CHECKPOINT_DIR,
    rotate_checkpoints,
)
from trl import SFTConfig, SFTTrainer

from ..configuration_deco import check_grid, num_image_tokens
from ..hub import base_models, model_card
from .collator import DecoCollator, expand_images
from .feature_cache import CacheError, FeatureCache, features_as_pixels
from .records import report_faults, rows_without_bytes, undecoded

logger = logging.getLogger(__name__)

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
INCOMPLETE = ".incomplete"  # under output_dir: a checkpoint is written here, then renamed


@dataclass
class DecoSFTConfig(SFTConfig):
    """TRL's `SFTConfig` with what is DeCo's. The loss is always on the assistant's answers alone."""

    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Parts that are not trained, of {', '.join(PARTS)}. LoRA adapters may lie on frozen parts."
        },
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "For the projector; default: learning_rate."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "For the vision tower; default: learning_rate."}
    )
    pooled_grid_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Elastic training: each step draws one of these grids (sides). Default: the model's grid."},
    )
    pooled_grid_weights: list[float] | None = field(
        default=None, metadata={"help": "How often each grid is drawn; default: equally."}
    )
    independent_turns: bool = field(
        default=False,
        metadata={"help": "Turns are questions about the first question's images, and do not see each other."},
    )
    overlong_samples: str = field(
        default="refuse",
        metadata={
            "help": "What happens to samples with more than max_length tokens (images at the largest grid): the run "
            "is refused, or they are dropped. Either is reported with numbers, and no sample is ever cut.",
            "choices": ["refuse", "drop"],
        },
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of recipes/cache_features.py: a frozen vision tower's features are read there, "
            "and no image is decoded."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # ids of samples are wanted, and the collator picks what it needs
        self.logging_nan_inf_filter = False  # such a loss stops the run
        self.use_cache = True  # of the saved config; TRL turns it off call by call
        if self.packing:
            raise ValueError("packing=True joins texts alone, and samples have images; leave it out.")
        # TRL tokenizes data sets without a column of images, whose images may be in the messages; the collator does so
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        for name in ("pad_token", "eos_token", "pad_to_multiple_of", "completion_only_loss", "chat_template_path"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect here: the loss is on what the chat template marks, "
                    f"and the template is set by --chat_template."
                )
        unknown = sorted(set(self.freeze) - set(PARTS))
        if unknown:
            raise ValueError(f"freeze names {', '.join(map(repr, unknown))}; the parts are {', '.join(PARTS)}.")
        if self.pooled_grid_weights is not None and len(self.pooled_grid_weights) != len(self.pooled_grid_sizes or ()):
            raise ValueError(
                f"pooled_grid_weights has {len(self.pooled_grid_weights)} numbers for "
                f"{len(self.pooled_grid_sizes or ())} pooled_grid_sizes; give one for each."
            )


class DecoSFTTrainer(SFTTrainer):
    """Differs from TRL's in what `DecoSFTConfig` adds, and in this:

    - Labels are those of `DecoCollator`. A step has one grid on all ranks, drawn from `seed` and its number.
    - `train_sampling_strategy="group_by_length"` makes batches of like length that are all images or all text.
    - Samples longer than `max_length` are refused or dropped before training, never cut.
    - What is trained is kept in float32 under mixed precision, whatever the dtype of the rest: an update of 2e-5 is
      lost on a bfloat16 weight.
    - A loss that is not finite raises an error with the step and the samples.
    - A checkpoint appears under its name when it is whole.
    - With `feature_cache` the vision tower does not run. It stays in the model, whose checkpoints are whole.

    Args:
        model: a `DecoForConditionalGeneration`.
        args: `DecoSFTConfig`.
        train_dataset: conversational, with `messages` and `images`.
        processing_class: the model's `DecoProcessor`.
        kwargs: as for `SFTTrainer`.

    Raises:
        ValueError: settings contradict each other or the model, or samples are too long and are refused.
    """

    def __init__(self, model, args: DecoSFTConfig, train_dataset, processing_class, eval_dataset=None, **kwargs):
        self._check_grids(model, args)
        for name, parameter in model.named_parameters():
            if part_of(name) in args.freeze:
                parameter.requires_grad_(False)
        # private, seen in transformers 5.19 to 5.24
        if args.independent_turns and model.config.get_text_config()._attn_implementation != "sdpa":
            raise ValueError("independent_turns has a mask of its own, which sdpa attention alone reads: choose that.")
        feature_cache = None
        if args.feature_cache is not None:
            feature_cache = FeatureCache.of_run(model, processing_class, args, evaluates=eval_dataset is not None)
            train_dataset = feature_cache.refer(train_dataset)
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: feature_cache.refer(dataset) for name, dataset in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = feature_cache.refer(eval_dataset)
        grids = [*(args.pooled_grid_sizes or ()), processing_class.pooled_grid_size]  # the last, in evaluation
        collator = DecoCollator(
            processing_class,
            independent_turns=args.independent_turns,
            max_length=args.max_length,
            largest_grid=max(grids, key=num_image_tokens),
            feature_cache=feature_cache,
            grids=args.pooled_grid_sizes,
        )
        with args.main_process_first(desc="measuring samples"):
            train_dataset = measured(train_dataset, collator, args)
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: measured(dataset, collator, args) for name, dataset in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = measured(eval_dataset, collator, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )
        whole = {part_of(name) for name, _ in self.model.named_parameters() if "modules_to_save" in name.split(".")}
        if whole & set(args.freeze):
            raise ValueError(
                f"{', '.join(sorted(whole & set(args.freeze)))} is in freeze and, for PEFT, in modules_to_save, which "
                f"trains it: name it in one of them."
            )
        trained = {part_of(name) for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if feature_cache is not None and "vision_tower" in trained:
            raise CacheError(
                "--feature_cache has the features of a frozen vision tower, and this run trains it: name vision_tower "
                "in freeze, keep adapters off it, or leave out the cache."
            )
        if not self.is_deepspeed_enabled:  # which keeps float32 copies itself
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            if model.dtype != torch.float32 and not (args.bf16 or args.fp16):
                raise ValueError(
                    f"The frozen parts are in {model.dtype} and what is trained in float32, which meet under autocast "
                    f"alone: set --bf16 true, or --dtype float32."
                )
        if self.is_fsdp_enabled:
            reduce_head_gradient(self._unwrapped())

    def _unwrapped(self):
        """The DeCo under PEFT's model, which adapters change in place."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    @staticmethod
    def _check_grids(model, args):
        if args.pooled_grid_sizes and not model.config.takes_any_grid:
            raise ValueError(
                f"pooled_grid_sizes draws a grid per step, and projector_type={model.config.projector_type!r} has one "
                f"grid; avg_pool and c_abstractor take any."
            )
        for side in args.pooled_grid_sizes or ():
            check_grid(side, model.config.patch_grid, name="pooled_grid_sizes")

    # --- batches -----------------------------------------------------------------------------------------------------

    def grid_of_step(self, step: int) -> int | None:
        """The grid that step `step` is trained at; None is the model's own."""
        if self.args.pooled_grid_sizes is None:
            return None
        weights = self.args.pooled_grid_weights or [1.0] * len(self.args.pooled_grid_sizes)
        rng = np.random.default_rng([self.args.seed, step])
        return int(rng.choice(self.args.pooled_grid_sizes, p=np.array(weights) / sum(weights)))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:  # resumed where it had ended: Trainer would do steps more
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # private, seen in transformers 5.19 to 5.24
    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        if "length" not in dataset.column_names:
            raise ValueError("group_by_length needs samples that were measured, and these come from a transform.")
        sampler = ModalityLengthSampler(
            dataset["length"][:],
            dataset["has_images"][:],
            batch_size=self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        self.add_callback(_SetEpoch(sampler))
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
            for part in reversed(PARTS):  # the logged rate is the first group's
                parameters = [parameter for parameter in group["params"] if parts[id(parameter)] == part]
                rate = group["lr"] if rates.get(part) is None else rates[part]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": rate})
        optimizer.param_groups = groups
        return optimizer

    def training_step(self, model, inputs, *args, **kwargs):
        sample_ids = inputs["sample_ids"]
        inputs = expand_images(inputs, self.grid_of_step(self.state.global_step), self.processing_class)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}, on samples {', '.join(sample_ids)}. "
                f"Nothing was learned from them; checkpoints before this step are good."
            )
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.data_collator.feature_cache is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with features_as_pixels(self._unwrapped().model):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, expand_images(inputs, None, self.processing_class), *args, **kwargs)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):  # private, seen in transformers 5.19 to 5.24
        run_dir = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / INCOMPLETE / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / INCOMPLETE, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        settings, self.args = self.args, copy.copy(self.args)
        self.args.output_dir, self.args.push_to_hub, self.args.save_total_limit = str(staged.parent), False, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args = settings
        self.accelerator.wait_for_everyone()
        is_best = self.state.best_model_checkpoint == str(staged)
        if is_best:
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            torch.save(self.args, staged / TRAINING_ARGS_NAME)
            if is_best:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            if final.exists():  # of a run that went on from an older checkpoint
                final.rename(run_dir / INCOMPLETE / "replaced")
            staged.rename(final)
            shutil.rmtree(run_dir / INCOMPLETE)
        self.accelerator.wait_for_everyone()
        if not final.exists():
            raise FileNotFoundError(f"{final} was written on another machine: output_dir must be on a shared disk.")
        self.create_model_card(self.args.hub_model_id and self.args.hub_model_id.split("/")[-1])
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))  # private, seen in transformers 5.19 to 5.24
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **metadata):
        """DeCo's card, in the place of TRL's, whose example shows a text model."""
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


def reduce_head_gradient(model) -> None:
    """Average `lm_head`'s gradient over ranks under FSDP2, as FSDP does for every other parameter.

    accelerate (1.15) makes the head a unit of its own, and TRL (1.16) multiplies by its weight without calling it: the
    weight is then gathered outside FSDP, and each rank's shard gets that rank's gradient alone.
    """
    fused_forward = model.forward

    def gathered_head():
        head = type(model).get_output_embeddings(model)
        if not isinstance(head.weight, DTensor):
            return head
        placements = [Partial("avg")] * head.weight.device_mesh.ndim
        return SimpleNamespace(weight=head.weight.full_tensor(grad_placements=placements), bias=None)

    @functools.wraps(fused_forward)
    def forward(*args, **kwargs):
        model.get_output_embeddings = gathered_head
        try:
            return fused_forward(*args, **kwargs)
        finally:
            del model.get_output_embeddings

    model.forward = forward


# --- data ------------------------------------------------------------------------------------------------------------


def part_of(parameter_name: str) -> str:
    """The part of the model, of `PARTS`, that a parameter belongs to; adapters belong to the part that they lie on."""
    names = parameter_name.split(".")
    return next((part for part in PARTS[:2] if part in names), "language_model")


def measured(dataset, collator: DecoCollator, args: DecoSFTConfig):
    """`dataset` with the columns `length` (tokens, images at the largest grid) and `has_images`, and without samples
    longer than `max_length` where those are dropped.

    Images are not decoded, here and in what is returned. A streamed data set is measured as it is read; one with a
    transform of its own is left to the collator.

    Raises:
        ValueError: samples cannot be read, or are longer than `max_length` and are refused.
    """
    if not isinstance(dataset, Dataset):
        if args.overlong_samples == "refuse" or args.max_length is None:
            return dataset
        return dataset.filter(lambda example: _fits(example, collator))
    if dataset.format["type"] == "custom":
        return dataset

    dataset = undecoded(dataset)
    features = dataset.features

    def measure(table: pa.Table) -> pa.Table:
        columns = {"length": [], "has_images": [], "fault": []}
        for row in rows_without_bytes(table, features):
            length, has_images, fault = 0, False, ""
            try:
                example = collator.read(row)
                length, has_images = collator.count_tokens(collator.tokenize(example)), bool(example["images"])
            except ValueError as error:
                fault = str(error)
            for column, value in zip(columns.values(), (length, has_images, fault), strict=True):
                column.append(value)
        return pa.table(columns)

    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [f"row {index}" for index in range(len(dataset))])
        features = dataset.features
    measurements = dataset.with_format("arrow").map(
        measure,
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=args.dataset_num_proc,
        desc="Measuring samples",
    )
    measurements = measurements.with_format(None)
    report_faults([fault for fault in measurements["fault"][:] if fault], len(dataset))
    dataset = concatenate_datasets([dataset, measurements.remove_columns("fault")], axis=1)
    if args.pooled_grid_sizes and collator.feature_cache is None:
        collator.check_grids(dataset, args.pooled_grid_sizes)
    if args.max_length is None:
        return dataset
    lengths = np.array(dataset["length"][:])
    overlong = np.flatnonzero(lengths > args.max_length)
    if len(overlong) == 0:
        return dataset
    shown = ", ".join(f"{dataset[int(row)]['id']} ({lengths[row]} tokens)" for row in overlong[:5])
    report = (
        f"{len(overlong)} of {len(dataset)} samples are longer than max_length={args.max_length}, images at the "
        f"largest grid: {shown}{', ...' if len(overlong) > 5 else ''}"
    )
    if args.overlong_samples == "refuse" or len(overlong) == len(dataset):
        raise ValueError(
            f"{report}. Raise --max_length, choose smaller grids, or drop such samples by --overlong_samples drop."
        )
    logger.warning("%s. They are dropped.", report)
    return dataset.select(np.flatnonzero(lengths <= args.max_length))


def _fits(example, collator: DecoCollator) -> bool:
    length = collator.count_tokens(collator.tokenize(collator.read(example)))
    if length > collator.max_length:
        logger.warning(
            "Sample %r is dropped: %d tokens, max_length=%d.", example.get("id"), length, collator.max_length
        )
    return length <= collator.max_length


class ModalityLengthSampler(Sampler[int]):
    """Batches of like length that are all images or all text, in random order (LLaVA, llava/train/llava_trainer.py).

    The batch with the longest sample comes first, so that a lack of memory shows at once; what fills no batch of its
    modality comes last, in mixed batches. The order depends on seed and epoch alone.

    Args:
        lengths: of the samples, in tokens.
        has_images: whether a sample has images.
        batch_size: of all processes together.
        seed: for the order.
    """

    def __init__(self, lengths, has_images, batch_size: int, seed: int):
        self.lengths = lengths
        self.has_images = np.array(has_images)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches, rest = [], []
        for is_multimodal in (True, False):
            samples = np.flatnonzero(self.has_images == is_multimodal).tolist()
            if samples:
                lengths = [self.lengths[sample] for sample in samples]
                order = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
                samples = [samples[position] for position in order]
            num_full = len(samples) // self.batch_size * self.batch_size
            batches += [samples[start : start + self.batch_size] for start in range(0, num_full, self.batch_size)]
            rest += samples[num_full:]
        batches = [batches[position] for position in torch.randperm(len(batches), generator=generator).tolist()]
        longest = [max(self.lengths[sample] for sample in batch) for batch in batches]
        if batches:
            batches.insert(0, batches.pop(int(np.argmax(longest))))
        yield from (sample for batch in [*batches, rest] for sample in batch)


class _SetEpoch(TrainerCallback):
    """Tells the sampler its epoch; neither accelerate nor Trainer do so after a resume on several processes."""

    def __init__(self, sampler: ModalityLengthSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int(state.epoch or 0)
