# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How DeCo is trained on the digits world: the parts of `recipes/digits/train.py`."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from ... import DecoForConditionalGeneration, DecoProcessor
from ...training.trainer import DecoSFTTrainer
from .evaluate import accuracy_by_kind
from .optimizer import MuonAdamW
from .questions import TRAINING_KINDS

logger = logging.getLogger(__name__)


def build_optimizer(
    model: DecoForConditionalGeneration, muon_rate: float, adamw_rate: float, tower_factor: float
) -> MuonAdamW:
    """Muon for the matrices of all three parts, and AdamW for the rest.

    Args:
        tower_factor: multiplies both learning rates for the parameters of the tower.
    """
    groups: dict = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and (".layers." in name or ".multi_modal_projector." in name)
        kind = "muon" if is_matrix else "adamw"
        groups.setdefault((kind, name.startswith("model.vision_tower.")), []).append(parameter)

    def with_rates(kind: str, rate: float) -> list[dict]:
        return [
            {"params": groups[kind, in_tower], "lr": rate * (tower_factor if in_tower else 1)}
            for in_tower in (False, True)
            if (kind, in_tower) in groups
        ]

    return MuonAdamW(with_rates("muon", muon_rate), with_rates("adamw", adamw_rate), weight_decay=0.05)


class PlateauCheck(TrainerCallback):
    """Stops a run whose answers do not depend on the picture.

    Args:
        step: the check runs after this step.
        min_accuracy: percentage of right answers on existence and on colour.
    """

    def __init__(self, processor: DecoProcessor, step: int, min_accuracy: float, num_pictures: int = 100):
        self.processor = processor
        self.step = step
        self.min_accuracy = min_accuracy
        self.num_pictures = num_pictures

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.step:
            return
        accuracies = accuracy_by_kind(model, self.processor, "validation", self.num_pictures, kinds=TRAINING_KINDS)
        shown = ", ".join(f"{kind} {row['accuracy']:.0f}" for kind, row in accuracies.items())
        logger.info("step %d, accuracy on validation scans in percent: %s", state.global_step, shown)
        for kind in ("existence", "colour"):
            if accuracies[kind]["accuracy"] < self.min_accuracy:
                raise RuntimeError(
                    f"The run is on a plateau, where answers do not depend on the picture: at step "
                    f"{state.global_step} {accuracies[kind]['accuracy']:.1f} % of the {kind} answers are right, below "
                    f"{self.min_accuracy:.1f} %. Start again with another --seed and another --output_dir."
                )


class DigitsTrainer(DecoSFTTrainer):
    """Trains at the model's own grid until `first_elastic_step`, and at every grid from then on.

    A model learns to look digits up sooner if a token always stands for the same place.
    """

    def __init__(self, *args, first_elastic_step: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.first_elastic_step = first_elastic_step

    def grid_of_step(self, step):
        return None if step < self.first_elastic_step else super().grid_of_step(step)


def faster_attention():
    """A context without PyTorch's fused attention on a CPU, where its backward pass is the slowest part of a step."""
    return nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)


def claim_folder(output_dir: Path, arguments: dict) -> None:
    """Make the folder of a run and note its arguments, or check that they are those of the run that is there.

    Raises:
        ValueError: the folder holds a run with other arguments, or a model of another origin.
    """
    path = output_dir / "arguments.json"
    if path.exists():
        other = json.loads(path.read_text(encoding="utf-8"))
        for name, value in arguments.items():
            if other.get(name) != value:
                raise ValueError(
                    f"--output_dir {output_dir} holds a run with --{name} {other.get(name)}, not {value}. Choose "
                    f"another folder, or resume that run with the arguments in {path.name}."
                )
    elif (output_dir / "deco").exists() or (output_dir / "final").exists():
        raise ValueError(
            f"--output_dir {output_dir} holds a model but no {path.name} of this recipe. Choose another folder."
        )
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
