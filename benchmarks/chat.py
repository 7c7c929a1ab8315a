# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Time to the first token by turn of a conversation about one image, with and without `PromptCache`.

    python benchmarks/chat.py

The model has CLIP ViT-L/14-336, 144 tokens per image, a decoder with the shape of Qwen2.5-0.5B, and random weights.
`--layers` sets the number of layers of both. Each turn is generated both ways, one after the other in one process.
Times are medians over conversations, after one as a warm-up. Answers have a fixed length, and both ways must give the
same tokens (in float32). The results are written to results/chat.json, and the last line of the output is the same
JSON.
"""

import json
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from shapes import RESULTS, TEXT_CONFIGS, TokenTimes, build_config

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.inference.prompt_cache import PromptCache
from modeling_deco.utils.measure import command, environment, write_report

QUESTION_TOKENS, NUM_WORDS = 24, 32_000  # the ids of words are smaller


def converse(model, prompts: PromptCache, turns: int, answer_tokens: int, seed: int) -> list[tuple[float, float]]:
    """Seconds to the first token at each turn, without and with the cache."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision_config.image_size
    pixel_values = torch.randn(1, 3, side, side, generator=generator).to(model.device)
    token_ids = torch.full((1, model.config.num_image_tokens), model.config.image_token_id)
    seconds = []
    for _ in range(turns):
        question = torch.randint(0, NUM_WORDS, (1, QUESTION_TOKENS), generator=generator)
        token_ids = torch.cat([token_ids, question], dim=1)
        answers, both = [], []
        for generate in (model.generate, prompts.generate):
            streamer = TokenTimes()
            answers.append(
                generate(
                    input_ids=token_ids.to(model.device),
                    attention_mask=torch.ones_like(token_ids).to(model.device),
                    pixel_values=pixel_values,
                    streamer=streamer,
                    do_sample=False,
                    min_new_tokens=answer_tokens,
                    max_new_tokens=answer_tokens,
                ).cpu()
            )
            both.append(streamer.first_token_seconds)
        if not torch.equal(*answers):
            raise RuntimeError("The answer with the cache differs from the answer without it.")
        token_ids = answers[0]
        seconds.append(tuple(both))
    return seconds


def main(
    turns: Annotated[int, typer.Option(min=2, help="Questions in a conversation.")] = 4,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed conversations.")] = 3,
    shape: Annotated[str, typer.Option(help=f"One of tiny, {', '.join(TEXT_CONFIGS)}.")] = "0.5b",
    num_layers: Annotated[
        int, typer.Option("--layers", min=0, help="Number of layers of tower and decoder; 0: all.")
    ] = 6,
    out: Annotated[Path, typer.Option(help="Folder for chat.json.")] = RESULTS,
) -> None:
    """Time to the first token at each turn of a conversation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = DecoForConditionalGeneration(build_config(shape, num_layers or None)).eval()
    prompts = PromptCache(model)
    converse(model, prompts, turns=2, answer_tokens=2, seed=0)
    conversations = [converse(model, prompts, turns, answer_tokens, seed) for seed in range(1, repeats + 1)]

    rows = []
    typer.echo(f"{'turn':>4}{'prompt':>8}{'without':>10}{'with':>10}{'ratio':>8}")
    for turn, pairs in enumerate(zip(*conversations, strict=True)):
        without, with_cache = (median(times) for times in zip(*pairs, strict=True))
        row = {
            "turn": turn + 1,
            "prompt_tokens": model.config.num_image_tokens + (turn + 1) * QUESTION_TOKENS + turn * answer_tokens,
            "seconds_without": round(without, 4),
            "seconds_with": round(with_cache, 4),
            "ratio": round(median(before / after for before, after in pairs), 2),
        }
        rows.append(row)
        typer.echo(f"{row['turn']:4}{row['prompt_tokens']:8}{without:9.3f}s{with_cache:9.3f}s{row['ratio']:7.1f}x")
    report = {
        "command": command(),
        "shape": shape,
        "vision_layers": model.config.vision_config.num_hidden_layers,
        "text_layers": model.config.text_config.num_hidden_layers,
        "answer_tokens": answer_tokens,
        "repeats": repeats,
        "time_to_first_token": rows,
        "environment": environment(device),
    }
    write_report(report, out / "chat.json")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
