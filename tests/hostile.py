# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVA checkpoints that convert, ways to spoil them, and what must hold when one is refused."""

import atexit
import functools
import hashlib
import io
import json
import re
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

LLM_HIDDEN = 32
RANK = 4
_COMMON_LLM = {name: value for name, value in tiny.TEXT_CONFIGS["llama"].items() if name != "vocab_size"}
# Layout -> the arguments of `convert` without which it cannot be converted; the values are other layouts.
NEEDS = {
    "llava-hf": {},
    "llava-hf sharded": {},
    "original": {"vision_tower": "tower"},
    "original sharded": {"vision_tower": "tower"},
    "stage 1": {"vision_tower": "tower", "base_model": "llm"},
    "snippet": {"vision_tower": "tower", "pooled_grid_size": 3},
    "LoRA": {"vision_tower": "tower", "base_model": "llm"},
}


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2))


def edit_json(path: Path, removed=(), **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: value for key, value in content.items() if key not in removed})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def edit_tensors(path: Path, removed=(), **changes) -> None:
    """Remove the keys that begin with one of `removed`; keys of `changes` are written with __ for the dots."""
    tensors = {key: value for key, value in read_tensors(path).items() if not key.startswith(tuple(removed))}
    write_tensors(path, {**tensors, **{key.replace("__", "."): value for key, value in changes.items()}})


def rename_tensors(path: Path, pattern: str, replacement: str) -> None:
    write_tensors(path, {re.sub(pattern, replacement, key): value for key, value in read_tensors(path).items()})


def read_safetensors(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(path: Path, header, data: bytes, length: int | None = None) -> None:
    """`header` is a dict or the bytes to be put there; `length` what is said about it."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def _split(folder: Path, name: str, num_shards: int = 2) -> None:
    """Spread one file of weights over shards with an index, neighbours to different shards."""
    path = folder / name
    tensors = read_tensors(path)
    shards = [f"{path.stem}-{i + 1:05}-of-{num_shards:05}{path.suffix}" for i in range(num_shards)]
    weight_map = {key: shards[i % num_shards] for i, key in enumerate(sorted(tensors))}
    for shard in shards:
        write_tensors(folder / shard, {key: tensors[key] for key in tensors if weight_map[key] == shard})
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / f"{name}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    path.unlink()


@functools.cache
def _sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog saw two red and blue cats . user : assistant :"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def _num_pieces() -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece_model()).vocab_size()


def _write_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})
    write_json(
        folder / "tokenizer_config.json",
        {**special, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False},
    )


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(shape, generator=generator) - 0.5 for key, shape in sorted(shapes.items())}


def llava_hf_tensors(seed: int = 0, **text_changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """What transformers writes for a tiny LLaVA of CLIP and Llama: its config.json, and random tensors."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tiny.VISION_CONFIGS["clip"],
        text_config={**tiny.TEXT_CONFIGS["llama"], **text_changes},
        image_token_id=tiny.IMAGE_TOKEN_ID,
        architectures=["LlavaForConditionalGeneration"],
    )
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in LlavaForConditionalGeneration(config).state_dict().items()}
    names = {r"^model\.language_model": "language_model.model", r"^lm_head": "language_model.lm_head", r"^model\.": ""}
    for pattern, replacement in names.items():  # the names in llava-hf's files, of which transformers' own are made
        shapes = {re.sub(pattern, replacement, key): shape for key, shape in shapes.items()}
    return config.to_dict(), _random(shapes, seed)


def write_llava_hf(folder: Path, seed: int = 0, **text_changes) -> None:
    from transformers import LlavaProcessor

    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = llava_hf_tensors(seed, **text_changes)
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", tensors)
    LlavaProcessor(
        tiny.build_image_processor(),
        tiny.build_tokenizer(),
        patch_size=tiny.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def llm_tensors(seed: int, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**_COMMON_LLM, "vocab_size": _num_pieces(), **changes}, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in LlamaForCausalLM(config).state_dict().items()}
    return config.to_dict(), _random(shapes, seed)


