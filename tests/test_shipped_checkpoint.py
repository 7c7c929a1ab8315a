# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The checkpoint in the package: its files, and what it can read."""

from pathlib import Path

from safetensors import safe_open

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.inference.loading import load
from modeling_deco.worlds.digits.evaluate import accuracy_by_kind

ROOT = Path(__file__).parents[1]


def test_it_is_small_and_complete():
    files = {path.name for path in SHIPPED_CHECKPOINT.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= files
    assert "{% generation" in (SHIPPED_CHECKPOINT / "chat_template.jinja").read_text().replace("{%- ", "{% ")
    assert (SHIPPED_CHECKPOINT / "model.safetensors").stat().st_size <= 8_000_000
    with safe_open(SHIPPED_CHECKPOINT / "model.safetensors", "pt") as tensors:
        assert "model.multi_modal_projector.linear_2.weight" in tensors.keys()
    assert (SHIPPED_CHECKPOINT / "README.md").read_text() == (ROOT / "MODEL_CARD.md").read_text()


def test_it_reads_held_out_handwriting_at_two_budgets():
    model, processor = load(str(SHIPPED_CHECKPOINT))
    for grid in (3, 6):
        accuracies = accuracy_by_kind(model, processor, "test", num_pictures=15, pooled_grid_size=grid)
        assert set(accuracies) == {"existence", "count", "colour", "read", "relation", "locate"}
        assert min(row["accuracy"] for row in accuracies.values()) >= 85
