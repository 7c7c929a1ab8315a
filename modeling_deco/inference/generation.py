# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Encode conversations and stream answers, for the command line, the page and the server."""

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
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..utils.errors import one_line
from ..videos import PreparedVideo

if TYPE_CHECKING:
    from .prompt_cache import PromptCache


def encode(processor: ProcessorMixin, messages: list, pooled_grid_size=None, **options) -> BatchFeature:
    """Encode one conversation, or a list of conversations as a batch, up to where the model answers.

    Args:
        options: other arguments of `DecoProcessor.__call__`, such as `max_image_tokens`, `tiles` and
            `pooled_video_grid_size`. None is the processor's default.

    The other arguments and the errors are those of `stream`.
    """
    parts = list(_parts(messages))
    for text in (part.get("text") or "" for part in parts):
        for token, kind in ((processor.image_token, "an image"), (processor.video_token, "a video")):
            if token is not None and token in text:
                raise ValueError(f"The text contains {token!r}, which marks {kind}; leave it out.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"The text {one_line(repr(text))} is not valid Unicode; write it in UTF-8.")
    options["pooled_grid_size"] = pooled_grid_size
    with _template_errors():
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={
                "padding": True,
                **{name: value for name, value in options.items() if value is not None},
            },
        )
    videos = [part["video"] for part in parts if part.get("type") == "video"]
    features = [video.features for video in videos if isinstance(video, PreparedVideo) and video.features is not None]
    if features:
        inputs["mm_encoder_outputs"] = {"video": BaseModelOutputWithPooling(pooler_output=features)}
    return inputs


def _parts(messages: list) -> Iterator[dict]:
    """The texts, images and videos of one conversation, or of a list of conversations."""
    for message in chain.from_iterable(messages if isinstance(messages[0], list) else [messages]):
        content = message["content"]
        yield from content if isinstance(content, list) else [{"type": "text", "text": content}]


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"The chat template rejects these messages: {one_line(error)}") from error


def num_positions(model: PreTrainedModel, inputs: BatchFeature) -> int:
    """The positions that the longest prompt takes. With `image_positions="patch"`, an image takes as many as it has
    patches, however few its tokens are."""
    deco = model.model
    if deco.check_image_positions(inputs.get("image_positions")) == "sequence":
        return inputs["input_ids"].shape[-1]
    return int(deco.position_behind(inputs).max())


def check_length(model: PreTrainedModel, inputs: BatchFeature) -> None:
    """Raise a ValueError if a prompt leaves no room for an answer.

    Beyond its context a model still generates, but the text has no meaning.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    num_tokens, length = inputs["input_ids"].shape[-1], num_positions(model, inputs)
    if num_tokens >= context:
        raise ValueError(
            f"The prompt has {num_tokens} tokens, but the model's context is {context}; shorten it, or choose a "
            f"smaller pooled_grid_size."
        )
    if length >= context:
        raise ValueError(
            f"The prompt takes {length} positions, because its images keep those of all their patches, but the "
            f"model's context is {context}; shorten it, or set image_positions to 'sequence', where it takes "
            f"{num_tokens}."
        )


def sampling(temperature: float | None) -> dict:
    """Arguments of `generate` for a temperature. 0 is greedy; None keeps the settings of the checkpoint."""
    if temperature is None:
        return {}
    if temperature < 1e-5:  # smaller temperatures would make logits overflow
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def with_system(processor: ProcessorMixin, messages: list[dict], system: str | None) -> list[dict]:
    """Put a system message before a conversation; None changes nothing.

    Raises:
        ValueError: the chat template ignores system messages.
    """
    if system is None:
        return messages
    instructed = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
    with _template_errors():
        if processor.apply_chat_template(instructed) == processor.apply_chat_template(messages):
            raise ValueError("The chat template ignores system messages; leave the system message out.")
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
    **options,
) -> Generator[str, None, None]:
    """Answer a conversation and yield the text as it is generated.

    Args:
        messages: chat messages as in transformers, the last one by the user. Their content is a list of `{"type":
            "image", "image": ...}`, `{"type": "video", "video": ...}` and `{"type": "text", "text": ...}`. Or the
            result of `encode`.
        pooled_grid_size: token budget of each image, as in `DecoProcessor.__call__`.
        max_new_tokens: maximum length of the answer.
        temperature: see `sampling`.
        seed: seed of sampling. Default: a different one each time.
        prompt_cache: cache of the model, which avoids encoding earlier turns of a conversation again.
        options: see `encode`.

    Yields:
        Pieces of text. Closing the iterator stops generation.

    Raises:
        ValueError: the messages, images or grid do not fit the model, the prompt leaves no room for an answer, or the
            logits of the model are NaN.
    """
    if not isinstance(messages, BatchFeature):
        messages = encode(processor, messages, pooled_grid_size, **options)
    inputs = messages.to(model.device)
    check_length(model, inputs)
    budget = {"max_new_tokens": max_new_tokens, "num_return_sequences": 1, **sampling(temperature)}
    answer = partial((prompt_cache or model).generate, **inputs, **budget)
    yield from stream_call(answer, processor, seed=seed)


def stream_call(call: Callable, processor: ProcessorMixin, *, seed: int | None = None) -> Generator[str, None, Any]:
    """Run a function that generates an answer in a thread, and yield the text as it is generated.

    Args:
        call: function that accepts `streamer`, `logits_processor`, `stopping_criteria`, `num_beams` and `tokenizer` of
            `generate`.
        seed: seed of sampling. Default: a different one each time.

    Returns:
        The result of the function. Closing the iterator stops generation.
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
                num_beams=1,  # answers of beam search cannot be streamed
                tokenizer=processor.tokenizer,  # for the `stop_strings` of a checkpoint's generation config
            )
            results.append(result)
        except BaseException as error:  # raised again in the thread that reads the answer
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
    """The logits of a model are NaN."""


class RefuseNaN(LogitsProcessor):
    """Raise a NaNError if logits are NaN, for which `generate` would give an empty or meaningless answer."""

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
