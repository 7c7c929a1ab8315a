# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Split a trained run into the files of `deco-everyday`, and compare what is assembled from them with the run.

    python -m modeling_deco.worlds.emoji.ship --model runs/stage2 --out modeling_deco/checkpoints/deco-everyday

The run is a LoRA adapter that `recipes/sft.py` trained on a DeCo with SmolLM2. Its language model is not shipped: it
must be the installed one, untouched. Other files in the folder, such as the model card and pictures, are kept.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file

from ...inference.adapters import find_adapter
from ...inference.everyday import ADAPTER, PROJECTOR, TOWER, assemble
from ...inference.generation import encode
from ...inference.loading import load
from ...inference.smollm2 import INSTALL, find_smollm2, read_llama
from ...utils.errors import InputError
from ...utils.files import read_json
from ...utils.program import run
from ...utils.staging import staged_file

MAX_FILE_BYTES = 10_000_000
# In parts of the largest logit. float16 makes differences of 0.005, a language model that was trained in bfloat16 of
# 0.03, and a wrong part of 1.
TOLERANCE = 0.05
MAX_NEW_TOKENS = 128
_PEFT = "base_model.model."
# Fields of PEFT's LoraConfig that change what is merged; shipped adapters leave them unset.
_UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication")


def ship(model: Path, out: Path, language_model: Path | None = None) -> dict:
    """Write the parts of a run, and check what is assembled from them.

    Args:
        model: folder of the adapter, which names its base model.
        out: folder of the parts.
        language_model: GGUF file. Default: the installed SmolLM2.

    Returns:
        The sizes of the files in bytes, and `logit_difference`: the largest difference from the run's logits, in parts
        of the largest logit.

    Raises:
        InputError: the run cannot be split, a file is too large, or the assembled model differs from the run.
    """
    language_model = language_model or find_smollm2()
    if language_model is None:
        raise InputError(f"The language model SmolLM2 is not installed: {INSTALL}")
    adapter = find_adapter(model)
    if adapter is None:
        raise InputError(f"{model} is not an adapter; train with LoRA (recipes/configs/stage2_lora.yaml).")
    trained, processor = load(model, dtype="float32", device="cpu")
    _check_language_model(Path(adapter.base), processor.tokenizer, language_model)
    lora, saved = _read_adapter(model)
    weights = trained.state_dict()
    parts = {
        TOWER: {key: weight for key, weight in weights.items() if key.startswith("model.vision_tower.")},
        PROJECTOR: {key: weight for key, weight in weights.items() if key.startswith("model.multi_modal_projector.")},
        f"{ADAPTER}/adapter_model.safetensors": lora,
    }
    if any(key.removeprefix(_PEFT) not in parts[PROJECTOR] for key in saved):
        raise InputError(f"{model} has trained {sorted(saved)[:3]}; only LoRA and the projector are shipped.")
    (out / ADAPTER).mkdir(parents=True, exist_ok=True)
    for name, tensors in parts.items():
        with staged_file(out / name) as path:
            save_file({key: _rounded(weight) for key, weight in tensors.items()}, path, {"format": "pt"})
    _write_small_files(trained, processor, out)
    fields = read_json(model / "adapter_config.json") | {"base_model_name_or_path": None, "modules_to_save": None}
    (out / ADAPTER / "adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    sizes = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*.*"))}
    too_large = [f"{name} has {size:,} bytes" for name, size in sizes.items() if size > MAX_FILE_BYTES]
    if too_large:
        raise InputError(f"{out}: {too_large[0]}; at most {MAX_FILE_BYTES:,} are shipped. A smaller --lora_r helps.")
    difference = _compare(trained, processor, out, language_model)
    if difference > TOLERANCE:
        raise InputError(f"{out}: its logits differ from the run's by {difference:.4f}, more than {TOLERANCE}.")
    return {"bytes": sizes, "logit_difference": difference}


def _check_language_model(base: Path, tokenizer, language_model: Path) -> None:
    _, expected, own_tokenizer = read_llama(language_model)
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        stored |= load_file(path)
    for key, weight in expected.items():
        name = key.replace("model.", "model.language_model.", 1)
        if key != "lm_head.weight" and (name not in stored or not torch.equal(stored[name], weight.to(stored[name]))):
            raise InputError(f"{base}: {name} is not that of {language_model.name}; only an adapter of it is shipped.")
    if tokenizer.get_vocab() != own_tokenizer.get_vocab():
        raise InputError(f"{base} has other tokens than {language_model.name}.")


def _read_adapter(folder: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """LoRA's matrices, and the names of the other tensors that were trained."""
    config, tensors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    for field in _UNSUPPORTED:
        if config.get(field):
            raise InputError(f"{field} in adapter_config.json of {folder} is {config[field]!r}; leave it out.")
    lora = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    return lora, tensors.keys() - lora.keys()


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """Matrices in float16. Vectors are small and stay exact: variances of a batch norm may exceed float16's range."""
    weight = weight.half() if weight.dim() > 1 else weight
    if weight.is_floating_point() and not weight.isfinite().all():
        raise InputError("a weight is NaN, or too large for float16.")
    return weight.contiguous()


def _write_small_files(model, processor, out: Path) -> None:
    model.config.dtype = "float32"
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        for name in ("config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"):
            shutil.copyfile(Path(folder, name), out / name)


def _compare(trained, processor, out: Path, language_model: Path) -> float:
    """Largest difference of logits about a picture, in parts of the largest logit."""
    with tempfile.TemporaryDirectory() as folder:
        assemble(out, language_model, Path(folder))
        assembled, own_processor = load(folder, device="cpu")
        noise = torch.randint(0, 256, (96, 128, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        content = [
            {"type": "image", "image": Image.fromarray(noise.numpy())},
            {"type": "text", "text": "What do you see? Is there a dog?"},
        ]
        messages = [{"role": "user", "content": content}]
        with torch.no_grad():
            expected = trained.eval()(**encode(processor, messages)).logits
            logits = assembled(**encode(own_processor, messages)).logits
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def main(
    model: Annotated[Path, typer.Option(help="Folder of the trained adapter.")],
    out: Annotated[Path, typer.Option(help="Folder of the shipped files.")],
):
    """Split a trained run into the files of deco-everyday."""
    typer.echo(json.dumps(ship(model, out)))


if __name__ == "__main__":
    run("ship", lambda: typer.run(main), bad_input=(ValueError, ImportError))
