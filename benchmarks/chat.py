# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Time to the first token by turn of a conversation about one image, with and without `PromptCache`.

    python benchmarks/chat.py

CLIP ViT-L/14-336, 144 tokens per image and a decoder of Qwen2.5-0.5B's shape, random weights, fewer layers than theirs
unless `--full` is given. Each turn is asked both ways, one after the other in one process; times are medians over
conversations, after one that warms up. Answers are of fixed length and must be the same token by token (in float32).
Prints a table and ends with one line of JSON, which is also written to results/chat.json.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from transformers.generation.streamers import BaseStreamer

from modeling_deco import DecoConfig, DecoForConditionalGeneration
from modeling_deco.prompt_cache import PromptCache
from modeling_deco.recipes.measure import environment, write_report

RESULTS = Path(__file__).with_name("results")
IMAGE_TOKEN_ID = 151_935
QUESTION_TOKENS = 24


class FirstToken(BaseStreamer):
    """Notes when the first token of an answer is there; what is put before is the prompt."""

    def __init__(self):
        self.began = time.perf_counter()
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter() - self.began)

    def end(self):
        pass

    @property
    def seconds(self) -> float:
        return self.times[1]


def build(vision_layers: int, text_layers: int, device: str) -> DecoForConditionalGeneration:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": text_layers,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    config = DecoConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN_ID, vision_feature_layer=-1, dtype="float32"
    )
    torch.manual_seed(0)
    with torch.device(device):
        return DecoForConditionalGeneration(config).eval()


def converse(model, prompts: PromptCache, turns: int, answer_tokens: int, seed: int) -> list[tuple[float, float]]:
    """Seconds to the first token at each turn, without and with the cache."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(1, 3, 336, 336, generator=generator).to(model.device)
    token_ids = torch.full((1, model.config.num_image_tokens), IMAGE_TOKEN_ID)
    seconds = []
    for _ in range(turns):
        question = torch.randint(0, IMAGE_TOKEN_ID, (1, QUESTION_TOKENS), generator=generator)
        token_ids = torch.cat([token_ids, question], dim=1)
        answers, both = [], []
        for generate in (model.generate, prompts.generate):
            streamer = FirstToken()
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
            both.append(streamer.seconds)
        if not torch.equal(*answers):
            raise RuntimeError("The answer with the cache is not the one without it.")
        token_ids = answers[0]
        seconds.append(tuple(both))
    return seconds


def main(
    turns: Annotated[int, typer.Option(min=2, help="Questions in a conversation.")] = 4,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed conversations; the median counts.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="All 23 and 24 layers, not 6 and 6.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for chat.json.")] = RESULTS,
) -> None:
    """Time to the first token, turn by turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vision_layers, text_layers = (23, 24) if full else (6, 6)
    model = build(vision_layers, text_layers, device)
    prompts = PromptCache(model)
    converse(model, prompts, 2, 2, seed=0)
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
        "command": "python benchmarks/chat.py" + (" --full" if full else ""),
        "vision_layers": vision_layers,
        "text_layers": text_layers,
        "answer_tokens": answer_tokens,
        "repeats": repeats,
        "time_to_first_token": rows,
        "environment": environment(device),
    }
    write_report(report, out / "chat.json")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
