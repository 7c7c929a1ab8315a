# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What turns pictures and words into a converted model's inputs: tokenizer, chat template, image processor, and the
settings of generation.

All of it is read from folders: never the network, never a checkpoint's own code.
"""

import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ..chat_templates import (
    CHAT_TEMPLATES,
    IMAGE_TOKEN,
    PROBE_CONVERSATION,
    VICUNA_CHAT_TEMPLATE,
    VICUNA_SYSTEM,
    adapt_chat_template,
    read_chat_template,
    render,
    shows_images,
)
from ..utils.errors import ConversionError, one_line
from ..utils.files import read_json, value_errors
from ..utils.image_processors import build_image_processor, pad_to_square

# Settings that act only where sampling or beams are on; transformers refuses to save them elsewhere.
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


def _read_settings(path: Path) -> dict:
    """What a JSON file sets; empty where there is no file."""
    return {name: value for name, value in read_json(path).items() if value is not None} if path.is_file() else {}


# --- tokenizer -------------------------------------------------------------------------------------------------------


def load_tokenizer(folder, extra_tokens=()) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with a `tokenizer.json`, or with Llama's sentencepiece `tokenizer.model` alone.

    `extra_tokens`, `"<image>"` and, where no token is there for padding alone, `"<pad>"` are added in this order, each
    only where it is missing. Padding is on the left, as generation needs.

    A `tokenizer.model` is converted here and not by transformers (seen in 5.19 to 5.24), which wants protobuf, gives
    other ids where several spaces stand together, and takes an unset `legacy` for false. The ids are those of the
    original LLaVA: it cuts a prompt at its images and reads each piece as a text of its own, and Llama begins a text
    with a space. After other special tokens there is such a space only if the tokenizer is `legacy`.

    Raises:
        ConversionError: there is no tokenizer, it cannot be read, or sentencepiece is needed and not installed.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, padding_side="left")
        except Exception as error:  # of many kinds, by tokenizers and by transformers
            raise ConversionError(f"{folder}: the tokenizer cannot be read: {one_line(error)}") from error
        tokenizer.init_kwargs.pop("auto_map", None)  # names code, which stays behind
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _convert_sentencepiece(folder, extra_tokens)
    else:
        raise ConversionError(
            f"{folder} has no tokenizer.json and no tokenizer.model; name the folder of the right tokenizer."
        )
    for token in (*extra_tokens, IMAGE_TOKEN):
        _add_token(tokenizer, token)
    if tokenizer.pad_token in (None, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token):
        _add_token(tokenizer, "<pad>")
        tokenizer.pad_token = "<pad>"  # noqa: S105
    return tokenizer


def _add_token(tokenizer, token: str) -> None:
    if token not in tokenizer.get_added_vocab():
        tokenizer.add_tokens(AddedToken(token, special=True, normalized=False), special_tokens=True)


def _convert_sentencepiece(folder: Path, extra_tokens) -> PreTrainedTokenizerFast:
    """Llama's slow tokenizer as a fast one, from the vocabulary of its `tokenizer.model`."""
    path = folder / "tokenizer.model"
    try:
        import sentencepiece  # optional: only these checkpoints need it
    except ImportError:
        raise ConversionError(
            f"{folder} has a tokenizer.model and no tokenizer.json; reading it takes sentencepiece: "
            f"pip install sentencepiece"
        ) from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ConversionError(
            f"{path} is not a sentencepiece model ({one_line(error)}); download it again."
        ) from error

    settings = _read_settings(folder / "special_tokens_map.json") | _read_settings(folder / "tokenizer_config.json")
    roles = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": model.eos_id()}
    pieces = {role: model.id_to_piece(index) for role, index in roles.items() if index >= 0}  # -1: it has none
    named = {role: _content(settings.get(role)) or piece for role, piece in pieces.items()}
    added = _added_tokens(folder, settings, special=(*named.values(), *extra_tokens))
    # Tokens that do not cut a text in two: all but those that the original puts between texts.
    inline = [token for token in (*named.values(), *added, *extra_tokens) if token != IMAGE_TOKEN]
    is_legacy = settings.get("legacy", True)  # Llama's slow tokenizer takes unset for true

    backend = _build_backend(model, [] if is_legacy else inline)
    _check_same_ids(model, backend, path)
    for token in dict.fromkeys([*added, *inline]):
        _, special = added.get(token, (None, True))
        # A normalized token is looked for after a text has got its first space, which leaves the rest without one.
        normalized = token in inline and not is_legacy
        backend.add_tokens([AddedToken(token, special=special, normalized=normalized)])
    for token, (index, _) in added.items():
        if backend.token_to_id(token) != index:
            raise ConversionError(
                f"{folder}: the added token {token!r} should have id {index}, and after the {model.get_piece_size()} "
                f"of tokenizer.model it gets {backend.token_to_id(token)}; its added tokens are not complete."
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        pad_token=_content(settings.get("pad_token")),
        **named,
        **{name: settings[name] for name in ("model_max_length", "chat_template") if name in settings},
    )


