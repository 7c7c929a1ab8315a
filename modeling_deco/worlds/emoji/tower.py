# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["modeling-deco[emoji]"]
# ///
"""Fine-tune ImageNet's EfficientNet-Lite0 on the names of things, together with the start of a projector.

    python -m modeling_deco.worlds.emoji.tower --output_dir runs/tower

Every pooled cell of a scene, at grids from 3 x 3 to 12 x 12, goes through DeCo's projector. Its token should be close
to the word embedding, in the language model, of the name of what is in the cell. Linear heads read the colour and the
box of the thing from the same token. So the language model, which has not seen a picture, is given words that it
knows; and what survives averaging is what the tower learns.

Batch norms keep ImageNet's statistics, and the layers before `FIRST_TRAINED_BLOCK` all their weights. Pictures are
smaller until the last fifth of the run. They are a function of the step, so a resumed run sees the same ones.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, normalize, smooth_l1_loss
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EfficientNetModel,
    HfArgumentParser,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from ...inference.smollm2 import smollm2_folder
from ...projectors import AvgPoolProjector, sine_positions
from ...utils.script import run
from ..boxes import box_iou
from ..training_state import load_state, save_state
from .art import concepts_of
from .colours import COLOURS
from .concepts import CONCEPTS
from .efficientnet_lite0 import image_processor, load_efficientnet_lite0
from .scenes import IMAGE_SIZE, Scene, render, single

logger = logging.getLogger(__name__)

FIRST_TRAINED_BLOCK = 5  # the first at a stride of 16
GRIDS = (12, 6, 4, 3)  # each is as likely; with smaller pictures, the grids up to theirs
SIZES = (224, 256, 320)  # of the pictures in the first part of the run, which then has those of the scenes
MAX_THINGS = 8
BACKGROUND = len(CONCEPTS)  # the class behind the names
_NAMES = {name: number for number, name in enumerate(CONCEPTS)}
_LOGIT_SCALE = 20.0


@dataclass
class TowerArguments:
    """How the tower is trained."""

    output_dir: str = field(metadata={"help": "Folder for the tower, the projector and the training state."})
    num_steps: int = field(default=1000, metadata={"help": "Optimizer steps of the whole schedule."})
    batch_size: int = field(default=16, metadata={"help": "Pictures per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of projector and heads."})
    tower_learning_rate: float = field(default=5e-4, metadata={"help": "Of the tower."})
    weight_decay: float = field(default=0.02, metadata={"help": "Of matrices and kernels."})
    warmup_steps: int = field(default=40, metadata={"help": "Steps of linear warm-up before the cosine decay."})
    seed: int = field(default=0, metadata={"help": "Seed of the new weights and of the pictures."})
    num_workers: int = field(default=1, metadata={"help": "Number of processes that render pictures."})
    eval_steps: int = field(default=150, metadata={"help": "Steps between two evaluations, each with a save."})
    split: str = field(default="validation", metadata={"help": "Artists of the evaluations."})


class NameHeads(nn.Module):
    """The projector, and heads that read a token's name, colour and box.

    Args:
        name_embeddings: `(num_concepts, text_hidden_size)`, in the language model's space.
        norm: length of a word embedding.
    """

    def __init__(self, vision_hidden_size: int, name_embeddings: torch.Tensor, norm: float):
        super().__init__()
        text_hidden_size = name_embeddings.shape[1]
        self.projector = AvgPoolProjector(vision_hidden_size, text_hidden_size, 6)
        self.background = nn.Parameter(torch.randn(1, text_hidden_size))
        self.attributes = nn.Linear(text_hidden_size, len(COLOURS) + 4)
        self.register_buffer("names", normalize(name_embeddings - name_embeddings.mean(0), dim=-1), persistent=False)
        self.norm = norm

    def forward(self, feature_map: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens `(pictures, cells, text_hidden_size)`, logits of names and background, and colours with boxes."""
        rows, cols = feature_map.shape[-2:]
        patches = feature_map.flatten(2).transpose(1, 2)
        patches = patches + sine_positions((rows, cols), patches.shape[-1]).to(patches)  # as the model adds them
        tokens = self.projector(patches, (rows, cols), (grid, grid))
        classes = torch.cat([self.names, normalize(self.background, dim=-1)])
        return tokens, _LOGIT_SCALE * normalize(tokens, dim=-1) @ classes.T, self.attributes(tokens / self.norm)

    def loss(self, feature_map: torch.Tensor, things: dict[str, torch.Tensor], grid: int) -> torch.Tensor:
        """Sum of the losses of names, colours, boxes and lengths of tokens; `things` is from `labelled`."""
        tokens, logits, attributes = self(feature_map, grid)
        shares = covered_shares(things["boxes"], grid)  # (pictures, cells, things)
        targets = torch.zeros_like(logits).scatter_add_(
            2, things["concepts"][:, None].expand_as(shares), shares.to(logits.dtype)
        )
        targets[..., BACKGROUND] = 0
        # a token should say what is there, however little of its cell it fills
        inked = targets.sum(-1, keepdim=True)
        targets = torch.where(inked > 0.08, targets / inked.clamp(min=1e-6), 0.0)
        is_background = inked[..., 0] < 0.01
        targets[..., BACKGROUND] = is_background.to(targets.dtype)
        weights = targets.sum(-1) * torch.where(is_background, 0.3, 1.0)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        share, main = shares.max(-1)  # the thing that covers most of a cell
        is_clear = (share > 0.12) & (share > 0.7 * shares.sum(-1))
        colours = things["colours"].gather(1, main)
        colours = colours.masked_fill(~is_clear, -100)
        if (colours >= 0).any():  # the mean over no label is NaN
            told = attributes[..., : len(COLOURS)].flatten(0, 1)
            loss = loss + cross_entropy(told, colours.flatten(), ignore_index=-100)
        boxes = things["boxes"].gather(1, main[..., None].expand(-1, -1, 4))
        differences = smooth_l1_loss(attributes[..., -4:], boxes, beta=0.05, reduction="none").mean(-1)
        loss = loss + 10 * (differences * is_clear).sum() / is_clear.sum().clamp(min=1)
        return loss + 0.1 * (tokens.norm(dim=-1) / self.norm - 1).square().mean()


