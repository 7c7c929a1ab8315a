# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The cost of an answer: DeCo at several grids, transformers' LLaVA with the same weights, and the limit of both.

    python benchmarks/inference.py --shape 0.5b --variant default --variant int8
    python benchmarks/inference.py --shape next --shape onevision --variant default --num-layers 2
    python benchmarks/inference.py --shape lite0 --cpu-time

Weights are random and are created on the device. LLaVA and DeCo share their tensors; LLaVA-1.5 and LLaVA-NeXT have one
more vision layer, which they compute and do not use. All variants are timed in rounds in one process, after a warm-up.
A time is the median over rounds, with quartiles, and a ratio is the median over rounds of the ratio.

No LLaVA has the convolutional tower of the shape `lite0`: there DeCo at the full grid stands in its place.

The shapes `next` and `onevision` cut a picture into views: an overview and 2 x 2 or 3 x 3 tiles.

The limit is the cost that every model of this kind has: the used layers of the vision tower alone, on all views, and
the language model alone on as many embeddings. Prefill is one forward pass from pixels to the logits of the last
position. The time to the first token is measured in `generate`. Peak memory is the weights and the most that a prefill
holds besides them.

The results are written to results/inference.json and .png after each shape and batch size, and the last line of the
output is the same JSON.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from shapes import (
    NUM_TEXT_TOKENS,
    PICTURES,
    RESULTS,
    TEXT_CONFIGS,
    TensorBytes,
    TokenTimes,
    build_config,
    build_lite0_config,
    build_views_config,
)
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, CompileConfig, LlavaConfig, PreTrainedModel

from modeling_deco import SHIPPED_CHECKPOINT, DecoConfig, DecoForConditionalGeneration
from modeling_deco.inference.costs import format_size
from modeling_deco.inference.quantization import Int8Linear, quantize_to_int8
from modeling_deco.modeling_deco import CACHE_NAME
from modeling_deco.utils.measure import command, environment, spread, synchronize, time_interleaved, write_report
from modeling_deco.views import num_map_tokens, num_map_views

SHAPES = ("digits", *TEXT_CONFIGS, "lite0", *PICTURES)
VARIANTS = ("default", "int8", "compiled")


def build(shape: str, num_layers: int | None = None) -> tuple[DecoForConditionalGeneration, PreTrainedModel]:
    """DeCo and transformers' LLaVA with the same random tensors, on the default device and in the default dtype.

    Args:
        num_layers: number of layers of tower and language model that are used. Default: all. A convolutional tower
            has all of its layers.
    """
    if shape == "lite0":
        deco = DecoForConditionalGeneration(build_lite0_config(num_layers))
        side = deco.config.vision_config.image_size
        deco.model.vision_tower.train()  # statistics with which activations are neither tiny nor large
        deco.model.vision_tower(torch.randn(2, 3, side, side))
        deco.eval()
        return deco, at_grid(deco, deco.config.patch_grid[0])
    if shape in PICTURES:
        llava_config = build_views_config(shape, num_layers)
        config = DecoConfig(
            vision_config=llava_config.vision_config,
            text_config=llava_config.text_config,
            image_token_id=llava_config.image_token_id,
            vision_feature_layer=llava_config.vision_feature_layer,
            image_grid_pinpoints=llava_config.image_grid_pinpoints,
            image_newline=True,
            vision_aspect_ratio=getattr(llava_config, "vision_aspect_ratio", "anyres"),
        )
    else:
        digits = AutoConfig.from_pretrained(SHIPPED_CHECKPOINT, trust_remote_code=False)
        config = digits if shape == "digits" else build_config(shape, num_layers)
        vision_config = config.vision_config.to_dict()
        vision_config["num_hidden_layers"] += 1
        llava_config = LlavaConfig(
            vision_config=vision_config,
            text_config=config.text_config,
            image_token_id=config.image_token_id,
            vision_feature_layer=-2,
        )
    torch.manual_seed(0)
    llava = AutoModelForImageTextToText.from_config(llava_config, trust_remote_code=False).eval()
    deco = DecoForConditionalGeneration(config).eval()
    missing, _ = deco.load_state_dict(llava.state_dict(), strict=False, assign=True)
    assert not missing, missing
    deco.tie_weights()
    return deco, llava


