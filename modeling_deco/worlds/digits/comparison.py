# /// script
# dependencies = ["modeling-deco[train]"]
# ///
"""DeCo against the projectors that it is compared with, on the digits world: the paper's question in small.

    python recipes/compare_projectors.py --config recipes/configs/compare_projectors/cpu.yaml

Every run starts from the same backbones, a frozen vision tower and a language model that has learned the task from
uncompressed patches, and puts a fresh projector between them. The projector is trained first, then both, with the
same pictures, steps and optimizer for all. There is a run for each projector, token count and seed.

Each run leaves `OUTPUT_DIR/runs/NAME/result.json` when it is done; started again, the recipe does what is missing.
Then it writes `results.json`, `table.md`, `curves.png`, `tokens.png` and `relevance.png` into OUTPUT_DIR.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
import typer
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import TrlParser

from ... import DecoConfig, DecoForConditionalGeneration, DecoProcessor
from ...configuration_deco import num_image_tokens
from ...inference.loading import load_model
from ...training.collator import IGNORE_INDEX, DecoCollator, expand_images
from ...training.trainer import DecoSFTConfig, DecoSFTTrainer, part_of
from ...utils.measure import environment
from .comparison_report import write_report
from .evaluate import accuracy_by_kind
from .optimizer import MuonAdamW
from .pointing_game import pointing_game
from .train import build_dataset, faster_attention, turn
from .world import KINDS, questions, render, score

logger = logging.getLogger(__name__)


@dataclass
class CompareArguments:
    """What is compared, and how it is trained. It stands in the YAML file; see recipes/configs."""

    backbones: str = field(
        metadata={"help": "A DeCo checkpoint whose tower and language model every run starts from: of type mlp."}
    )
    output_dir: str = field(metadata={"help": "Holds the runs and the report."})
    projectors: dict = field(metadata={"help": "projector_type: projector_config, for each projector."})
    pooled_grid_sizes: list[int] = field(metadata={"help": "Sides of the grids; mlp has the patch grid alone."})
    seeds: list[int] = field(metadata={"help": "For the projector's weights, and for the pictures."})
    training: dict = field(
        metadata={"help": "Fields of DecoSFTConfig; learning rates are Muon's, and AdamW has a tenth of them."}
    )
    alignment_steps: int = field(
        default=0, metadata={"help": "First so many of the steps train the projector alone, as LLaVA's stage 1 does."}
    )
    min_digits: int = field(default=2, metadata={"help": "Fewest digits in a picture."})
    max_digits: int = field(default=4, metadata={"help": "Most digits in a picture."})
    eval_steps: int = field(default=50, metadata={"help": "A point on the curves this often."})
    num_eval_pictures: int = field(default=100, metadata={"help": "Pictures of validation scans for the curves."})
    num_test_pictures: int = field(default=300, metadata={"help": "Pictures of held-out scans for the table."})
    num_pointing_pictures: int = field(default=100, metadata={"help": "The same, for the pointing game."})
    threshold: float = field(default=90.0, metadata={"help": "Accuracy, in percent, that runs are timed to."})
    parallel_runs: int = field(default=1, metadata={"help": "Runs at once; they share the cores, or the GPU."})


@dataclass(frozen=True)
class Run:
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
    """The backbones' configuration with the run's projector.

    Raises:
        ValueError: the projector's sizes or the grid cannot be.
    """
    config = DecoConfig.from_pretrained(args.backbones).to_dict() | {
        "projector_type": run.projector_type,
        "projector_config": args.projectors[run.projector_type] or None,
        "pooled_grid_size": run.pooled_grid_size,
    }
    return DecoConfig(**config)


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
    """The backbones' vision tower and language model with a fresh projector, and their processor."""
    warm = load_model(args.backbones, dtype=torch.float32)
    processor = DecoProcessor.from_pretrained(args.backbones, trust_remote_code=False)
    processor.pooled_grid_size = run.pooled_grid_size
    model = DecoForConditionalGeneration(config_of(args, run))
    model.model.vision_tower.load_state_dict(warm.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(warm.model.language_model.state_dict())
    model.lm_head.load_state_dict(warm.lm_head.state_dict())
    model.generation_config = warm.generation_config
    return model, processor


def build_optimizer(model: DecoForConditionalGeneration, training_args: DecoSFTConfig) -> MuonAdamW:
    """Muon for the matrices of projector and language model, AdamW at a tenth of its rates for the rest."""
    rates = {"language_model": training_args.learning_rate}
    rates["multi_modal_projector"] = training_args.projector_learning_rate or training_args.learning_rate
    groups = {}
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


# --- one run ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def forced_accuracy(model, processor, pictures: list[tuple]) -> dict[str, float]:
    """Percent right by kind of question, from the most likely token at each position of the reference answer.

    Where that is the reference, it is what the model would write greedily; so this equals exact match in a fraction
    of the time. Boxes are judged by IoU, and a wrong number in one does not lead the next ones astray.

    Args:
        pictures: `(scene, questions)`.
    """
    was_training = model.training
    model.eval()
    collator = DecoCollator(processor, independent_turns=True)
    hits = {kind: [] for kind in KINDS}
    for start in range(0, len(pictures), 32):
        chunk = pictures[start : start + 32]
        examples = [
            {"images": [scene.image], "messages": [message for question in asked for message in turn(question)]}
            for scene, asked in chunk
        ]
        inputs = expand_images(collator(examples), None, processor)
        labels = inputs.pop("labels")
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        predictions = model(**inputs).logits.argmax(-1).cpu()
        for (_, asked), row, predicted in zip(chunk, labels, predictions, strict=True):
            answers = torch.nonzero(row != IGNORE_INDEX).flatten().tolist()
            ends = [position for position, after in pairwise([*answers, -1]) if after != position + 1]
            starts = [position for before, position in pairwise([-1, *answers]) if before != position - 1]
            for question, first, last in zip(asked, starts, ends, strict=True):
                text = processor.decode(predicted[first - 1 : last], skip_special_tokens=True)
                hits[question.kind].append(score(question, text))
    model.train(was_training)
    return {kind: round(100 * float(np.mean(found)), 2) for kind, found in hits.items()}


class Curve(TrainerCallback):
    """Accuracy every `eval_steps`, from before the first step on."""

    def __init__(self, args: CompareArguments, processor):
        self.args, self.processor = args, processor
        self.points, self.seconds = [], 0.0
        scenes = [
            render("validation", index, min_digits=args.min_digits, max_digits=args.max_digits)
            for index in range(args.num_eval_pictures)
        ]
        self.pictures = [(scene, questions(scene, np.random.default_rng(index))) for index, scene in enumerate(scenes)]

    def measure(self, model, step: int):
        began = time.perf_counter()
        self.points.append({"step": step, "accuracy": forced_accuracy(model, self.processor, self.pictures)})
        self.seconds += time.perf_counter() - began

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.args.eval_steps == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)


