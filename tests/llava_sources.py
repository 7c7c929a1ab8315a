# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVA checkpoints in every layout, and the models that they were written from.

Weights are kept under their names in a `LlavaForConditionalGeneration` in memory (`model.vision_tower.*`,
`model.multi_modal_projector.*`, `model.language_model.*`, `lm_head.weight`), and each layout renames them when it is
written: the reverse of the converter, of which nothing is used here. `OriginalLlava` is the forward pass of the
original code, built from its parts.
"""

import functools
import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AddedToken,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

PATCH_GRID, NUM_PATCHES = 6, 36
VOCAB_SIZE = 300  # of the sentencepiece model; what is added to it follows
IMAGE_TOKEN_ID, PAD_TOKEN_ID, PADDED_VOCAB_SIZE = 300, 301, 320
IMAGE_MARKER = -200  # the place of an image in the original code's ids
LICENSE = "llama2"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

VISION_CONFIG = tiny.VISION_CONFIGS["clip"]
TEXT_CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

HF_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- message['role'].upper() + ': ' -}}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- part['text'] + ' ' -}}{%- endgeneration -%}
{%- else -%}
{{- part['text'] + ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


# --- tokenizer ---------------------------------------------------------------------------------------------------


@functools.cache
def sentencepiece_model() -> bytes:
    """A `tokenizer.model` like Llama's: BPE with byte fallback, and unk, bos and eos at 0, 1 and 2."""
    sentences = [
        "A chat between a curious user and an artificial intelligence assistant.",
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER: what is this? ASSISTANT: it is a red dog.",
        "USER: describe the picture in one word. ASSISTANT: blue",
    ]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 5),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


@functools.cache
def sentencepiece_processor() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


def original_ids(prompt: str) -> list[int]:
    """The ids of the original code: bos, then the pieces between the images, each tokenized by itself."""
    ids = [1]
    for index, piece in enumerate(prompt.split("<image>")):
        ids += [IMAGE_MARKER] * (index > 0) + sentencepiece_processor().encode(piece)
    return ids


def build_tokenizer(tokens=("<image>", "<pad>")) -> LlamaTokenizer:
    """The tokenizer of llava-hf: the sentencepiece model as a fast tokenizer, with special tokens from id 300."""
    pieces = sentencepiece_processor()
    vocabulary = {pieces.id_to_piece(index): index for index in range(VOCAB_SIZE)}
    merges = []
    for piece in sorted((piece for piece in vocabulary if len(piece) > 1), key=vocabulary.get):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
        merges += sorted(splits, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=False, add_bos_token=True)
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return tokenizer


def write_original_tokenizer(folder) -> None:
    """The three files that LLaVA-1.5 and Vicuna-1.5 have."""

    def token(content):
        return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    Path(folder, "tokenizer.model").write_bytes(sentencepiece_model())
    specials = {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>")}
    write_json(folder, "special_tokens_map.json", {**specials, "pad_token": "<unk>"})
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{name: {"__type": "AddedToken", **value} for name, value in specials.items()},
    }
    write_json(folder, "tokenizer_config.json", config)


# --- weights and files -------------------------------------------------------------------------------------------


def write_json(folder, name, content) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, name).write_text(json.dumps(content, indent=2) + "\n")


def write_readme(folder, license=LICENSE) -> None:
    header = f"---\nlicense: {license}\npipeline_tag: image-text-to-text\n---\n" if license else ""
    Path(folder, "README.md").write_text(f"{header}# A LLaVA\n")


