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
from ..utils.errors import ConversionError
from ..utils.files import read_settings, value_errors


def load_chat_template(folder, tokenizer) -> str | None:
    """The chat template of a checkpoint: its processor's if it has one of its own, else its tokenizer's."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):  # of transformers before 4.52
        template = read_settings(folder / name).get("chat_template")
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
