# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a model for answering, and stream its answers: what the command line, the page and the server share."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from transformers import (
    BatchFeature,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..utils.errors import one_line

if TYPE_CHECKING:
    from .prompt_cache import PromptCache


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