class Alignment(TrainerCallback):
    """Keeps the language model as it is until the projector speaks its language."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.model.language_model.requires_grad_(state.global_step >= self.num_steps)


def settings_of(args: CompareArguments, run: Run) -> dict:
    """What a result depends on, besides the code."""
    ignored = ("backbones", "output_dir", "projectors", "pooled_grid_sizes", "seeds", "threshold", "parallel_runs")
    weights = Path(args.backbones, "model.safetensors").read_bytes()
    return {
        "backbones": hashlib.sha256(weights).hexdigest(),
        "projector_config": args.projectors[run.projector_type] or None,
        **{name: value for name, value in vars(args).items() if name not in ignored},
    }


def train(args: CompareArguments, run: Run) -> dict:
    """Train and measure; the result is also written to the run's folder, when all is done."""
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
    partial = folder / "result.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "result.json")
    return result


# --- all runs --------------------------------------------------------------------------------------------------------


# What the comparison sets itself, of DecoSFTConfig.
_SET_HERE = (
    *("output_dir", "seed", "freeze", "pooled_grid_sizes", "independent_turns", "max_length", "num_train_epochs"),
    *("gradient_accumulation_steps", "train_sampling_strategy", "save_strategy", "report_to", "disable_tqdm"),
)


def check(args: CompareArguments) -> None:
    """Refuse what could not be compared, before anything is trained.

    Raises:
        ValueError: names the setting, its value and what it can be.
    """
    if not Path(args.backbones, "model.safetensors").is_file():
        raise ValueError(
            f"backbones={args.backbones!r} is no folder of a DeCo checkpoint; cpu.yaml says how to make it."
        )
    projector_type = DecoConfig.from_pretrained(args.backbones).projector_type
    if projector_type != "mlp":
        raise ValueError(
            f"backbones={args.backbones!r} has projector_type={projector_type!r}, which would be favoured: its "
            f"language model must have learned from uncompressed patches, projector_type='mlp'."
        )
    least = {"eval_steps": 1, "num_eval_pictures": 1, "num_test_pictures": 2, "num_pointing_pictures": 2}
    for name, minimum in {**least, "parallel_runs": 1}.items():
        if getattr(args, name) < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(args, name)}.")
    for name, kind in {"projectors": dict, "training": dict, "pooled_grid_sizes": list, "seeds": list}.items():
        if not isinstance(getattr(args, name), kind) or not getattr(args, name):
            raise ValueError(f"{name} must be a {kind.__name__} that is not empty, got {getattr(args, name)!r}.")
    if not 2 <= args.min_digits <= args.max_digits <= 6:
        raise ValueError(
            f"min_digits={args.min_digits} and max_digits={args.max_digits} must satisfy 2 <= min <= max <= 6."
        )
    taken = [name for name in _SET_HERE if name in args.training]
    if taken:
        raise ValueError(f"training has {', '.join(taken)}, which the comparison sets itself.")
    if args.training.get("max_steps", 0) < 1:
        raise ValueError(f"training needs max_steps of at least 1, got {args.training.get('max_steps')}.")
    if not 0 <= args.alignment_steps <= args.training["max_steps"]:
        raise ValueError(
            f"alignment_steps must be 0 to max_steps={args.training['max_steps']}, got {args.alignment_steps}."
        )
    unknown = sorted(set(args.training) - {known.name for known in fields(DecoSFTConfig)})
    if unknown:
        raise ValueError(f"training has {', '.join(unknown)}, which is no field of DecoSFTConfig.")
    for run in planned_runs(args):
        config_of(args, run)