def covered_shares(boxes: torch.Tensor, grid: int) -> torch.Tensor:
    """The share of each cell that each box covers.

    Args:
        boxes: `(pictures, things, 4)`, 0 to 1; an empty box stands for no thing.

    Returns:
        `(pictures, grid * grid, things)`.
    """
    edges = torch.linspace(0, 1, grid + 1, device=boxes.device)
    starts, stops = edges[:-1], edges[1:]
    columns = torch.minimum(boxes[..., 2:3], stops) - torch.maximum(boxes[..., 0:1], starts)
    rows = torch.minimum(boxes[..., 3:4], stops) - torch.maximum(boxes[..., 1:2], starts)
    area = rows.clamp(min=0)[..., :, None] * columns.clamp(min=0)[..., None, :]  # (pictures, things, grid, grid)
    return area.flatten(2).transpose(1, 2) * grid**2


class LabelledScenes(Dataset):
    """Batches of training scenes with their labels, by the number of the step."""

    def __init__(self, args: TowerArguments, first_step: int = 0):
        self.args = args
        self.steps = range(first_step, args.num_steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor | int]:
        step, args = self.steps[position], self.args
        rng = np.random.default_rng([args.seed, step])
        size = int(rng.choice(SIZES)) if step < 0.8 * args.num_steps else IMAGE_SIZE
        first = step * args.batch_size
        scenes = [
            render(
                "train",
                index,
                seed=args.seed,
                min_things=1 if index % 4 == 0 else 4,
                max_things=1 if index % 4 == 0 else MAX_THINGS,
                size=size,
            )
            for index in range(first, first + args.batch_size)
        ]
        return {**labelled(scenes), "grid": int(rng.choice([grid for grid in GRIDS if grid <= size // 32]))}


def labelled(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Pixels, and the things of each scene: concepts, boxes and colours (-100 where unclear), padded."""
    concepts = torch.zeros(len(scenes), MAX_THINGS, dtype=torch.long)
    boxes = torch.zeros(len(scenes), MAX_THINGS, 4)
    colours = torch.full((len(scenes), MAX_THINGS), -100)
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            concepts[row, column] = _NAMES[thing.concept]
            boxes[row, column] = torch.tensor(thing.box)
            colours[row, column] = -100 if thing.colour is None else COLOURS.index(thing.colour)
    pixels = torch.stack([torch.from_numpy(np.array(scene.image)) for scene in scenes])
    return {"pixels": pixels, "concepts": concepts, "boxes": boxes, "colours": colours}


def pixel_values(pixels: torch.Tensor) -> torch.Tensor:
    """What EfficientNet-Lite0 was trained on: `(pictures, 3, height, width)` from `(pictures, height, width, 3)`."""
    return ((pixels.float() - 127) / 128).permute(0, 3, 1, 2)  # channels last in memory, which CPUs read faster


def name_embeddings(folder: str | Path) -> tuple[torch.Tensor, float]:
    """The mean word embedding of each name's tokens `(num_concepts, text_hidden_size)`, and a word's mean length."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    embeddings = model.get_input_embeddings().weight.detach()
    ids = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in CONCEPTS]
    used = torch.tensor(sorted({token for name_ids in ids for token in name_ids}))
    return torch.stack([embeddings[name_ids].mean(0) for name_ids in ids]), float(embeddings[used].norm(dim=-1).mean())


def build_tower() -> EfficientNetModel:
    """EfficientNet-Lite0 with the first layers frozen, without its squeeze-and-excitation, which are identities."""
    tower = load_efficientnet_lite0(IMAGE_SIZE).eval().to(memory_format=torch.channels_last)
    for block in tower.encoder.blocks:
        block.squeeze_excite = nn.Identity()
    frozen = [tower.embeddings, *tower.encoder.blocks[:FIRST_TRAINED_BLOCK]]
    for part in frozen:
        part.requires_grad_(False)
    return tower


def save_tower(tower: EfficientNetModel, folder: Path) -> None:
    """Write the tower, with the squeeze-and-excitation that transformers' class wants, and its image processor."""
    whole = load_efficientnet_lite0(IMAGE_SIZE)
    missing, unexpected = whole.load_state_dict(tower.state_dict(), strict=False)
    assert not unexpected
    assert all(".squeeze_excite." in name for name in missing)
    whole.save_pretrained(folder)
    image_processor(IMAGE_SIZE).save_pretrained(folder)


@torch.inference_mode()
def evaluate(tower: EfficientNetModel, heads: NameHeads, split: str, num_scenes: int = 120) -> dict[str, float]:
    """Percentages of right names: of single things at a grid of 3, and of cells of scenes at 6; colours and boxes."""
    device = next(heads.parameters()).device
    hits: dict[str, list[float]] = {"single": [], "cells": [], "colours": [], "boxes": []}
    concepts = concepts_of(split)
    for start in range(0, len(concepts), 20):
        batch = labelled([single(split, concept, 0) for concept in concepts[start : start + 20]])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = heads(tower(pixel_values(batch["pixels"])).last_hidden_state, 3)[1]
        shares = covered_shares(batch["boxes"], 3)[..., :1]
        names = (logits.softmax(-1) * shares).sum(1)[:, :BACKGROUND].argmax(-1)
        hits["single"] += (names == batch["concepts"][:, 0]).tolist()
    for start in range(0, num_scenes, 20):
        scenes = [render(split, index, min_things=2) for index in range(start, min(num_scenes, start + 20))]
        batch = {name: tensor.to(device) for name, tensor in labelled(scenes).items()}
        _, logits, attributes = heads(tower(pixel_values(batch["pixels"])).last_hidden_state, 6)
        share, main = covered_shares(batch["boxes"], 6).max(-1)
        is_clear = share > 0.5
        names = logits[..., :BACKGROUND].argmax(-1)
        hits["cells"] += (names == batch["concepts"].gather(1, main))[is_clear].tolist()
        colours = batch["colours"].gather(1, main)
        told = attributes[..., : len(COLOURS)].argmax(-1)
        hits["colours"] += (told == colours)[is_clear & (colours >= 0)].tolist()
        boxes = batch["boxes"].gather(1, main[..., None].expand(-1, -1, 4))
        hits["boxes"] += (box_iou(attributes[..., -4:], boxes) >= 0.5)[is_clear].tolist()
    return {name: round(100 * sum(values) / max(1, len(values)), 1) for name, values in hits.items()}


def train_tower(args: TowerArguments) -> dict[str, float]:
    """Train to the end of the schedule, from the last saved state if there is one. Returns the last evaluation."""
    set_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tower = build_tower().to(device)
    heads = NameHeads(tower.config.hidden_dim, *name_embeddings(smollm2_folder())).to(device)
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "lr": args.tower_learning_rate},
            {"params": [p for p in trained if p.ndim == 1], "lr": args.tower_learning_rate, "weight_decay": 0.0},
            {"params": list(heads.parameters()), "lr": args.learning_rate},
        ],
        weight_decay=args.weight_decay,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.num_steps)
    parts = {"tower": tower, "heads": heads, "optimizer": optimizer, "schedule": schedule}
    state_path = output_dir / "training_state.pt"
    first_step = load_state(state_path, parts)
    loader = DataLoader(LabelledScenes(args, first_step), batch_size=None, num_workers=args.num_workers)
    metrics: dict[str, float] = {}
    losses: list[float] = []
    progress = tqdm(loader, initial=first_step, total=args.num_steps, desc="tower", unit="step", disable=None)
    for step, batch in enumerate(progress, start=first_step + 1):
        grid = batch.pop("grid")
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        loss = heads.loss(tower(pixel_values(batch["pixels"])).last_hidden_state, batch, grid)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 25 == 0 or step == args.num_steps:
            logger.info("step %d of %d: loss %.3f", step, args.num_steps, sum(losses) / len(losses))
            losses.clear()
        if step % args.eval_steps == 0 or step == args.num_steps:
            metrics = evaluate(tower, heads, args.split)
            logger.info("step %d: %s", step, json.dumps(metrics))
            save_state(state_path, step, parts)
    save_tower(tower, output_dir)
    save_file(heads.projector.state_dict(), output_dir / "projector.safetensors")
    return metrics


def load_projector(folder: str | Path) -> dict[str, torch.Tensor]:
    """The parameters of the projector that a run of this program has written."""
    return load_file(Path(folder) / "projector.safetensors")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    (args,) = HfArgumentParser(TowerArguments).parse_args_into_dataclasses()
    metrics = train_tower(args)
    logger.info("tower written to %s: %s", args.output_dir, json.dumps(metrics))


if __name__ == "__main__":
    run("emoji.tower", main)
