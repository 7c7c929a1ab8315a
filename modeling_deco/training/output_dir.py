# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: checked before training, searched for checkpoints, cleared if the user says so."""

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl import ModelConfig

from ..utils.errors import first_names
from ..utils.staging import INCOMPLETE
from .arguments import DecoArguments
from .config import DecoSFTConfig
from .distributed import on_first_process

BASE = "base"  # under output_dir: two backbones, joined, if an adapter of them is trained


def check_output_dir(args: DecoArguments, training_args: DecoSFTConfig, model_args: ModelConfig) -> None:
    """Check that the run may write into `output_dir`. Every process of a launch must call it.

    Raises:
        ValueError: the folder contains something that the run reads, or a model or checkpoints of an earlier run.
    """
    on_first_process(training_args, _check_output_dir, args, training_args, model_args)


def _check_output_dir(args: DecoArguments, training_args: DecoSFTConfig, model_args: ModelConfig) -> None:
    out = Path(training_args.output_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output_dir {out} is a file; name a folder.")
    read = {
        "--model_name_or_path": [model_args.model_name_or_path],
        "--vision_model_name_or_path": [args.vision_model_name_or_path],
        "--data_path": args.data_path,
        "--eval_data_path": args.eval_data_path or [],
    }
    written = [out.resolve(), *(path.resolve() for path in _results(out))]
    for option, names in read.items():
        for path in (Path(name).resolve() for name in names if name is not None):
            if path.exists() and (path in written or any(parent in written[1:] for parent in path.parents)):
                raise ValueError(f"--output_dir {out} contains {option} {path}, which the run reads; name another.")
    found = [path.name for path in _results(out)]
    if found and not args.overwrite_output_dir and training_args.resume_from_checkpoint is None:
        raise ValueError(
            f"--output_dir {out} has a model or checkpoints ({first_names(found)}). Continue with "
            f"--resume_from_checkpoint latest, replace them with --overwrite_output_dir true, or name another folder."
        )
    if args.overwrite_output_dir and training_args.resume_from_checkpoint is not None:
        raise ValueError("--overwrite_output_dir removes what --resume_from_checkpoint needs; choose one of them.")


def _results(out: Path) -> list[Path]:
    """The models and checkpoints that earlier runs left in a folder."""
    folders = [*out.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *(out / name for name in (BASE, "merged", INCOMPLETE))]
    names = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
    files = [path for name in names for path in out.glob(name)]
    return [*(path for path in folders if path.is_dir()), *(path for path in files if path.is_file())]


def remove_results(out: Path) -> None:
    """Remove the models and checkpoints of earlier runs, so that nobody takes them for results of this run."""
    for path in _results(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear_output_dir(args: DecoArguments, training_args: DecoSFTConfig) -> None:
    """Remove earlier results if `--overwrite_output_dir` says so. Every process of a launch must call it."""
    if args.overwrite_output_dir:
        on_first_process(training_args, remove_results, Path(training_args.output_dir))


def find_checkpoint(training_args: DecoSFTConfig) -> str | None:
    """The checkpoint of `--resume_from_checkpoint`. "latest" means the last one in `output_dir`, if there is one.

    Every process of a launch must call it. They use what the first process finds: without a shared disk they would
    otherwise begin at different steps.
    """
    if training_args.resume_from_checkpoint != "latest":
        return training_args.resume_from_checkpoint
    out = training_args.output_dir
    return on_first_process(training_args, lambda: get_last_checkpoint(out) if Path(out).is_dir() else None)
