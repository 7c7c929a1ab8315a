# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The chat template of a converted checkpoint."""

from pathlib import Path

from .. import llava
from ..chat_templates import (
    CHAT_TEMPLATES,
    IMAGE_TOKEN,
    VICUNA_CHAT_TEMPLATE,
    VIDEO_TOKEN,
    read_chat_template,
    shows_images,
)
from ..utils.errors import InputError, as_input_errors
from ..utils.files import read_settings

__all__ = ["VICUNA_CHAT_TEMPLATE", "choose_chat_template", "load_chat_template", "named_chat_template"]


def load_chat_template(folder, tokenizer) -> str | dict[str, str] | None:
    """`llava.load_chat_template`, which refuses duplicate keys in JSON files."""
    return llava.load_chat_template(Path(folder), tokenizer, read_settings)


def choose_chat_template(template, tokenizer=None, model_type="llama", use_im_start_end=False) -> tuple[str, str]:
    """The chat template of a converted checkpoint, and its origin, from `llava.choose_chat_template`.

    Args:
        use_im_start_end: an image or video is placed between `<im_start>` and `<im_end>`, as by `mm_use_im_start_end`
            in the original code's config.

    Raises:
        InputError: the format is not recognized.
    """
    with as_input_errors():
        chosen, origin = llava.choose_chat_template(template, tokenizer, model_type)
    return chosen if origin == "source" else _between_marks(chosen, use_im_start_end), origin


def _between_marks(template: str, use_im_start_end: bool) -> str:
    for token in (IMAGE_TOKEN, VIDEO_TOKEN) if use_im_start_end else ():
        template = template.replace(token, f"<im_start>{token}<im_end>")
    return template


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
