# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a converted checkpoint, with `<image>` and `<pad>`.

Only files are read: never the network, never a checkpoint's own code.
"""

import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ..chat_templates import IMAGE_TOKEN
from ..llava import add_special_tokens, read_tokenizer
from ..utils.errors import InputError, one_line
from ..utils.files import read_settings


def load_tokenizer(folder, extra_tokens=()) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with a `tokenizer.json`, or with only Llama's sentencepiece `tokenizer.model`.

    `extra_tokens`, `"<image>"` and, if no token is for padding only, `"<pad>"` are added in this order, unless they
    exist. Padding is on the left, as generation needs.

    A `tokenizer.model` is converted here and not by transformers (seen in 5.19 to 5.24), which needs protobuf, gives
    other ids for several spaces in a row, and treats an unset `legacy` as false. The ids are those of the original
    LLaVA: it splits a prompt at its images and tokenizes each piece as a text of its own, and Llama begins a text with
    a space. After other special tokens there is such a space only if the tokenizer is `legacy`.

    Raises:
        InputError: there is no tokenizer, it cannot be read, or sentencepiece is needed and not installed.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = read_tokenizer(folder)
        except Exception as error:  # tokenizers and transformers raise many types
            raise InputError(f"{folder}: the tokenizer cannot be read: {one_line(error)}") from error
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _convert_sentencepiece(folder, extra_tokens)
    else:
        raise InputError(
            f"{folder} has no tokenizer.json and no tokenizer.model; copy those of its language model there."
        )
    add_special_tokens(tokenizer, extra_tokens)
    return tokenizer


def _convert_sentencepiece(folder: Path, extra_tokens) -> PreTrainedTokenizerFast:
    """Llama's slow tokenizer as a fast one, from the vocabulary of its `tokenizer.model`."""
    path = folder / "tokenizer.model"
    try:
        import sentencepiece  # optional: only these checkpoints need it
    except ImportError:
        raise InputError(
            f"{folder} has a tokenizer.model and no tokenizer.json; reading it takes sentencepiece: "
            f"pip install sentencepiece"
        ) from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path} is not a sentencepiece model ({one_line(error)}); download it again.") from error

    settings = read_settings(folder / "special_tokens_map.json") | read_settings(folder / "tokenizer_config.json")
    roles = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": model.eos_id()}
    pieces = {role: model.id_to_piece(index) for role, index in roles.items() if index >= 0}  # -1: the model has none
    named = {role: _content(settings.get(role)) or piece for role, piece in pieces.items()}
    added = _added_tokens(folder, settings, special=(*named.values(), *extra_tokens))
    # Tokens that do not split a text in two: all but the image token.
    inline = [token for token in (*named.values(), *added, *extra_tokens) if token != IMAGE_TOKEN]
    is_legacy = settings.get("legacy", True)  # unset means true to Llama's slow tokenizer

    backend = _build_backend(model, [] if is_legacy else inline)
    _check_same_ids(model, backend, path)
    for token in dict.fromkeys([*added, *inline]):
        _, special = added.get(token, (None, True))
        # A normalized token is matched after the first space is added, so the text after it gets none.
        normalized = token in inline and not is_legacy
        backend.add_tokens([AddedToken(token, special=special, normalized=normalized)])
    for token, (index, _) in added.items():
        if backend.token_to_id(token) != index:
            raise InputError(
                f"{folder}: the added token {token!r} should have id {index}, but after the {model.get_piece_size()} "
                f"tokens of tokenizer.model it gets {backend.token_to_id(token)}: an added token is missing."
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
    """`(id, is_special)` of each token that was added to the vocabulary, in the order of the ids."""
    special = {*special, *map(_content, settings.get("additional_special_tokens", []))}
    added = {token: (index, token in special) for token, index in read_settings(folder / "added_tokens.json").items()}
    for index, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = (int(index), token.get("special", False))
    return dict(sorted(added.items(), key=lambda item: item[1]))


def _build_backend(model, inline_tokens) -> Tokenizer:
    """Byte pairs, merged by the scores of the pieces. A text that begins with no inline token gets a first space."""
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    scored_merges = [
        (model.get_score(index), piece[:cut], piece[cut:])
        for index, piece in enumerate(pieces)
        if _is_text(model, index)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    # All runs of spaces have the lowest score. sentencepiece merges equal scores with the longer left part first.
    scored_merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    merges = [(left, right) for _, left, right in scored_merges]
    unknown = pieces[model.unk_id()]
    backend = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    first_space: normalizers.Normalizer = normalizers.Prepend("▁")
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
    """Tokenize texts of the whole vocabulary with both tokenizers.

    Raises:
        InputError: they differ, so the model is not of Llama's kind: it is a unigram model, normalizes, or has
            user-defined symbols.
    """
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size()) if _is_text(model, index)]
    texts = ["".join(pieces[start : start + 16]).replace("▁", " ") for start in range(0, len(pieces), 16)]
    for text in [*texts, "  two  spaces ", "\n\ttab", "Ａ ﬁ é 😀"]:
        if backend.encode(text).ids != model.encode(text):
            raise InputError(
                f"{path} is not of Llama's kind (byte pairs, no normalization): a fast tokenizer made of it gives "
                f"other ids for {text[:40]!r}; put a tokenizer.json beside it."
            )


def _content(token) -> str | None:
    """The text of a token, which is a string or an object in the JSON files."""
    return (token["content"] if isinstance(token, dict) else token) or None
