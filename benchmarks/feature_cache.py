# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Stage 1 with and without cached features: seconds per step, the time to write the cache, and its size.

    python benchmarks/feature_cache.py                  # CLIP ViT-L/14-336 before a 0.5B decoder
    python benchmarks/feature_cache.py --shape 7b       # with CUDA

Random weights of published shapes, JPEGs of 640 x 480, `recipes/configs/stage1.yaml`: in float32 on a CPU, in bfloat16
on CUDA. The steps of the two trainers are interleaved in one process. A step makes the batch and runs forward,
backward and the optimizer, without workers, so that decoding and preprocessing count. The cache has three grids, from
one pass of the tower. The last line is the result as JSON, which is also written to results/feature_cache.json.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from shapes import RESULTS, TEXT_CONFIGS, save_random_checkpoint
from trl import ModelConfig, TrlParser

from modeling_deco.training import (
    CacheArguments,
    DecoArguments,
    DecoSFTConfig,
    DecoSFTTrainer,
    build_data,
    load_data,
)
from modeling_deco.training.feature_cache import feature_shape, grid_name, grids_of_run
from modeling_deco.training.feature_cache_writer import UniqueImages, prepare_cache, write_shards
from modeling_deco.training.models import load_model_and_processor
from modeling_deco.utils.measure import command, environment, seconds, spread, time_interleaved, write_report

ROOT = Path(__file__).parents[1]
NUM_IMAGES, LLAVA_IMAGES = 8, 558_128  # the second is LLaVA-1.5's stage 1


def save_data(folder: Path) -> Path:
    """Write captions about as long as LLaVA's, and noise that takes a JPEG decoder as long as photographs."""
    (folder / "images").mkdir(parents=True)
    rng, records = np.random.default_rng(0), []
    for index in range(NUM_IMAGES):
        blocks = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = np.asarray(blocks, dtype=np.int16) + rng.normal(0, 8, (480, 640, 3)).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{index}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "the red 3 is left of the blue 7. " * 2},
        ]
        records.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(records))
    build_data(folder / "captions.json", images=folder / "images", out=folder / "data", num_proc=1)
    return folder / "data"


def parse(model: Path, data: Path, batch_size: int, **kwargs):
    settings = {
        "config": ROOT / "recipes" / "configs" / "stage1.yaml",
        "model_name_or_path": model,
        "data_path": data,
        "output_dir": data / "unused",
        "per_device_train_batch_size": batch_size,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "report_to": "none",
        "disable_tqdm": True,
    } | kwargs
    if not torch.cuda.is_available():
        settings |= {"use_cpu": True, "bf16": False, "dtype": "float32"}
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments))
    return parser.parse_args_and_config(words)


def steps(trainer: DecoSFTTrainer) -> Iterator[None]:
    """Take a training step at each `next`."""
    optimizer = trainer.create_optimizer()
    trainer.model.train()
    # Trainer's own loop sets it
    trainer.current_gradient_accumulation_steps = 1  # private, seen in transformers 5.19 to 5.24
    while True:
        for batch in trainer.get_train_dataloader():
            trainer.training_step(trainer.model, batch)
            optimizer.step()
            optimizer.zero_grad()
            yield


def main(
    shape: Annotated[str, typer.Option(help=f"Of tiny, {', '.join(TEXT_CONFIGS)}.")] = "0.5b",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 2 on a CPU, 8 on CUDA.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each, after one that warms up.")] = 5,
    grids: Annotated[list[int], typer.Option("--grid", help="Grids that are cached; the run uses 12.")] = [6, 12, 24],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder for feature_cache.json.")] = RESULTS,
) -> None:
    """Stage 1 with and without cached features."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = batch_size or (8 if device == "cuda" else 2)
    with tempfile.TemporaryDirectory() as work:
        model, data, folder = Path(work, "model"), save_data(Path(work)), Path(work, "features")
        save_random_checkpoint(model, shape, torch.bfloat16)
        args, training_args, model_args, cache_args = parse(
            model, data, batch_size, feature_cache=folder, pooled_grid_sizes=grids
        )
        deco, processor = load_model_and_processor(args, model_args)
        images = UniqueImages(load_data(args.data_path))
        names = grids_of_run(deco, processor, training_args, evaluates=False)
        cache, missing = prepare_cache(deco, processor, images, training_args, names, cache_args)
        write_seconds = seconds(lambda: write_shards(cache, missing, deco, processor, images, training_args), device)
        trainers = {}
        for name, settings in (("images", {}), ("features", {"feature_cache": folder})):
            args, training_args, model_args, _ = parse(model, data, batch_size, **settings)
            deco, processor = load_model_and_processor(args, model_args)
            trainers[name] = DecoSFTTrainer(
                model=deco,
                args=training_args,
                train_dataset=load_data(args.data_path),
                processing_class=processor,
            )
        iterators = {name: steps(trainer) for name, trainer in trainers.items()}
        times = time_interleaved({name: lambda name=name: next(iterators[name]) for name in trainers}, repeats, device)
        collate = time_interleaved(
            {
                name: lambda trainer=trainer: trainer.data_collator(
                    [trainer.train_dataset[row] for row in range(batch_size)]
                )
                for name, trainer in trainers.items()
            },
            max(repeats, 10),
        )
        cached_bytes = sum(path.stat().st_size for path in folder.iterdir())
    per_step = {name: spread(values) for name, values in times.items()}
    write_per_image = write_seconds / NUM_IMAGES
    saved_per_image = (per_step["images"]["median"] - per_step["features"]["median"]) / batch_size
    bytes_per_image = {grid_name(grid): 2 * math.prod(feature_shape(cache.config, grid_name(grid))) for grid in grids}
    report = {
        "command": command(),
        "shape": shape,
        "batch_size": batch_size,
        "pooled_grid_size": 12,
        "seconds_per_step": per_step,
        "steps_per_second": {name: float(f"{1 / row['median']:.4g}") for name, row in per_step.items()},
        "speed_up": spread([before / after for before, after in zip(times["images"], times["features"], strict=True)]),
        "seconds_per_batch_made": {name: spread(values) for name, values in collate.items()},
        "making_the_cache": {
            "grids": list(bytes_per_image),
            "seconds_per_image": float(f"{write_per_image:.4g}"),
            "passes_over_the_data_that_pay_for_it": round(write_per_image / saved_per_image, 2),
        },
        "bytes_per_image_in_16_bit": bytes_per_image,
        "gigabytes_of_llavas_558128_images": {
            name: round(b * LLAVA_IMAGES / 1e9, 1) for name, b in bytes_per_image.items()
        },
        "bytes_on_disk_per_image": round(cached_bytes / NUM_IMAGES),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "environment": environment(device, "trl", "safetensors"),
    }
    typer.echo(
        f"{shape}, batch {batch_size}: {per_step['images']['median']:.3g} s per step on images, "
        f"{per_step['features']['median']:.3g} s on features: {report['speed_up']['median']:.2f} times as fast\n"
        f"writing the cache: {write_per_image:.3g} s per image, for grids {', '.join(bytes_per_image)}"
    )
    write_report(report, out / "feature_cache.json")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
