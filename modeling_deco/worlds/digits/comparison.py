# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What a comparison of projectors consists of: its arguments and its runs, checked before the first one starts."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from ... import DecoConfig
from ...configuration_deco import num_image_tokens
from ...training.trainer import DecoSFTConfig


@dataclass
class CompareArguments:
    """What is compared, and how it is trained: the fields of the YAML files in recipes/configs/compare_projectors."""

    backbones: str = field(
        metadata={"help": "A DeCo checkpoint of type mlp. Every run starts from its tower and language model."}
    )
    output_dir: str = field(metadata={"help": "Folder for the runs and the report."})
    projectors: dict = field(metadata={"help": "The projectors: projector_type to projector_config."})
    pooled_grid_sizes: list[int] = field(metadata={"help": "Sides of the grids. mlp always has the patch grid."})
    seeds: list[int] = field(metadata={"help": "Seeds of the projector's weights and of the pictures."})
    training: dict = field(
        metadata={"help": "Fields of DecoSFTConfig. The learning rates are for Muon; AdamW has a tenth of them."}
    )
    alignment_steps: int = field(
        default=0, metadata={"help": "Number of first steps that train the projector alone, as LLaVA's stage 1 does."}
    )
    min_digits: int = field(default=2, metadata={"help": "Fewest digits in a picture."})
    max_digits: int = field(default=4, metadata={"help": "Most digits in a picture."})
    eval_steps: int = field(default=50, metadata={"help": "Steps between two points of the curves."})
    num_eval_pictures: int = field(default=100, metadata={"help": "Number of validation pictures for the curves."})
    num_test_pictures: int = field(default=300, metadata={"help": "Number of test pictures for the table."})
    num_pointing_pictures: int = field(
        default=100, metadata={"help": "Number of test pictures for the pointing game."}
    )
    threshold: float = field(
        default=90.0, metadata={"help": "The table shows the step at which a run reaches this accuracy, in percent."}
    )
    parallel_runs: int = field(
        default=1, metadata={"help": "Number of runs at a time. They share the cores, or the GPU."}
    )


@dataclass(frozen=True)
class Run:
    """One projector at one token count, with one seed."""

    projector_type: str
    pooled_grid_size: int
    seed: int

    @property
    def num_tokens(self) -> int:
        return num_image_tokens(self.pooled_grid_size)

    @property
    def name(self) -> str:
        return f"{self.projector_type}-{self.num_tokens}-{self.seed}"

    def folder(self, args: CompareArguments) -> Path:
        return Path(args.output_dir) / "runs" / self.name


def config_of(args: CompareArguments, run: Run) -> DecoConfig:
    """The configuration of the backbones with the projector of the run.

    Raises:
        ValueError: the projector's sizes or the grid are invalid.
    """
    config = DecoConfig.from_pretrained(args.backbones).to_dict() | {
        "projector_type": run.projector_type,
        "projector_config": args.projectors[run.projector_type] or None,
        "pooled_grid_size": run.pooled_grid_size,
        "image_positions": "sequence",  # tokens of learned queries have no place in the picture
    }
    return DecoConfig(**config)


def settings_of(args: CompareArguments, run: Run) -> dict:
    """Everything that a result depends on, except the code."""
    ignored = ("backbones", "output_dir", "projectors", "pooled_grid_sizes", "seeds", "threshold", "parallel_runs")
    weights = Path(args.backbones, "model.safetensors").read_bytes()
    return {
        "backbones": hashlib.sha256(weights).hexdigest(),
        "projector_config": args.projectors[run.projector_type] or None,
        **{name: value for name, value in vars(args).items() if name not in ignored},
    }


# fields of DecoSFTConfig that the comparison sets itself
_SET_HERE = (
    *("output_dir", "seed", "freeze", "pooled_grid_sizes", "independent_turns", "max_length", "num_train_epochs"),
    *("gradient_accumulation_steps", "train_sampling_strategy", "save_strategy", "report_to", "disable_tqdm"),
)


def check(args: CompareArguments) -> None:
    """Check the arguments before anything is trained.

    Raises:
        ValueError: an argument is invalid. The message has its name and value.
    """
    if not Path(args.backbones, "model.safetensors").is_file():
        raise ValueError(
            f"backbones={args.backbones!r} is not the folder of a DeCo checkpoint. "
            "recipes/configs/compare_projectors/cpu.yaml has the commands that make one."
        )
    projector_type = DecoConfig.from_pretrained(args.backbones).projector_type
    if projector_type != "mlp":
        raise ValueError(
            f"backbones={args.backbones!r} has projector_type={projector_type!r}, so the comparison would favour this "
            f"projector. Give a checkpoint with projector_type='mlp', which was trained on uncompressed patches."
        )
    least = {"eval_steps": 1, "num_eval_pictures": 1, "num_test_pictures": 2, "num_pointing_pictures": 2}
    for name, minimum in {**least, "parallel_runs": 1}.items():
        if getattr(args, name) < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(args, name)}.")
    for name, kind in {"projectors": dict, "training": dict, "pooled_grid_sizes": list, "seeds": list}.items():
        if not isinstance(getattr(args, name), kind) or not getattr(args, name):
            raise ValueError(f"{name} must be a non-empty {kind.__name__}, got {getattr(args, name)!r}.")
    if not 2 <= args.min_digits <= args.max_digits <= 6:
        raise ValueError(
            f"min_digits={args.min_digits} and max_digits={args.max_digits} must satisfy 2 <= min <= max <= 6."
        )
    taken = [name for name in _SET_HERE if name in args.training]
    if taken:
        raise ValueError(f"training has {', '.join(taken)}. Remove it: the comparison sets it itself.")
    if args.training.get("max_steps", 0) < 1:
        raise ValueError(f"training needs max_steps of at least 1, got {args.training.get('max_steps')}.")
    if not 0 <= args.alignment_steps <= args.training["max_steps"]:
        raise ValueError(
            f"alignment_steps must be 0 to max_steps={args.training['max_steps']}, got {args.alignment_steps}."
        )
    unknown = sorted(set(args.training) - {known.name for known in fields(DecoSFTConfig)})
    if unknown:
        raise ValueError(f"training has {', '.join(unknown)}, which DecoSFTConfig does not have.")
    for run in planned_runs(args):
        config_of(args, run)


def planned_runs(args: CompareArguments) -> list[Run]:
    """All runs, seed by seed, so that an unfinished comparison has every projector. mlp has the patch grid alone."""
    patch_rows, _ = DecoConfig.from_pretrained(args.backbones).patch_grid
    runs = []
    for seed in args.seeds:
        for projector_type in args.projectors:
            grids = [patch_rows] if projector_type == "mlp" else args.pooled_grid_sizes
            runs += [Run(projector_type, grid, seed) for grid in grids]
    return runs


def read_result(args: CompareArguments, run: Run) -> dict | None:
    """The result of a finished run, or None if the run is not finished.

    Raises:
        ValueError: the result was made with other settings.
    """
    path = run.folder(args) / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("settings") != json.loads(json.dumps(settings_of(args, run))):
        raise ValueError(f"{path} was made with other settings. Choose another output_dir, or remove this folder.")
    return result