def split(names, num_shards, seed=None) -> list[list[str]]:
    """Names in `num_shards` groups, none empty: in order, or shuffled over random boundaries."""
    names = list(names)
    if seed is None:
        cuts = [len(names) * shard // num_shards for shard in range(num_shards + 1)]
    else:
        chance = random.Random(seed)
        chance.shuffle(names)
        cuts = [0, *sorted(chance.sample(range(1, len(names)), num_shards - 1)), len(names)]
    return [names[first:last] for first, last in zip(cuts[:-1], cuts[1:], strict=True)]


def write_weights(folder, tensors, kind="safetensors", shards=1, metadata=True) -> None:
    """Weights as `save_pretrained` lays them out.

    Args:
        kind: `"safetensors"`, `"bin"`, or `"legacy bin"`, which torch wrote before 1.6 and cannot be mapped.
        shards: a number, or names in groups.
        metadata: whether safetensors files say that they are PyTorch's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = split(tensors, shards) if isinstance(shards, int) else shards
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    weight_map = {}
    for number, names in enumerate(groups, start=1):
        name = f"{stem}-{number:05d}-of-{len(groups):05d}{suffix}" if len(groups) > 1 else f"{stem}{suffix}"
        shard = {key: tensors[key] for key in names}
        if kind == "safetensors":
            shard = {key: value.contiguous() for key, value in shard.items()}
            save_file(shard, folder / name, metadata={"format": "pt"} if metadata else None)
        else:
            torch.save(shard, folder / name, _use_new_zipfile_serialization=kind == "bin")
        weight_map.update(dict.fromkeys(names, name))
    if len(groups) > 1:
        total_size = sum(value.nbytes for value in tensors.values())
        write_json(
            folder, f"{stem}{suffix}.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        )


def read_weights(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, each stored once."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert not tensors.keys() & set(opened.keys())
        tensors.update(load_file(file))
    return tensors


# --- models ------------------------------------------------------------------------------------------------------


class OriginalLlava(nn.Module):
    """The original code's model: a CLIP tower, `mm_projector`, Llama; with a grid, the DeCo authors' projector.

    Args:
        pooled_grid: None, or `(rows, cols)` for the `AdaptiveAvgPool2d` before the MLP.
        num_layers: linear layers of the MLP.
    """

    def __init__(self, pooled_grid=None, num_layers=2, vision_config=VISION_CONFIG, text_config=TEXT_CONFIG, seed=0):
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**vision_config))
        self.language_model = LlamaForCausalLM(LlamaConfig(**text_config))
        widths = [vision_config["hidden_size"]] + [text_config["hidden_size"]] * num_layers
        layers = [nn.Linear(widths[0], widths[1])]
        for width in widths[2:]:
            layers += [nn.GELU(), nn.Linear(width, width)]
        self.mm_projector = nn.Sequential(*layers)
        self.pooled_grid = pooled_grid
        tiny.randomize(self, seed)

    def round_to(self, dtype) -> "OriginalLlava":
        """Round the weights as storage in `dtype` does; the arithmetic stays fp32."""
        with torch.no_grad():
            for parameter in self.parameters():  # not the buffers, which are computed in fp32
                parameter.copy_(parameter.to(dtype))
        return self

    @torch.no_grad()
    def image_features(self, pixel_values) -> torch.Tensor:
        patch_features = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        if self.pooled_grid is not None:
            rows = self.tower.config.image_size // self.tower.config.patch_size
            feature_map = patch_features.transpose(1, 2).unflatten(2, (rows, -1))
            feature_map = nn.AdaptiveAvgPool2d(self.pooled_grid)(feature_map)
            patch_features = feature_map.flatten(2).transpose(1, 2)
        return self.mm_projector(patch_features)

    @torch.no_grad()
    def forward(self, ids, pixel_values=None) -> torch.Tensor:
        """Logits `(positions, vocabulary)` of one prompt, with features in the place of each marker in `ids`."""
        features = iter(() if pixel_values is None else self.image_features(pixel_values))
        embed = self.language_model.get_input_embeddings()
        pieces = [next(features) if index == IMAGE_MARKER else embed(torch.tensor([index])) for index in ids]
        return self.language_model(inputs_embeds=torch.cat(pieces)[None]).logits[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights under `LlavaForConditionalGeneration`'s names."""
        tensors = {}
        for name, value in self.tower.state_dict().items():
            tensors["model.vision_tower." + name.removeprefix("vision_model.")] = value
        for name, value in self.mm_projector.state_dict().items():
            index, part = name.split(".")
            tensors[f"model.multi_modal_projector.linear_{int(index) // 2 + 1}.{part}"] = value
        for name, value in self.language_model.state_dict().items():
            if name != "lm_head.weight":
                name = "model.language_model." + name.removeprefix("model.")
            tensors[name] = value
        return {name: value.detach().clone() for name, value in tensors.items()}


def build_hf_model(vision_config=VISION_CONFIG, text_config=None, seed=0, **kwargs) -> LlavaForConditionalGeneration:
    text_config = text_config or {**TEXT_CONFIG, "vocab_size": PADDED_VOCAB_SIZE, "pad_token_id": PAD_TOKEN_ID}
    choices = {"image_token_index": IMAGE_TOKEN_ID, "image_seq_length": NUM_PATCHES, **kwargs}
    config = LlavaConfig(vision_config=dict(vision_config), text_config=dict(text_config), **choices)
    model = tiny.randomize(LlavaForConditionalGeneration(config), seed)
    model.tie_weights()
    return model


# --- names -------------------------------------------------------------------------------------------------------


def rename(tensors, rules) -> dict[str, torch.Tensor]:
    """Names with the first matching prefix replaced; each name matches one."""

    def renamed(name):
        return next(new + name.removeprefix(old) for old, new in rules.items() if name.startswith(old))

    return {renamed(name): value for name, value in tensors.items()}


HF_NAMES = {
    # as on the Hub since 2023
    "hub": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    # as saved by transformers 5
    "present": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    # in memory since transformers 4.52
    "4.52": {"model.vision_tower.": "model.vision_tower.vision_model.", "": ""},
    # in memory in transformers 5
    "in memory": {"": ""},
}


def original_names(tensors, snippet=False) -> dict[str, torch.Tensor]:
    projector = "model.mm_projector." + ("mlp_projector." if snippet else "")
    numbers = {f"model.multi_modal_projector.linear_{layer + 1}.": f"{projector}{2 * layer}." for layer in range(4)}
    others = {
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    }
    return rename(tensors, {**numbers, **others})


def select(tensors, *prefixes) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(prefixes)}


