# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["modeling-deco[train]"]
# ///
"""Compare DeCo with other projectors on the digits world: the paper's question at a small scale.

    python recipes/compare_projectors.py --config recipes/configs/compare_projectors/cpu.yaml

Every run starts from the same backbones: a frozen vision tower, and a language model that has learned the task from
uncompressed patches. A run puts a new projector between them, trains first the projector and then both, with the same
pictures, steps and optimizer for all projectors. There is one run for each projector, token count and seed.

A finished run leaves `OUTPUT_DIR/runs/NAME/result.json`. Run the same command again to train the missing runs. At the
end the recipe writes `results.json`, `table.md`, `curves.png`, `tokens.png` and `relevance.png` to OUTPUT_DIR.
"""

import logging
from pathlib import Path

import typer
from trl import TrlParser

from modeling_deco.utils.script import run as run_recipe
from modeling_deco.worlds.digits.comparison import CompareArguments, check, planned_runs, read_result
from modeling_deco.worlds.digits.comparison_report import write_report
from modeling_deco.worlds.digits.comparison_run import train_runs


def main(args: CompareArguments) -> None:
    check(args)
    results = {run: read_result(args, run) for run in planned_runs(args)}
    missing = [run for run, result in results.items() if result is None]
    results |= train_runs(args, missing)
    write_report([{**result, "folder": str(run.folder(args))} for run, result in results.items()], args)
    typer.echo((Path(args.output_dir) / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_recipe("compare_projectors", lambda: main(*TrlParser((CompareArguments,)).parse_args_and_config()))
