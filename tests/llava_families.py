# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVA-NeXT, LLaVA-OneVision and LLaVA-NeXT-Video: models of transformers, their folders as transformers and the
Hub have them, and the same weights in the layout of the original code.

As in `llava_sources`, nothing of the converter is used here. What is expected comes from transformers' own classes.
"""

from pathlib import Path

import llava_sources
import numpy as np
import tiny
import torch
from llava_sources import CLIP_MEAN, CLIP_STD, IMAGE_MARKER, write_json
from peft import LoraConfig, get_peft_model
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    MistralForCausalLM,
    Qwen2ForCausalLM,
)

VIDEO_MARKER = -201  # the place of a video in a prompt
SIDE, VOCAB_SIZE = tiny.IMAGE_SIZE, llava_sources.PADDED_VOCAB_SIZE
CLASSES = {
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_next_video": (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}
TOKENS = {  # special tokens of each family in the order of their ids, from 300
    "llava_next": ["<image>", "<pad>"],
    "llava_next_video": ["<video>", "<image>", "<pad>"],
    "llava_onevision": ["<image>", "<video>", "<pad>"],
}
# (rows, cols) of the tiles: those of LLaVA-1.6, and the square ones of OneVision
NEXT_SHAPES = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ONEVISION_SHAPES = [(rows, cols) for rows in range(1, 5) for cols in range(1, 5)]
# (height, width): portrait, landscape, square, tiny, very large, very thin
SIZES = [
    (24, 24),
    (30, 40),
    (40, 30),
    (70, 71),
    (100, 100),
    (13, 90),
    (90, 13),
    (5, 7),
    (1, 1),
    (600, 900),
    (1001, 333),
    (47, 25),
]

# --- chat templates, as llava-hf has them on the Hub -----------------------------------------------------------------

_IMAGES = (
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)
_VIDEOS = _IMAGES.replace("images", "videos").replace("image", "video")
_TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
_VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% else %}"
    "{{ message['role'].upper() + ': '}}{% endif %}" + _IMAGES + "VIDEOS{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}" + _TEXTS + "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    + _TEXTS + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # fmt: skip
CHAT_TEMPLATES = {
    "vicuna": _VICUNA.replace("VIDEOS", ""),
    "next video": _VICUNA.replace("VIDEOS", _VIDEOS),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' }}" + _IMAGES + _TEXTS + "{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        + _IMAGES + _TEXTS + "{{ content['text'] + '<|eot_id|>' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "yi": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}" + _IMAGES + _TEXTS
        + "{{ content['text'] + '<|im_end|>' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "onevision": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
        + (_IMAGES + _VIDEOS).replace("\n", "") + "{# Render all text next #}{% if message['role'] != 'assistant' %}"
        + _TEXTS + "{{ '\n' + content['text'] }}{% endfor %}{% else %}" + _TEXTS
        + "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}  # fmt: skip
TEMPLATE_OF = {"llava_next": "vicuna", "llava_next_video": "next video", "llava_onevision": "onevision"}


# --- models ----------------------------------------------------------------------------------------------------------


def pinpoints(shapes, side=SIDE) -> list[list[int]]:
    return [[rows * side, cols * side] for rows, cols in shapes]


def build(family, vision=None, text=None, side=SIDE, shapes=None, seed=0, text_choices=None, **choices):
    """A random model of transformers.

    Args:
        family: of `CLASSES`.
        vision, text: names of tiny's backbones.
        side: image size of the vision tower.
        shapes: `(rows, cols)` of the pinpoints in views.
        text_choices: more fields of the language model's config.
        choices: more fields of the model's config.
    """
    is_onevision = family == "llava_onevision"
    vision, text = vision or ("siglip" if is_onevision else "clip"), text or ("qwen2" if is_onevision else "llama")
    vision_config = {**tiny.VISION_CONFIGS[vision], "image_size": side}
    strategy = "default" if vision == "clip" else "full"
    choices = {"vision_feature_select_strategy": strategy, **choices}
    if vision == "siglip":
        vision_config["vision_use_head"] = False
    if is_onevision:
        choices = {"vision_aspect_ratio": "anyres_max_4", **choices}
    tokens = {f"{token[1:-1]}_token_index": 300 + index for index, token in enumerate(TOKENS[family])}
    tokens.pop("pad_token_index")
    config_class, model_class = CLASSES[family]
    text_config = {**tiny.TEXT_CONFIGS[text], "vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096}
    config = config_class(
        vision_config=vision_config,
        text_config={**text_config, **(text_choices or {})},
        image_grid_pinpoints=pinpoints(shapes or (ONEVISION_SHAPES if is_onevision else NEXT_SHAPES), side),
        **{**tokens, **choices},
    )
    model = tiny.randomize(model_class(config), seed)
    model.tie_weights()
    return model


def image_processor(model):
    """Transformers' image processor of the model's family."""
    config, side = model.config, model.config.vision_config.image_size
    square = {"height": side, "width": side}
    settings = {"image_grid_pinpoints": config.image_grid_pinpoints, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    if config.model_type == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=square, **settings)
    return LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **settings)


# --- folders of transformers -----------------------------------------------------------------------------------------


def write_hf(folder, model, template=None, names=None, dtype=None, **weights) -> None:
    """A folder of transformers. Processors of models for videos cannot be built without torchvision, so that the files
    are written as on the Hub.

    Args:
        template: a name of `CHAT_TEMPLATES`.
        names: of `llava_sources.HF_NAMES`; None: as `save_pretrained` writes them.
        dtype: type of the stored weights.
        weights: arguments of `save_pretrained` or `llava_sources.write_weights`.
    """
    family = model.config.model_type
    if names is None:
        model.save_pretrained(folder, **weights)
    else:
        tensors = {name: value.to(dtype or value.dtype) for name, value in model.state_dict().items()}
        table = {**llava_sources.HF_NAMES[names], "model.image_newline": "image_newline", "": ""}
        llava_sources.write_weights(folder, llava_sources.rename(tensors, table), **weights)
        model.config.save_pretrained(folder)
    write_processor(folder, model, template or TEMPLATE_OF[family])
    llava_sources.write_readme(folder)


def write_processor(folder, model, template) -> None:
    family, side = model.config.model_type, model.config.vision_config.image_size
    llava_sources.build_tokenizer(TOKENS[family]).save_pretrained(folder)
    image_processor(model).save_pretrained(folder)
    settings = {
        "llava_next": {"processor_class": "LlavaNextProcessor", "patch_size": tiny.PATCH_SIZE},
        "llava_next_video": {"processor_class": "LlavaNextVideoProcessor", "patch_size": tiny.PATCH_SIZE},
        "llava_onevision": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (side // tiny.PATCH_SIZE) ** 2,
            "vision_aspect_ratio": getattr(model.config, "vision_aspect_ratio", None),
        },
    }[family]
    strategy = model.config.vision_feature_select_strategy
    settings |= {"image_token": "<image>", "vision_feature_select_strategy": strategy}
    if family != "llava_onevision":
        settings["num_additional_image_tokens"] = int(strategy == "default")
    if "<video>" in TOKENS[family]:
        settings["video_token"] = "<video>"
        kind = "LlavaOnevision" if family == "llava_onevision" else "LlavaNextVideo"
        write_json(folder, "video_preprocessor_config.json", {"video_processor_type": f"{kind}VideoProcessor"})
    write_json(folder, "processor_config.json", settings)
    write_json(folder, "chat_template.json", {"chat_template": CHAT_TEMPLATES[template]})


# --- the layout of the original code ---------------------------------------------------------------------------------


def write_original(folder, model, tower, tower_inside=False, config=None, **weights) -> None:
    """The whole model as the original code writes it.

    Args:
        tower: folder that the config names, to be written with `write_tower`.
        tower_inside: as after training with the tower unfrozen.
        config: more fields of `config.json`.
        weights: arguments of `llava_sources.write_weights`.
    """
    tensors = original_tensors(model)
    if tower_inside:  # the original code cuts the last layer of a SigLIP off
        last = f"encoder.layers.{model.config.vision_config.num_hidden_layers - 1}."
        tensors = {name: value for name, value in tensors.items() if last not in name or "vision_tower" not in name}
    else:
        tensors = {name: value for name, value in tensors.items() if "vision_tower" not in name}
    llava_sources.write_weights(folder, tensors, **weights)
    trained = {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model"} if tower_inside else {}
    write_original_files(folder, model, tower, **trained, **(config or {}))


def original_tensors(model) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    newline = tensors.pop("model.image_newline")
    return {**llava_sources.original_names(tensors), "model.image_newline": newline}


def write_original_files(folder, model, tower, **config) -> None:
    write_json(folder, "config.json", original_config(model, tower, **config))
    llava_sources.write_original_tokenizer(folder)
    llava_sources.write_readme(folder)


def original_config(model, tower, **config) -> dict:
    """`config.json` of the original code: LLaVA-1.6's, LLaVA-NeXT-Video's or LLaVA-OneVision's."""
    family, text = model.config.model_type, model.config.text_config
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}[text.model_type]
    side = model.config.vision_config.image_size
    fields = {
        "architectures": [f"Llava{name}ForCausalLM"],
        "model_type": "llava",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_aspect_ratio": "anyres",
        "image_crop_resolution": 224,
        "image_grid_pinpoints": model.config.image_grid_pinpoints,
        "image_split_resolution": 224,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_tower": str(tower),
        "mm_vision_tower_lr": 2e-06,
        "tokenizer_model_max_length": 4096,
        "use_image_newline_parameter": True,
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
    }
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    fields |= {name: getattr(text, name) for name in (*names, "max_position_embeddings", "rms_norm_eps")}
    fields["tie_word_embeddings"] = bool(text.tie_word_embeddings)
    if family == "llava_next_video":
        fields |= {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average"}
        fields |= {"mm_spatial_pool_stride": model.config.spatial_pool_stride, "mm_spatial_pool_out_channels": 1024}
    elif family == "llava_onevision":
        shapes = [(height // side, width // side) for height, width in model.config.image_grid_pinpoints]
        fields |= {
            "image_aspect_ratio": model.config.vision_aspect_ratio,
            "image_grid_pinpoints": f"(1x1),...,({max(shapes)[0]}x{max(shapes)[1]})",
            "mm_spatial_pool_mode": "bilinear",
            "pos_skipping_range": 4096,
            "use_pos_skipping": False,
            "vision_tower_pretrained": None,
        }
    return {**fields, **config}


def write_tower(folder, model) -> None:
    """The model's vision tower alone."""
    tower = model.model.vision_tower
    llava_sources.write_weights(folder, {f"vision_model.{name}": value for name, value in tower.state_dict().items()})
    write_json(folder, "config.json", tower.config.to_diff_dict())
    side = tower.config.image_size
    write_json(folder, "preprocessor_config.json", llava_sources.clip_preprocessor_config(side))


def write_lora(folder, model, tower, base) -> None:
    """LoRA adapters over the language model, which is written to `base` as it was before; the projector and the
    newline are in `non_lora_trainables.bin`. The model gets the merged weights."""
    text_class = {"mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}[model.config.text_config.model_type]
    language_model = text_class(model.config.text_config)
    language_model.model, language_model.lm_head = model.model.language_model, model.lm_head
    language_model.tie_weights()
    stored = {name: value.clone() for name, value in language_model.state_dict().items()}
    llava_sources.write_weights(base, stored)
    write_json(base, "config.json", language_model.config.to_diff_dict())
    llava_sources.write_original_tokenizer(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": llava_sources.LINEAR_NAMES}
    wrapped = get_peft_model(language_model, LoraConfig(bias="none", task_type="CAUSAL_LM", **settings))
    tiny_generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=tiny_generator) * 0.1)
    wrapped.save_pretrained(folder)
    trained = {name: value for name, value in original_tensors(model).items() if "mm_projector" in name}
    trained["model.image_newline"] = model.model.image_newline.detach()
    torch.save(
        {f"base_model.model.{name}": value.clone() for name, value in trained.items()},
        Path(folder, "non_lora_trainables.bin"),
    )
    write_json(folder, "config.json", original_config(model, tower))
    llava_sources.write_readme(folder)
    merged = wrapped.merge_and_unload()
    model.model.language_model, model.lm_head = merged.model, merged.lm_head


# --- inputs ----------------------------------------------------------------------------------------------------------


def frames(num_videos, num_frames, side=SIDE, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_videos, num_frames, 3, side, side, generator=generator)


def image_inputs(model, samples) -> dict[str, torch.Tensor]:
    """What transformers' image processor makes of pictures.

    Args:
        samples: for each sample its pictures' sizes `(height, width)`.
    """
    pictures = [[noise(*size, seed=index) for index, size in enumerate(sizes)] for sizes in samples if sizes]
    if not pictures:
        return {}
    if model.config.model_type != "llava_onevision":
        pictures = [picture for sample in pictures for picture in sample]
    return dict(image_processor(model)(pictures, return_tensors="pt"))


def noise(height, width, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


@torch.no_grad()
def prepare(model, prompts, images=None, videos=None) -> dict[str, torch.Tensor]:
    """Inputs of transformers' model: each marker becomes as many placeholders as the model makes features.

    Args:
        prompts: ids with `IMAGE_MARKER` and `VIDEO_MARKER`.
        images: what `image_inputs` gives.
        videos: `(num_videos, num_frames, 3, height, width)`.
    """
    counts = {IMAGE_MARKER: iter(()), VIDEO_MARKER: iter(())}
    placeholders = {IMAGE_MARKER: model.config.image_token_id}
    inputs = dict(images or {})
    if images:
        features = model.model.get_image_features(**images).pooler_output
        counts[IMAGE_MARKER] = iter([len(feature) for feature in features])
    if videos is not None:
        features = model.model.get_video_features(videos).pooler_output
        # in transformers 5.19, LLaVA-NeXT-Video has one more dimension, of the frames
        counts[VIDEO_MARKER] = iter([feature.shape[:-1].numel() for feature in features])
        placeholders[VIDEO_MARKER] = model.config.video_token_id
        inputs["pixel_values_videos"] = videos
    rows = [
        [
            token
            for index in prompt
            for token in ([placeholders[index]] * next(counts[index]) if index in counts else [index])
        ]
        for prompt in prompts
    ]
    return {**inputs, **tiny.batch(*rows)}


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits
