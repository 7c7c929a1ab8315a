# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of untrusted folders, for what would hang a library or take all memory when the library reads it."""

import json
import os
import re
import stat
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from ..configuration_deco import LARGEST_SIZES
from ..utils.child_process import is_explosion, run_within_limits

# Largest size of a file that is read as a whole. The largest known tokenizer.json (Gemma's) has 33 MB.
_VOCABULARY_BYTES, _CONFIG_BYTES = 64 << 20, 4 << 20
# Each step of generation processes the lists in a generation config. The longest known (Whisper's) has 4 kB.
_GENERATION_CONFIG_BYTES = 64 << 10
# Largest number of added tokens: a tokenizer searches each text for each of them. Gemma's has 6415.
_ADDED_TOKENS = 32_768
_VOCABULARIES = re.compile(r"(tokenizer|vocab|added_tokens)\.json|.*\.index\.json|.*\.model|(merges|vocab)\.txt")
_CONFIGS = re.compile(r".*config\.json|special_tokens_map\.json|chat_template\.json|.*\.jinja|README\.md")

# Largest value of a field in a config of any model type. The first pattern found in the field's name decides.
# `DecoConfig` has stricter checks of its own fields.
_LIMITS = {
    r"image_size": LARGEST_SIZES["image_size"],
    r"^r$|rank": 16_384,
    r"num_beams|num_return_sequences": 100,
    r"layers|n_layer|depth|experts|stages|repeats": LARGEST_SIZES["num_hidden_layers"],
    r"size|dim|heads|num_|n_": LARGEST_SIZES["vocab_size"],
}


def check_folder(folder: str | os.PathLike) -> None:
    """Raise a ValueError if a model's folder has a file that never ends or is much too large, or an absurd config."""
    folder = Path(folder)
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        try:
            status = path.stat()
        except OSError:  # a broken link; the missing file is reported later
            continue
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is a pipe or a device, not a regular file; remove it.")
        is_config = bool(_CONFIGS.fullmatch(path.name))
        limit = _CONFIG_BYTES if is_config else _VOCABULARY_BYTES
        if path.name == "generation_config.json":
            limit = _GENERATION_CONFIG_BYTES
        if (is_config or _VOCABULARIES.fullmatch(path.name)) and status.st_size > limit:
            raise ValueError(f"{path} has {status.st_size:,} bytes; such a file may have at most {limit:,}.")
        if is_config and path.suffix == ".json":
            _check_config(path)
        if path.name == "tokenizer.json":
            _check_added_tokens(path.read_bytes().count(b'"single_word"'), path)


def _check_config(path: Path) -> None:
    try:
        fields = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None
    except ValueError:  # not JSON; it is reported when the file is used
        return
    if path.name in ("config.json", "generation_config.json", "adapter_config.json"):
        check_fields(fields, str(path))
    if path.name == "tokenizer_config.json" and isinstance(fields, dict):
        _check_added_tokens(
            max((len(value) for value in fields.values() if isinstance(value, list | dict)), default=0), path
        )


def _check_added_tokens(number: int, path: Path) -> None:
    if number > _ADDED_TOKENS:
        raise ValueError(f"{path} adds {number:,} tokens to the vocabulary; it must be at most {_ADDED_TOKENS:,}.")


def check_fields(config: Any, name: str) -> None:
    """Raise a ValueError if a field of a config, or of a nested config, is larger than in any model or names Hub code.

    Hub code is `"attn_implementation": "owner/kernel"`, for example, which transformers would run.

    Args:
        name: name of the file in the message.
    """
    for field, value in _values(config):
        if isinstance(value, str) and field.endswith("_implementation") and "/" in value:
            raise ValueError(
                f"{field} in {name} is {value[:100]!r}, which is code of the Hub and is not run; remove it."
            )
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        limit = next((limit for pattern, limit in _LIMITS.items() if re.search(pattern, field)), None)
        if limit is not None and value > limit:
            raise ValueError(f"{field} in {name} is {value}; it must be at most {limit:,}.")


def _values(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values in a config and in nested configs, with the names of their fields."""
    entries = [("", config)]
    while entries:
        name, value = entries.pop()
        if isinstance(value, dict):
            # these fields may have one value for each part of the model
            outer = name if name.endswith(("_implementation", "rank_pattern")) else ""
            entries += [(outer or str(key), entry) for key, entry in value.items()]
        elif isinstance(value, list):
            entries += [(name, entry) for entry in value]
        else:
            yield name, value


def check_processor(processor, name: str | os.PathLike) -> None:
    """Raise a ValueError if a processor needs more than 10 seconds or 2 GB for short conversations on a small image.

    A chat template may have nested loops, a tokenizer may expand its text, and an image size may be huge.

    Args:
        name: name of the model in the message.
    """
    text = "Which digits? " + "".join(map(chr, range(32, 127)))
    question = [{"type": "image", "image": Image.new("RGB", (64, 48))}, {"type": "text", "text": text}]
    content = [{"type": "text", "text": text}]
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": content},
        {"role": "user", "content": content},
        {"role": "assistant", "content": content},
    ]

    def encode():
        import torch

        torch.set_num_threads(1)  # a forked process has only one thread
        for system, num_turns in product([[], [{"role": "system", "content": content}]], range(1, 5)):
            try:
                inputs = processor.apply_chat_template(
                    system + turns[:num_turns], add_generation_prompt=num_turns % 2, tokenize=True, return_dict=True
                )
                processor.tokenizer.decode(inputs["input_ids"][0])
            except Exception as error:  # for example of a template that rejects system messages
                if is_explosion(error):
                    raise

    run_within_limits(encode, f"{name}: its chat template, tokenizer or image processor")
