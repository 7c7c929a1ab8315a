# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a model for answering, and stream its answers: what the command line, the page and the server share."""

from collections.abc import Iterator
from importlib.util import find_spec
from threading import Event, Thread
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from .loading import checkpoint_name, load_config, named_errors
from .quantization import nf4_config, quantize_to_int8

if TYPE_CHECKING:
    from .prompt_cache import PromptCache


def load(
    model: str, *, revision: str | None = None, in_4bit: bool = False, in_int8: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a checkpoint and its processor, in its own dtype: on GPUs, over all that are there, where accelerate is
    installed; else on the CPU.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        in_4bit: quantize the language model's layers to NF4.
        in_int8: compute in int8 what is not in 4 bits, as `quantize_to_int8` does.

    Raises:
        ValueError: there is no such checkpoint, it is not a DeCo, has no chat template, or is broken; one line.
        ImportError: it needs a library that is not installed.
    """
    # not quantization_config=None, with which an Auto class forgets that a checkpoint is quantized
    arguments = {"quantization_config": nf4_config()} if in_4bit else {}
    if torch.cuda.is_available() and find_spec("accelerate") is not None:
        arguments["device_map"] = "auto"
    load_config(model, revision)
    path = checkpoint_name(model)
    with named_errors(model):
        processor = AutoProcessor.from_pretrained(path, **_arguments(revision))
        if processor.chat_template is None:
            raise ValueError("it has no chat template.")
        loaded = AutoModelForImageTextToText.from_pretrained(path, **_arguments(revision), **arguments)
    return quantize_to_int8(loaded) if in_int8 else loaded, processor


def _arguments(revision: str | None) -> dict:
    """Of every load. Where nothing says whether to trust a checkpoint's code, transformers asks on stdin."""
    return {"trust_remote_code": False, **({} if revision is None else {"revision": revision})}


def encode(processor: ProcessorMixin, messages: list, pooled_grid_size=None) -> BatchFeature:
    """One conversation, or a list of them as a batch, as the model's inputs up to where it answers. Arguments and
    errors are those of `stream`."""
    try:
        return processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "pooled_grid_size": pooled_grid_size},
        )
    except TemplateError as error:
        raise ValueError(f"The chat template does not take these messages: {error}") from error


def check_length(model: PreTrainedModel, inputs: BatchFeature) -> None:
    """Raise a ValueError where a prompt leaves no room for an answer: a model goes on beyond its context, and what it
    writes there means nothing."""
    num_tokens = inputs["input_ids"].shape[-1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and num_tokens >= context:
        raise ValueError(
            f"The prompt has {num_tokens} tokens, and the model's context is {context}; shorten it, or choose a "
            f"smaller pooled_grid_size."
        )


def stream(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    messages: list[dict],
    *,
    pooled_grid_size=None,
    max_new_tokens: int = 128,
    prompt_cache: "PromptCache | None" = None,
) -> Iterator[str]:
    """Answer a conversation, piece by piece.

    Args:
        messages: transformers' chat messages, whose content is a list of `{"type": "image", "image": ...}` and
            `{"type": "text", "text": ...}`, the user's last.
        pooled_grid_size: token budget of each image, as in `DecoProcessor.__call__`.
        max_new_tokens: longest answer, in tokens.
        prompt_cache: the model's, by which the next question of a conversation is not encoded from its beginning.

    Yields:
        Pieces of the answer's text as they are generated. Closing the iterator stops generation.

    Raises:
        ValueError: messages, images or grid do not fit the model, or the prompt leaves no room for an answer.
    """
    inputs = encode(processor, messages, pooled_grid_size).to(model.device)
    check_length(model, inputs)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed, errors = Event(), []

    def generate():
        try:
            (prompt_cache or model).generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopOn(closed)]),
            )
        except BaseException as error:  # to be raised where the answer is read
            errors.append(error)
        finally:
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        closed.set()
        thread.join()
    if errors:
        raise errors[0]


class _StopOn(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
