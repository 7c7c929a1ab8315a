# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA checkpoints of transformers, which `from_pretrained` of DeCo's classes loads as they are.

The parameters of both models have the same names. What differs is read here, also for the converter: the config, the
older names of weights, the tokenizer, the image processor, the chat template and the generation config. Only files are
read: never a checkpoint's own code.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file
from transformers.utils.hub import cached_files

from .chat_templates import (
    CHAT_TEMPLATES,
    IMAGE_TOKEN,
    PROBE_CONVERSATION,
    VICUNA_CHAT_TEMPLATE,
    VICUNA_SYSTEM,
    VIDEO_TOKEN,
    adapt_chat_template,
    render,
)
from .feature_maps import has_feature_map

# Starts of weights' names, as regular expressions, and DeCo's: the names that transformers writes, the older ones on
# the Hub, and those in memory. It is a `key_mapping` of `from_pretrained`.
KEY_MAPPING = {
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.",
    r"^(?:model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
    r"^(?:language_model\.model|model\.language_model)\.": "model.language_model.",
    r"^(?:language_model\.)?lm_head\.": "lm_head.",
    r"^(?:model\.)?image_newline": "model.image_newline",
}

LLAVA_TYPES = ("llava", "llava_next", "llava_next_video", "llava_onevision")  # model types of transformers' LLaVAs