def planned_runs(args: CompareArguments) -> list[Run]:
    """Seed by seed, so that an unfinished comparison has all projectors. mlp has one token count, the patches'."""
    patch_rows, _ = DecoConfig.from_pretrained(args.backbones).patch_grid
    runs = []
    for seed in args.seeds:
        for projector_type in args.projectors:
            grids = [patch_rows] if projector_type == "mlp" else args.pooled_grid_sizes
            runs += [Run(projector_type, grid, seed) for grid in grids]
    return runs


def finished(args: CompareArguments, run: Run) -> dict | None:
    path = run.folder(args) / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("settings") != json.loads(json.dumps(settings_of(args, run))):
        raise ValueError(f"{path} is of other settings; choose another output_dir, or remove that folder.")
    return result


def compare(args: CompareArguments) -> list[dict]:
    """The results of all runs, those that are there already included.

    Raises:
        ValueError: `check` refuses the arguments, or a result that is there is of others.
        RuntimeError: a run failed; those that had begun are finished, and no other is begun.
    """
    check(args)
    found = {run: finished(args, run) for run in planned_runs(args)}
    missing = [run for run, result in found.items() if result is None]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(args.parallel_runs, mp_context=context) as pool:
        started = {pool.submit(train, args, run): run for run in missing}
        progress = tqdm(as_completed(started), total=len(found), initial=len(found) - len(missing), unit="run")
        try:
            for future in progress:
                run = started[future]
                found[run] = future.result()
                progress.set_postfix_str(run.name)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, Exception):
                raise RuntimeError(f"The run {run.name} failed: {error}") from error
            raise
    return [{**result, "folder": str(run.folder(args))} for run, result in found.items()]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (args,) = TrlParser((CompareArguments,)).parse_args_and_config()
    results = compare(args)
    write_report(results, args)
    typer.echo((Path(args.output_dir) / "table.md").read_text(encoding="utf-8"))
