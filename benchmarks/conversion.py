# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco convert` beside `cp`, and its reading and writing of weights beside safetensors' and torch's own.

    python benchmarks/conversion.py --work-dir DIR --num-layers 1 --repeats 3 --out RESULTS_JSON

Contract: for each of two formats (llava-hf safetensors, original .bin with the tower named) a checkpoint is generated.
Then one run on one disk interleaves: `cp` of its weight files, `cp` and `sync` of them, the conversion, which syncs
too, and the conversion in the `VARIANTS` below. Ratios are of medians; the last line on stdout is the JSON that is
also written to `--out`. Imports are not timed; their time is given apart. Memory is the peak of a fresh process that
converts over the peak of one that only imports; pages of mapped files count. 8 layers are 4.4 GB, 32 are the whole
model (14 GB).
"""

import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Annotated
from unittest.mock import patch

import safetensors.torch
import sentencepiece
import torch
import typer
from safetensors import safe_open
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig
from xxhash import xxh3_128

from modeling_deco.conversion import convert, output, stored, writing
from modeling_deco.utils.measure import environment, peak_resident_bytes, seconds, write_report

HIDDEN, INTERMEDIATE, VOCAB = 4096, 11008, 32000
SETTLE_SECONDS = 3  # what the run before left to be written, or deleted, is not the next one's
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def llava_hf_shapes(num_layers: int, vocab_size: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes, shard by shard: the tower with projector and embeddings, then each two layers."""
    from transformers import LlavaForConditionalGeneration

    text = LlamaConfig(num_hidden_layers=num_layers, vocab_size=vocab_size)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text)
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    shards = [{} for _ in range(1 + (num_layers + 1) // 2)]
    for name, tensor in state.items():
        in_layer = name.startswith("model.language_model.layers.")
        shards[1 + int(name.split(".")[3]) // 2 if in_layer else 0][name] = tuple(tensor.shape)
    return shards


def random_tensor(shape) -> torch.Tensor:
    """Random float16 bits: as hard to compress as weights are, and quick to make."""
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    return bits.bitwise_and(~0x4000).view(torch.float16)  # no exponent of all ones: no inf, no NaN


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece model with Llama's 32000 pieces."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (1_500_000,), generator=generator, dtype=torch.uint8)
    text = bytes(letters.tolist()).decode()
    words = [text[start : start + 2 + start % 7] for start in range(0, len(text) - 9, 5)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words[start : start + 12]) for start in range(0, len(words), 12)),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def write_llava_hf(folder: Path, num_layers: int) -> None:
    from modeling_deco.conversion.tokenizer import load_tokenizer

    folder.mkdir(parents=True)
    write_tokenizer(folder)
    load_tokenizer(folder).save_pretrained(folder)
    weight_map = {}
    shards = llava_hf_shapes(num_layers, VOCAB + 64)
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {key: random_tensor(shape) for key, shape in shard.items()}
        safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    text = LlamaConfig(num_hidden_layers=num_layers, vocab_size=VOCAB + 64)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=VOCAB)
    config.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336).save_pretrained(folder)