def write_llm(folder: Path, seed: int = 1, **changes) -> None:
    """A base model of the sentencepiece vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = llm_tensors(seed, **changes)
    write_json(folder / "config.json", config)
    write_tensors(folder / "pytorch_model.bin", tensors)
    _write_sentencepiece(folder)


def _write_tower(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(**tiny.VISION_CONFIGS["clip"])).save_pretrained(folder)
    tiny.build_image_processor().save_pretrained(folder)


def _projector_tensors(prefix: str) -> dict[str, torch.Tensor]:
    vision_hidden = tiny.VISION_CONFIGS["clip"]["hidden_size"]
    weights = {"0.weight": (LLM_HIDDEN, vision_hidden), "2.weight": (LLM_HIDDEN, LLM_HIDDEN)}
    shapes = {**weights, "0.bias": (LLM_HIDDEN,), "2.bias": (LLM_HIDDEN,)}
    return _random({prefix + key: shape for key, shape in shapes.items()}, seed=2)


def _original_config(**changes) -> dict:
    """config.json in the words of the original code."""
    return {
        "_name_or_path": "someone/llava-tiny",
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.37.2",
        "use_cache": True,
        **{name: value for name, value in _COMMON_LLM.items() if name != "model_type"},
        "vocab_size": _num_pieces(),
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": tiny.VISION_CONFIGS["clip"]["hidden_size"],
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "someone/clip-tiny",
        "use_mm_proj": True,
        **changes,
    }


def write_original(folder: Path, seed: int = 1, prefix: str = "model.mm_projector.", **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _, tensors = llm_tensors(seed, **changes)
    write_json(folder / "config.json", _original_config(**changes))
    write_tensors(folder / "pytorch_model.bin", {**tensors, **_projector_tensors(prefix)})
    _write_sentencepiece(folder)


def _write_stage_1(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / "config.json", _original_config(_name_or_path="someone/llm-tiny", tune_mm_mlp_adapter=True))
    write_tensors(folder / "mm_projector.bin", _projector_tensors("model.mm_projector."))


def _write_lora(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / "config.json", _original_config(_name_or_path="someone/llm-tiny"))
    projector = _projector_tensors("base_model.model.model.mm_projector.")
    write_tensors(folder / "non_lora_trainables.bin", projector)
    shapes = {}
    for layer in range(_COMMON_LLM["num_hidden_layers"]):
        for name, rows in (("q_proj", 32), ("v_proj", 16)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes[f"{module}.lora_A.weight"] = (RANK, LLM_HIDDEN)
            shapes[f"{module}.lora_B.weight"] = (rows, RANK)
    write_tensors(folder / "adapter_model.bin", _random(shapes, seed=3))
    write_json(
        folder / "adapter_config.json",
        {
            "base_model_name_or_path": "someone/llm-tiny",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": 8,
            "lora_dropout": 0.05,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": RANK,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
        },
    )


@functools.cache
def _templates() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def template(layout: str) -> Path:
    folder = _templates() / layout.replace(" ", "-")
    if layout == "tower":
        _write_tower(folder)
    elif layout == "llm":
        write_llm(folder)
    elif layout.startswith("llava-hf"):
        write_llava_hf(folder)
    elif layout.startswith("original"):
        write_original(folder)
    elif layout == "snippet":
        write_original(folder, prefix="model.mm_projector.mlp_projector.")
    elif layout == "stage 1":
        _write_stage_1(folder)
    elif layout == "LoRA":
        _write_lora(folder)
    else:
        raise ValueError(layout)
    if layout.endswith("sharded"):
        _split(folder, "model.safetensors" if layout.startswith("llava-hf") else "pytorch_model.bin")
    return folder


class Place:
    """A folder with one source, what its conversion needs, and room for a destination that does not exist.

    Attributes:
        root: the folder that must not change when a conversion is refused.
        source: a checkpoint of the layout, to be spoiled.
        options: what `convert` needs for it; folders named in it are copies in the place, to be spoiled, too.
        destination: where it is to go, in a folder that exists.
    """

    def __init__(self, root: Path, layout: str):
        self.root = root
        self.source = shutil.copytree(template(layout), root / "source")
        self.options = dict(NEEDS[layout])
        for name in ("vision_tower", "base_model"):
            if name in self.options:
                self.options[name] = shutil.copytree(template(self.options[name]), root / name[:6])
        self.destination = root / "target" / "out"
        self.destination.parent.mkdir()

    def arguments(self) -> list[str]:
        """Of `deco convert`."""
        arguments = [str(self.source), str(self.destination)]
        for name, value in self.options.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        return arguments


def snapshot(folder: Path, with_times: bool = False) -> dict[str, tuple]:
    """Every path below a folder, with mode and content; the times of a folder tell what came and went in it."""
    paths = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        entry = [status.st_mode]
        if path.is_file() and not path.is_symlink():
            entry += [status.st_mtime_ns, status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        elif with_times:
            entry += [status.st_mtime_ns]
        paths[str(path.relative_to(folder))] = tuple(entry)
    return paths


def without_paths(message: str, root: Path) -> str:
    """Temporary folders are called after tests, which would match many a pattern."""
    return message.replace(str(root.resolve()), "").replace(str(root), "")


def assert_refused(place: Place, match: str, with_times: bool = False, **changes) -> None:
    """`convert` says why in one line and leaves everything as it was.

    Args:
        match: must be found in the message, in whatever case; paths of the place are taken out of it first.
        with_times: nothing may have been written and removed again, either.
        changes: of the arguments; None takes one out.
    """
    from modeling_deco.conversion import InputError, convert

    arguments = {"source": place.source, "destination": place.destination, **place.options, **changes}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    before = snapshot(place.root, with_times)
    with pytest.raises(InputError) as raised:
        convert(**arguments)
    message = str(raised.value)
    assert len(message.splitlines()) == 1, message
    assert "\x1b" not in message
    assert re.search(match, without_paths(message, place.root), re.IGNORECASE), message
    assert snapshot(place.root, with_times) == before


def for_each_case(root: Path, layout: str, cases: dict[str, tuple], check) -> None:
    """Spoils a fresh place of the layout for each case, and checks it.

    Args:
        cases: by name, `(spoil, *arguments)`: `spoil(place)` or None, and what `check(place, *arguments)` needs, of
            which a dict at the end has the keyword arguments.
        check: fails where the case is not as it should be; the failure then names the case.
    """
    failures = []
    for name, (spoil, *arguments) in cases.items():
        folder = root / "case"
        folder.mkdir()
        keywords = arguments.pop() if isinstance(arguments[-1], dict) else {}
        try:
            place = Place(folder, layout)
            if spoil is not None:
                spoil(place)
            check(place, *arguments, **keywords)
        except (Exception, pytest.fail.Exception) as error:
            failures.append(f"{layout}, {name}: {type(error).__name__}: {error}")
        shutil.rmtree(folder)
    assert not failures, "\n".join(failures)


def assert_all_refused(root: Path, layout: str, cases: dict[str, tuple]) -> None:
    """Each case is refused as in `assert_refused`: `(spoil, match)` or `(spoil, match, changes of the arguments)`."""
    for_each_case(root, layout, cases, assert_refused)


def contents(folder: Path, without=("conversion_report.json", "README.md")) -> dict[str, str]:
    """Digests of the files that depend on the source alone."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }
