# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison: each trains a new projector between the common backbones and measures the result."""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed

from ... import DecoForConditionalGeneration, DecoProcessor
from ...inference import load
from ...training.trainer import DecoSFTConfig, DecoSFTTrainer, part_of
from ...utils.measure import environment
from ...utils.staging import staged_file
from .comparison import CompareArguments, Run, config_of, settings_of
from .curve import Curve
from .evaluate import accuracy_by_kind
from .optimizer import MuonAdamW
from .pointing_game import pointing_game
from .training import faster_attention
from .training_data import build_dataset


def train_runs(args: CompareArguments, runs: list[Run]) -> dict[Run, dict]:
    """Train `args.parallel_runs` runs at a time, each in a process of its own, and return their results.

    Raises:
        RuntimeError: a run failed. The runs that had started are finished, and no other run is started.
    """
    results = {}
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(args.parallel_runs, mp_context=context) as pool:
        started = {pool.submit(train_run, args, run): run for run in runs}
        progress = tqdm(as_completed(started), total=len(runs), unit="run")
        try:
            for future in progress:
                run = started[future]
                results[run] = future.result()
                progress.set_postfix_str(run.name)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, Exception):
                raise RuntimeError(f"The run {run.name} failed: {error}") from error
            raise
    return results


def training_args_of(args: CompareArguments, run: Run) -> DecoSFTConfig:
    return DecoSFTConfig(
        **args.training,
        output_dir=str(run.folder(args)),
        freeze=["vision_tower"],
        seed=run.seed,
        independent_turns=True,
        max_length=None,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=args.parallel_runs > 1,
    )


def build_model(args: CompareArguments, run: Run) -> tuple[DecoForConditionalGeneration, DecoProcessor]:
    """Join the vision tower and language model of the backbones with a new projector. Returns also their processor."""
    warm, processor = load(args.backbones, device="cpu", dtype="float32")
    processor.pooled_grid_size = run.pooled_grid_size
    model = DecoForConditionalGeneration(config_of(args, run))
    model.model.vision_tower.load_state_dict(warm.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(warm.model.language_model.state_dict())
    model.lm_head.load_state_dict(warm.lm_head.state_dict())
    model.generation_config = warm.generation_config
    return model, processor


def build_optimizer(model: DecoForConditionalGeneration, training_args: DecoSFTConfig) -> MuonAdamW:
    """Muon for the matrices of projector and language model; AdamW, at a tenth of the learning rate, for the rest."""
    rates = {"language_model": training_args.learning_rate}
    rates["multi_modal_projector"] = training_args.projector_learning_rate or training_args.learning_rate
    groups: dict = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part in rates:
            is_matrix = parameter.ndim == 2 or parameter.shape[2:] == (1, 1)
            is_embedding = part == "language_model" and ".layers." not in name
            groups.setdefault((part, is_matrix and not is_embedding), []).append(parameter)
    return MuonAdamW(
        [{"params": groups[part, True], "lr": rate} for part, rate in rates.items()],
        [{"params": groups[part, False], "lr": rate / 10} for part, rate in rates.items()],
        weight_decay=0.0,
    )


class Alignment(TrainerCallback):
    """Freezes the language model for the first `num_steps` steps."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.model.language_model.requires_grad_(state.global_step >= self.num_steps)


def train_run(args: CompareArguments, run: Run) -> dict:
    """Train and measure. The result is returned, and written to the folder of the run at the end."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.parallel_runs))
    transformers.utils.logging.disable_progress_bar()
    set_seed(run.seed)
    folder, training_args = run.folder(args), training_args_of(args, run)
    model, processor = build_model(args, run)
    pictures = training_args.max_steps * training_args.per_device_train_batch_size
    curve = Curve(args, processor)
    trainer = DecoSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=build_dataset(pictures, run.seed, args.min_digits, args.max_digits),
        processing_class=processor,
        optimizers=(build_optimizer(model, training_args), None),
        callbacks=[curve, Alignment(args.alignment_steps)],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    with faster_attention():
        trainer.train()
    seconds = time.perf_counter() - began - curve.seconds
    model.eval()
    digits = {"min_digits": args.min_digits, "max_digits": args.max_digits}
    accuracy = accuracy_by_kind(model, processor, "test", args.num_test_pictures, **digits)
    pointing = pointing_game(model, processor, args.num_pointing_pictures, **digits)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    result = {
        "projector_type": run.projector_type,
        "num_tokens": run.num_tokens,
        "pooled_grid_size": run.pooled_grid_size,
        "seed": run.seed,
        "parameters": sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters()),
        "seconds": round(seconds, 1),
        "accuracy": accuracy,
        "pointing_game": pointing,
        "curve": curve.points,
        "loss": [[log["step"], round(log["loss"], 4)] for log in trainer.state.log_history if "loss" in log],
        "settings": settings_of(args, run),
        "environment": environment(model.device, "trl") | {"parallel_runs": args.parallel_runs},
    }
    with staged_file(folder / "result.json") as incomplete:
        incomplete.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
