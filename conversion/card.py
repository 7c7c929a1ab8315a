# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a converted checkpoint."""

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_deco import parse_grid
from .checkpoints import LlavaCheckpoint
from .sources import Source

_ROLES = {"source": "LLaVA checkpoint", "base_model": "Language model", "vision_tower": "Vision tower"}


def build_card(checkpoint: LlavaCheckpoint, version: str) -> ModelCard:
    """Names what the checkpoint was made from, under which licence, and how it is used."""
    config, licence = checkpoint.config, checkpoint.sources["source"].licence
    on_hub = [source.name for source in checkpoint.sources.values() if source.revision]
    data = ModelCardData(
        **licence,
        base_model=on_hub or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["deco", "llava", "vision-language"],
    )
    (rows, cols), (pooled_rows, pooled_cols) = config.patch_grid, parse_grid(config.pooled_grid_size)
    origins = "\n".join(
        f"- {_ROLES[role]}: {source.title}"
        + (f" at revision `{source.revision}`" if source.revision else "")
        + f", licence: {_licence_name(source)}"
        for role, source in checkpoint.sources.items()
    )
    if checkpoint.is_trained_pooled:
        trained = "It was trained with pooling;\nanother grid than that of its training may need fine-tuning."
    else:
        trained = (
            f"At {rows} x {cols}\nits logits are LLaVA's. It has not been trained at a smaller grid, where it is a "
            f"starting point for\nfine-tuning."
        )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {checkpoint.sources["source"].title}, as DeCo

A [DeCo](https://arxiv.org/abs/2405.20985) vision-language model with the weights of a LLaVA checkpoint
(format: {checkpoint.format}). Its {rows} x {cols} image patches are shrunk by 2D average pooling, which has no
parameters, to {pooled_rows} x {pooled_cols} = {config.num_image_tokens} tokens per image; any other grid can be chosen
per call. {trained}

Made from:

{origins}

The licences of all of these apply. Converted by modeling-deco {version}; `conversion_report.json` has the details.

```python
import modeling_deco  # or pass trust_remote_code=True
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="THIS_FOLDER_OR_REPOSITORY")
content = [{{"type": "image", "image": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
pipe(text=[{{"role": "user", "content": content}}], return_full_text=False)
pipe(text=[{{"role": "user", "content": content}}], processor_kwargs={{"pooled_grid_size": {min(rows, cols)}}})
```
""")


def _licence_name(source: Source) -> str:
    name = source.licence.get("license_name") or source.licence.get("license") or "not stated there"
    return " ".join(name.split())  # what follows a line break would be said by this card
