# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The work that DeCo saves, each saving compared with the version without it, and the work outside the model's parts.

    python benchmarks/unused_work.py

The model has CLIP ViT-L/14-336, the width of a 0.5B language model, and random weights. The two versions of a saving
are timed in rounds in one process; `ratio` is the median over rounds of the time without the saving divided by the
time with it. One more run counts the bytes of the tensors that PyTorch's operators create: the `peak`, and the bytes
that the output `keeps`. Then it times a forward pass and its parts, and counts the operators that run outside of
tower, projector, embeddings, language model and head. The results are written to results/unused_work.json, and the
last line of the output is the same JSON.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from shapes import NUM_TEXT_TOKENS, RESULTS, TensorBytes, build_config
from torch.utils._python_dispatch import TorchDispatchMode  # private, seen in torch 2.13
from transformers import AutoModel, CLIPVisionConfig

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.projectors import pool_patch_grid
from modeling_deco.utils.measure import command, environment, spread, time_interleaved, write_report

SIDE, PATCH_GRID, POOLED_GRID, OTHER_GRID = 336, (24, 24), (12, 12), (8, 8)


class OperatorsOutside(TorchDispatchMode):
    """Counts the operators that run outside of the model's `parts`."""

    def __init__(self, parts: list[torch.nn.Module]):
        super().__init__()
        self.counts, self.depth = Counter(), 0
        for part in parts:
            part.register_forward_pre_hook(lambda *call: self.enter(1))
            part.register_forward_hook(lambda *call: self.enter(-1))

    def enter(self, step: int):
        self.depth += step

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.depth == 0:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def compare(runs: dict, repeats: int, device: str) -> dict[str, dict]:
    """Time and bytes of two functions, `{"with": function, "without": function}`."""
    times, report = time_interleaved(runs, repeats, device), {}
    for name, run in runs.items():
        with TensorBytes() as tensors:
            output = run()
        report[name] = {"seconds": spread(times[name]), "peak_bytes": tensors.peak, "kept_bytes": tensors.held}
        del output
    report["ratio"] = spread([slow / fast for slow, fast in zip(times["without"], times["with"], strict=True)])
    return report


def rest_of_forward(model, pixel_values, repeats: int, device: str) -> dict:
    """Time and operators of a forward pass outside the model's parts."""
    tokens = torch.full((len(pixel_values), NUM_TEXT_TOKENS + POOLED_GRID[0] * POOLED_GRID[1]), 5, device=device)
    tokens[:, 4 : 4 + POOLED_GRID[0] * POOLED_GRID[1]] = model.config.image_token_id
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "logits_to_keep": 1}
    parts = [model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    parts.append(model.get_input_embeddings())
    with OperatorsOutside(parts) as outside:
        model(**inputs, pixel_values=pixel_values)
    embeddings = model.get_input_embeddings()(tokens)
    patch_features = model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]
    features = model.get_image_features(pixel_values)
    runs = {
        "forward": lambda: model(**inputs, pixel_values=pixel_values),
        "tower": lambda: model.model.vision_tower(pixel_values),
        "projector": lambda: model.model.multi_modal_projector(patch_features, PATCH_GRID, POOLED_GRID),
        "language model": lambda: model.model.language_model(
            inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]
        ),
        "find placeholders and put the features there": lambda: embeddings.masked_scatter(
            model.model.get_placeholder_mask(tokens, embeddings, features.pooler_output),
            torch.cat(list(features.pooler_output)),
        ),
    }
    return {
        "seconds": {name: spread(values) for name, values in time_interleaved(runs, repeats, device).items()},
        "operators_outside": dict(outside.counts.most_common()),
    }


@torch.inference_mode()
def main(
    vision_layers: Annotated[int, typer.Option(min=2, help="Layers of the tower, with the unused one.")] = 24,
    text_layers: Annotated[int, typer.Option(min=1, help="Layers of the language model.")] = 2,
    num_images: Annotated[int, typer.Option(min=2, help="Images in the batches for the projector alone.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for unused_work.json.")] = RESULTS,
) -> None:
    """Measure each saving."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = build_config("0.5b", vision_layers - 1, text_config={"num_hidden_layers": text_layers})
    with torch.device(device):
        model = DecoForConditionalGeneration(config).eval()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    whole = CLIPVisionConfig(**{**tower.config.to_dict(), "num_hidden_layers": vision_layers})
    with torch.device(device):
        whole = AutoModel.from_config(whole, trust_remote_code=False).eval()
    pixel_values = torch.randn(1, 3, SIDE, SIDE, device=device)
    states = torch.randn(num_images, 577, tower.config.hidden_size, device=device)  # CLS and patches
    patches = states[:, 1:]
    pooled = pool_patch_grid(patches, PATCH_GRID, POOLED_GRID)
    channels_first = pooled.transpose(1, 2).contiguous().transpose(1, 2)
    grids = torch.tensor([POOLED_GRID, OTHER_GRID], device=device).repeat(num_images // 2, 1)
    mixed = patches[: len(grids)]

    def by_grid(start: int, stop: int):
        return model.model.project_features(mixed[start:stop], PATCH_GRID, grids[start:stop])

    savings = {
        "layers above the feature layer are not run": {
            "with": lambda: tower(pixel_values, output_hidden_states=-1),
            "without": lambda: whole(pixel_values, output_hidden_states=-2),
        },
        "hidden states that nobody reads are not kept": {
            "with": lambda: model.get_image_features(pixel_values),
            "without": lambda: model.get_image_features(pixel_values, output_hidden_states=True),
        },
        "prefix tokens are dropped before the projector": {
            "with": lambda: projector.project(states[:, 1:]),
            "without": lambda: projector.project(states)[:, 1:],
        },
        "pooling is before the MLP": {
            "with": lambda: projector.project(pool_patch_grid(patches, PATCH_GRID, POOLED_GRID)),
            "without": lambda: pool_patch_grid(projector.project(patches), PATCH_GRID, POOLED_GRID),
        },
        "the MLP's input is contiguous": {
            "with": lambda: projector.project(pooled),
            "without": lambda: projector.project(channels_first),
        },
        "images with equal grids are pooled in one call": {
            "with": lambda: by_grid(0, len(grids)),
            "without": lambda: [by_grid(index, index + 1) for index in range(len(grids))],
        },
    }
    report = {
        "command": command(),
        "vision_layers": vision_layers,
        "num_images": num_images,
        "savings": {},
    }
    for name, runs in savings.items():
        row = report["savings"][name] = compare(runs, repeats, device)
        typer.echo(
            f"{name:50} {row['without']['seconds']['median']:8.4f} s -> {row['with']['seconds']['median']:8.4f} s"
            f"  {row['without']['peak_bytes'] / 2**20:7.1f} MiB -> {row['with']['peak_bytes'] / 2**20:7.1f} MiB"
        )
    first = report["savings"]["layers above the feature layer are not run"]
    for name, part in (("with", tower), ("without", whole)):
        first[name]["stored_bytes"] = sum(parameter.nbytes for parameter in part.parameters())
    rest = report["forward"] = rest_of_forward(model, pixel_values, repeats, device)
    for name, times in rest["seconds"].items():
        typer.echo(f"{name:50} {times['median']:8.4f} s")
    typer.echo(f"operators outside the parts: {rest['operators_outside']}")
    report["environment"] = environment(device)
    write_report(report, out / "unused_work.json")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
