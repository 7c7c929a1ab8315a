# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How the cost of an answer grows with tokens per image, images per prompt, and prompts per batch.

    python benchmarks/scaling.py

The model is CLIP ViT-L/14-336 with a 0.5B or 7B decoder and random weights. `--layers` sets the number of layers of
both, because the time of a layer is what grows. Vision tower and language model are timed separately, in rounds; times
are medians. PyTorch counts the floating-point operations of each, so operations per second can be compared along a
curve. docs/scaling.md discusses the results.

The results are written to results/scaling.json and .png, and the last line of the output is the same JSON.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from shapes import NUM_TEXT_TOKENS, RESULTS, TEXT_CONFIGS, build_config
from torch.utils.flop_counter import FlopCounterMode

from modeling_deco import DecoForConditionalGeneration, num_image_tokens
from modeling_deco.inference.costs import kv_cache_bytes
from modeling_deco.modeling_deco import CACHE_NAME
from modeling_deco.utils.measure import command, environment, spread, time_interleaved, write_report

GRIDS, NUMBERS = (1, 2, 4, 6, 8, 12, 16, 20, 24), (1, 2, 4, 8)
GRID = 12  # of the other two curves


def decode(model, cache_length: int, batch_size: int):
    """One step of decoding after `cache_length` tokens. It restores the cache."""
    hidden_size = model.config.text_config.hidden_size
    language_model = model.model.language_model
    prompt = torch.randn(batch_size, cache_length, hidden_size, dtype=model.dtype, device=model.device)
    cache = language_model(inputs_embeds=prompt, use_cache=True)[CACHE_NAME]

    def step():
        states = language_model(inputs_embeds=prompt[:, :1], **{CACHE_NAME: cache}).last_hidden_state
        model.lm_head(states)
        cache.crop(-1)

    return step


def count_flops(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def measure(model, points: list[dict], repeats: int) -> list[dict]:
    """Each point with the seconds and operations of its parts."""
    side, text_config = model.config.vision_config.image_size, model.config.text_config
    runs, flops = {}, {}
    for i, point in enumerate(points):
        num_images = point["batch_size"] * point["images_per_prompt"]
        length = NUM_TEXT_TOKENS + point["images_per_prompt"] * point["image_tokens"]
        like = {"dtype": model.dtype, "device": model.device}
        pixels = torch.randn(num_images, 3, side, side, **like)
        embeds = torch.randn(point["batch_size"], length, text_config.hidden_size, **like)
        parts = {
            "vision_tower": partial(model.model.vision_tower, pixels),
            "language_model": partial(model.model.language_model, inputs_embeds=embeds, use_cache=True),
            "decode": decode(model, length, point["batch_size"]),
        }
        runs |= {(i, name): run for name, run in parts.items()}
        flops[i] = {name: count_flops(parts[name]) for name in ("vision_tower", "language_model")}
        point["kv_cache_bytes"] = point["batch_size"] * kv_cache_bytes(text_config, length, model.dtype)
    seconds = {name: spread(rounds) for name, rounds in time_interleaved(runs, repeats, model.device).items()}
    rows = []
    for i, point in enumerate(points):
        timed = {name: times for (j, name), times in seconds.items() if i == j}
        rate = {name: float(f"{work / timed[name]['median']:.4g}") for name, work in flops[i].items()}
        rows.append({**point, "seconds": timed, "flops": flops[i], "flops_per_second": rate})
    return rows


def work_at_7b() -> dict[str, dict]:
    """Operations of a 7B model for one request with one image, by tokens per image, counted without computing it."""
    model = DecoForConditionalGeneration(build_config("7b")).eval()
    config, rows = model.config, {}
    tower = count_flops(lambda: model.model.vision_tower(torch.empty(1, 3, 336, 336)))
    for image_tokens in (16, 64, 144, 576):
        length = NUM_TEXT_TOKENS + image_tokens
        embeds = torch.empty(1, length, config.text_config.hidden_size)
        prefill = count_flops(lambda: model.model.language_model(inputs_embeds=embeds, use_cache=True))  # noqa: B023
        rows[str(image_tokens)] = {
            "vision_tower_flops": tower,
            "language_model_flops": prefill,
            "kv_cache_bytes": kv_cache_bytes(config.text_config, length, torch.bfloat16),
        }
    parameters = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    return {"language_model_parameters": parameters, "image_tokens": rows}


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        values = [row[name] for row in rows]
        for part in ("vision_tower", "language_model", "decode"):
            times = [row["seconds"][part] for row in rows]
            label = {"decode": "one more token"}.get(part, part.replace("_", " "))
            (line,) = axes.plot(values, [time["median"] for time in times], "o-", markersize=4, label=label)
            lows, highs = ([time[end] for time in times] for end in ("low", "high"))
            axes.fill_between(values, lows, highs, color=line.get_color(), alpha=0.2)
        axes.set(xlabel=name.replace("_", " "), ylabel="seconds", ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


@torch.inference_mode()
def main(
    shape: Annotated[str, typer.Option(help=f"One of tiny, {', '.join(TEXT_CONFIGS)}.")] = "0.5b",
    num_layers: Annotated[
        int, typer.Option("--layers", min=0, help="Number of layers of tower and decoder; 0: all.")
    ] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the plot.")] = RESULTS,
) -> None:
    """Curves of seconds against tokens per image, images per prompt, and batch size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = DecoForConditionalGeneration(build_config(shape, num_layers or None)).eval()
    point = {"image_tokens": num_image_tokens(GRID), "images_per_prompt": 1, "batch_size": 1}
    sizes = {"image_tokens": [num_image_tokens(grid) for grid in GRIDS]}
    sizes |= {"images_per_prompt": NUMBERS, "batch_size": NUMBERS}
    points = [(name, {**point, name: value}) for name, values in sizes.items() for value in values]
    rows = measure(model, [point for _, point in points], repeats)
    curves = {name: [row for (of, _), row in zip(points, rows, strict=True) if of == name] for name in sizes}
    for name, of_curve in curves.items():
        typer.echo(f"\n{name:18}{'vision ms':>12}{'language ms':>12}{'decode ms':>12}{'GFLOP/s':>16}")
        for row in of_curve:
            ms = {part: 1000 * times["median"] for part, times in row["seconds"].items()}
            rates = "".join(f"{rate / 1e9:8.4g}" for rate in row["flops_per_second"].values())
            typer.echo(
                f"{row[name]:<18}{ms['vision_tower']:12.4g}{ms['language_model']:12.4g}{ms['decode']:12.4g}{rates}"
            )
    with torch.device("meta"):
        counted = work_at_7b()
    report = {
        "command": command(),
        "shape": shape,
        "layers": num_layers,
        "text_tokens": NUM_TEXT_TOKENS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "repeats": repeats,
        "curves": curves,
        "work_at_7b": counted,
        "environment": environment(device),
    }
    write_report(report, out / "scaling.json")
    draw(curves, out / "scaling.png")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