def build_inputs(deco: DecoForConditionalGeneration, batch_size: int, picture: tuple[int, int] | None = None) -> dict:
    """Random pixels, and a prompt of placeholders and random words.

    Args:
        deco: the model that the placeholders are for, at its config's grid.
        picture: height and width of a picture that is cut into views. Default: an image is one view.
    """
    device, dtype, config = deco.device, deco.dtype, deco.config
    image_sizes = None if picture is None else torch.tensor([picture] * batch_size, device=device)
    image_maps = deco.model.image_maps(image_sizes=image_sizes)
    num_views = () if picture is None else (num_map_views(image_maps[0]),)
    text = torch.randint(3, config.text_config.vocab_size, (batch_size, NUM_TEXT_TOKENS), device=device)
    text[text == config.image_token_id] = 3
    image = torch.full((batch_size, num_map_tokens(image_maps[0])), config.image_token_id, device=device)
    input_ids = torch.cat([image, text], dim=1)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch_size, *num_views, 3, *config.view_size, device=device, dtype=dtype),
    }
    return inputs if picture is None else {**inputs, "image_sizes": image_sizes}


def project(model: PreTrainedModel, patch_features: torch.Tensor, image_sizes: torch.Tensor | None) -> Callable:
    """A function that makes the image tokens of the language model from the vision tower's patches."""
    body = model.model
    if isinstance(model, DecoForConditionalGeneration):
        if image_sizes is None:
            return lambda: body.multi_modal_projector(patch_features, None, model.config.pooled_grid)
        return lambda: body.project_maps(patch_features, body.image_maps(image_sizes=image_sizes))
    if image_sizes is None:
        return lambda: body.multi_modal_projector(patch_features)
    options = {"image_newline": body.image_newline}
    if model.config.model_type == "llava_next":
        options["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    num_views = len(patch_features) // len(image_sizes)
    return lambda: body.pack_image_features(
        body.multi_modal_projector(patch_features).split(num_views), image_sizes, **options
    )


class Subject:
    """A model at one token budget, in one variant, at one batch size.

    Attributes:
        parts: the functions to time, by name.
        decode_seconds: for each call of `generate`, seconds per token after the first.
        first_token_seconds: for each call of `generate`, seconds to the first token.
    """

    def __init__(
        self,
        variant: str,
        name: str,
        model: PreTrainedModel,
        tower: nn.Module,
        inputs: dict,
        new_tokens: int,
        clock: Callable[[], float],
    ):
        """`tower` is the vision tower without an unused layer."""
        self.clock = clock
        self.variant, self.name, self.model, self.inputs, self.new_tokens = variant, name, model, inputs, new_tokens
        (batch_size, length), config = inputs["input_ids"].shape, model.config
        self.batch_size, self.length = batch_size, length
        pixels = inputs["pixel_values"].flatten(end_dim=-4)  # (num_views, 3, height, width)
        like = {"device": pixels.device, "dtype": pixels.dtype}
        if isinstance(config, DecoConfig):
            num_patches, width = math.prod(config.patch_grid), config.vision_hidden_size
        else:
            width = config.vision_config.hidden_size
            num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        patch_features = torch.randn(len(pixels), num_patches, width, **like)
        embeds = torch.randn(batch_size, length, config.text_config.hidden_size, **like)
        forward, language_model, self.generation = model, model.model.language_model, {}
        if variant == "compiled":
            mode = "reduce-overhead" if pixels.is_cuda else "default"  # CUDA graphs
            compiled = partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
            forward = compiled(forward)
            compile_config = CompileConfig(fullgraph=True, mode=mode)
            compile_config._compile_all_devices = True  # private, seen in transformers 5.19 to 5.24
            self.generation = {"cache_implementation": "static", "compile_config": compile_config}
        self.decode_seconds, self.first_token_seconds = [], []
        self.parts: dict[str, Callable] = {
            "vision_tower": lambda: tower(pixels),
            "projector": project(model, patch_features, inputs.get("image_sizes")),
            "language_model": lambda: model.lm_head(
                language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state[:, -1:]
            ),
            "prefill": lambda: forward(**inputs, use_cache=True, logits_to_keep=1),
            "generate": self.generate,
        }

    def generate(self) -> None:
        streamer = TokenTimes(self.clock)
        self.model.generate(
            **self.inputs,
            **self.generation,
            do_sample=False,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            streamer=streamer,
        )
        self.first_token_seconds.append(streamer.first_token_seconds)
        self.decode_seconds.append(streamer.seconds_per_token)

    def summarize(self, samples: dict[str, list[float]], llava: "Subject", llava_alike: "Subject") -> dict:
        """Seconds, ratios and bytes.

        Args:
            samples: for each part the seconds of every round.
            llava: transformers' LLaVA in the default variant.
            llava_alike: transformers' LLaVA in the variant of this subject.
        """
        rounds = len(samples["generate"])  # the calls before them were the warm-up
        limit = [sum(parts) for parts in zip(samples["vision_tower"], samples["language_model"], strict=True)]
        first_token = self.first_token_seconds[-rounds:]
        timed = {**samples, "first_token": first_token, "limit": limit}
        del timed["generate"]
        weights = sum(tensor.nbytes for parameter in self.model.parameters() for tensor in tensors_of(parameter))
        weights += sum(layer.nbytes for layer in self.model.modules() if isinstance(layer, Int8Linear))
        return {
            "variant": self.variant,
            "model": self.name,
            "batch_size": self.batch_size,
            "image_tokens": self.length - NUM_TEXT_TOKENS,
            "seconds": {name: spread(times) for name, times in timed.items()},
            "decode_tokens_per_second": spread([self.batch_size / s for s in self.decode_seconds[-rounds:]])["median"],
            "prefill_over_limit": median_ratio(samples["prefill"], limit),
            "first_token_speedup": median_ratio(llava.first_token_seconds[-rounds:], first_token),
            "first_token_speedup_alike": median_ratio(llava_alike.first_token_seconds[-rounds:], first_token),
            "kv_cache_bytes": sum(
                layer.keys.nbytes + layer.values.nbytes for layer in self.parts["prefill"]()[CACHE_NAME].layers
            ),
            "weights_bytes": weights,
            "peak_bytes": weights + peak_bytes(self.parts["prefill"]),
        }


def tensors_of(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The weight, or the tensors that it consists of if torchao has quantized it; its own `nbytes` would be wrong."""
    if type(parameter) is nn.Parameter:
        return [parameter]
    parts = (getattr(parameter, name) for name in parameter.__tensor_flatten__()[0])
    return [part for part in parts if part is not None]


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])["median"]


def peak_bytes(part: Callable) -> int:
    """The most bytes that `part` adds to those of existing tensors."""
    if torch.cuda.is_available():
        synchronize("cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        part()
        return torch.cuda.max_memory_allocated() - before
    with torch.compiler.set_stance("force_eager"), TensorBytes() as tensors:  # compiled code would not be counted
        part()
    return tensors.peak


def at_grid(model: DecoForConditionalGeneration, grid: int) -> DecoForConditionalGeneration:
    """A model with the same weights and another grid in its config, so that the grid is not an input."""
    shared = [model.model.vision_tower]  # a copy would not be compiled
    shared += [*model.parameters(), *model.buffers(), *(m for m in model.modules() if isinstance(m, Int8Linear))]
    model = copy.deepcopy(model, memo={id(part): part for part in shared})
    model.config.pooled_grid_size = grid
    return model


def measure(
    device: str,
    shape: str,
    num_layers: int | None,
    grids: list[int],
    variants: list[str],
    batch_size: int,
    repeats: int,
    new_tokens: int,
    clock: Callable[[], float],
) -> list[dict]:
    """Results of one shape at one batch size, in the default dtype."""
    torch.compiler.reset()  # graphs of other shapes and batch sizes count towards a limit
    with torch.device(device):  # not around compiled code, which would trace this context too
        deco, llava = build(shape, num_layers)
    (side, _), picture = deco.config.patch_grid, PICTURES.get(shape)
    if not grids:
        divisors = {"lite0": (2, 3, 4)}.get(shape, (1, 2, 3, 4))
        grids = [12, 8, 6] if shape in ("digits", *TEXT_CONFIGS) else [math.ceil(side / k) for k in divisors]
    names = {"llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision", "deco": "full grid"}
    llava_name = names.get(llava.config.model_type, "LLaVA")
    subjects = []
    pixels_of_batch = build_inputs(deco, batch_size, picture)["pixel_values"]
    for variant in [
        "default",
        *(name for name in variants if name != "default"),
    ]:  # the default LLaVA is the reference
        models = [deco, llava]
        if variant == "int8":
            models = [quantize_to_int8(copy.deepcopy(model)) for model in models]
        tower = models[0].model.vision_tower
        pooled = [at_grid(models[0], grid) for grid in grids]
        for name, model, counted in [
            (llava_name, models[1], at_grid(deco, side)),
            *(("DeCo", model, model) for model in pooled),
        ]:
            inputs = build_inputs(counted, batch_size, picture) | {"pixel_values": pixels_of_batch}
            subjects.append(Subject(variant, name, model, tower, inputs, new_tokens, clock))
    runs = {(i, part): run for i, subject in enumerate(subjects) for part, run in subject.parts.items()}
    samples = time_interleaved(runs, repeats, deco.device, clock)
    llavas = {subject.variant: subject for subject in subjects if subject.name == llava_name}
    return [
        subject.summarize(
            {part: samples[i, part] for part in subject.parts}, llavas["default"], llavas[subject.variant]
        )
        for i, subject in enumerate(subjects)
    ]


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Plot the time to the first token and its parts, for each shape and batch size."""
    height = sum(1 + 0.3 * len(rows) for rows in results.values())
    figure = Figure(figsize=(9, height), layout="constrained")
    heights = [1 + 0.3 * len(rows) for rows in results.values()]
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(panels, results.items(), strict=True):
        labels = [f"{row['model']} {row['image_tokens']}, {row['variant']}" for row in rows]
        left = [0.0] * len(rows)
        for part in ("vision_tower", "projector", "language_model"):
            widths = [row["seconds"][part]["median"] for row in rows]
            axes.barh(labels, widths, left=left, label=part.replace("_", " "))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        first = [row["seconds"]["first_token"]["median"] for row in rows]
        axes.plot(first, labels, "k|", markersize=12, label="first token, measured")
        for row, seconds in zip(rows, first, strict=True):
            label = f"  {row['first_token_speedup']:.2f}x"
            axes.annotate(label, (seconds, f"{row['model']} {row['image_tokens']}, {row['variant']}"), va="center")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(title=title, xlabel="seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)


@torch.inference_mode()
def main(
    shapes: Annotated[list[str], typer.Option("--shape", help=f"One of {', '.join(SHAPES)}.")] = ["digits", "0.5b"],  # noqa: B006
    grids: Annotated[
        list[int],
        typer.Option(
            "--grid",
            help="Sides of DeCo's grids. Default: 12, 8 and 6, or for views and lite0 1/4, 1/9 and 1/16 of the full "
            "grid, and for views that grid too.",
        ),
    ] = [],  # noqa: B006
    variants: Annotated[list[str], typer.Option("--variant", help=f"{', '.join(VARIANTS)}.")] = ["default", "int8"],  # noqa: B006
    batch_sizes: Annotated[list[int], typer.Option("--batch-size", help="Prompts with one image each.")] = [1],  # noqa: B006
    num_layers: Annotated[int | None, typer.Option(help="Layers of tower and language model. Default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=3, help="Length of the answers.")] = 9,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count CPU seconds, for one thread on a machine with other load.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the plot.")] = RESULTS,
) -> None:
    """Measure the time to the first token and its parts."""
    for name, given, known in (("shape", shapes, SHAPES), ("variant", variants, VARIANTS)):
        for value in given:
            if value not in known:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=f"--{name}")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    report = {
        "command": command(),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "num_layers": num_layers,
        "clock": "CPU" if cpu_time else "wall",
        "text_tokens": NUM_TEXT_TOKENS,
        "repeats": repeats,
        "results": {},
        "environment": environment(device, *(["torchao"] if device == "cuda" and "int8" in variants else [])),
    }
    for shape, batch_size in product(shapes, batch_sizes):
        torch.set_default_dtype(dtype)
        clock = time.process_time if cpu_time else time.perf_counter
        rows = measure(device, shape, num_layers, grids, variants, batch_size, repeats, new_tokens, clock)
        torch.set_default_dtype(torch.float32)
        report["results"][f"{shape}, batch {batch_size}"] = rows
        typer.echo(f"\n{shape}, batch {batch_size}: medians in ms")
        typer.echo(
            f"{'':24}{'vision':>9}{'project':>9}{'language':>9}{'prefill':>9}{'/limit':>8}{'token 1':>9}{'speedup':>9}"
            f"{'alike':>7}{'tokens/s':>10}{'KV':>9}{'peak':>9}"
        )
        for row in rows:
            ms = {name: 1000 * times["median"] for name, times in row["seconds"].items()}
            typer.echo(
                f"{row['model'] + ' ' + str(row['image_tokens']) + ', ' + row['variant']:24}{ms['vision_tower']:9.4g}"
                f"{ms['projector']:9.3g}{ms['language_model']:9.4g}{ms['prefill']:9.4g}"
                f"{row['prefill_over_limit']:8.3f}{ms['first_token']:9.4g}{row['first_token_speedup']:9.2f}"
                f"{row['first_token_speedup_alike']:7.2f}"
                f"{row['decode_tokens_per_second']:10.4g}{format_size(row['kv_cache_bytes']):>9}"
                f"{format_size(row['peak_bytes']):>9}"
            )
        write_report(report, out / "inference.json")
        draw(report["results"], out / "inference.png")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