# --- llava-hf ----------------------------------------------------------------------------------------------------


def hf_hub_config(model, dtype="float16") -> dict:
    """`config.json` as it stands on the Hub: nested configs say only what is not a default."""
    text, vision = model.config.text_config, model.config.vision_config
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": model.config.image_token_id,
        "model_type": "llava",
        "pad_token_id": PAD_TOKEN_ID,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "model_type": "llama",
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "rms_norm_eps": text.rms_norm_eps,
            "torch_dtype": dtype,
            "vocab_size": text.vocab_size,
        },
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.36.0.dev0",
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size,
            "model_type": "clip_vision_model",
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size,
            "projection_dim": vision.projection_dim,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": text.vocab_size,
    }


def clip_preprocessor_config(image_size=tiny.IMAGE_SIZE) -> dict:
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }


def write_hf_hub_processor(folder) -> None:
    """Processor files as they stand on the Hub."""
    build_tokenizer().save_pretrained(folder)
    Path(folder, "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(folder, "added_tokens.json", {"<image>": IMAGE_TOKEN_ID, "<pad>": PAD_TOKEN_ID})
    write_json(folder, "preprocessor_config.json", {**clip_preprocessor_config(), "processor_class": "LlavaProcessor"})
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": tiny.PATCH_SIZE,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    write_json(folder, "processor_config.json", processor)
    write_json(folder, "chat_template.json", {"chat_template": HF_CHAT_TEMPLATE})
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD_TOKEN_ID}
    write_json(folder, "generation_config.json", {**generation, "transformers_version": "4.36.0.dev0"})


