# /// script
# dependencies = ["modeling-deco[train]", "transformers>=5.18"]
# ///
"""Train the shipped checkpoint: the digits tower, then DeCo on top of it with TRL's SFTTrainer.

    python recipes/digits/train.py --output_dir runs/digits

Under two hours on two CPU cores. Seeded; started again with the same arguments, it goes on where it stopped. Pictures
are rendered from their index, all questions about one stand in one sequence, and each batch is pooled to a grid drawn
at random, so that one checkpoint serves every token budget. A run whose answers do not depend on the picture is on a
plateau that some never leave; it is stopped early, with a word about what to do.
"""

import json
import logging
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, CLIPVisionModel, HfArgumentParser, LlamaConfig, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ... import DecoConfig, DecoForConditionalGeneration, DecoModel, DecoProcessor, pool_patch_grid
from ...training.trainer import DecoSFTConfig, DecoSFTTrainer
from . import tower
from .evaluate import accuracy_by_kind
from .optimizer import MuonAdamW
from .processor import build_processor
from .world import TRAINING_KINDS, Question, questions, render

logger = logging.getLogger(__name__)

GRID_WEIGHTS = {3: 0.35, 4: 0.2, 6: 0.3, 12: 0.15}  # more of the hard one, fewer of the dear one


@dataclass
class DigitsArguments:
    """How DeCo is trained on the digits world."""

    output_dir: str = field(metadata={"help": "Holds tower/, deco/ (checkpoints) and final/ (the result)."})
    tower: str | None = field(
        default=None, metadata={"help": "A trained tower, or a DeCo checkpoint with one; default: one is trained."}
    )
    projector_type: str = field(
        default="avg_pool",
        metadata={
            "help": "mlp: every patch is a token, and no grid is drawn (backbones for compare_projectors).",
            "choices": ["avg_pool", "mlp"],
        },
    )
    max_digits: int = field(default=4, metadata={"help": "Most digits in a picture."})
    num_steps: int = field(default=3600, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=32, metadata={"help": "Pictures per step, each with up to eleven questions."})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "For matrices but embeddings."})
    adamw_learning_rate: float = field(default=2e-3, metadata={"help": "For embeddings, norms and biases."})
    tower_learning_rate_factor: float = field(
        default=0.1, metadata={"help": "The tower's share of both rates; 0 freezes it."}
    )
    plateau_step: int = field(
        default=400, metadata={"help": "One grid until this step; then it is checked that answers use the picture."}
    )
    plateau_accuracy: float = field(
        default=80.0, metadata={"help": "Least percentage of right answers on existence and colour."}
    )
    bf16: bool = field(
        default=True, metadata={"help": "Autocast; slow, not fast, on CPUs without bfloat16 instructions."}
    )
    save_steps: int = field(default=500, metadata={"help": "Checkpoint this often."})
    seed: int = field(default=1, metadata={"help": "For weights, pictures and grids."})


def build_model(
    tower_dir: str | os.PathLike, processor: DecoProcessor, projector_type: str = "avg_pool"
) -> DecoForConditionalGeneration:
    """The trained tower under a fresh projector and a fresh four-layer Llama of width 128 (heads of 32)."""
    tokenizer = processor.tokenizer
    if AutoConfig.from_pretrained(tower_dir, trust_remote_code=False).model_type == "deco":
        vision_tower = DecoModel.from_pretrained(tower_dir).vision_tower
    else:
        vision_tower = CLIPVisionModel.from_pretrained(tower_dir)
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = DecoConfig(
        vision_config=vision_tower.config,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        pooled_grid_size=processor.pooled_grid_size,
        projector_type=projector_type,
        vision_feature_layer=-1,
    )
    model = DecoForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.generation_config.max_new_tokens = 16
    return model


@torch.no_grad()
def whiten_projector(model: DecoForConditionalGeneration, pixel_values: torch.Tensor) -> None:
    """Start the projector's first layer as a random rotation of whitened pooled features.

    Colour is 2 % of the variance of the tower's features (digits are 40 %), and from the usual initialization it was
    still not found after 30 thousand pictures: every digit was purple.

    Args:
        pixel_values: `(num_images, 3, 96, 96)` of some training pictures.
    """
    projector, config = model.model.multi_modal_projector, model.config
    patch_features = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
    pooled = pool_patch_grid(patch_features, config.patch_grid, config.pooled_grid).flatten(0, 1)
    variances, directions = torch.linalg.eigh(torch.cov(pooled.T))
    scales = variances.clamp(min=variances.max() * 1e-4).rsqrt()  # the last directions are numerical noise
    rotation, _ = torch.linalg.qr(torch.randn_like(projector.linear_1.weight))
    projector.linear_1.weight.copy_(rotation @ (directions * scales) @ directions.T)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ pooled.mean(0))


def build_dataset(num_pictures: int, seed: int, min_digits: int = 2, max_digits: int = 4) -> Dataset:
    """Training pictures by index, rendered when they are read: nothing is stored, and any row can be made again.

    Every fifth picture may have a digit less than `min_digits`.
    """

    def draw(rows):
        scenes = [
            render("train", index, seed=seed, min_digits=min_digits - (index % 5 == 0), max_digits=max_digits)
            for index in rows["index"]
        ]
        rngs = [np.random.default_rng([seed, index]) for index in rows["index"]]
        return {
            "index": rows["index"],
            "images": [[scene.image] for scene in scenes],
            "messages": [
                [message for question in questions(scene, rng, TRAINING_KINDS) for message in turn(question)]
                for scene, rng in zip(scenes, rngs, strict=True)
            ],
        }

    return Dataset.from_dict({"index": range(num_pictures)}).with_transform(draw)