def _added_tokens(folder: Path, settings: dict, special) -> dict[str, tuple[int, bool]]:
    """`(id, is it special)` of each token that was added to the vocabulary, in the order of ids."""
    special = {*special, *map(_content, settings.get("additional_special_tokens", []))}
    added = {token: (index, token in special) for token, index in _read_settings(folder / "added_tokens.json").items()}
    for index, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = (int(index), token.get("special", False))
    return dict(sorted(added.items(), key=lambda item: item[1]))


def _build_backend(model, inline_tokens) -> Tokenizer:
    """Byte pairs, merged by the pieces' scores. A text gets a first space, unless an inline token is its beginning."""
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    scored_merges = [
        (model.get_score(index), piece[:cut], piece[cut:])
        for index, piece in enumerate(pieces)
        if _is_text(model, index)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    # Runs of spaces have one score, the lowest. sentencepiece merges equals from the left: the longer left part first.
    scored_merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    merges = [(left, right) for _, left, right in scored_merges]
    unknown = pieces[model.unk_id()]
    backend = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    first_space = normalizers.Prepend("▁")
    if inline_tokens:
        tokens = "|".join(map(re.escape, inline_tokens))
        first_space = normalizers.Replace(Regex(rf"\A(?!{tokens})"), "▁")
    backend.normalizer = normalizers.Sequence([first_space, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return backend


def _is_text(model, index: int) -> bool:
    return not (model.is_unknown(index) or model.is_control(index) or model.is_byte(index) or model.is_unused(index))


def _check_same_ids(model, backend: Tokenizer, path: Path) -> None:
    """Read texts made of the whole vocabulary with both. They differ where a model is not of Llama's kind: a unigram
    model, one that normalizes, one with symbols of its user's."""
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size()) if _is_text(model, index)]
    texts = ["".join(pieces[start : start + 16]).replace("▁", " ") for start in range(0, len(pieces), 16)]
    for text in [*texts, "  two  spaces ", "\n\ttab", "Ａ ﬁ é 😀"]:
        if backend.encode(text).ids != model.encode(text):
            raise ConversionError(
                f"{path} is not of Llama's kind (byte pairs, no normalization): a fast tokenizer made of it gives "
                f"other ids for {text[:40]!r}; put a tokenizer.json beside it."
            )


def _content(token) -> str | None:
    """The text of a token as the JSON files have it: a string or an object."""
    return (token["content"] if isinstance(token, dict) else token) or None


# --- chat template ---------------------------------------------------------------------------------------------------


def load_chat_template(folder, tokenizer) -> str | None:
    """The chat template of a checkpoint: its processor's if it has one of its own, else its tokenizer's."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):  # of transformers before 4.52
        template = _read_settings(folder / name).get("chat_template")
        if template is not None:
            return template
    return tokenizer.chat_template


def choose_chat_template(template, tokenizer=None, model_type="llama", use_im_start_end=False) -> tuple[str, str]:
    """The chat template of a converted checkpoint, and where it is from: `"source"`, `"adapted"` or `"vicuna"`.

    The source's is kept where it shows images and is another format than Vicuna's. Of Vicuna's own, ours is taken: it
    marks for the loss what the assistant has to write, its end included, which llava-hf's leaves out. Questions are
    asked as the source asks them: without the system prompt where it has none. A template that knows text alone is
    adapted. Without a template the format is recognized by the tokenizer's special tokens; a Llama whose format is not
    recognized gets Vicuna's.

    Args:
        template: the source's: Jinja, several by name, or None.
        tokenizer: the language model's.
        model_type: the language model's.
        use_im_start_end: images stand between `<im_start>` and `<im_end>`, as the original's `mm_use_im_start_end`
            says.

    Raises:
        ConversionError: the format is not recognized.
    """
    if isinstance(template, dict):
        template = template.get("default")
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"} if tokenizer is None else tokenizer.special_tokens_map
    rendered = render(template, PROBE_CONVERSATION, **special_tokens) or "" if template else ""
    if IMAGE_TOKEN in rendered and not re.search(r"USER:.*ASSISTANT:", rendered, re.DOTALL):
        return template, "source"
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    if IMAGE_TOKEN in rendered:  # Vicuna's
        chosen, origin = VICUNA_CHAT_TEMPLATE, "vicuna"
        if "artificial intelligence assistant" not in rendered:
            chosen = chosen.replace(VICUNA_SYSTEM, "")
    elif adapted := adapt_chat_template(template, vocabulary, **special_tokens):
        chosen, origin = adapted, "vicuna" if adapted == VICUNA_CHAT_TEMPLATE else "adapted"
    elif model_type == "llama":
        chosen, origin = VICUNA_CHAT_TEMPLATE, "vicuna"
    else:
        raise ConversionError(
            f"The chat format of a {model_type!r} language model is not recognized: its tokenizer has "
            f"{'a chat template that cannot show images' if template else 'no chat template'}. Name the format by "
            f"--chat-template: {', '.join(CHAT_TEMPLATES)}, or a Jinja file."
        )
    return _between_marks(chosen, use_im_start_end), origin


def _between_marks(template: str, use_im_start_end: bool) -> str:
    return template.replace(IMAGE_TOKEN, f"<im_start>{IMAGE_TOKEN}<im_end>") if use_im_start_end else template


def named_chat_template(name_or_path: str, use_im_start_end=False) -> str:
    """The template that `--chat-template` names.

    Raises:
        ConversionError: there is none, or it shows no images.
    """
    with value_errors():
        template = read_chat_template(name_or_path)
    if name_or_path in CHAT_TEMPLATES:
        return _between_marks(template, use_im_start_end)
    if not shows_images(template, bos_token="<s>", eos_token="</s>"):  # noqa: S106
        raise ConversionError(f"The chat template {name_or_path} does not write <image> for an image of a message.")
    return template


# --- image processor -------------------------------------------------------------------------------------------------


def load_image_processor(folder, image_aspect_ratio=None):
    """The image processor of a vision tower, with or without torchvision.

    Args:
        folder: with a `preprocessor_config.json`, or a `processor_config.json` that has an image processor in it.
        image_aspect_ratio: the original LLaVA's. `"pad"` makes it LLaVA's image processor, which first pads an image
            to a square in the mean colour; `"square"` and None leave it as it is.

    Raises:
        ConversionError: there is none, it cannot be read, or the aspect ratio is another.
    """
    folder = Path(folder)
    if image_aspect_ratio not in (None, "square", "pad"):
        raise ConversionError(f"image_aspect_ratio must be 'pad' or 'square', got {image_aspect_ratio!r}.")
    settings = _read_settings(folder / "processor_config.json").get("image_processor")
    settings = settings or _read_settings(folder / "preprocessor_config.json")
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if kind is None:
        raise ConversionError(
            f"{folder} names no image processor: neither preprocessor_config.json nor processor_config.json has an "
            f"image_processor_type; name the folder of the vision tower."
        )
    try:
        processor = build_image_processor(kind.replace("FeatureExtractor", "ImageProcessor"), settings)
        if image_aspect_ratio == "pad":
            processor = pad_to_square(processor)
    except (ValueError, TypeError, OSError) as error:
        raise ConversionError(f"{folder}: the image processor {kind!r} cannot be built: {one_line(error)}") from error
    return processor


# --- generation ------------------------------------------------------------------------------------------------------


def load_generation_config(folder, tokenizer) -> GenerationConfig:
    """The settings of generation in `generation_config.json`, or fresh ones; what they do not say about special tokens
    is the tokenizer's, if there is one, and so is the padding token.

    Vicuna's file has a temperature without sampling, which transformers does not save: settings without effect are
    left out, and generation is what it was.

    Raises:
        ConversionError: the file has settings that contradict each other.
    """
    path = Path(folder) / "generation_config.json"
    settings = _read_settings(path)
    if tokenizer is not None:
        settings = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **settings}
        settings["pad_token_id"] = tokenizer.pad_token_id
    idle = ["transformers_version", "_from_model_config"]  # of the file's writer
    if not settings.get("do_sample"):
        idle += _SAMPLING_SETTINGS
    if settings.get("num_beams", 1) == 1:
        idle += _BEAM_SETTINGS
    try:
        config = GenerationConfig(**{name: value for name, value in settings.items() if name not in idle})
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{path} is not valid ({one_line(error)}); mend it or remove it.") from error
    return config
