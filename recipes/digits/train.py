# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Train the shipped checkpoint: the digits tower, then DeCo on top of it with TRL's SFTTrainer.

    python recipes/digits/train.py --output_dir runs/digits

Under two hours on two CPU cores. Seeded; started again with the same arguments, it goes on where it stopped. Pictures
are rendered from their index, all questions about one stand in one sequence, and each batch is pooled to a grid drawn
at random, so that one checkpoint serves every token budget. A run whose answers do not depend on the picture is on a
plateau that some never leave; it is stopped early, with a word about what to do.
"""

from modeling_deco.utils.script import run
from modeling_deco.worlds.digits.train import main

if __name__ == "__main__":
    run("digits.train", main)
