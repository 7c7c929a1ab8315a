# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that appear under their name only when they are complete."""

import copy
import shutil
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME  # private, seen in transformers 5.19 to 5.24
from transformers.trainer_utils import (  # private, seen in transformers 5.19 to 5.24
    PREFIX_CHECKPOINT_DIR,
    rotate_checkpoints,
)

from ..utils.staging import INCOMPLETE, replace_folder


class CompleteCheckpoints(Trainer):
    """A `Trainer` that writes a checkpoint under `output_dir/.incomplete` and renames it when it is complete."""

    def _save_checkpoint(self, model, trial):  # private, seen in transformers 5.19 to 5.24
        run_dir = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / INCOMPLETE / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / INCOMPLETE, ignore_errors=True)  # left by a run that was killed
        self.accelerator.wait_for_everyone()
        settings = self.args
        self.args: TrainingArguments = copy.copy(settings)
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
            # `final` may exist from before a resume at an older checkpoint
            replace_folder(final, staged, run_dir / INCOMPLETE / "replaced")
            shutil.rmtree(run_dir / INCOMPLETE)
        self.accelerator.wait_for_everyone()
        if not final.exists():
            raise FileNotFoundError(f"{final} was written on another machine; choose an output_dir on a shared disk.")
        self.create_model_card(self.args.hub_model_id and self.args.hub_model_id.split("/")[-1])
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))  # private, seen in transformers 5.19 to 5.24
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
