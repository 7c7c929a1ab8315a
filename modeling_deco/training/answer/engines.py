# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The engines that answer a batch of conversations: transformers, or vLLM where it is installed.

An engine is a callable that takes conversations, whose image parts have their picture, and the seed of the batch. It
returns an `Answer` for each. Its `batch_size` says how many conversations it takes at a time.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature, LogitsProcessorList, PreTrainedModel, ProcessorMixin

from ...configuration_deco import DecoConfig
from ...inference.generation import RefuseNaN, check_length, encode, sampling
from ...inference.loading import load, load_config, load_processor
from ...utils.errors import one_line

ENGINES = ("transformers", "vllm")


class Answer(NamedTuple):
    """An answer without special tokens.

    Args:
        text: maybe empty.
        is_cut: whether the answer reached the limit of its length before its end.
        fault: why the conversation has no answer, or `""`.
    """

    text: str
    is_cut: bool = False
    fault: str = ""


class TransformersEngine:
    """Answers with `generate`, padded on the left.

    Args:
        model: in evaluation mode.
        processor: of the model.
        pooled_grid_size: token budget of each image. None means the grid of its patches.
        max_new_tokens: maximum length of an answer.
        temperature: of sampling; 0 is greedy decoding.
        batch_size: conversations that are answered at the same time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        pooled_grid_size: list[int] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        batch_size: int = 16,
    ):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.pooled_grid_size, self.max_new_tokens = pooled_grid_size, max_new_tokens
        self.sampling = sampling(temperature)
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def __call__(self, conversations: Sequence[list[dict]], seed: int = 0) -> list[Answer]:
        faults = [""] * len(conversations)
        try:
            inputs = self._encode(conversations)
        except ValueError as error:  # find the conversations that cannot be asked, and ask the others
            faults = [one_line(error)] if len(conversations) == 1 else list(map(self._fault, conversations))
            conversations = [talk for talk, fault in zip(conversations, faults, strict=True) if not fault]
            inputs = self._encode(conversations) if conversations else None
        answers = iter(() if inputs is None else self._generate(inputs, seed))
        return [Answer("", fault=fault) if fault else next(answers) for fault in faults]

    def _fault(self, conversation: list[dict]) -> str:
        try:
            self._encode([conversation])
        except ValueError as error:
            return one_line(error)
        return ""

    def _encode(self, conversations: Sequence[list[dict]]) -> BatchFeature:
        images = [image for conversation in conversations for image in _images(conversation)]
        grid = full_grid(self.model.config, self.processor, images, self.pooled_grid_size) if images else None
        inputs = encode(self.processor, list(conversations), grid)
        check_length(self.model, inputs)
        return inputs

    @torch.inference_mode()
    def _generate(self, inputs: BatchFeature, seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        generated = self.model.generate(
            **inputs.to(self.model.device),
            max_new_tokens=self.max_new_tokens,
            num_beams=1,
            num_return_sequences=1,
            logits_processor=LogitsProcessorList([RefuseNaN()]),
            tokenizer=self.processor.tokenizer,  # for the `stop_strings` of a checkpoint's generation config
            **self.sampling,
        )
        stops = self.model.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else set(stops or ())
        padding = self.processor.tokenizer.pad_token_id
        answers = []
        for ids in generated[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
            text = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
            answers.append(Answer(text, is_cut=end == self.max_new_tokens and ids[-1] != padding))
        return answers


class VLLMEngine:
    """Answers with vLLM, which forms batches itself.

    Args:
        model: folder or Hub id of a DeCo checkpoint.
        batch_size: conversations that are handed to vLLM at the same time.
        options: arguments of `vllm.LLM`.

    The other arguments are those of `TransformersEngine`.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        pooled_grid_size: list[int] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        batch_size: int = 256,
        revision: str | None = None,
        **options,
    ):
        if find_spec("vllm") is None:
            raise ValueError("--engine vllm needs vLLM, which is not installed: pip install vllm")
        from vllm import LLM, SamplingParams

        self.refusals: tuple[type[Exception], ...] = (ValueError,)
        with suppress(ImportError):  # vLLM 0.32; in earlier releases a refusal is a ValueError
            from vllm.exceptions import VLLMClientError

            self.refusals += (VLLMClientError,)
        self.config = load_config(model, revision)
        self.processor = load_processor(model, revision)
        self.pooled_grid_size, self.batch_size = pooled_grid_size, batch_size
        self.sampling = lambda seed: SamplingParams(
            temperature=temperature, max_tokens=max_new_tokens, seed=seed, skip_special_tokens=True
        )
        self.llm = LLM(model=os.fspath(model), revision=revision, **options)

    def __call__(self, conversations: Sequence[list[dict]], seed: int = 0) -> list[Answer]:
        prompts = [self._prompt(conversation) for conversation in conversations]
        return self._generate(prompts, [self.sampling(seed + offset) for offset in range(len(prompts))])

    def _generate(self, prompts: list[dict[str, Any]], sampling_params: list) -> list[Answer]:
        try:
            outputs = self.llm.generate(prompts, sampling_params, use_tqdm=False)
        except self.refusals as error:  # vLLM refuses all prompts for one that is, for example, too long
            if len(prompts) == 1:
                return [Answer("", fault=one_line(error.__cause__ or error))]
            half = len(prompts) // 2
            return [
                *self._generate(prompts[:half], sampling_params[:half]),
                *self._generate(prompts[half:], sampling_params[half:]),
            ]
        choices = [output.outputs[0] for output in outputs]
        return [Answer(choice.text.strip(), choice.finish_reason == "length") for choice in choices]

    def _prompt(self, conversation: list[dict]) -> dict[str, Any]:
        """A request as vLLM takes it: the text of the chat template, which has one placeholder for each image."""
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        tokenizer, images = self.processor.tokenizer, _images(conversation)
        if tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
            text = text.removeprefix(tokenizer.bos_token)  # vLLM's tokenizer adds it
        if not images:
            return {"prompt": text}
        grid = full_grid(self.config, self.processor, images, self.pooled_grid_size)
        return {
            "prompt": text,
            "multi_modal_data": {"image": images},
            "mm_processor_kwargs": {} if grid is None else {"pooled_grid_size": grid},
        }