def build_hf_processor(tokenizer=None, strategy="default", image_size=tiny.IMAGE_SIZE) -> LlavaProcessor:
    crop = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop),
        tokenizer or build_tokenizer(),
        patch_size=tiny.PATCH_SIZE,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if strategy == "default" else 0,
        chat_template=HF_CHAT_TEMPLATE,
    )


def write_hf_saved(folder, model=None, processor=None, **kwargs) -> None:
    """What `save_pretrained` writes."""
    model = model or build_hf_model()
    model.save_pretrained(folder, **kwargs)
    (processor or build_hf_processor()).save_pretrained(folder)
    write_readme(folder)


def write_hf_hub(folder, names="hub", dtype=torch.float16, **kwargs) -> dict[str, torch.Tensor]:
    """What the Hub has; returns the tensors under their names in memory."""
    model = build_hf_model()
    tensors = {name: value.to(dtype) for name, value in model.state_dict().items()}
    write_weights(folder, rename(tensors, HF_NAMES[names]), **kwargs)
    write_json(folder, "config.json", hf_hub_config(model, str(dtype).removeprefix("torch.")))
    write_hf_hub_processor(folder)
    write_readme(folder)
    return tensors


# --- the original code -------------------------------------------------------------------------------------------


def original_config(llava, vision_tower, **kwargs) -> dict:
    """`config.json` as LLaVA-1.5 writes it: all in one level, the tower by its name."""
    text = llava.language_model.config
    return {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_length": 4096,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": llava.tower.config.hidden_size,
        "mm_projector_lr": None,
        "mm_projector_type": f"mlp{(len(llava.mm_projector) + 1) // 2}x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(vision_tower),
        "model_type": "llava",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
        **kwargs,
    }


class _TrainingArguments:
    """Stands for what `training_args.bin` holds: an object, which no reader of weights may load."""


def write_original(
    folder,
    llava,
    vision_tower="openai/clip-vit-large-patch14-336",
    tower_inside=False,
    buffers=False,
    trainer_files=False,
    config=None,
    **kwargs,
) -> None:
    """A full checkpoint of the original code.

    Args:
        llava: an `OriginalLlava`, whose tensors are written; or `(llava, tensors)` to write others of its names.
        tower_inside: as after training with the tower unfrozen.
        buffers: as transformers 4.30 and older wrote them, with position ids and rotary frequencies.
        trainer_files: what `Trainer` leaves beside the weights.
        config: more fields of `config.json`.
    """
    llava, tensors = llava if isinstance(llava, tuple) else (llava, llava.tensors())
    if not tower_inside:
        tensors = {name: value for name, value in tensors.items() if "vision_tower" not in name}
    tensors = original_names(tensors, snippet=llava.pooled_grid is not None)
    if buffers:
        head_dim = llava.language_model.config.hidden_size // llava.language_model.config.num_attention_heads
        frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        for layer in range(llava.language_model.config.num_hidden_layers):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()
        if tower_inside:
            name = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
            tensors[name] = torch.arange(NUM_PATCHES + 1)[None]
    write_weights(folder, tensors, **kwargs)
    dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    choices = {"torch_dtype": dtype, "unfreeze_mm_vision_tower": tower_inside, **(config or {})}
    write_json(folder, "config.json", original_config(llava, vision_tower, **choices))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0}
    write_json(folder, "generation_config.json", {**generation, "transformers_version": "4.31.0"})
    write_original_tokenizer(folder)
    write_readme(folder)
    if trainer_files:
        torch.save(_TrainingArguments(), Path(folder, "training_args.bin"))
        write_json(folder, "trainer_state.json", {"epoch": 1.0, "global_step": 5197})