# how LLaVA-OneVision reads videos: it interpolates frames after the projector, and puts a newline behind a video
ONEVISION_VIDEOS = {"spatial_pool_mode": "bilinear", "spatial_pool_stride": 2, "video_newline": True}

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
_SMALL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` that say where a checkpoint is."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def find_llava(name, **hub) -> Path | None:
    """The folder with the files of a LLaVA of transformers, without its weights. Files on the Hub are downloaded.

    Args:
        name: folder or Hub id.
        hub: `hub_arguments`.

    Returns:
        The folder, or None if the checkpoint is a DeCo or has no `config.json`.

    Raises:
        ValueError: it is a model of another kind.
    """
    config_file = _find(name, "config.json", **hub)
    fields = {} if config_file is None else read_settings(Path(config_file))
    if config_file is None or fields.get("model_type") in (None, "deco"):
        return None
    if not is_llava(fields):
        raise ValueError(refusal(fields["model_type"], name))
    if not Path(name).is_dir():
        # private, seen in transformers 5.19 to 5.24
        cached_files(name, list(_SMALL_FILES), _raise_exceptions_for_missing_entries=False, **hub)
    return Path(config_file).parent


def _find(name, filename: str, **hub) -> str | None:
    if name is None or Path(name).is_file():
        return None
    # private, seen in transformers 5.19 to 5.24
    return cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **hub)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def check_safetensors(name, **hub) -> None:
    """Raise a ValueError if a checkpoint has no safetensors files."""
    if not any(_find(name, filename, **hub) for filename in _WEIGHTS):
        raise ValueError(
            f"{name} has no safetensors files, and no others are loaded as they are. deco convert makes a DeCo of a "
            f"LLaVA with .bin files."
        )


# --- config ----------------------------------------------------------------------------------------------------------


def is_llava(fields: dict) -> bool:
    """Whether the fields of a `config.json` are those of a LLaVA of transformers. The original code has a config of
    one level, with `mm_*` fields."""
    is_of_transformers = "vision_config" in fields or "text_config" in fields
    model_type = fields.get("model_type")
    return is_of_transformers and isinstance(model_type, str) and model_type in LLAVA_TYPES


# why no DeCo can be made of a model of another kind, by the start of its model type
_MERGES_PATCHES = "its vision tower takes pictures of any shape, and merges patches by learned weights"
_REASONS = {
    "vipllava": "it reads several layers of its vision tower, and DeCo reads one",
    "video_llava": "it has a second vision tower for videos; LLaVA-NeXT-Video and LLaVA-OneVision have one for both",
    "qwen2_vl": _MERGES_PATCHES,
    "qwen2_5_vl": _MERGES_PATCHES,
    "qwen3_vl": _MERGES_PATCHES,
    "internvl": "its projector learned patches that are shuffled four to one",
    "mllama": "its language model reads pictures by cross-attention",
    "blip": "its projector has learned queries; recipes/sft.py trains one (projector_type='qformer')",
    "idefics": "its projector has learned queries; recipes/sft.py trains one (projector_type='resampler')",
}


def reason_against(model_type) -> str:
    """Why no DeCo can be made of a model of this type, `": ..."`; empty if it is not known."""
    return next((f": {reason}" for kind, reason in _REASONS.items() if str(model_type).startswith(kind)), "")


def refusal(model_type, name: str) -> str:
    """The message for a checkpoint that is neither a DeCo nor a LLaVA of transformers, but maybe one of the original
    code."""
    return (
        f"{name} is a {model_type!r} model, not a DeCo{reason_against(model_type)}. deco convert makes one of a "
        f"LLaVA; recipes/sft.py joins a vision tower and a language model (--vision_model_name_or_path)."
    )


def check_features(fields: dict, where: str) -> None:
    """Raise a ValueError if the config of a LLaVA, of any code, has what DeCo lacks.

    Args:
        where: name of the file in the message.
    """
    if fields.get("quantization_config"):
        raise ValueError(
            f"{where} has a quantization_config: quantized weights cannot be converted; take the float checkpoint "
            f"that they were made from, which can be quantized while it is loaded."
        )
    if fields.get("s2") or fields.get("mm_vision_s2"):
        raise ValueError(
            f"s2 in {where}: DeCo does not support multi-scale (S2) features; take a LLaVA without them, such as "
            f"LLaVA-1.6, which cuts pictures into tiles."
        )
    aspect_ratio = fields.get("image_aspect_ratio")
    if is_llava(fields) and fields["model_type"] == "llava" and aspect_ratio not in (None, "square", "pad"):
        raise ValueError(
            f"image_aspect_ratio {aspect_ratio!r} in {where}: a 'llava' of transformers has one view of an image; "
            f"those that cut it into views are 'llava_next' and 'llava_onevision'."
        )


def deco_fields(fields: dict, where: str) -> dict[str, Any]:
    """The fields of a `DecoConfig`, all but its grid, from those of a LLaVA of transformers.

    Raises:
        ValueError: several vision layers are used, or the vision tower is not supported.
    """
    try:
        parts = {part: fields.get(part) for part in ("vision_config", "text_config")}
        config = AutoConfig.for_model(fields["model_type"], **parts)
    except Exception as error:  # configs raise many types
        raise ValueError(f"{where} cannot be used: {type(error).__name__}: {_one_line(error)}") from error
    layer = fields.get("vision_feature_layer", config.vision_feature_layer)
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer {layer} in {where} is not one layer; DeCo reads one.")
    model_type = config.vision_config.model_type
    if model_type.startswith("dinov2") or has_feature_map(config.vision_config):
        raise ValueError(f"The vision tower in {where} is a {model_type}; use a CLIP or a SigLIP.")
    strategy = fields.get("vision_feature_select_strategy", config.vision_feature_select_strategy)
    common = {
        "vision_config": config.vision_config,
        "text_config": config.text_config,
        "image_token_id": _token_id(fields, "image_token", config),
        "image_positions": "patch",
        "projector_hidden_act": fields.get("projector_hidden_act", config.projector_hidden_act),
        "multimodal_projector_bias": fields.get("multimodal_projector_bias", config.multimodal_projector_bias),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
    }
    return common | _view_fields(fields, config, where)


def _view_fields(fields: dict, config: PreTrainedConfig, where: str) -> dict[str, Any]:
    """The fields of views and videos, of a family that has them.

    Args:
        fields: those of the file.
        config: the family's, with its defaults.
    """
    family = config.model_type
    if family == "llava":
        return {}
    pinpoints = fields.get("image_grid_pinpoints")
    views = {
        "image_grid_pinpoints": config.image_grid_pinpoints if pinpoints is None else pinpoints,
        "image_newline": True,
    }
    if family == "llava_next":
        return views
    views["video_token_id"] = _token_id(fields, "video_token", config)
    if type(views["video_token_id"]) is not int:
        raise ValueError(f"video_token_index in {where} must be an int, got {str(views['video_token_id'])[:80]!r}.")
    if family == "llava_onevision":
        aspect_ratio = fields.get("vision_aspect_ratio", config.vision_aspect_ratio)
        return views | {"vision_aspect_ratio": aspect_ratio} | ONEVISION_VIDEOS
    mode = fields.get("spatial_pool_mode", config.spatial_pool_mode)
    if mode != "average":
        raise ValueError(
            f"spatial_pool_mode {mode!r} in {where}: DeCo averages the patches of a frame, and has no 'max' and no "
            f"'conv'; take a LLaVA-NeXT-Video with 'average'."
        )
    stride = fields.get("spatial_pool_stride", config.spatial_pool_stride)
    return views | {"spatial_pool_mode": mode, "spatial_pool_stride": stride}


def _token_id(fields: dict, token: str, config):
    """The id of a placeholder, which has two names."""
    return fields.get(f"{token}_index", fields.get(f"{token}_id", getattr(config, f"{token}_index")))


# --- processor -------------------------------------------------------------------------------------------------------


def has_processor(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer and of an image processor."""
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    image_processors = ("preprocessor_config.json", "processor_config.json")
    return all(any((folder / name).exists() for name in names) for names in (tokenizers, image_processors))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file, without those that are null; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a JSON {type(settings).__name__} where an object is expected.")
    return {name: value for name, value in settings.items() if value is not None}


def load_tokenizer(folder: Path, **kwargs) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder's `tokenizer.json`, with what `add_special_tokens` adds.

    Args:
        kwargs: arguments of the tokenizer, such as `model_max_length`.

    Raises:
        ValueError: there is no `tokenizer.json`, or it cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json. deco convert also reads a sentencepiece tokenizer.model.")
    try:
        tokenizer = read_tokenizer(folder, **kwargs)
    except Exception as error:  # tokenizers and transformers raise many types
        raise ValueError(f"{folder}: the tokenizer cannot be read: {_one_line(error)}") from error
    add_special_tokens(tokenizer)
    return tokenizer


def read_tokenizer(folder: Path, **kwargs) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder's `tokenizer.json`. Padding is on the left, as generation needs."""
    kwargs = {"local_files_only": True, "padding_side": "left", **kwargs}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **kwargs)
    tokenizer.init_kwargs.pop("auto_map", None)  # it names code, which is not copied
    return tokenizer


def add_special_tokens(tokenizer, extra_tokens=()) -> None:
    """Add what is missing: `extra_tokens`, `"<image>"` and, if no token is for padding only, `"<pad>"`."""
    for token in (*extra_tokens, IMAGE_TOKEN):
        _add_token(tokenizer, token)
    if tokenizer.pad_token in (None, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token):
        _add_token(tokenizer, "<pad>")
        tokenizer.pad_token = "<pad>"


def _add_token(tokenizer, token: str) -> None:
    if token not in tokenizer.get_added_vocab():
        tokenizer.add_tokens(AddedToken(token, special=True, normalized=False), special_tokens=True)


def check_image_token(tokenizer, image_token_id: int, name) -> None:
    """Raise a ValueError if the id of `<image>` is not that of the config."""
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found != image_token_id:
        raise ValueError(
            f"image_token_index is {image_token_id} in config.json of {name}, and the id of '<image>' in its "
            f"tokenizer is {found}; they must be equal."
        )


def choose_video_token(tokenizer, video_token_id: int | None, num_rows: float, name) -> int | None:
    """The id of `<video>`, which is added to the tokenizer if it is missing, so that any LLaVA can read videos.

    Args:
        tokenizer: None if the checkpoint has none.
        video_token_id: that of the config.
        num_rows: rows of the embeddings.

    Returns:
        None if the embeddings have no row for the token, which is not added then.

    Raises:
        ValueError: the tokenizer has `<video>` with another id than the config.
    """
    if tokenizer is None:
        return video_token_id if video_token_id is not None and 0 <= video_token_id < num_rows else None
    found = tokenizer.get_vocab().get(VIDEO_TOKEN)
    if found is not None and video_token_id not in (None, found):
        raise ValueError(
            f"video_token_index is {video_token_id} in config.json of {name}, and the id of '<video>' in its "
            f"tokenizer is {found}; they must be equal."
        )
    if found is None and len(tokenizer) >= num_rows:
        return None
    _add_token(tokenizer, VIDEO_TOKEN)
    return tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)


def check_vocabulary(tokenizer, vocab_size: int, name) -> None:
    """Raise a ValueError if the embeddings have no row for a token."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{name} has {vocab_size} embeddings for {len(tokenizer)} tokens: a token for images or for padding is "
            f"new. deco convert makes a DeCo with rows for new tokens."
        )


def image_processor_settings(folder: Path, read=read_settings) -> tuple[str | None, dict[str, Any]]:
    """The class and the settings of the image processor in a folder; None if no class is named.

    Args:
        read: reads the settings in a JSON file; empty if there is no file.
    """
    settings = read(folder / "processor_config.json").get("image_processor")
    settings = settings or read(folder / "preprocessor_config.json")
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    return kind and kind.replace("FeatureExtractor", "ImageProcessor"), settings


def load_image_processor(folder: Path, **kwargs):
    """The image processor of a LLaVA: that of its vision tower, or LLaVA's own, which pads images to a square.

    Args:
        kwargs: arguments of `AutoImageProcessor.from_pretrained`, such as `backend`.

    Raises:
        ValueError: there is none.
    """
    kind, settings = image_processor_settings(folder)
    if kind is None:
        raise ValueError(
            f"{folder} names no image processor: neither preprocessor_config.json nor processor_config.json has an "
            f"image_processor_type."
        )
    return build_image_processor(kind, settings, **kwargs)


def build_image_processor(kind: str, settings: dict, **kwargs):
    """Build an image processor with the auto class of transformers, which chooses the backend but only reads files."""
    # imported here to avoid a circle: its module imports the one that registers DecoConfig
    from transformers import AutoImageProcessor

    settings = {name: value for name, value in settings.items() if name not in ("auto_map", "feature_extractor_type")}
    with tempfile.TemporaryDirectory() as folder:
        content = json.dumps({**settings, "image_processor_type": kind})
        Path(folder, "preprocessor_config.json").write_text(content, encoding="utf-8")
        kwargs["local_files_only"] = True
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, **kwargs)


def check_image_processor(image_processor, config, name) -> None:
    """Raise a ValueError if the image processor does not cut pictures into the views of the model's config."""
    found, expected = getattr(image_processor, "image_grid_pinpoints", None), config.image_grid_pinpoints
    if json.dumps(found) != json.dumps(expected):  # tuples are lists
        raise ValueError(
            f"image_grid_pinpoints of {name} must be equal in config.json and preprocessor_config.json, and are "
            f"{str(expected)[:60]} and {str(found)[:60]}."
        )


def load_chat_template(folder: Path, tokenizer, read=read_settings) -> str | dict[str, str] | None:
    """The chat template of a checkpoint: that of its processor, or otherwise that of its tokenizer.

    Args:
        read: reads the settings in a JSON file; empty if there is no file.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):  # of transformers before 4.52
        template = read(folder / name).get("chat_template")
        if template is not None:
            return template
    return tokenizer.chat_template


def choose_chat_template(template, tokenizer=None, model_type: str = "llama") -> tuple[str, str]:
    """The chat template of a LLaVA as a DeCo, and its origin: `"source"`, `"adapted"` or `"vicuna"`.

    A template of the source that renders images is kept, unless its format is Vicuna's. In that case this package's
    template for Vicuna is used: it ends an answer by `</s>`, which the one of llava-hf lacks. The system prompt is
    omitted if the source has none. A template for text only is adapted. `complete_chat_template` then adds what the
    template lacks.
    Without a template, the special tokens of the tokenizer show the format; a Llama with an unknown format gets
    Vicuna's.

    Args:
        template: the source's: Jinja, several by name, or None.
        tokenizer: the language model's.
        model_type: the language model's.

    Raises:
        ValueError: the format is not recognized.
    """
    if isinstance(template, dict):
        template = template.get("default")
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"} if tokenizer is None else tokenizer.special_tokens_map
    rendered = render(template, PROBE_CONVERSATION, **special_tokens) or "" if template else ""
    if IMAGE_TOKEN in rendered:
        if not re.search(r"USER:.*ASSISTANT:", rendered, re.DOTALL):
            return template, "source"
        has_system = "artificial intelligence assistant" in rendered
        return VICUNA_CHAT_TEMPLATE if has_system else VICUNA_CHAT_TEMPLATE.replace(VICUNA_SYSTEM, ""), "vicuna"
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    if adapted := adapt_chat_template(template, vocabulary, **special_tokens):
        return adapted, "vicuna" if adapted == VICUNA_CHAT_TEMPLATE else "adapted"
    if model_type == "llama":
        return VICUNA_CHAT_TEMPLATE, "vicuna"
    raise ValueError(
        f"The chat format of a {model_type!r} language model is not recognized: its tokenizer has "
        f"{'a chat template that cannot show images' if template else 'no chat template'}. Choose the format with "
        f"deco convert --chat-template: {', '.join(CHAT_TEMPLATES)}, or a Jinja file."
    )


# --- generation config -----------------------------------------------------------------------------------------------

# Settings that have an effect only with sampling or with beams. Without these, transformers refuses to save them.
_SAMPLING_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_BEAM_SETTINGS = ("early_stopping", "length_penalty")


def generation_config_of(settings: dict[str, Any], tokenizer) -> GenerationConfig:
    """The generation config of a LLaVA as a DeCo.

    Special tokens that are not set are those of the tokenizer, if there is one; so is the padding token. Settings
    without effect, such as the temperature without sampling in Vicuna's file, are left out: transformers does not save
    them.

    Args:
        settings: what `generation_config.json` has.

    Raises:
        ValueError, TypeError: settings contradict each other.
    """
    if tokenizer is not None:
        settings = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **settings}
        settings["pad_token_id"] = tokenizer.pad_token_id
    idle = ["transformers_version", "_from_model_config"]  # of the program that wrote the file
    if not settings.get("do_sample"):
        idle += _SAMPLING_SETTINGS
    if settings.get("num_beams", 1) == 1:
        idle += _BEAM_SETTINGS
    config = GenerationConfig(**{name: value for name, value in settings.items() if name not in idle})
    config.validate(strict=True)
    return config


def suppress_placeholders(generation_config: GenerationConfig, config) -> None:
    """The placeholders of images and videos are never generated. `config` is the model's."""
    placeholders = [index for index in (config.image_token_id, config.video_token_id) if index is not None]
    generation_config.suppress_tokens = list(
        dict.fromkeys([*(generation_config.suppress_tokens or []), *placeholders])
    )