def write_original(folder: Path, tower: Path, num_layers: int) -> None:
    """The original code's layout: .bin shards, and a vision tower of its own."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    weight_map, vision = {}, {}
    names = {"model.language_model.": "model.", "model.multi_modal_projector.linear_1.": "model.mm_projector.0."}
    names |= {"model.multi_modal_projector.linear_2.": "model.mm_projector.2."}
    shards = llava_hf_shapes(num_layers, VOCAB)
    for index, shard in enumerate(shards):
        tensors = {}
        for key, shape in shard.items():
            if key.startswith("model.vision_tower."):
                vision[key.removeprefix("model.vision_tower.")] = random_tensor(shape)
                continue
            for prefix, original in names.items():
                key = key.replace(prefix, original)
            tensors[key] = random_tensor(shape)
        name = f"pytorch_model-{index + 1:05}-of-{len(shards):05}.bin"
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    fields = LlamaConfig(num_hidden_layers=num_layers, vocab_size=VOCAB).to_dict()
    fields |= {"model_type": "llava_llama", "mm_vision_tower": str(tower), "mm_projector_type": "mlp2x_gelu"}
    fields |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(fields))
    tower.mkdir()
    safetensors.torch.save_file(vision, tower / "model.safetensors", metadata={"format": "pt"})
    CLIPVisionConfig(**VISION).save_pretrained(tower)
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336).save_pretrained(tower)


# --- variants --------------------------------------------------------------------------------------------------------


def digest(file: Path) -> str:
    """XXH3 of a file, read in pieces."""
    hasher, buffer = xxh3_128(), memoryview(bytearray(1 << 20))
    with open(file, "rb", buffering=0) as opened:
        while num_read := opened.readinto(buffer):
            hasher.update(buffer[:num_read])
    return hasher.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def stored_tensor(tensor, opened: dict) -> torch.Tensor:
    """A stored tensor, from its file by `safe_open` or by `torch.load`, which map the file."""
    if tensor.path.suffix == ".safetensors":
        if tensor.path not in opened:
            opened[tensor.path] = safe_open(tensor.path, framework="pt")
        return opened[tensor.path].get_tensor(tensor.key)
    if tensor.path not in opened:
        opened[tensor.path] = torch.load(tensor.path, mmap=True, weights_only=True)
    return opened[tensor.path][tensor.key]


def write_by_libraries(tensors: dict, folder: Path, source_files: list[Path], progress) -> writing.Digests:
    """`write_weights` for tensors that are copied or given new rows, by `save_file`, a GB at a time. It checks and
    reports the same, and a second thread reads everything back too."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > 10**9:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    written, files, read_back, weight_map = {}, {}, {}, {}
    with ThreadPoolExecutor(max_workers=1) as reader:
        sources = {path: reader.submit(digest, path) for path in source_files}
        for number, shard in enumerate(shards, start=1):
            opened, loaded, path = {}, {}, folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
            for name, tensor in shard.items():
                if hasattr(tensor, "tensor"):  # computed: given new rows
                    data = bytearray(b"".join(bytes(piece) for piece in tensor.read_bytes()))
                    loaded[name] = torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape)
                else:
                    loaded[name] = stored_tensor(tensor, opened)
            safetensors.torch.save_file(loaded, path, metadata={"format": "pt"})
            files[path.name] = reader.submit(digest, path)
            file = safe_open(path, framework="pt")
            for name, tensor in loaded.items():
                written[name] = xxh3_128(bytes_of(tensor)).hexdigest()
                pieces = pieces_of(file, name)
                read_back[name] = reader.submit(writing._digest_and_nonfinite, pieces, tensor.dtype, Event())
                progress(tensor.nbytes)
            weight_map |= dict.fromkeys(shard, path.name)
        nonfinite = writing._check(written, read_back, {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    files, sources = ({key: result.result() for key, result in results.items()} for results in (files, sources))
    return writing.Digests(written, files, sources, nonfinite)


def pieces_of(file, name: str) -> Iterator[memoryview]:
    data = bytes_of(file.get_tensor(name))
    for start in range(0, len(data), stored.CHUNK_BYTES):
        yield data[start : start + stored.CHUNK_BYTES]


@contextmanager
def mapped_reads() -> Iterator[None]:
    """Stored tensors are read by `safe_open` and `torch.load`, and written as ever."""
    opened = {}

    def read_bytes(tensor):
        yield bytes_of(stored_tensor(tensor, opened))

    with patch.object(stored.StoredTensor, "read_bytes", read_bytes):
        yield


VARIANTS = {
    "convert by safe_open, torch.load and save_file": lambda: patch.object(
        output, "write_weights", write_by_libraries
    ),
    "convert, read by safe_open and torch.load": mapped_reads,
}


def convert_as(variant: str, source: Path, destination: Path) -> None:
    if variant == "convert":
        convert(source, destination)
    else:
        with VARIANTS[variant]():
            convert(source, destination)


# --- measurement -----------------------------------------------------------------------------------------------------


def copy(files: list[Path], destination: Path, sync: bool) -> None:
    destination.mkdir()
    subprocess.run(["cp", *map(str, files), str(destination)], check=True)
    if sync:
        subprocess.run(["sync", *(str(destination / file.name) for file in files)], check=True)


def peak_bytes(variant: str | None, source: Path, destination: Path, queue) -> None:
    """In a fresh process, which has imported this module: convert, or do nothing."""
    if variant is not None:
        convert_as(variant, source, destination)
    queue.put(peak_resident_bytes())


def measure_peak(variant: str | None, source: Path, destination: Path) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_bytes, args=(variant, source, destination, queue))
    process.start()
    peak = queue.get()
    process.join()
    shutil.rmtree(destination, ignore_errors=True)
    return peak


def measure(source: Path, files: list[Path], work_dir: Path, repeats: int) -> dict:
    copied, converted = work_dir / "copied", work_dir / "converted"
    runs = {
        "cp": lambda: copy(files, copied, sync=False),
        "cp and sync": lambda: copy(files, copied, sync=True),
        "convert": lambda: convert(source, converted),
        **{name: lambda name=name: convert_as(name, source, converted) for name in VARIANTS},
    }
    times, order = {name: [] for name in runs}, list(runs)
    for repeat in range(repeats + 1):
        first = repeat % len(order)
        for name in order[first:] + order[:first]:
            subprocess.run(["sync"], check=True)
            time.sleep(SETTLE_SECONDS)
            elapsed = seconds(runs[name])
            if repeat:  # the first is the warm-up
                times[name].append(round(elapsed, 3))
            typer.echo(f"{source.name}: {name} {elapsed:.2f} s", err=True)
            for folder in (copied, converted):
                shutil.rmtree(folder, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    imports = measure_peak(None, source, converted)
    peaks = {name: measure_peak(name, source, converted) - imports for name in ("convert", *VARIANTS)}
    return {
        "source_bytes": sum(file.stat().st_size for file in files),
        "seconds": times,
        "median_seconds": medians,
        "time_over_cp": round(medians["convert"] / medians["cp"], 2),
        "time_over_cp_and_sync": round(medians["convert"] / medians["cp and sync"], 2),
        "time_over_convert": {name: round(medians[name] / medians["convert"], 2) for name in VARIANTS},
        "peak_mb_over_imports": {name: round(peak / 1e6) for name, peak in peaks.items()},
        "imports_mb": round(imports / 1e6),
        "largest_tensor_mb": round((VOCAB + 64) * HIDDEN * 2 / 1e6),
    }


def main(
    work_dir: Annotated[Path, typer.Option(help="Folder on the disk to measure; three times the size is needed.")],
    num_layers: Annotated[int, typer.Option(help="Layers of the language model.")] = 8,
    repeats: Annotated[int, typer.Option(help="Runs of each, after a warm-up.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Where the JSON is written.")] = None,
):
    llava_hf, original, tower = work_dir / "llava-hf", work_dir / "original", work_dir / "tower"
    write_llava_hf(llava_hf, num_layers)
    result = {"llava-hf, safetensors": measure(llava_hf, sorted(llava_hf.glob("*.safetensors")), work_dir, repeats)}
    shutil.rmtree(llava_hf)
    write_original(original, tower, num_layers)
    files = [*sorted(original.glob("*.bin")), tower / "model.safetensors"]
    result["original, .bin"] = measure(original, files, work_dir, repeats)
    shutil.rmtree(original)
    shutil.rmtree(tower)
    import_seconds = seconds(lambda: subprocess.run([sys.executable, "-c", "import modeling_deco.conversion"]))
    report = {
        "command": f"python benchmarks/conversion.py --num-layers {num_layers} --repeats {repeats}",
        "results": result,
        "import_seconds": round(import_seconds, 2),
        "environment": environment("cpu"),
    }
    if out is not None:
        write_report(report, out)
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
