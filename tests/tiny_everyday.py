# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A tiny random stand-in for what `deco-everyday` is made from: a run with LoRA on a DeCo with a tiny SmolLM2."""

from pathlib import Path

import tiny
import tiny_gguf
import torch
from gguf import GGMLQuantizationType
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from modeling_deco import DecoForConditionalGeneration, DecoProcessor
from modeling_deco.inference.smollm2 import _save


def build_run(folder: Path, **lora) -> tuple[Path, Path]:
    """Write a language model, a DeCo with it, and an adapter as `recipes/sft.py` saves it.

    Returns:
        The adapter's folder, and the GGUF file of the language model.
    """
    folder.mkdir(exist_ok=True)
    gguf = tiny_gguf.write_gguf(tiny_gguf.build_llama(), folder / "tiny.gguf", GGMLQuantizationType.Q4_1)
    (folder / "text").mkdir()
    _save(gguf, folder / "text")
    torch.manual_seed(0)
    fields = {name: value for name, value in tiny.VISION_CONFIGS["clip"].items() if name != "model_type"}
    tiny.randomize(CLIPVisionModel(CLIPVisionConfig(**fields))).save_pretrained(folder / "tower")
    tiny.build_image_processor().save_pretrained(folder / "tower")
    backbones = str(folder / "tower"), str(folder / "text")
    model = DecoForConditionalGeneration.from_vision_text_pretrained(
        *backbones, pooled_grid_size=3, image_positions="patch"
    )
    processor = DecoProcessor.from_vision_text_pretrained(*backbones, pooled_grid_size=3)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = DecoForConditionalGeneration.from_pretrained(folder / "base")  # which the adapter then names
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 12,
            "target_modules": r".*language_model.*\.(q_proj|v_proj|gate_proj|down_proj)",
            "modules_to_save": ["multi_modal_projector"],
            **lora,
        }
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "run")
    processor.save_pretrained(folder / "run")
    return folder / "run", gguf
