# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["modeling-deco[emoji,train]"]
# ///
"""Train deco-everyday from nothing: art, tower, captions, questions, both stages of LLaVA, and the files to ship.

    python recipes/everyday.py --output_dir runs/everyday

Each step is a program of its own, whose command is printed. A step that is complete is skipped, and one that was
killed continues, so the same command resumes a run. `--scale 0.01` tries everything out in minutes. It needs the npm
package @iconify/json, which `npm pack` downloads, unless `--iconify` names its file.
"""

import argparse
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from modeling_deco.utils.errors import InputError
from modeling_deco.utils.program import run
from modeling_deco.worlds.emoji.tower import TowerArguments

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent
NUM_CAPTIONS = 1200
NUM_PICTURES = 2400  # of stage 2, with about eight questions each


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train deco-everyday from nothing.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the run, of about 3 GB")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and pictures (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training to do (default: 1)")
    parser.add_argument("--iconify", type=Path, help="file of the npm package @iconify/json (default: npm pack)")
    args = parser.parse_args(argv)
    if args.scale <= 0:
        parser.error(f"--scale must be positive, got {args.scale}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    start = time.monotonic()
    for name, result, command in steps(args):
        if result is not None and result.exists():
            logger.info("%s: done, %s is there", name, result)
            continue
        logger.info("%s, after %.0f minutes: %s", name, (time.monotonic() - start) / 60, shlex.join(command))
        done = subprocess.run([sys.executable, *command], check=False)
        if done.returncode != 0:
            raise InputError(f"{name} failed with exit code {done.returncode}; its message is above. Run this again.")
    logger.info("done after %.0f minutes", (time.monotonic() - start) / 60)


def steps(args: argparse.Namespace) -> Iterator[tuple[str, Path | None, list[str]]]:
    """The name of each step, the file that it writes last (None: the program itself knows), and its command."""
    out, seed = args.output_dir, str(args.seed)

    def scaled(number: int) -> str:
        return str(max(4, round(number * args.scale)))

    def program(name: str, *arguments: object) -> list[str]:
        return ["-m", f"modeling_deco.{name}", *map(str, arguments)]

    def sft(stage: int, model: Path, *options: object) -> list[str]:
        command = [RECIPES / "sft.py", "--config", RECIPES / "configs" / f"everyday_stage{stage}.yaml"]
        command += ["--model_name_or_path", model, "--data_path", out / f"data{stage}"]
        command += ["--output_dir", out / f"stage{stage}", "--seed", seed, "--resume_from_checkpoint", "latest"]
        return [*map(str, [*command, *options]), "--use_cpu", str(not _has_gpu()).lower()]

    def data(stage: int, number: int, *options: str) -> Iterator[tuple[str, Path, list[str]]]:
        raw, records = out / f"pictures{stage}", f"train{'-captions' if options else ''}.json"
        arguments = ("--split", "train", "--num-pictures", scaled(number), "--seed", args.seed + stage, "--out", raw)
        yield f"pictures of stage {stage}", raw / records, program("worlds.emoji.world", *arguments, *options)
        arguments = (raw / records, "--images", raw / "images", "--out", out / f"data{stage}")
        yield f"data of stage {stage}", out / f"data{stage}", program("training.data", *arguments)

    tower, joined = out / "tower", out / "joined"
    yield "art", None, program("worlds.emoji.art", *(["--iconify", args.iconify] if args.iconify else []))
    arguments = ("--output_dir", tower, "--num_steps", scaled(TowerArguments.num_steps), "--seed", seed)
    yield "tower", tower / "projector.safetensors", program("worlds.emoji.tower", *arguments)
    yield "joining", joined / "config.json", program("worlds.emoji.join", "--tower", tower, "--out", joined)
    yield from data(1, NUM_CAPTIONS, "--captions")
    yield "stage 1", out / "stage1" / "model.safetensors", sft(1, joined)
    yield from data(2, NUM_PICTURES)
    template = ("--chat_template", joined / "chat_template.jinja")  # SmolLM2's; that of stage 1 has no questions
    yield "stage 2", out / "stage2" / "adapter_model.safetensors", sft(2, out / "stage1", *template)
    yield (
        "files to ship",
        None,
        program("worlds.emoji.ship", "--model", out / "stage2", "--out", out / "deco-everyday"),
    )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    run("everyday", main, bad_input=(InputError,))
