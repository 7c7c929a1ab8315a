# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of untrusted folders: what would hang a library or take all memory is refused before a library reads it."""

import faulthandler
import json
import os
import re
import select
import signal
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from .configuration_deco import LARGEST_SIZES

# Most bytes of a file that is read as a whole. The largest tokenizer.json seen (Gemma's) has 33 MB.
_VOCABULARY_BYTES, _CONFIG_BYTES = 64 << 20, 4 << 20
_VOCABULARIES = re.compile(r"(tokenizer|vocab|added_tokens)\.json|.*\.index\.json|.*\.model|(merges|vocab)\.txt")
_CONFIGS = re.compile(r".*config\.json|special_tokens_map\.json|chat_template\.json|.*\.jinja|README\.md")

# The largest number in a field of a config, of any model type, by the first pattern that is found in the field's name.
# `DecoConfig` checks the fields that it knows more closely.
_LIMITS = {
    r"image_size": LARGEST_SIZES["image_size"],
    r"num_beams|num_return_sequences": 100,
    r"layers|n_layer|depth|experts": LARGEST_SIZES["num_hidden_layers"],
    r"size|dim|heads|num_|n_": LARGEST_SIZES["vocab_size"],
}


def check_folder(folder: str | os.PathLike) -> None:
    """Raise a ValueError where a model's folder has a file that never ends or is far too large, or a config with sizes
    that no model has."""
    folder = Path(folder)
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        try:
            status = path.stat()
        except OSError:  # a link to nowhere: the file is missing
            continue
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file but a pipe or a device; remove it.")
        is_config = bool(_CONFIGS.fullmatch(path.name))
        limit = _CONFIG_BYTES if is_config else _VOCABULARY_BYTES
        if (is_config or _VOCABULARIES.fullmatch(path.name)) and status.st_size > limit:
            raise ValueError(f"{path} has {status.st_size:,} bytes; at most {limit:,} are read of such a file.")
        if is_config and path.suffix == ".json":
            _check_config(path)


def _check_config(path: Path) -> None:
    try:
        fields = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None
    except ValueError:  # not JSON: the error comes where it is read
        return
    if path.name in ("config.json", "generation_config.json", "adapter_config.json"):
        check_sizes(fields, str(path))


def check_sizes(config: Any, name: str) -> None:
    """Raise a ValueError where a field of a config, or of a config in it, is larger than in any model. `name` is the
    file's."""
    for field, value in _numbers(config):
        limit = next((limit for pattern, limit in _LIMITS.items() if re.search(pattern, field)), None)
        if limit is not None and value > limit:
            raise ValueError(f"{field} in {name} is {value}; it must be at most {limit:,}.")


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a config, each with the name of its field."""
    entries = [("", config)]
    while entries:
        name, value = entries.pop()
        if isinstance(value, dict):
            entries += [(str(key), entry) for key, entry in value.items()]
        elif isinstance(value, list):
            entries += [(name, entry) for entry in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def check_processor(processor, name: str) -> None:
    """Raise a ValueError where a processor takes more than 10 seconds or 2 GB to encode a short question about a small
    picture: a chat template with nested loops, a tokenizer or an image size whose output explodes.

    `name` is the model's.
    """
    text = "Which digits? " + "".join(map(chr, range(32, 127)))
    question = [{"type": "image", "image": Image.new("RGB", (64, 48))}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": question}]

    def encode():
        import torch

        torch.set_num_threads(1)  # a forked process has no others
        for is_answered in (False, True):
            processor.apply_chat_template(
                messages, add_generation_prompt=not is_answered, tokenize=True, return_dict=True
            )
            messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})

    run_within_limits(encode, f"{name}: its chat template, tokenizer or image processor")


def run_within_limits(function: Callable[[], Any], what: str, seconds: float = 10, num_bytes: int = 2 << 30) -> Any:
    """Run a function in a process of its own, and return what it returned (as JSON), or None where it raised an error.

    Args:
        function: it sees this process's memory, and cannot change it.
        what: the subject of the error's line.
        seconds: longest time.
        num_bytes: most memory beyond what this process has, on Linux.

    Raises:
        ValueError: it takes more than that.
    """
    if not hasattr(os, "fork"):  # Windows
        with suppress(Exception):
            return function()
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside threads is deprecated: the new process does not need them
        child = os.fork()
    if child == 0:
        _answer(function, writer, num_bytes)
    os.close(writer)
    answer, deadline = b"", time.monotonic() + seconds
    try:
        while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
            piece = os.read(reader, 1 << 16)
            if not piece:
                break
            answer += piece
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        os.waitpid(child, 0)
    if not answer.endswith(b"\n"):  # the answer is incomplete: out of time, or of memory
        raise ValueError(f"{what} takes more than {seconds:g} seconds or {num_bytes / 2**30:g} GB.")
    return json.loads(answer)


def _answer(function: Callable[[], Any], writer: int, num_bytes: int) -> NoReturn:
    """In the new process: write the function's result as a line of JSON, or nothing, and end."""
    try:
        faulthandler.disable()  # a crash is an answer too
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        with suppress(ImportError, OSError):
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + num_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            result = function()
        except Exception as error:
            if isinstance(error, MemoryError | RecursionError | OverflowError) or "allocate memory" in str(error):
                raise
            result = None
        with os.fdopen(writer, "wb") as file:
            file.write(json.dumps(result).encode() + b"\n")
    finally:
        os._exit(0)
