# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Join the tower of the emoji world to SmolLM2, with the projector that was trained with the tower.

    python -m modeling_deco.worlds.emoji.join --tower runs/tower --out runs/joined

It is the model that stage 1 begins with.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ... import DecoForConditionalGeneration, DecoProcessor
from ...inference.smollm2 import smollm2_folder
from ...utils.errors import InputError
from ...utils.program import run
from ...utils.staging import staged_folder
from .tower import load_projector

logger = logging.getLogger(__name__)

POOLED_GRID_SIZE = 6  # a quarter of 12 x 12
_NUM_BYTES = 700_000_000


def join(tower: Path, language_model: Path, out: Path) -> None:
    """Write a DeCo of both, with its processor, to the folder `out`."""
    model = DecoForConditionalGeneration.from_vision_text_pretrained(
        str(tower),
        str(language_model),
        pooled_grid_size=POOLED_GRID_SIZE,
        image_positions="patch",
        vision_position_embedding="sine",
    )
    model.model.multi_modal_projector.load_state_dict(load_projector(tower))
    processor = DecoProcessor.from_vision_text_pretrained(
        str(tower), str(language_model), pooled_grid_size=POOLED_GRID_SIZE
    )
    with staged_folder(out, _NUM_BYTES, check=lambda: None) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    logger.info("joined %s and %s in %s", tower, language_model, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Join the tower of the emoji world to SmolLM2.")
    parser.add_argument("--tower", type=Path, required=True, help="folder that emoji.tower has written")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    join(args.tower, smollm2_folder(), args.out)


if __name__ == "__main__":
    run("emoji.join", main, bad_input=(InputError,))
