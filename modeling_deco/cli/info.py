# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco info`: what a checkpoint consists of, and how much memory it needs."""

import json
from typing import Annotated

import typer

from .common import ImagePositions, Model, Revision, choose_model, one_line_errors, quiet_transformers, table


def info(
    model: Model = None,
    revision: Revision = None,
    image_positions: ImagePositions = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with memory in bytes.")] = False,
):
    """Show a checkpoint's token flow, parameters, memory and licence, without loading its weights.

    \b
    deco info DIR_OR_HUB_ID
    deco info DIR_OR_HUB_ID --revision main --json
    """
    with one_line_errors("info"):
        from ..inference.costs import describe

        quiet_transformers()
        description = describe(choose_model("info", model), revision, image_positions)
    typer.echo(json.dumps(description) if as_json else _to_text(description))


def _to_text(about: dict) -> str:
    from ..inference.costs import format_size

    tower, text, parameters = about["vision_tower"], about["language_model"], about["parameters"]
    patches, pooled = ("{} x {}".format(*grid) for grid in (about["patch_grid"], about["pooled_grid_size"]))
    has_views = about["num_views"] > 1
    source, most = (f"image -> up to {about['num_views']} views", "at most ") if has_views else ("image", "")
    tokens = (
        f"{pooled} a view, {most}{about['num_image_tokens']}"
        if has_views
        else f"{pooled} = {about['num_image_tokens']}"
    )
    size = "feature map" if tower["layers"] is None else f"{tower['layers']} layers"
    stored = ", ".join(name for name in (about["dtype"], about["quantization"]) if name)
    lines = [
        about["model"],
        "",
        f"{source} -> {tower['type']}, {size}: {patches} patches of {about['patch_size']} pixels "
        f"-> {about['projector_type']} -> {tokens} tokens "
        f"-> {text['type']}, {text['layers']} layers",
        "",
        f"positions   {about['image_positions']}: an image takes {most}{about['num_image_positions']} of the context",
        f"licence     {about['license'] or 'not stated'}",
    ]
    if about["pooled_video_grid_size"]:
        rows, cols = about["pooled_video_grid_size"]
        lines.append(f"videos      {rows} x {cols} = {rows * cols} tokens a frame")
    if about["adapter_of"]:
        lines.append(f"adapter of  {about['adapter_of']}")
    if about["base_model"]:
        bases = about["base_model"]
        lines.append(f"base model  {bases if isinstance(bases, str) else ', '.join(bases)}")
    if stored:
        lines.append(f"stored as   {stored}")
    table_rows: list[tuple[str, ...]] = [(name.replace("_", " "), f"{parameters[name]:,}") for name in parameters]
    lines += ["", *table(("parameters", ""), table_rows)]
    table_rows = [(name, format_size(size)) for name, size in about["weights"].items()]
    lines += ["", *table(("weights as", "memory"), table_rows)]
    table_rows = [
        (
            "{} x {}".format(*grid["pooled_grid_size"]),
            str(grid["num_image_tokens"]),
            *(format_size(grid["kv_cache"][dtype]) for dtype in ("float32", "16bit")),
            *(
                format_size(about["weights"][weights] + grid["kv_cache"][cache])
                for weights, cache in _CACHE_OF.items()
            ),
        )
        for grid in about["grids"]
    ]
    header = ("grid", "tokens", "cache float32", "cache 16bit", *(f"total {name}" for name in _CACHE_OF))
    lines += ["", *table(header, table_rows)]
    image = "the largest image" if has_views else "one image"
    lines += ["", f"cache: keys and values of {image}'s tokens. total: weights and cache, without activations."]
    if not about["takes_any_grid"]:
        lines.append(f"This projector has only one grid, {pooled}.")
    return "\n".join(lines)


# The type of the key-value cache is that of the activations: 16 bits for weights in 4 bits.
_CACHE_OF = {"float32": "float32", "16bit": "16bit", "4bit": "16bit"}
