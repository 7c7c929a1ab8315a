# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Images per second and peak memory of training steps: DeCo, LLaVA's 576 tokens, and the compared projectors.

    python benchmarks/training.py        # the shape for CPUs; with CUDA 0.5b, 1.5b and 7b
    python benchmarks/training.py --shape 1.5b --projector avg_pool-144 --projector mlp-576

Every run does what `recipes/sft.py` does with the stage's YAML, except for the batch size, the number of steps and the
saving, on random weights of real widths. Pictures and questions are the digits world's, resized to the tower's 336
pixels. Stage 1 is measured with each projector, the other stages with average pooling and with no compression, which
is LLaVA ("mlp-576"). Each run has its own process, and runs are interleaved. A run that fails or takes too long is
reported, and the next one begins.

The time of a step includes its data; the first two steps are left out. With CUDA, memory is PyTorch's
`max_memory_allocated`. On CPUs it is the peak resident set of the process less what the imports took; it includes the
pages of the checkpoint that was read. The shape "cpu" has the widths of CLIP ViT-L/14-336 and of Qwen2.5-0.5B in 2
layers each and the digits world's vocabulary, in float32; 0.5b to 7b have all layers, in bfloat16. Results are written
after each run, and a plot at the end; the last line is the same JSON.
"""

import json
import multiprocessing
import os
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from shapes import RESULTS, TEXT_CONFIGS, save_random_checkpoint

from modeling_deco.training.data import build_data
from modeling_deco.utils.measure import command, environment, peak_resident_bytes, spread, write_report
from modeling_deco.worlds.digits.world import write_llava_data

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
NUM_PICTURES, SECONDS_PER_RUN, WARM_UP_STEPS = 64, 180, 2

SHAPES = ("tiny", "cpu", *TEXT_CONFIGS)
ON_CPU = ("tiny", "cpu")
BATCH_SIZES = {"tiny": 2, "cpu": 2, "0.5b": 8, "1.5b": 8, "7b": 8}
# Full training of 7B needs 16 bytes per parameter, so several GPUs (accelerate_configs/fsdp2.yaml).
STAGES = {name: ["stage1", "stage2_full", "stage2_lora", "stage2_qlora"] for name in SHAPES}
STAGES["7b"].remove("stage2_full")
STAGES["cpu"].remove("stage2_qlora")

LLAVA = "mlp-576"
POOLING = ("avg_pool-64", "avg_pool-144", LLAVA)  # projector_type-tokens
PROJECTORS = (*POOLING, "qformer-144", "resampler-144", "c_abstractor-144", "d_abstractor-144")


def train(stage: str, model: Path, data: Path, output_dir: str, batch_size: int, num_steps: int) -> dict:
    """Train a few steps, as `recipes/sft.py` does."""
    from trl import ModelConfig, TrlParser

    from modeling_deco.training import DecoArguments, DecoSFTConfig, DecoSFTTrainer, load_data
    from modeling_deco.training.models import load_model_and_processor, peft_config_of

    on_gpu = torch.cuda.is_available()
    settings = {
        "config": CONFIGS / f"{stage}.yaml",
        "model_name_or_path": model,
        "data_path": data,
        "output_dir": output_dir,
        "max_steps": num_steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 4 if on_gpu else 0,
        "dataset_num_proc": 1,
    }
    if not on_gpu:
        settings |= {"use_cpu": True, "bf16": False, "dtype": "float32"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig))
    args, training_args, model_args = parser.parse_args_and_config(words)
    before = 0 if on_gpu else peak_resident_bytes()
    ends, peaks = [], []

    class MeasuredTrainer(DecoSFTTrainer):
        def training_step(self, *step_args, **kwargs):
            loss = super().training_step(*step_args, **kwargs)  # reads the loss, so it waits for the device
            ends.append(time.perf_counter())
            peaks.append(torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes() - before)
            return loss

    loaded, processor = load_model_and_processor(args, model_args)
    trainer = MeasuredTrainer(
        model=loaded,
        args=training_args,
        train_dataset=load_data(args.data_path, decode=False),
        processing_class=processor,
        peft_config=peft_config_of(model_args),
    )
    trainer.train()
    return {
        "step_seconds": [after - before for before, after in zip(ends[WARM_UP_STEPS - 1 :], ends[WARM_UP_STEPS:])],  # noqa: B905
        "peak_memory_gib": round(peaks[-1] / 2**30, 3),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "losses": [round(log["loss"], 4) for log in trainer.state.log_history if "loss" in log],
    }


def answer(sender, function) -> None:
    os.dup2(2, 1)  # stdout is for the report
    try:
        sender.send(function())
    except Exception as error:  # any error is reported, and the next run begins
        sender.send({"failed": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]})


def in_a_process(function) -> dict:
    """Call a function in a new process: its result, or `failed` with the reason."""
    # CUDA does not survive a fork; without CUDA, all runs can share one import
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["modeling_deco.training.trainer", "modeling_deco.training.models"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function))
    process.start()
    sender.close()
    if not receiver.poll(SECONDS_PER_RUN):
        process.kill()
        process.join()  # so that the GPU is free for the next run
        return {"failed": f"took more than {SECONDS_PER_RUN} s"}
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join(SECONDS_PER_RUN)
    return result or {"failed": f"the process ended with exit code {process.exitcode}"}


def add_ratios(rows: dict[str, dict]) -> None:
    """Add `over_llava` to each row, if LLaVA was measured in the same shape and stage."""
    for row in rows.values():
        llava = rows.get(f"{row['shape']} {row['stage']} {LLAVA}", {"failed": True})
        if "failed" not in row and "failed" not in llava:
            row["over_llava"] = {
                "speed": round(row["images_per_second"]["median"] / llava["images_per_second"]["median"], 2),
                "memory": round(row["peak_memory_gib"] / llava["peak_memory_gib"], 2),
            }


def draw(rows: dict[str, dict], path: Path) -> None:
    """Draw two rows of panels for each shape, speed and memory: a panel per stage, a bar per projector."""
    from matplotlib.figure import Figure

    done = [row for row in rows.values() if "failed" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in done))
    stages = list(dict.fromkeys(row["stage"] for row in done))
    figure = Figure(figsize=(4.2 * len(stages) + 0.5, 4.4 * len(shapes)), layout="constrained")
    panels = figure.subplots(2 * len(shapes), len(stages), squeeze=False)
    for place, (shape, unit) in enumerate((shape, unit) for shape in shapes for unit in ("images/s", "peak GiB")):
        for axes, stage in zip(panels[place], stages, strict=True):
            of_panel = [row for row in done if (row["shape"], row["stage"]) == (shape, stage)][::-1]
            speeds = [row["images_per_second"] for row in of_panel]
            names = [row["projector"] for row in of_panel]
            colours = {LLAVA: "tab:gray", **dict.fromkeys(POOLING[:2], "tab:blue")}
            bars = [speed["median"] for speed in speeds]
            errors = [[speed["median"] - speed["low"] for speed in speeds], [s["high"] - s["median"] for s in speeds]]
            if unit == "peak GiB":
                bars, errors = [row["peak_memory_gib"] for row in of_panel], None
            bars = axes.barh(names, bars, xerr=errors, color=[colours.get(name, "tab:orange") for name in names])
            axes.set_yticks(names, [f"{name} (LLaVA)" if name == LLAVA else name for name in names])
            axes.bar_label(bars, fmt="%.3g", padding=4)
            axes.margins(x=0.25)
            axes.set(title=f"{shape}, {stage}", xlabel=unit)
    figure.savefig(path, dpi=110)


def main(
    shapes: Annotated[list[str] | None, typer.Option("--shape", help=f"Of {', '.join(SHAPES)}.")] = None,
    projectors: Annotated[list[str], typer.Option("--projector", help=f"Of {', '.join(PROJECTORS)}.")] = list(  # noqa: B006
        PROJECTORS
    ),
    num_steps: Annotated[int, typer.Option(min=4, help="Steps of each run; the first two are not timed.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each projector in each stage.")] = 2,
    out: Annotated[Path, typer.Option(help="The JSON file; the plot goes beside it.")] = RESULTS / "training.json",
) -> None:
    """Speed and memory of training."""
    on_gpu = torch.cuda.is_available()
    shapes = shapes or (["0.5b", "1.5b", "7b"] if on_gpu else ["cpu"])
    for option, given, known in (("--shape", shapes, SHAPES), ("--projector", projectors, PROJECTORS)):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint=option)
    for shape in shapes:
        if not on_gpu and shape not in ON_CPU:
            typer.echo(f"not run: {shape}, {', '.join(STAGES[shape])}: this machine has no CUDA device", err=True)
    if not on_gpu and not set(shapes) <= set(ON_CPU):
        raise typer.Exit(1)
    rows = {}
    report = {
        "command": command(),
        "num_steps": num_steps,
        "repeats": repeats,
        "rows": rows,
        "environment": environment("cuda" if on_gpu else "cpu", "trl", "peft"),
    }
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        records = write_llava_data(folder / "llava", "train", NUM_PICTURES, seed=0, min_digits=1)
        build_data(records, images=folder / "llava" / "images", out=folder / "data")
        for shape in shapes:
            with tempfile.TemporaryDirectory(dir=folder) as checkpoints:
                for projector in projectors:
                    dtype = torch.float32 if shape in ON_CPU else torch.bfloat16
                    sizes = {"shape": "0.5b", "num_layers": 2} if shape == "cpu" else {"shape": shape}
                    save_random_checkpoint(Path(checkpoints, projector), dtype=dtype, projector=projector, **sizes)
                if on_gpu:
                    torch.cuda.empty_cache()
                planned = [(stage, name) for stage in STAGES[shape] for name in projectors]
                planned = [(stage, name) for stage, name in planned if stage == "stage1" or name in POOLING]
                for repeat in range(repeats):
                    for stage, projector in planned:
                        name = f"{shape} {stage} {projector}"
                        model, batch_size = Path(checkpoints, projector), BATCH_SIZES[shape]
                        output_dir = folder / f"{name}-{repeat}"
                        run = partial(train, stage, model, folder / "data", str(output_dir), batch_size, num_steps)
                        row = rows.setdefault(name, {"shape": shape, "stage": stage, "projector": projector})
                        if "failed" in row:
                            continue
                        result = in_a_process(run)
                        if "failed" not in result:
                            result["step_seconds"] = row.get("step_seconds", []) + result["step_seconds"]
                            result["images_per_second"] = spread([batch_size / s for s in result["step_seconds"]])
                        row |= {"batch_size": batch_size, **result}
                        shown = row.get("failed") or f"{row['images_per_second']['median']:.2f} images/s"
                        typer.echo(f"{name}: {shown}, {row.get('peak_memory_gib')} GiB", err=True)
                        add_ratios(rows)
                        write_report(report, out)
    if any("failed" not in row for row in rows.values()):
        draw(rows, out.with_suffix(".png"))
    typer.echo(json.dumps(report))
    failed = [name for name, row in rows.items() if "failed" in row]
    if failed:
        typer.echo(f"not run to the end: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
