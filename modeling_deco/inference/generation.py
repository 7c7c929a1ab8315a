# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a model for answering, and stream its answers: what the command line, the page and the server share."""

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import chain
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from transformers import (
    AutoProcessor,
    BatchFeature,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..modeling_deco import DecoForConditionalGeneration
from ..utils.errors import one_line
from .folders import check_processor
from .loading import checkpoint_name, find_adapter, has_file, load_config, load_model, named_errors
from .quantization import nf4_config, quantize_to_int8

if TYPE_CHECKING:
    from .prompt_cache import PromptCache


DTYPES = ("auto", "float32", "float16", "bfloat16")


def load(
    model: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    in_4bit: bool = False,
    in_int8: bool = False,
) -> tuple[DecoForConditionalGeneration, ProcessorMixin]:
    """Load a checkpoint and its processor. An adapter is loaded onto its base model.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        device: `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`. Default: the GPUs, over all of which accelerate spreads the
            model where it is installed, and else the CPU.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; `"auto"` is the checkpoint's own.
        in_4bit: quantize the language model's layers to NF4.
        in_int8: compute in int8 what is not in 4 bits, as `quantize_to_int8` does.

    Raises:
        ValueError: there is no such checkpoint or device, it is not a DeCo, has no chat template, not all its weights,
            or is broken; one line.
        ImportError: it needs a library that is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype {dtype!r} is none of {', '.join(DTYPES)}.")
    device, arguments = _device(device), {"dtype": dtype}
    if in_4bit:
        arguments["quantization_config"] = nf4_config()
    config = load_config(model, revision)
    adapter = find_adapter(model, revision)
    is_quantized = in_4bit or getattr(config, "quantization_config", None) is not None
    if adapter is not None and is_quantized and in_int8:
        raise ValueError(f"{model} is an adapter, and stays one on a base model in 4 bits: merge it before --int8.")
    has_accelerate = find_spec("accelerate") is not None
    if has_accelerate and device is not None:
        arguments["device_map"] = {"": device}  # without a copy in this machine's memory
    elif has_accelerate and torch.cuda.is_available():
        arguments["device_map"] = "auto" if torch.cuda.device_count() > 1 else {"": "cuda"}
    processor = load_processor(model, revision)
    if adapter is not None:
        arguments["pooled_grid_size"] = processor.pooled_grid_size
    loaded = load_model(model, revision, **arguments)
    if not has_accelerate:
        loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return quantize_to_int8(loaded) if in_int8 else loaded, processor


def _device(name: str | None) -> str | None:
    """A device's name, which is checked. Raises a ValueError where there is no such device."""
    if name is None:
        return None
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"The device {name!r} is none of cpu, cuda, cuda:N and mps.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("The device 'mps' is not there: PyTorch finds no GPU of Apple's.")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= num_gpus:
        raise ValueError(f"The device {name!r} is not there: PyTorch finds {num_gpus} CUDA GPUs.")
    return name


def load_processor(model: str, revision: str | None = None) -> ProcessorMixin:
    """A checkpoint's processor; of an adapter that was saved without one, its base model's.

    Raises:
        ValueError: there is no such checkpoint, or its processor is broken or has no chat template.
    """
    adapter = find_adapter(model, revision)
    if adapter is not None and not has_file(model, "processor_config.json", revision):
        model, revision = adapter.base, adapter.base_revision
    with named_errors(model):
        processor = AutoProcessor.from_pretrained(
            checkpoint_name(model), revision=revision or "main", trust_remote_code=False
        )
        if processor.chat_template is None:
            raise ValueError("it has no chat template.")
    check_processor(processor, model)
    return processor


def encode(processor: ProcessorMixin, messages: list, pooled_grid_size=None) -> BatchFeature:
    """One conversation, or a list of them as a batch, as the model's inputs up to where it answers. Arguments and
    errors are those of `stream`."""
    for message in chain.from_iterable(messages if isinstance(messages[0], list) else [messages]):
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        for text in (part.get("text") or "" for part in parts):
            if processor.image_token in text:
                raise ValueError(f"The text holds {processor.image_token!r}, which stands for an image; leave it out.")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"The text {one_line(repr(text))} is not valid Unicode; write it in UTF-8.")
    with _template_errors():
        return processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "pooled_grid_size": pooled_grid_size},
        )


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"The chat template does not take these messages: {one_line(error)}") from error


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