def turn(question: Question) -> list[dict]:
    """A question and its answer as chat messages."""
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]


def build_optimizer(model: DecoForConditionalGeneration, args: DigitsArguments) -> MuonAdamW:
    """Muon for the matrices of all three parts, AdamW for the rest; the tower at a smaller rate."""
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and (".layers." in name or ".multi_modal_projector." in name)
        kind = "muon" if is_matrix else "adamw"
        groups.setdefault((kind, name.startswith("model.vision_tower.")), []).append(parameter)

    def with_rates(kind: str, rate: float) -> list[dict]:
        return [
            {"params": groups[kind, in_tower], "lr": rate * (args.tower_learning_rate_factor if in_tower else 1)}
            for in_tower in (False, True)
            if (kind, in_tower) in groups
        ]

    return MuonAdamW(
        with_rates("muon", args.muon_learning_rate), with_rates("adamw", args.adamw_learning_rate), weight_decay=0.05
    )


class PlateauCheck(TrainerCallback):
    """Stops a run whose answers do not depend on the picture."""

    def __init__(self, args: DigitsArguments, processor: DecoProcessor, num_pictures: int = 100):
        self.args = args
        self.processor = processor
        self.num_pictures = num_pictures

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.args.plateau_step:
            return
        accuracies = accuracy_by_kind(model, self.processor, "validation", self.num_pictures, kinds=TRAINING_KINDS)
        shown = ", ".join(f"{kind} {row['accuracy']:.0f}" for kind, row in accuracies.items())
        logger.info("step %d, percent right on validation scans: %s", state.global_step, shown)
        for kind in ("existence", "colour"):
            if accuracies[kind]["accuracy"] < self.args.plateau_accuracy:
                raise RuntimeError(
                    f"This run stays on the plateau: at step {state.global_step} {accuracies[kind]['accuracy']:.1f} % "
                    f"of its {kind} answers are right, below {self.args.plateau_accuracy:.1f} %, so it answers from "
                    f"statistics instead of looking the digit up. Start again with another --seed and another "
                    f"--output_dir."
                )


class DigitsTrainer(DecoSFTTrainer):
    """The first steps have the model's own grid: looking digits up is learned sooner where a token always stands for
    the same place."""

    def __init__(self, *args, first_elastic_step: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.first_elastic_step = first_elastic_step

    def grid_of_step(self, step):
        return None if step < self.first_elastic_step else super().grid_of_step(step)


def faster_attention():
    """On a CPU, the backward pass of PyTorch's fused attention is the slowest part of a step: not it."""
    return nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)


def check_arguments(args: DigitsArguments) -> None:
    """Raise a ValueError where `output_dir` has a run of other arguments, which would be replaced or gone on with."""
    output_dir = Path(args.output_dir)
    path, given = output_dir / "arguments.json", {**asdict(args), "output_dir": None}
    if path.exists():
        other = json.loads(path.read_text(encoding="utf-8"))
        for name, value in given.items():
            if other.get(name) != value:
                raise ValueError(
                    f"--output_dir {output_dir} has a run with --{name} {other.get(name)}, not {value}: name another "
                    f"folder, or go on with the arguments in {path.name}."
                )
    elif (output_dir / "deco").exists() or (output_dir / "final").exists():
        raise ValueError(
            f"--output_dir {output_dir} has a model, and no {path.name} of this recipe; name another folder."
        )
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")


def train(args: DigitsArguments) -> Path:
    """Train what is missing of both stages; returns the folder of the finished checkpoint."""
    output_dir = Path(args.output_dir)
    check_arguments(args)
    tower_dir = Path(args.tower or output_dir / "tower")
    if args.tower is None and not (tower_dir / "model.safetensors").exists():
        tower.train(tower.TowerArguments(output_dir=str(tower_dir)))
    set_seed(args.seed)
    on_gpu = torch.cuda.is_available()
    is_elastic = args.projector_type == "avg_pool"
    processor = build_processor() if is_elastic else build_processor(tower.PATCH_GRID)
    model = build_model(tower_dir, processor, args.projector_type)
    train_dataset = build_dataset(args.num_steps * args.batch_size, args.seed, max_digits=args.max_digits)
    model.model.vision_tower.requires_grad_(args.tower_learning_rate_factor > 0)
    pictures = [images[0] for images in train_dataset[:96]["images"]]
    whiten_projector(model, processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
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
    trainer = DigitsTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        processing_class=processor,
        optimizers=(build_optimizer(model, args), None),
        callbacks=[PlateauCheck(args, processor)],
        first_elastic_step=args.plateau_step,
    )
    with faster_attention():
        trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir))
    final_dir = output_dir / "final"
    trainer.model.save_pretrained(final_dir)
    processor.save_pretrained(final_dir)
    (output_dir / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    return final_dir


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    (args,) = HfArgumentParser(DigitsArguments).parse_args_into_dataclasses()
    logger.info("checkpoint written to %s", train(args))