def write_base_model(folder, llava, kind="bin", shards=2, dtype=torch.float32) -> None:
    """Vicuna: Llama alone. Its generation config has a temperature, but no sampling."""
    tensors = original_names(select(llava.tensors(), "model.language_model.", "lm_head."))
    write_weights(folder, {name: value.to(dtype) for name, value in tensors.items()}, kind=kind, shards=shards)
    config = {
        "_name_or_path": "vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        **llava.language_model.config.to_diff_dict(),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.31.0",
    }
    for name in ("rope_parameters", "dtype"):  # which that version does not know
        config.pop(name, None)
    config.update(rope_scaling=None, use_cache=True, pretraining_tp=1, tie_word_embeddings=False, model_type="llama")
    write_json(folder, "config.json", config)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0}
    write_json(folder, "generation_config.json", {**generation, "temperature": 0.9, "top_p": 0.6})
    write_original_tokenizer(folder)
    write_readme(folder)


def write_stage_1(folder, llava, vision_tower="openai/clip-vit-large-patch14-336", config=None) -> None:
    """The projector that was trained, and the base model's config with the fields of LLaVA."""
    projector = select(llava.tensors(), "model.multi_modal_projector.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    projector = original_names(projector, snippet=llava.pooled_grid is not None)
    torch.save(projector, Path(folder, "mm_projector.bin"))
    choices = {"architectures": ["LlamaForCausalLM"], "tune_mm_mlp_adapter": True, **(config or {})}
    write_json(folder, "config.json", original_config(llava, vision_tower, **choices))
    write_json(folder, "trainer_state.json", {"epoch": 1.0, "global_step": 2180})
    write_readme(folder)


def add_lora(llava, seed=5, **kwargs) -> OriginalLlava:
    """The model with adapters on its Llama, both matrices random; `llava.language_model` is then PEFT's."""
    choices = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": LINEAR_NAMES, **kwargs}
    wrapped = get_peft_model(llava.language_model, LoraConfig(bias="none", task_type="CAUSAL_LM", **choices))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (0.3 if "magnitude" in name else 0.6 / parameter.shape[-1] ** 0.5))
    llava.language_model = wrapped.eval()
    return llava


def write_lora(folder, llava, vision_tower="openai/clip-vit-large-patch14-336", kind="safetensors", config=None):
    """What PEFT writes, `non_lora_trainables.bin` and `config.json`; a `.bin` adapter has the config of its day."""
    llava.language_model.save_pretrained(folder)
    if kind == "bin":
        adapter = Path(folder, "adapter_model.safetensors")
        torch.save(load_file(adapter), adapter.with_suffix(".bin"))
        adapter.unlink()
        lora = llava.language_model.peft_config["default"]
        old = {
            "auto_mapping": None,
            "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": lora.lora_alpha,
            "lora_dropout": 0.05,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": lora.r,
            "revision": None,
            "target_modules": sorted(lora.target_modules),
            "task_type": "CAUSAL_LM",
        }
        write_json(folder, "adapter_config.json", old)
    snippet = llava.pooled_grid is not None
    projector = {}
    for name, value in llava.mm_projector.state_dict().items():
        projector[f"base_model.model.model.mm_projector.{'mlp_projector.' if snippet else ''}{name}"] = value
    torch.save(projector, Path(folder, "non_lora_trainables.bin"))
    text = llava.language_model.get_base_model()
    plain = OriginalLlava.__new__(OriginalLlava)
    nn.Module.__init__(plain)
    plain.tower, plain.language_model, plain.mm_projector = llava.tower, text, llava.mm_projector
    choices = {"model_type": "llava_llama", **(config or {})}
    write_json(folder, "config.json", original_config(plain, vision_tower, **choices))
    write_json(folder, "trainer_state.json", {"epoch": 1.0, "global_step": 5197})
    write_readme(folder)


# --- the vision tower --------------------------------------------------------------------------------------------


def _tower_tensors(tower):
    return {"vision_model." + name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}


