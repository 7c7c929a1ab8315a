"""What `recipes/gpu_check.sh` runs: `recipes/sft.py` with each stage's YAML, on random weights of real shapes.

Pictures and questions are the digits world's, resized to the tower's 336 pixels. Each stage is a process of its own:
one that fails or takes too long is reported, and the others go on. Results are written after each.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import trl
import typer
from transformers import CLIPImageProcessor

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoProcessor
from modeling_deco.recipes.data import build_data
from modeling_deco.recipes.digits.tokenizer import build_tokenizer
from modeling_deco.recipes.digits.world import write_llava_data

RECIPES = Path(__file__).parent
RESULTS = RECIPES.parent / "benchmarks" / "results"
NUM_PICTURES = 64
SECONDS_PER_STAGE = 150

# Decoders' sizes: Qwen2.5-1.5B's and Llama-7B's published configurations. "tiny" is for machines without a GPU.
TEXT_CONFIGS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {"vocab_size": 32064},
}
TINY_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
# Full training of 7B keeps 16 bytes per parameter: it needs shards (accelerate_configs/fsdp2.yaml), not one GPU.
STAGES = {
    "tiny": ("stage1", "stage2_full", "stage2_lora", "stage2_qlora"),
    "1.5b": ("stage1", "stage2_full", "stage2_lora", "stage2_qlora"),
    "7b": ("stage1", "stage2_lora", "stage2_qlora"),
}
BATCH_SIZES = {"tiny": 2, "1.5b": 8, "7b": 8}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def save_random_checkpoint(shape: str, folder: Path) -> None:
    """CLIP ViT-L/14-336 (by default), a fresh projector and a decoder, in bfloat16."""
    tokenizer = build_tokenizer()
    side = 96 if shape == "tiny" else 336
    vision_config = {**TINY_VISION, "image_size": side, "patch_size": 8} if shape == "tiny" else None
    text_config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **TEXT_CONFIGS[shape]}
    config = DecoConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        DecoForConditionalGeneration(config).save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    DecoProcessor(image_processor, tokenizer).save_pretrained(folder)


@app.command(hidden=True)
def stage(model: Path, data: Path, config: str, batch_size: int, num_steps: int) -> None:
    """Train a few steps; the last line of stdout is a JSON object with the cost."""
    from modeling_deco.recipes import sft
    from modeling_deco.recipes.trainer import DecoSFTConfig

    has_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as output_dir:
        words = ["--config", str(RECIPES / "configs" / f"{config}.yaml"), "--model_name_or_path", str(model)]
        words += ["--data_path", str(data), "--output_dir", output_dir, "--max_steps", str(num_steps)]
        words += ["--per_device_train_batch_size", str(batch_size), "--gradient_accumulation_steps", "1"]
        words += ["--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
        words += ["--use_cpu", str(not has_gpu), "--dataloader_num_workers", "4" if has_gpu else "0"]
        args, training_args, model_args = trl.TrlParser(
            (sft.DecoArguments, DecoSFTConfig, trl.ModelConfig)
        ).parse_args_and_config(words)
        ends = []
        training_step = sft.DecoSFTTrainer.training_step

        def timed(self, *step_args, **kwargs):
            loss = training_step(self, *step_args, **kwargs)  # which reads the loss, and so waits for the device
            ends.append(time.perf_counter())
            return loss

        sft.DecoSFTTrainer.training_step = timed
        trainer = sft.main(args, training_args, model_args)
    seconds = (ends[-1] - ends[1]) / (len(ends) - 2)  # the first two steps warm up
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    report = {
        "seconds_per_step": round(seconds, 4),
        "samples_per_second": round(batch_size / seconds, 2),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if has_gpu else None,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "losses": [round(loss, 4) for loss in losses],
    }
    typer.echo(json.dumps(report))


@app.command()
def check(
    shapes: Annotated[list[str], typer.Option("--shape", help=f"Of {', '.join(TEXT_CONFIGS)}.")] = ["1.5b", "7b"],  # noqa: B006
    num_steps: Annotated[int, typer.Option(min=4, help="Steps of each stage; two of them warm up.")] = 6,
    out: Annotated[Path, typer.Option(help="Folder for gpu_check.json.")] = RESULTS,
) -> None:
    """Run every stage at the given shapes."""
    if not torch.cuda.is_available() and set(shapes) != {"tiny"}:
        for shape in shapes:
            typer.echo(f"not run: {shape}, {', '.join(STAGES[shape])}: this machine has no CUDA device", err=True)
        raise typer.Exit(1)
    report = {
        "command": "recipes/gpu_check.sh",
        "environment": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, transformers, trl)},
        },
        "stages": {},
    }
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        records = write_llava_data(folder / "llava", "train", NUM_PICTURES, seed=0, min_digits=1)
        build_data(records, images=folder / "llava" / "images", out=folder / "data")
        for shape in shapes:
            model = folder / shape
            save_random_checkpoint(shape, model)
            torch.cuda.empty_cache()
            for config in STAGES[shape]:
                words = [str(model), str(folder / "data"), config, str(BATCH_SIZES[shape]), str(num_steps)]
                name = f"{shape} {config}"
                try:
                    result = subprocess.run(
                        [sys.executable, __file__, "stage", *words],
                        capture_output=True,
                        text=True,
                        timeout=SECONDS_PER_STAGE,
                    )
                    failure = result.stderr.strip().splitlines()[-1:] if result.returncode else None
                    cost = {"failed": failure} if result.returncode else json.loads(result.stdout.splitlines()[-1])
                except subprocess.TimeoutExpired:
                    cost = {"failed": f"took more than {SECONDS_PER_STAGE} s"}
                report["stages"][name] = {"batch_size": BATCH_SIZES[shape], **cost}
                typer.echo(f"{name}: {json.dumps(cost)}")
                out.mkdir(parents=True, exist_ok=True)
                (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, cost in report["stages"].items() if "failed" in cost]
    typer.echo(json.dumps(report))
    if failed:
        typer.echo(f"not run to the end: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
