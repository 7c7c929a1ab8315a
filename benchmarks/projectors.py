# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters and time of each projector at LLaVA-1.5's sizes: CLIP ViT-L/14-336 to a 7B model, 576 patches to 144.

    python benchmarks/projectors.py

Times are medians of forward, and of forward and backward, over a batch of images in one process, as ratios to average
pooling's. No compression makes 576 tokens, and what that costs is in the language model. Prints a table and ends with
one line of JSON, which is also written to results/projectors.json.
"""

import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import transformers
import typer

from modeling_deco import DecoConfig
from modeling_deco.modeling_deco import build_projector

RESULTS = Path(__file__).with_name("results")
PROJECTORS = ("mlp", "avg_pool", "qformer", "resampler", "c_abstractor", "d_abstractor")


def seconds(step, repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])  # the first warms up


def measure(projector_type: str, num_images: int, repeats: int, device: str) -> dict[str, float]:
    config = DecoConfig(projector_type=projector_type, pooled_grid_size=24 if projector_type == "mlp" else 12)
    torch.manual_seed(0)
    projector = build_projector(config).to(device)
    patch_features = torch.randn(num_images, 576, config.vision_config.hidden_size, device=device)

    def forward():
        with torch.no_grad():
            projector(patch_features, (24, 24))

    def forward_and_backward():
        projector(patch_features, (24, 24)).sum().backward()
        projector.zero_grad()

    return {
        "parameters": sum(parameter.numel() for parameter in projector.parameters()),
        "tokens": config.num_image_tokens,
        "forward_seconds": seconds(forward, repeats, device),
        "forward_backward_seconds": seconds(forward_and_backward, repeats, device),
    }


def main(
    num_images: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes; the median counts.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for projectors.json.")] = RESULTS,
) -> None:
    """Parameters and time of the projectors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = {name: measure(name, num_images, repeats, device) for name in PROJECTORS}
    unit = measured["avg_pool"]
    typer.echo(f"{'':14}{'parameters':>14}{'tokens':>8}{'forward':>10}{'and backward':>14}")
    for name, row in measured.items():
        row["forward_ratio"] = round(row["forward_seconds"] / unit["forward_seconds"], 2)
        row["forward_backward_ratio"] = round(row["forward_backward_seconds"] / unit["forward_backward_seconds"], 2)
        typer.echo(
            f"{name:14}{row['parameters']:14,}{row['tokens']:8}{row['forward_ratio']:10.1f}"
            f"{row['forward_backward_ratio']:14.1f}"
        )
    report = {
        "command": "python benchmarks/projectors.py",
        "num_images": num_images,
        "projectors": measured,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "projectors.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