def _images(conversation: list[dict]) -> list[Any]:
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]


def full_grid(config: DecoConfig, processor: ProcessorMixin, images: list, pooled_grid_size=None):
    """The grid to encode images at: the given one or, if it is None, that of their patches.

    Returns:
        `[rows, cols]`, one such grid per image if each has a patch grid of its own (SigLIP 2, NaFlex), or None for a
        projector that has one grid only.
    """
    if pooled_grid_size is not None:
        return pooled_grid_size
    if not config.takes_any_grid:
        return None
    if hasattr(processor.image_processor, "max_num_patches"):
        return processor.image_processor(images, return_tensors="pt")["spatial_shapes"].tolist()
    return list(config.patch_grid)


def load_engine(
    name: str,
    model: str,
    *,
    pooled_grid_size: list[int] | None,
    max_new_tokens: int,
    temperature: float,
    batch_size: int | None,
    revision: str | None,
    device: str | None,
    dtype: str,
    in_4bit: bool,
) -> TransformersEngine | VLLMEngine:
    """Load a checkpoint into an engine. A process of a launch (`LOCAL_RANK`) takes its own GPU.

    Raises:
        ValueError: the checkpoint cannot be loaded, or the engine does not have these options.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if batch_size is not None:
        options["batch_size"] = batch_size
    if name == "vllm":
        if device is not None or in_4bit:
            raise ValueError("--engine vllm chooses its device and its precision; leave out --device and --4bit.")
        return VLLMEngine(model, pooled_grid_size, revision=revision, dtype=dtype, **options)
    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    loaded, processor = load(model, revision=revision, device=device, dtype=dtype, in_4bit=in_4bit)
    return TransformersEngine(loaded.eval(), processor, pooled_grid_size, **options)