def write_clip_vision(folder, tower, kind="safetensors") -> None:
    """A `CLIPVisionModel` alone, under the names that it had when LLaVA was written."""
    write_weights(folder, _tower_tensors(tower), kind=kind)
    config = {"architectures": ["CLIPVisionModel"], **tower.config.to_diff_dict(), "model_type": "clip_vision_model"}
    write_json(folder, "config.json", config)
    write_json(folder, "preprocessor_config.json", clip_preprocessor_config(tower.config.image_size))


def write_clip(folder, tower, kind="bin") -> None:
    """A whole `CLIPModel`, as OpenAI's repositories have it: both towers, two projections, buffers; old image
    processor fields."""
    text_config = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 16,
        "bos_token_id": 48,
        "eos_token_id": 49,
    }
    vision_config = tower.config.to_diff_dict()
    clip = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=16))
    tiny.randomize(clip, seed=9)
    tensors = {name: value for name, value in clip.state_dict().items() if not name.startswith("vision_model.")}
    tensors.update(_tower_tensors(tower))
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(NUM_PATCHES + 1)[None]
    write_weights(folder, tensors, kind=kind)
    config = {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": {**text_config, "model_type": "clip_text_model", "projection_dim": 16},
        "text_config_dict": {**text_config, "projection_dim": 16},
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {**vision_config, "model_type": "clip_vision_model"},
        "vision_config_dict": {key: value for key, value in vision_config.items() if key != "model_type"},
    }
    write_json(folder, "config.json", config)
    old = {
        "crop_size": tower.config.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "size": tower.config.image_size,
    }
    write_json(folder, "preprocessor_config.json", old)


