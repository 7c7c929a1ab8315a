# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo against the projectors that it is compared with, on the digits world: the paper's question in small.

    python recipes/compare_projectors.py --config recipes/configs/compare_projectors/cpu.yaml

Every run starts from the same backbones, a frozen vision tower and a language model that has learned the task from
uncompressed patches, and puts a fresh projector between them. The projector is trained first, then both, with the
same pictures, steps and optimizer for all. There is a run for each projector, token count and seed.

Each run leaves `OUTPUT_DIR/runs/NAME/result.json` when it is done; started again, the recipe does what is missing.
Then it writes `results.json`, `table.md`, `curves.png`, `tokens.png` and `relevance.png` into OUTPUT_DIR.
"""

from modeling_deco.utils.script import run
from modeling_deco.worlds.digits.comparison import main

if __name__ == "__main__":
    run("compare_projectors", main)
