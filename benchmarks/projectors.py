# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters and time of each projector at LLaVA-1.5's sizes: CLIP ViT-L/14-336 to a 7B model, 576 patches to 144.

    python benchmarks/projectors.py

It times forward, and forward with backward, on a batch of images. The projectors are timed in rounds in one process;
the table has the ratios of their median times to that of average pooling. The MLP does not compress: it makes 576
tokens, whose cost is in the language model, which is not timed here. The results are written to
results/projectors.json, and the last line of the output is the same JSON.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from shapes import RESULTS

from modeling_deco import DecoConfig
from modeling_deco.modeling_deco import build_projector
from modeling_deco.utils.measure import command, environment, spread, time_interleaved, write_report

PROJECTORS = ("mlp", "avg_pool", "qformer", "resampler", "c_abstractor", "d_abstractor")


def forward(projector, patch_features):
    with torch.no_grad():
        projector(patch_features, (24, 24))


def forward_and_backward(projector, patch_features):
    projector(patch_features, (24, 24)).sum().backward()
    projector.zero_grad()


def main(
    num_images: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for projectors.json.")] = RESULTS,
) -> None:
    """Parameters and time of the projectors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured, projectors = {}, {}
    for name in PROJECTORS:
        config = DecoConfig(projector_type=name, pooled_grid_size=24 if name == "mlp" else 12)
        torch.manual_seed(0)
        projectors[name] = build_projector(config).to(device)
        parameters = sum(parameter.numel() for parameter in projectors[name].parameters())
        measured[name] = {"parameters": parameters, "tokens": config.num_image_tokens}
    patch_features = torch.randn(num_images, 576, config.vision_config.hidden_size, device=device)
    for step in (forward, forward_and_backward):
        runs = {name: partial(step, projector, patch_features) for name, projector in projectors.items()}
        times = {name: spread(rounds) for name, rounds in time_interleaved(runs, repeats, device).items()}
        for name, row in measured.items():
            row[f"{step.__name__}_seconds"] = times[name]
            row[f"{step.__name__}_ratio"] = round(times[name]["median"] / times["avg_pool"]["median"], 2)
    typer.echo(f"{'':14}{'parameters':>14}{'tokens':>8}{'forward':>10}{'and backward':>14}")
    for name, row in measured.items():
        typer.echo(
            f"{name:14}{row['parameters']:14,}{row['tokens']:8}{row['forward_ratio']:10.1f}"
            f"{row['forward_and_backward_ratio']:14.1f}"
        )
    report = {
        "command": command(),
        "num_images": num_images,
        "projectors": measured,
        "environment": environment(device),
    }
    write_report(report, out / "projectors.json")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
