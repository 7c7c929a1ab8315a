# /// script
# dependencies = ["modeling-deco[train]"]
# ///
"""Train the vision tower of the digits world: a small CLIP that knows digit, colour and box at every patch.

    python -m modeling_deco.worlds.digits.tower --output_dir runs/tower

Labels are dense, since the scenes know where everything is: a linear head reads the digit, its colour and its box off
each patch, and a two-layer head reads, for each of the ten digits, the same off the *pooled* patches at 3 x 3, 4 x 4
and 6 x 6 cells. The second is what DeCo's projector will have to do, so it teaches the tower features that survive
averaging. Both heads see the last layer's output before the final norm, which is what DeCo pools.

Muon drives the matrices of the encoder and AdamW the rest: AdamW alone needs several times the pictures. Runs are
resumed from `OUTPUT_DIR/training_state.pt`; pictures are a function of the step, so a resumed run sees what an
uninterrupted one would have.
"""

import json
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    HfArgumentParser,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from ...utils.script import run
from .optimizer import MuonAdamW
from .world import COLOURS, IMAGE_SIZE, Scene, render

logger = logging.getLogger(__name__)

PATCH_SIZE = 8
PATCH_GRID = IMAGE_SIZE // PATCH_SIZE
POOLED_GRIDS = (3, 4, 6)
# Pictures are dark: these bring background and ink to about -0.6 and 2.
IMAGE_MEAN = IMAGE_STD = (0.25, 0.25, 0.25)
COLOUR_NAMES = tuple(COLOURS)
NUM_CLASSES, NUM_COLOURS = 10, len(COLOUR_NAMES)
BACKGROUND, IGNORE = NUM_CLASSES, -100
BOX_SCALE = IMAGE_SIZE / 4  # box losses count in units of 4 pixels, those of the answers