def sampling(temperature: float | None) -> dict:
    """Arguments of `generate` for a temperature: 0 takes the likeliest token, None is the checkpoint's own choice."""
    if temperature is None:
        return {}
    if temperature < 1e-5:  # where logits overflow
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def with_system(processor: ProcessorMixin, messages: list[dict], system: str | None) -> list[dict]:
    """A conversation with instructions before it.

    Raises:
        ValueError: the chat template leaves them out.
    """
    if system is None:
        return messages
    instructed = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
    with _template_errors():
        if processor.apply_chat_template(instructed) == processor.apply_chat_template(messages):
            raise ValueError("The chat template has no place for a system message.")
    return instructed


def stream(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    messages: list[dict] | BatchFeature,
    *,
    pooled_grid_size=None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    seed: int | None = None,
    prompt_cache: "PromptCache | None" = None,
) -> Iterator[str]:
    """Answer a conversation, piece by piece.

    Args:
        messages: transformers' chat messages, whose content is a list of `{"type": "image", "image": ...}` and
            `{"type": "text", "text": ...}`, the user's last; or what `encode` has made of them.
        pooled_grid_size: token budget of each image, as in `DecoProcessor.__call__`.
        max_new_tokens: longest answer, in tokens.
        temperature: see `sampling`.
        seed: of sampling. Default: another one each time.
        prompt_cache: the model's, by which the next question of a conversation is not encoded from its beginning.

    Yields:
        Pieces of the answer's text as they are generated. Closing the iterator stops generation.

    Raises:
        ValueError: messages, images or grid do not fit the model, the prompt leaves no room for an answer, or the
            model's logits are no numbers.
    """
    inputs = messages if isinstance(messages, BatchFeature) else encode(processor, messages, pooled_grid_size)
    inputs = inputs.to(model.device)
    check_length(model, inputs)
    budget = {"max_new_tokens": max_new_tokens, "num_return_sequences": 1, **sampling(temperature)}
    answer = partial((prompt_cache or model).generate, **inputs, **budget)
    yield from stream_call(answer, processor, seed=seed)


def stream_call(call: Callable, processor: ProcessorMixin, *, seed: int | None = None) -> Generator[str, None, Any]:
    """Run a function that generates an answer, in a thread, and yield the pieces of its text.

    Args:
        call: takes `streamer`, `logits_processor`, `stopping_criteria`, `num_beams` and `tokenizer` of `generate`.
        seed: of sampling. Default: another one each time.

    Returns:
        What the function returns. Closing the iterator stops generation.
    """
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed, results, errors = Event(), [], []

    def run():
        try:
            if seed is not None:
                torch.manual_seed(seed)
            result = call(
                streamer=streamer,
                logits_processor=LogitsProcessorList([RefuseNaN()]),
                stopping_criteria=StoppingCriteriaList([_StopOn(closed)]),
                num_beams=1,  # whose answers cannot be written as they come
                tokenizer=processor.tokenizer,  # for the `stop_strings` of a checkpoint's generation config
            )
            results.append(result)
        except BaseException as error:  # to be raised where the answer is read
            errors.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        closed.set()
        thread.join()
    if errors:
        raise errors[0]
    return results[0]


class NaNError(ValueError):
    """A model's logits are NaN."""


class RefuseNaN(LogitsProcessor):
    """Raises a NaNError where logits are NaN: `generate` would give an empty or meaningless answer."""

    def __call__(self, input_ids, scores):
        if bool(scores.isnan().any()):
            raise NaNError(
                "The model's logits are NaN: its weights are damaged, or overflow in 16 bits (try --dtype float32)."
            )
        return scores


class _StopOn(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
