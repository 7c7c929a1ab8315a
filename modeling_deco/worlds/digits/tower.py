# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["modeling-deco[train]"]
# ///
"""Train the vision tower of the digits world: a small CLIP that encodes digit, colour and box at every patch.

    python -m modeling_deco.worlds.digits.tower --output_dir runs/tower

A scene has dense labels. A linear head predicts the digit, its colour and its box from each patch. A two-layer head
predicts the same for each of the ten digits from *pooled* patches, at 3 x 3, 4 x 4 and 6 x 6 cells: DeCo's projector
will have to do this, so the tower learns features that survive averaging. Both heads get the output of the last layer
before the final norm, as DeCo's pooling does.

Muon optimizes the matrices of the encoder and AdamW the rest; AdamW alone needs several times the pictures. A run
resumes from `OUTPUT_DIR/training_state.pt`. Pictures are a function of the step, so a resumed run sees the same
pictures as an uninterrupted one.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import CLIPVisionModel, HfArgumentParser, get_cosine_schedule_with_warmup, set_seed

from ...utils.script import run
from ..training_state import load_state, save_state
from .optimizer import MuonAdamW
from .tower_heads import DenseHeads, evaluate
from .tower_labels import LabelledScenes
from .tower_model import build_tower, patch_features

logger = logging.getLogger(__name__)


@dataclass
class TowerArguments:
    """How the tower is trained. The defaults take half an hour on two CPU cores with bfloat16 instructions."""

    output_dir: str = field(metadata={"help": "Folder for the tower and the training state."})
    num_steps: int = field(default=2800, metadata={"help": "Optimizer steps of the whole schedule."})
    batch_size: int = field(default=48, metadata={"help": "Pictures per step."})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "For the matrices of the encoder."})
    adamw_learning_rate: float = field(default=2e-3, metadata={"help": "For embeddings, norms, biases and heads."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled; only on the matrices of the encoder."})
    warmup_steps: int = field(
        default=100, metadata={"help": "Steps of linear warm-up before the cosine decay to zero."}
    )
    min_digits: int = field(default=2, metadata={"help": "Fewest digits in a training picture."})
    max_digits: int = field(
        default=6,
        metadata={"help": "Most digits in a training picture. More than 4, the default of scenes, give more labels."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the initial weights and of the pictures."})
    pooled_heads: bool = field(
        default=True,
        metadata={
            "help": "Train on pooled patches too. Turn it off for compare_projectors, where it would favour pooling."
        },
    )
    bf16: bool = field(
        default=True,
        metadata={
            "help": "Use bfloat16 autocast. Turn it off on CPUs without bfloat16 instructions, where it is slow."
        },
    )
    num_workers: int = field(default=1, metadata={"help": "Number of processes that render pictures."})
    eval_steps: int = field(default=500, metadata={"help": "Steps between two evaluations, each with a save."})
    num_eval_pictures: int = field(
        default=400, metadata={"help": "Number of validation pictures, with two to four digits each."}
    )


def build_optimizer(tower: CLIPVisionModel, heads: DenseHeads, args: TowerArguments) -> MuonAdamW:
    """Muon for the matrices of the encoder, AdamW for everything else."""
    groups = {"muon": [], "adamw": list(heads.parameters())}
    for name, parameter in tower.named_parameters():
        groups["muon" if name.startswith("encoder.") and parameter.ndim == 2 else "adamw"].append(parameter)
    return MuonAdamW(
        [{"params": groups["muon"], "lr": args.muon_learning_rate}],
        [{"params": groups["adamw"], "lr": args.adamw_learning_rate}],
        weight_decay=args.weight_decay,
    )


def train_tower(args: TowerArguments) -> dict[str, float]:
    """Train to the end of the schedule, from the last saved state if there is one. Returns the last evaluation."""
    set_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    tower, heads = build_tower().to(device), DenseHeads().to(device)
    if device.type == "cpu":
        # The backward pass of the fused CPU kernel takes longer than the rest of the step.
        tower.set_attn_implementation("eager")
    optimizer = build_optimizer(tower, heads, args)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.num_steps)
    parts = {"tower": tower, "heads": heads, "optimizer": optimizer, "schedule": schedule}
    state_path = output_dir / "training_state.pt"
    first_step = load_state(state_path, parts)

    scenes = LabelledScenes(
        "train",
        first_step * args.batch_size,
        args.num_steps * args.batch_size,
        seed=args.seed,
        min_digits=args.min_digits,
        max_digits=args.max_digits,
    )
    eval_scenes = LabelledScenes("validation", 0, args.num_eval_pictures)
    eval_loader = DataLoader([eval_scenes[i] for i in range(len(eval_scenes))], batch_size=100)
    loader = DataLoader(scenes, batch_size=args.batch_size, num_workers=args.num_workers)
    metrics: dict[str, float] = {}
    losses: list[float] = []
    progress = tqdm(loader, initial=first_step, total=args.num_steps, desc="tower", unit="step", disable=None)
    for step, batch in enumerate(progress, start=first_step + 1):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16):
            loss = heads.loss(patch_features(tower, batch["pixel_values"]), batch, pooled=args.pooled_heads)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == args.num_steps:
            progress.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
            logger.info("step %d of %d: loss %.3f", step, args.num_steps, sum(losses) / len(losses))
            losses.clear()
        if step % args.eval_steps == 0 or step == args.num_steps:
            metrics = evaluate(tower, heads, eval_loader, bf16=args.bf16, pooled=args.pooled_heads)
            logger.info("step %d: %s", step, json.dumps(metrics))
            save_state(state_path, step, parts)

    tower.save_pretrained(output_dir)
    return metrics


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    (args,) = HfArgumentParser(TowerArguments).parse_args_into_dataclasses()
    metrics = train_tower(args)
    logger.info("tower written to %s: %s", args.output_dir, json.dumps(metrics))


if __name__ == "__main__":
    run("digits.tower", main)
