# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["modeling-deco[train]"]
# ///
"""Train the shipped checkpoint: first the digits tower, then DeCo on top of it with TRL's SFTTrainer.

    python recipes/digits/train.py --output_dir runs/digits

It takes less than two hours on two CPU cores. The run is seeded. Run the same command again to resume it. A sequence
holds one picture and all its questions, and each batch is pooled to a random grid, so the checkpoint works at every
token budget. If the answers do not depend on the picture after some hundred steps, the run stops and says what to do.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_deco.training.trainer import DecoSFTConfig
from modeling_deco.utils.script import run
from modeling_deco.worlds.digits.deco_model import build_model, whiten_projector
from modeling_deco.worlds.digits.processor import build_processor
from modeling_deco.worlds.digits.tower import TowerArguments, train_tower
from modeling_deco.worlds.digits.tower_model import PATCH_GRID
from modeling_deco.worlds.digits.training import (
    DigitsTrainer,
    PlateauCheck,
    build_optimizer,
    claim_folder,
    faster_attention,
)
from modeling_deco.worlds.digits.training_data import build_dataset

GRID_WEIGHTS = {3: 0.35, 4: 0.2, 6: 0.3, 12: 0.15}  # the smallest grid is the hardest, the largest the slowest

logger = logging.getLogger(__name__)


@dataclass
class DigitsArguments:
    """How DeCo is trained on the digits world."""

    output_dir: str = field(metadata={"help": "Folder for tower/, deco/ (checkpoints) and final/ (the result)."})
    tower: str | None = field(
        default=None,
        metadata={"help": "A trained tower, or a DeCo checkpoint with one. By default the recipe trains a tower."},
    )
    projector_type: str = field(
        default="avg_pool",
        metadata={
            "help": "With mlp every patch is a token, and there is one grid (backbones for compare_projectors).",
            "choices": ["avg_pool", "mlp"],
        },
    )
    max_digits: int = field(default=4, metadata={"help": "Most digits in a picture."})
    num_steps: int = field(default=3600, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=32, metadata={"help": "Pictures per step, each with up to eleven questions."})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "For matrices except embeddings."})
    adamw_learning_rate: float = field(default=2e-3, metadata={"help": "For embeddings, norms and biases."})
    tower_learning_rate_factor: float = field(
        default=0.1, metadata={"help": "Factor of both learning rates for the tower. 0 freezes it."}
    )
    plateau_step: int = field(
        default=400, metadata={"help": "Train at one grid until this step, then check that answers use the picture."}
    )
    plateau_accuracy: float = field(
        default=80.0, metadata={"help": "Least percentage of right answers on existence and colour in this check."}
    )
    bf16: bool = field(
        default=True,
        metadata={
            "help": "Use bfloat16 autocast. Turn it off on CPUs without bfloat16 instructions, where it is slow."
        },
    )
    save_steps: int = field(default=500, metadata={"help": "Steps between two checkpoints."})
    seed: int = field(default=1, metadata={"help": "Seed of weights, pictures and grids."})


def main(args: DigitsArguments) -> None:
    output_dir = Path(args.output_dir)
    claim_folder(output_dir, {**asdict(args), "output_dir": None})

    # Tower
    tower_dir = Path(args.tower or output_dir / "tower")
    if args.tower is None and not (tower_dir / "model.safetensors").exists():
        train_tower(TowerArguments(output_dir=str(tower_dir)))

    # Model and data
    set_seed(args.seed)
    is_elastic = args.projector_type == "avg_pool"
    processor = build_processor() if is_elastic else build_processor(PATCH_GRID)
    model = build_model(tower_dir, processor, args.projector_type)
    model.model.vision_tower.requires_grad_(args.tower_learning_rate_factor > 0)
    train_dataset = build_dataset(args.num_steps * args.batch_size, args.seed, max_digits=args.max_digits)
    pictures = [images[0] for images in train_dataset[:96]["images"]]
    whiten_projector(model, processor.image_processor(pictures, return_tensors="pt")["pixel_values"])

    # Training
    on_gpu = torch.cuda.is_available()
    training_args = DecoSFTConfig(
        output_dir=str(output_dir / "deco"),
        max_steps=args.num_steps,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        max_grad_norm=1.0,
        bf16=args.bf16,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        pooled_grid_sizes=list(GRID_WEIGHTS) if is_elastic else None,
        pooled_grid_weights=list(GRID_WEIGHTS.values()) if is_elastic else None,
        independent_turns=True,
        max_length=None,
        train_sampling_strategy="sequential",
        dataloader_num_workers=8 if on_gpu else 1,
        logging_steps=50,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        report_to="none",
    )
    rates = (args.muon_learning_rate, args.adamw_learning_rate, args.tower_learning_rate_factor)
    trainer = DigitsTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        processing_class=processor,
        optimizers=(build_optimizer(model, *rates), None),
        callbacks=[PlateauCheck(processor, args.plateau_step, args.plateau_accuracy)],
        first_elastic_step=args.plateau_step,
    )
    with faster_attention():
        trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir))

    # Save
    final_dir = output_dir / "final"
    trainer.model.save_pretrained(final_dir)
    processor.save_pretrained(final_dir)
    (output_dir / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    logger.info("checkpoint written to %s", final_dir)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run("digits.train", lambda: main(*HfArgumentParser(DigitsArguments).parse_args_into_dataclasses()))