# --- every format ------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A written checkpoint.

    Attributes:
        folder: the checkpoint, under a name that misleads.
        arguments: what `convert` needs besides, at the grid of the patches or at the authors' projector's.
        tensors: the stored tensors under their names in memory, before any merge.
        reference: an `OriginalLlava`, or None where transformers loads the folder itself.
        dropped: source keys that a conversion leaves behind, among others.
    """

    folder: Path
    tensors: dict[str, torch.Tensor]
    arguments: dict = field(default_factory=dict)
    reference: OriginalLlava | None = None
    dropped: list[str] = field(default_factory=list)

    @property
    def grid(self) -> tuple[int, int]:
        return (self.reference and self.reference.pooled_grid) or (PATCH_GRID, PATCH_GRID)


_LAST_LAYER = "encoder.layers.2.layer_norm1.weight"  # a tensor of the vision layer that is not used

_HF = {
    # name: names, weights, dtype, prefix of the tower
    "llava-hf on the Hub": ("hub", {}, torch.float16, "vision_tower.vision_model."),
    "llava-hf on the Hub, sharded": ("hub", {"shards": 3}, torch.float16, "vision_tower.vision_model."),
    "llava-hf on the Hub, .bin": ("hub", {"kind": "bin", "shards": 2}, torch.float16, "vision_tower.vision_model."),
    "llava-hf of 4.52": ("4.52", {}, torch.bfloat16, "model.vision_tower.vision_model."),
    "llava-hf in memory": ("in memory", {"shards": 2}, torch.float32, "model.vision_tower."),
}
HF_FORMATS = ["llava-hf saved now", "llava-hf saved now, sharded", *_HF]

_TOWER = "model.vision_tower.vision_tower.vision_model."
_ORIGINAL = {
    # name: arguments of write_original, dtype, the tower's own writer
    "original, sharded .bin": ({"kind": "bin", "shards": 2, "trainer_files": True}, torch.float16, write_clip),
    "original, one .bin": (
        {"kind": "bin", "config": {"model_type": "llava_llama"}, "buffers": True},
        torch.bfloat16,
        write_clip_vision,
    ),
    "original, safetensors": ({"config": {"model_type": "llava_llama"}}, torch.float32, write_clip_vision),
    "original, sharded safetensors": ({"shards": 4}, torch.float16, write_clip),
    "original, tower inside": ({"tower_inside": True, "shards": 2}, torch.float32, write_clip),
    "original, tower inside, .bin, buffers": (
        {"tower_inside": True, "kind": "bin", "shards": 3, "buffers": True},
        torch.float16,
        write_clip,
    ),
}
STAGE_1_FORMATS = ["stage 1"]
SNIPPET_FORMATS = [
    "snippet, full, query_num",
    "snippet, full, no query_num",
    "snippet, stage 1, query_num",
    "snippet, stage 1, no query_num",
]
LORA_FORMATS = ["LoRA, safetensors", "LoRA, .bin", "LoRA, snippet"]
ORIGINAL_FORMATS = [*_ORIGINAL, *STAGE_1_FORMATS, *SNIPPET_FORMATS, *LORA_FORMATS]
FORMATS = [*HF_FORMATS, *ORIGINAL_FORMATS]


def write(name, folder) -> Source:
    """Write a format of `FORMATS`, with what it needs beside it, into sub-folders of `folder`."""
    folder = Path(folder)
    if name.startswith("llava-hf"):
        return _write_hf(name, folder / "my-lora-stage1-vicuna")
    if name in _ORIGINAL:
        return _write_original(name, folder)
    llava = OriginalLlava(pooled_grid=(3, 3) if "snippet" in name else None)
    write_clip(folder / "siglip-tower", llava.tower)
    write_base_model(folder / "llava-lora-base", llava)
    source = Source(
        folder / "llava-hf-full",
        llava.tensors(),
        {"vision_tower": folder / "siglip-tower", "base_model": folder / "llava-lora-base"},
        llava,
        ["vision_model." + _LAST_LAYER, "vision_model.embeddings.position_ids"],
    )
    config = {"query_num": 9} if name.endswith(" query_num") and "no query_num" not in name else {}
    if "query_num" not in config:
        source.arguments["pooled_grid_size"] = source.grid[0]
    if "stage 1" in name:
        write_stage_1(source.folder, llava, config=config)
    elif "LoRA" in name:
        write_lora(source.folder, add_lora(llava), kind="bin" if ".bin" in name else "safetensors", config=config)
    else:
        del source.arguments["base_model"]
        write_original(source.folder, llava, config=config, kind="bin", shards=2)
    return source


def _write_hf(name, folder) -> Source:
    if name not in _HF:
        model = build_hf_model()
        write_hf_saved(folder, model, max_shard_size="40KB" if "sharded" in name else "5GB")
        return Source(
            folder, dict(model.state_dict()), {"pooled_grid_size": PATCH_GRID}, dropped=["vision_tower." + _LAST_LAYER]
        )
    names, weights, dtype, tower = _HF[name]
    tensors = write_hf_hub(folder, names, dtype, **weights)
    return Source(folder, tensors, {"pooled_grid_size": PATCH_GRID}, dropped=[tower + _LAST_LAYER])


def _write_original(name, folder) -> Source:
    choices, dtype, write_tower = _ORIGINAL[name]
    llava = OriginalLlava().round_to(dtype)
    tensors = {key: value.to(dtype) for key, value in llava.tensors().items()}
    source = Source(
        folder / "llava-hf-lora", tensors, {"vision_tower": folder / "tower", "pooled_grid_size": PATCH_GRID}, llava
    )
    write_original(source.folder, (llava, tensors), **choices)
    if choices.get("tower_inside"):  # the named one was where training began
        write_tower(folder / "tower", OriginalLlava(seed=77).tower)
        source.dropped.append(_TOWER + _LAST_LAYER)
    else:
        write_tower(folder / "tower", llava.tower)
        source.tensors = {
            key: value.float() if "vision_tower" in key else value for key, value in source.tensors.items()
        }
        source.dropped.append("vision_model." + _LAST_LAYER)
    if choices.get("buffers"):
        source.dropped.append("model.layers.0.self_attn.rotary_emb.inv_freq")
    if choices.get("buffers") and choices.get("tower_inside"):
        source.dropped.append(_TOWER + "embeddings.position_ids")
    return source