@dataclass
class TowerArguments:
    """How the tower is trained. Defaults fit half an hour on two CPU cores with bfloat16 instructions."""

    output_dir: str = field(metadata={"help": "Where the tower, its heads and the training state are written."})
    num_steps: int = field(default=2800, metadata={"help": "Optimizer steps of the whole schedule."})
    batch_size: int = field(default=48, metadata={"help": "Pictures per step."})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "For the matrices of the encoder."})
    adamw_learning_rate: float = field(default=2e-3, metadata={"help": "For embeddings, norms, biases and heads."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled, on the matrices of the encoder only."})
    warmup_steps: int = field(default=100, metadata={"help": "Linear warm-up; cosine to zero afterwards."})
    min_digits: int = field(default=2, metadata={"help": "Fewest digits in a training picture."})
    max_digits: int = field(default=6, metadata={"help": "Most digits; more than the world's 4 give more labels."})
    seed: int = field(default=0, metadata={"help": "For the initial weights and the pictures."})
    pooled_heads: bool = field(
        default=True,
        metadata={"help": "Labels of pooled patches too; without them no projector is favoured (compare_projectors)."},
    )
    bf16: bool = field(
        default=True, metadata={"help": "Autocast; slow, not fast, on CPUs without bfloat16 instructions."}
    )
    num_workers: int = field(default=1, metadata={"help": "Processes that render ahead."})
    eval_steps: int = field(default=500, metadata={"help": "Evaluate on validation scans and save this often."})
    num_eval_pictures: int = field(default=400, metadata={"help": "Validation pictures, two to four digits each."})


# --- model -----------------------------------------------------------------------------------------------------------


def sincos_positions(grid_size: int, hidden_size: int) -> torch.Tensor:
    """Fixed 2D sine-cosine positions `(grid_size ** 2, hidden_size)`: half the channels for rows, half for columns."""
    frequencies = 1 / 100 ** (torch.arange(hidden_size // 4) / (hidden_size // 4))
    angles = torch.arange(grid_size)[:, None] * frequencies  # (grid, hidden / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, hidden / 2)
    rows = line[:, None].expand(-1, grid_size, -1)
    columns = line[None].expand(grid_size, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def build_tower() -> CLIPVisionModel:
    """A CLIP vision tower of 0.84 M parameters for 96 x 96 pictures in patches of 8, ready to be trained."""
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    tower = CLIPVisionModel(config)
    embeddings = tower.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[1:] = sincos_positions(PATCH_GRID, config.hidden_size)
        # CLIP's default of 0.02 would drown the pixels in the positions.
        nn.init.normal_(embeddings.patch_embedding.weight, std=embeddings.patch_embedding.weight[0].numel() ** -0.5)
    return tower


def patch_features(tower: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What DeCo pools: the last layer's output, not normalized, without CLS: `(pictures, 144, hidden_size)`."""
    return tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]


class DenseHeads(nn.Module):
    """Heads that read digits, colours and boxes off patches and off pooled patches; used in training only."""

    def __init__(self, hidden_size: int = 128, pooled_hidden_size: int = 384):
        super().__init__()
        self.patch = nn.Linear(hidden_size, NUM_CLASSES + 1 + NUM_COLOURS + 4)
        self.pooled = nn.Sequential(
            nn.Linear(hidden_size, pooled_hidden_size),
            nn.GELU(),
            nn.Linear(pooled_hidden_size, NUM_CLASSES * (1 + NUM_COLOURS + 4)),
        )

    def read_patches(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of digit or background `(..., 11)`, of colour `(..., 6)`, and boxes `(..., 4)` in 0 to 1."""
        return self.patch(features).float().split([NUM_CLASSES + 1, NUM_COLOURS, 4], dim=-1)

    def read_pooled(self, features: torch.Tensor, grid: int) -> tuple[torch.Tensor, ...]:
        """Logits of presence `(pictures, cells, 10)`, of colour `(..., 10, 6)`, and boxes `(..., 10, 4)`."""
        patch_grid = features.transpose(1, 2).unflatten(-1, (PATCH_GRID, PATCH_GRID))
        pooled_grid = F.adaptive_avg_pool2d(patch_grid, grid)
        slots = self.pooled(pooled_grid.flatten(2).transpose(1, 2)).float().unflatten(-1, (NUM_CLASSES, -1))
        presence, colours, boxes = slots.split([1, NUM_COLOURS, 4], dim=-1)
        return presence.squeeze(-1), colours, boxes

    def loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor], pooled: bool = True) -> torch.Tensor:
        """Sum of the dense losses for `patch_features` of a batch and its `scene_labels`."""
        grids = POOLED_GRIDS if pooled else ()
        return self._patch_loss(features, labels) + sum(self._pooled_loss(features, labels, grid) for grid in grids)

    def _patch_loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        digit_logits, colour_logits, boxes = self.read_patches(features)
        digits = patch_digits(labels["boxes"])
        picture, patch = torch.nonzero((digits >= 0) & (digits != BACKGROUND), as_tuple=True)
        value = digits[picture, patch]
        return (
            F.cross_entropy(digit_logits.flatten(0, 1), digits.flatten(), ignore_index=IGNORE)
            + F.cross_entropy(colour_logits[picture, patch], labels["colours"][picture, value])
            + _box_loss(boxes[picture, patch], labels["boxes"][picture, value])
        )

    def _pooled_loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor], grid: int) -> torch.Tensor:
        presence_logits, colour_logits, boxes = self.read_pooled(features, grid)
        present, known = cell_presence(labels["boxes"], grid)
        picture, cell, value = torch.nonzero(present, as_tuple=True)
        presence_loss = F.binary_cross_entropy_with_logits(presence_logits, present.float(), reduction="none")
        return (
            # Per positive slot, since nearly all slots are negative.
            (presence_loss * known).sum() / present.sum()
            + F.cross_entropy(colour_logits[picture, cell, value], labels["colours"][picture, value])
            + _box_loss(boxes[picture, cell, value], labels["boxes"][picture, value])
        )


def _box_loss(predicted: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    return F.smooth_l1_loss(predicted * BOX_SCALE, boxes / IMAGE_SIZE * BOX_SCALE)


# --- labels ----------------------------------------------------------------------------------------------------------


def scene_labels(scene: Scene) -> dict[str, torch.Tensor]:
    """What is in a scene, by class: `boxes` `(10, 4)` in pixels, zero where absent, and `colours` `(10,)`."""
    boxes, colours = torch.zeros(NUM_CLASSES, 4), torch.full((NUM_CLASSES,), IGNORE)
    for digit in scene.digits:
        boxes[digit.value] = torch.tensor(digit.box, dtype=torch.float)
        colours[digit.value] = COLOUR_NAMES.index(digit.colour)
    return {"boxes": boxes, "colours": colours}


def _covered_area(boxes: torch.Tensor, grid: int) -> torch.Tensor:
    """Pixels of each cell of a grid that each box covers: `(pictures, cells, classes)`."""
    edges = torch.linspace(0, IMAGE_SIZE, grid + 1, device=boxes.device)
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    covered = torch.minimum(high, edges[1:, None]) - torch.maximum(low, edges[:-1, None])
    columns, rows = covered.clamp(min=0).unbind(-1)  # each (pictures, classes, grid)
    return (rows[..., :, None] * columns[..., None, :]).flatten(2).transpose(1, 2)


def patch_digits(boxes: torch.Tensor) -> torch.Tensor:
    """Class of each patch `(pictures, 144)`: `BACKGROUND`, or `IGNORE` where a box covers less than a quarter."""
    area, digits = _covered_area(boxes, PATCH_GRID).max(dim=-1)
    digits = digits.masked_fill(area < PATCH_SIZE**2 / 4, IGNORE)
    return digits.masked_fill(area == 0, BACKGROUND)


def cell_presence(boxes: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which digits each pooled cell should report, and where that is defined: two masks `(pictures, cells, 10)`.

    A cell reports a digit when it holds a sixth of its box, or the most of all cells; a smaller share is left open.
    """
    area = _covered_area(boxes, grid)
    share = area / area.sum(dim=1, keepdim=True).clamp(min=1)
    present = (share > 0) & ((share >= 1 / 6) | (share == share.amax(dim=1, keepdim=True)))
    return present, present | (share == 0)


def pixel_values(scene: Scene) -> torch.Tensor:
    """A scene as the tower wants it, `(3, 96, 96)`: what the image processor of the checkpoint computes."""
    pixels = torch.frombuffer(bytearray(scene.image.tobytes()), dtype=torch.uint8).view(IMAGE_SIZE, IMAGE_SIZE, 3)
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return ((pixels / 255 - mean) / std).permute(2, 0, 1)


class LabelledScenes(Dataset):
    """Scenes `start` to `stop` of a split, with the labels of `DenseHeads`."""

    def __init__(self, split: str, start: int, stop: int, seed: int = 0, min_digits: int = 2, max_digits: int = 4):
        self.indices = range(start, stop)
        self.arguments = {"split": split, "seed": seed, "min_digits": min_digits, "max_digits": max_digits}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        scene = render(index=self.indices[position], **self.arguments)
        return {"pixel_values": pixel_values(scene).contiguous(), **scene_labels(scene)}


# --- evaluation ------------------------------------------------------------------------------------------------------


def box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes `(..., 4)`, pairwise by position."""
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    intersection = sides.clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    other_area = (others[..., 2:] - others[..., :2]).clamp(min=0).prod(-1)
    return intersection / (area + other_area - intersection).clamp(min=1e-6)


def read_scenes(
    heads: DenseHeads, features: torch.Tensor, grid: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per class, from its most confident cell: presence `(pictures, 10)`, colour `(pictures, 10)`, box in pixels."""
    presence, colours, boxes = heads.read_pooled(features, grid)
    confidence, cell = presence.max(dim=1)
    colours = colours.argmax(-1).gather(1, cell[:, None]).squeeze(1)
    boxes = boxes.gather(1, cell[:, None, :, None].expand(-1, -1, -1, 4)).squeeze(1)
    return confidence > 0, colours, boxes * IMAGE_SIZE


@torch.no_grad()
def evaluate(
    tower: CLIPVisionModel, heads: DenseHeads, loader: DataLoader, bf16: bool = True, pooled: bool = True
) -> dict[str, float]:
    """Percentages on pictures of held-back scans: digit of a digit's patch, and per grid whole pictures and boxes.

    `read` counts pictures whose digits are all found, none besides, in the right order; `locate` counts boxes with
    IoU >= 0.5. They are a readout without a language model, and so a forecast of what DeCo can answer.
    """
    device = next(tower.parameters()).device
    counts: dict[str, list[float]] = {}
    for batch in loader:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            features = patch_features(tower, batch["pixel_values"])
            digits, predicted = patch_digits(batch["boxes"]), heads.read_patches(features)[0].argmax(-1)
            on_digit = (digits >= 0) & (digits != BACKGROUND)
            counts.setdefault("patch_digit", []).extend((digits == predicted)[on_digit].tolist())
            for grid in POOLED_GRIDS if pooled else ():
                present, colours, boxes = read_scenes(heads, features, grid)
                truth = batch["colours"] >= 0
                order = _centers(boxes, truth).argsort(-1) == _centers(batch["boxes"], truth).argsort(-1)
                read = (present == truth).all(-1) & (order | (_centers(boxes, truth).sort(-1)[0] == math.inf)).all(-1)
                counts.setdefault(f"read_{grid}x{grid}", []).extend(read.tolist())
                counts.setdefault(f"colour_{grid}x{grid}", []).extend((colours == batch["colours"])[truth].tolist())
                iou = box_iou(boxes, batch["boxes"])[truth]
                counts.setdefault(f"locate_{grid}x{grid}", []).extend((iou >= 0.5).tolist())
    return {name: round(100 * sum(hits) / len(hits), 1) for name, hits in counts.items()}


def _centers(boxes: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return ((boxes[..., 0] + boxes[..., 2]) / 2).masked_fill(~present, math.inf)


# --- training --------------------------------------------------------------------------------------------------------


def build_optimizer(tower: CLIPVisionModel, heads: DenseHeads, args: TowerArguments) -> MuonAdamW:
    """Muon for the encoder's matrices, AdamW for everything else."""
    groups = {"muon": [], "adamw": list(heads.parameters())}
    for name, parameter in tower.named_parameters():
        groups["muon" if name.startswith("encoder.") and parameter.ndim == 2 else "adamw"].append(parameter)
    return MuonAdamW(
        [{"params": groups["muon"], "lr": args.muon_learning_rate}],
        [{"params": groups["adamw"], "lr": args.adamw_learning_rate}],
        weight_decay=args.weight_decay,
    )


def save_state(path: Path, step: int, parts: dict) -> None:
    state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)  # an interrupted write leaves the last good state


def load_state(path: Path, parts: dict) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("resuming from %s at step %d", path, state["step"])
    return state["step"]


def train(args: TowerArguments) -> dict[str, float]:
    """Train to the end of the schedule, from the last saved state if there is one; returns the last evaluation."""
    set_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    tower, heads = build_tower().to(device), DenseHeads().to(device)
    if device.type == "cpu":
        # The backward pass of the fused CPU kernel takes longer than all the rest of the step.
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
    metrics = train(args)
    logger.info("tower written to %s: %s", args.output_dir, json.dumps(metrics))


if __name__ == "__main__":
    run("digits.tower", main)
