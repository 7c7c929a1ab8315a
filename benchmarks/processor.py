# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Images per second of DecoProcessor and of transformers' LlavaProcessor, with the same image processor and tokenizer.

    python benchmarks/processor.py

DeCo makes 144 placeholders per image ("deco"), or 576 as LLaVA does ("deco-576"). All processors are timed in rounds
in one process, for each kind of input: pictures in memory, small (640 x 480) and large (4000 x 3000) JPEG files by
path, a batch of texts with padding, and one text with many images. `ratio` is the median over rounds of DeCo's speed
divided by LLaVA's. The backends of the image processor are transformers' "pil" and, if it is installed, "torchvision".
The results are written to results/processor.json, and the last line of the output is the same JSON.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from shapes import RESULTS
from transformers import AutoImageProcessor, LlavaProcessor
from transformers.utils import is_torchvision_available

from modeling_deco import DecoProcessor
from modeling_deco.utils.measure import command, environment, spread, time_interleaved, write_report
from modeling_deco.worlds.digits.tokenizer import build_tokenizer

SIDE, PATCH_SIZE = 336, 14  # CLIP ViT-L/14-336
QUESTION = "What is this?"


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A smooth picture: noise would make a JPEG several times larger than a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def build_inputs(folder: Path, num_images: int, large: tuple[int, int]) -> dict[str, dict]:
    """Arguments of a processor by kind of input."""
    pictures = [picture(seed, 640, 480) for seed in range(num_images)]
    small, big = [], []
    for seed, image in enumerate(pictures):
        image.save(folder / f"small-{seed}.jpg", quality=90)
        small.append(str(folder / f"small-{seed}.jpg"))
    for seed in range(max(1, num_images // 4)):
        picture(seed, *large).save(folder / f"large-{seed}.jpg", quality=90)
        big.append(str(folder / f"large-{seed}.jpg"))
    texts = [f"<image> {QUESTION}" * (1 + index % 2) for index in range(num_images)]
    by_text = [pictures[: text.count("<image>")] for text in texts]
    return {
        "one picture in memory": {"images": pictures[0], "text": f"<image> {QUESTION}"},
        "pictures in memory": {"images": pictures, "text": [f"<image> {QUESTION}"] * num_images},
        "small JPEG files": {"images": small, "text": [f"<image> {QUESTION}"] * len(small)},
        "large JPEG files": {"images": big, "text": [f"<image> {QUESTION}"] * len(big)},
        "batch with padding": {"images": by_text, "text": texts, "padding": True},
        "one text, many pictures": {"images": pictures * 4, "text": "<image>" * 4 * num_images + QUESTION},
    }


def count(images) -> int:
    return sum(map(count, images)) if isinstance(images, list) else 1


def measure(backend: str, inputs: dict[str, dict], repeats: int) -> dict[str, dict]:
    """Speeds by kind of input and processor."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": SIDE}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(config))
        image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend, trust_remote_code=False)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 10**6  # avoids a warning
    llava = LlavaProcessor(image_processor, tokenizer, PATCH_SIZE, "default", num_additional_image_tokens=1)
    processors = {
        "llava": llava,
        "deco": DecoProcessor(image_processor, tokenizer, 12, patch_size=PATCH_SIZE),
        "deco-576": DecoProcessor(image_processor, tokenizer, 24, patch_size=PATCH_SIZE),
    }
    rows = {}
    for kind, arguments in inputs.items():
        runs = {
            name: lambda processor=processor: processor(**arguments, return_tensors="pt")  # noqa: B023  called below
            for name, processor in processors.items()
        }
        same = runs["llava"](), runs["deco-576"]()
        if not all(torch.equal(same[0][name], same[1][name]) for name in ("input_ids", "pixel_values")):
            raise AssertionError(f"{kind}: DeCo's inputs at LLaVA's grid differ from LLaVA's.")
        times, num_images = time_interleaved(runs, repeats), count(arguments["images"])
        rows[kind] = {"num_images": num_images}
        for name, seconds in times.items():
            ratios = [theirs / ours for theirs, ours in zip(times["llava"], seconds, strict=True)]
            per_second = spread([num_images / value for value in seconds])
            rows[kind][name] = {"images_per_second": per_second, "ratio": spread(ratios)}
        typer.echo(
            f"{backend:12}{kind:26}"
            + "".join(f"{name}: {rows[kind][name]['images_per_second']['median']:7.1f}/s   " for name in processors)
            + f"ratio {rows[kind]['deco']['ratio']['median']:.2f}, {rows[kind]['deco-576']['ratio']['median']:.2f}"
        )
    return rows


def main(
    num_images: Annotated[int, typer.Option(min=2, help="Images in a batch; a quarter of it for large images.")] = 8,
    large: Annotated[tuple[int, int], typer.Option(help="Width and height of the large pictures.")] = (4000, 3000),
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for processor.json.")] = RESULTS,
) -> None:
    """Speed of the processors."""
    report = {"command": command(), "backends": {}, "environment": environment("cpu", "pillow")}
    with tempfile.TemporaryDirectory() as folder:
        inputs = build_inputs(Path(folder), num_images, large)
        for backend in ("pil", "torchvision"):
            if backend == "torchvision" and not is_torchvision_available():
                report["backends"][backend] = "not run: torchvision is not installed"
            else:
                report["backends"][backend] = measure(backend, inputs, repeats)
    write_report(report, out / "processor.json")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
