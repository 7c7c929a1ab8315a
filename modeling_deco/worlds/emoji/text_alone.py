# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What training on pictures has done to the language model without a picture.

    python -m modeling_deco.worlds.emoji.text_alone --model DIR [--text FILE]

prints one JSON object: the perplexity of the package's README for the language model of DIR and for SmolLM2 as it is
installed, and the greedy answers of both to ten plain questions, in the same chat template.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from ...inference.loading import load
from ...inference.smollm2 import smollm2_folder
from ...utils.measure import command, environment
from ...utils.script import run

QUESTIONS = (
    "What is the capital of France?",
    "How many days has a week?",
    "What colour is the sky on a clear day?",
    "Write a sentence about the sea.",
    "What is 7 plus 5?",
    "Translate 'good morning' to French.",
    "Who wrote Romeo and Juliet?",
    "Name three fruits.",
    "What do bees make?",
    "Give me one tip for sleeping well.",
)
WINDOW = 512  # tokens that are predicted from those before them in the same window
_README = Path(__file__).parents[3] / "README.md"


@torch.inference_mode()
def perplexity(model, input_ids: torch.LongTensor, window: int = WINDOW) -> float:
    """Perplexity of a text, in windows that do not overlap.

    Args:
        input_ids: `(num_tokens,)`, at least two.
    """
    total = torch.zeros((), dtype=torch.float64)
    starts = range(0, len(input_ids) - 1, window)
    for start in starts:
        ids = input_ids[start : start + window + 1].to(model.device)
        logits = model(input_ids=ids[None, :-1]).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").double().cpu()
    return math.exp(total.item() / (len(input_ids) - 1))


@torch.inference_mode()
def answer(model, tokenizer, prompt: torch.LongTensor, max_new_tokens: int = 48) -> str:
    """The greedy answer to a prompt, `(1, num_tokens)`."""
    prompt = prompt.to(model.device)
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def compare(model, processor, plain, text: str) -> dict[str, Any]:
    """Perplexity and answers of a DeCo and of the plain language model, which has the same tokenizer."""
    tokenizer = processor.tokenizer
    input_ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_tensors="pt").input_ids[0]
    answers = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        pair = {name: answer(of, tokenizer, prompt) for name, of in (("deco", model), ("plain", plain))}
        answers.append({"question": question, **pair})
    return {
        "num_tokens": len(input_ids),
        "perplexity": {name: round(perplexity(of, input_ids), 3) for name, of in (("deco", model), ("plain", plain))},
        "answers": answers,
    }


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the checkpoint.")],
    text: Annotated[Path, typer.Option(help="File whose perplexity is measured.")] = _README,
    in_4bit: Annotated[bool, typer.Option("--4bit", help="Load DeCo's language model in 4 bits.")] = False,
    in_int8: Annotated[bool, typer.Option("--int8", help="Use int8 for DeCo's linear layers.")] = False,
) -> None:
    """Compare MODEL with SmolLM2 on text alone."""
    if not text.is_file():
        raise typer.BadParameter(f"{text} is not a file", param_hint="--text")
    loaded, processor = load(model, in_4bit=in_4bit, in_int8=in_int8)
    plain = AutoModelForCausalLM.from_pretrained(smollm2_folder(), trust_remote_code=False).to(loaded.device)
    report = {
        "model": model,
        "in_4bit": in_4bit,
        "in_int8": in_int8,
        "text": text.name,
        **compare(loaded.eval(), processor, plain.eval(), text.read_text(encoding="utf-8")),
        "command": command(),
        "environment": environment(loaded.device),
    }
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    run("emoji.text_alone", lambda: typer.run(main))
