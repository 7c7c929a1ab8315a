# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The chat template of a converted checkpoint."""

import re
from pathlib import Path

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
from ..utils.errors import InputError, as_input_errors
from ..utils.files import read_settings


def load_chat_template(folder, tokenizer) -> str | None:
    """The chat template of a checkpoint: that of its processor, or otherwise that of its tokenizer."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):  # of transformers before 4.52
        template = read_settings(folder / name).get("chat_template")
        if template is not None:
            return template
    return tokenizer.chat_template


def choose_chat_template(template, tokenizer=None, model_type="llama", use_im_start_end=False) -> tuple[str, str]:
    """The chat template of a converted checkpoint, and its origin: `"source"`, `"adapted"` or `"vicuna"`.

    A template of the source that renders images is kept, unless its format is Vicuna's. In that case this package's
    template for Vicuna is used: it marks the assistant's text for the loss, with the end of the answer, which the one
    of llava-hf lacks. The system prompt is omitted if the source has none. A template for text only is adapted.
    Without a template, the special tokens of the tokenizer show the format; a Llama with an unknown format gets
    Vicuna's.

    Args:
        template: the source's: Jinja, several by name, or None.
        tokenizer: the language model's.
        model_type: the language model's.
        use_im_start_end: an image is placed between `<im_start>` and `<im_end>`, as by `mm_use_im_start_end` in the
            original code's config.

    Raises:
        InputError: the format is not recognized.
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
        raise InputError(
            f"The chat format of a {model_type!r} language model is not recognized: its tokenizer has "
            f"{'a chat template that cannot show images' if template else 'no chat template'}. Choose the format with "
            f"--chat-template: {', '.join(CHAT_TEMPLATES)}, or a Jinja file."
        )
    return _between_marks(chosen, use_im_start_end), origin


def _between_marks(template: str, use_im_start_end: bool) -> str:
    return template.replace(IMAGE_TOKEN, f"<im_start>{IMAGE_TOKEN}<im_end>") if use_im_start_end else template


def named_chat_template(name_or_path: str, use_im_start_end=False) -> str:
    """The template that `--chat-template` names.

    Raises:
        InputError: there is no such template, or it does not render images.
    """
    with as_input_errors():
        template = read_chat_template(name_or_path)
    if name_or_path in CHAT_TEMPLATES:
        return _between_marks(template, use_im_start_end)
    if not shows_images(template, bos_token="<s>", eos_token="</s>"):
        raise InputError(f"The chat template {name_or_path} does not write <image> for an image of a message.")
    return template
