# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a converted checkpoint."""

from huggingface_hub import ModelCard

from ..hub import model_card
from .checkpoints import LlavaCheckpoint
from .sources import Source

_ROLES = {"source": "LLaVA checkpoint", "base_model": "Language model", "vision_tower": "Vision tower"}


def build_card(checkpoint: LlavaCheckpoint, version: str) -> ModelCard:
    """The card says what the checkpoint was made from, under which licences, and how to use it."""
    config, source = checkpoint.config, checkpoint.sources["source"]
    on_hub = [origin.name for origin in checkpoint.sources.values() if origin.revision]
    origins = "\n".join(
        f"- {_ROLES[role]}: {origin.title}"
        + (f" at revision `{origin.revision}`" if origin.revision else "")
        + f", licence: {_licence_name(origin)}"
        for role, origin in checkpoint.sources.items()
    )
    rows, cols = config.patch_grid
    a_view = "" if config.image_grid_pinpoints is None else " for each view"
    if checkpoint.is_trained_pooled:
        trained = "It was trained with pooling; a grid other than that of its training may need fine-tuning."
    else:
        trained = (
            f"At {rows} x {cols}{a_view} its logits are LLaVA's. It has not been trained at a smaller grid. There "
            f"its tokens keep the positions of their patches (`image_positions`), and its accuracy has not been "
            f"measured."
        )
    about = f"""\
It has the weights of a LLaVA checkpoint (format: {checkpoint.format}). {trained}

Made from:

{origins}

The licences of all of these apply. Converted by modeling-deco {version}; `conversion_report.json` has the details."""
    return model_card(
        config,
        f"{source.title}, as DeCo",
        "THIS_FOLDER_OR_REPOSITORY",
        about,
        base_model=on_hub or None,
        **source.licence,
    )


def _licence_name(source: Source) -> str:
    name = source.licence.get("license_name") or source.licence.get("license") or "not stated there"
    return " ".join(name.split())  # text after a line break would look like text of this card
