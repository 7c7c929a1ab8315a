# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo as a model of lmms-eval, at any token budget.

    python -m lmms_eval --model deco --model_args pretrained=DIR,pooled_grid_size=8 --tasks pope --batch_size 16

lmms-eval finds this class by the entry point `lmms_eval.models`. Tested with lmms-eval 0.7.3.
"""

import inspect
import re
import time
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.progress import make_progress
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from PIL import Image
from transformers import LogitsProcessorList
from transformers.utils import logging

from ..configuration_deco import check_grid, parse_grid
from ..inference.generation import RefuseNaN, encode, num_positions
from ..inference.loading import load
from ..inference.videos import encode_video
from ..utils.options import parse_grid_option
from ..videos import PreparedVideo

logger = logging.get_logger(__name__)

# Maximum length of an answer if neither the task (as TextVQA and RefCOCO) nor the checkpoint's generation config sets
# it. lmms-eval's own LLaVA uses this value.
MAX_NEW_TOKENS = 1024

_GENERATION_KWARGS = ("max_new_tokens", "num_beams", "repetition_penalty")
_SAMPLING_KWARGS = ("temperature", "top_p", "top_k")


class Deco(lmms):
    """A DeCo checkpoint as a chat model of lmms-eval: text, images and videos in any order, one turn or several.

    With `accelerate launch -m lmms_eval`, each process has a whole model and answers its share of the requests.

    Args:
        pretrained: folder or Hub id of a DeCo, of a LLaVA of transformers, or of an adapter.
        pooled_grid_size: token budget of each image, `8` or `8x12` (rows x columns). Default: the checkpoint's.
        max_image_tokens, tiles, fps, max_frames, pooled_video_grid_size, frames_per_token_grid, add_timestamps: as in
            `DecoProcessor.__call__`, grids as `pooled_grid_size`. Default: the checkpoint's.
        image_positions: `patch` or `sequence`, see `DecoConfig`. Default: the checkpoint's.
        batch_size: number of requests answered together.
        device: default: one GPU for each process, or the CPU.
        device_map: `auto` spreads one model over all GPUs; only for a single process.
        dtype: `auto` (the checkpoint's), `bfloat16`, `float32`, ...
        revision: branch, tag or commit on the Hub.
        attn_implementation: `sdpa`, `flash_attention_2`, ...; default: transformers'.
        load_in_4bit: load the language model in NF4 (needs bitsandbytes).

    Raises:
        ValueError: an argument is unknown, or does not fit the other arguments, the checkpoint or the number of
            processes.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        pooled_grid_size: int | str | None = None,
        max_image_tokens: int | None = None,
        tiles: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        pooled_video_grid_size: int | str | None = None,
        frames_per_token_grid: int | None = None,
        add_timestamps: bool | None = None,
        image_positions: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        revision: str = "main",
        attn_implementation: str | None = None,
        load_in_4bit: bool = False,
        **unknown,
    ):
        super().__init__()
        if unknown:
            known = [name for name in inspect.signature(Deco).parameters if name != "unknown"]
            raise ValueError(
                f"--model_args: {', '.join(unknown)} is not an argument of --model deco; use {', '.join(known)}."
            )
        for name, value in {"pretrained": pretrained, "revision": revision}.items():
            if not isinstance(value, str):  # lmms-eval converts what looks like a number
                raise ValueError(f"--model_args: {name} must be text, got {value!r}; write a folder named 7 as ./7.")
        if not re.fullmatch(r"[1-9]\d*", str(batch_size)):
            raise ValueError(
                f"--batch_size must be a positive integer, got {batch_size!r}; DeCo does not support 'auto'."
            )
        self.options = {
            "pooled_grid_size": _parse_grid(pooled_grid_size),
            "max_image_tokens": max_image_tokens,
            "tiles": tiles,
            "add_timestamps": add_timestamps,
        }
        self.video_options: dict[str, Any] = {
            "fps": fps,
            "max_frames": max_frames,
            "pooled_video_grid_size": _parse_grid(pooled_video_grid_size, "pooled_video_grid_size"),
            "frames_per_token_grid": frames_per_token_grid,
        }
        self.batch_size = int(batch_size)

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.world_size > 1 and (device or device_map):
            raise ValueError(
                f"device and device_map need a single process; each of {self.world_size} processes uses its own GPU."
            )
        if device_map not in (None, "auto"):
            raise ValueError(f"device_map must be auto, got {device_map!r}.")
        own_device = self.accelerator.device  # "cpu:0" for each of several processes on CPUs
        own_device = own_device.type if own_device.type == "cpu" else str(own_device)
        self.model, self.processor = load(
            str(pretrained),
            revision=revision,
            device=None if device_map else device or own_device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            in_4bit=load_in_4bit,
            image_positions=image_positions,
        )
        self.device = self.model.device
        self._check_options()
        self.max_length = getattr(self.model.config.text_config, "max_position_embeddings", None)

    def _check_options(self) -> None:
        """Refuse budgets that do not fit the checkpoint, before lmms-eval loads the data."""
        grid = self.options["pooled_grid_size"]
        if grid is not None and self.options["tiles"] is None:  # the processor may not know the patch grid
            check_grid(grid, self.model.config.patch_grid)
        blank = Image.new("RGB", (64, 64))
        content = [{"type": "image", "image": blank}]
        if any(value is not None for value in self.video_options.values()):
            content.append({"type": "video", "video": self._encode_video([blank])})
        encode(self.processor, [{"role": "user", "content": content}], **self.options)

    def _encode_video(self, source) -> PreparedVideo:
        return encode_video(self.model, self.processor, source, **self.video_options)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. Each ends before the first of its task's stop strings (`until`).

        Decoding is greedy, unless the task or `--gen_kwargs` sets a temperature above 0 or `do_sample=True`.

        Raises:
            ValueError: an image or video cannot be read, or the text has another number of `<image>` than there are
                images.
            NotImplementedError: a request has audio, or asks for a part of a video.
        """
        # Requests with the same generation arguments are answered together. The longest come first: if memory is too
        # small for a batch, the first one fails.
        batches = Collator(
            [request.args for request in requests], lambda args: -len(args[0]), lambda args: args[2], grouping=True
        )
        results, seconds = [], 0.0
        progress = make_progress(total=len(requests), desc="Model Responding", disable=self.rank != 0)
        for batch in batches.get_batched(n=self.batch_size):
            try:
                conversations = [self._conversation(*args) for args in batch]
                inputs = encode(self.processor, conversations, **self.options).to(self.device)
                start = time.perf_counter()
                results += self._generate(inputs, **batch[0][2])
                seconds += time.perf_counter() - start
            except Exception:
                places = ", ".join(f"{task} {doc_id}" for _, _, _, doc_id, task, _ in batch)
                logger.error(f"DeCo failed at one of these documents: {places}")
                raise
            progress.update(len(batch))
        progress.close()
        num_tokens = sum(result.token_counts.output_tokens for result in results)
        log_metrics(seconds, num_tokens, num_tokens / seconds if seconds else 0.0)
        return batches.get_original(results)

    def _conversation(self, context, doc_to_messages, generation_kwargs, doc_id, task, split) -> list[dict]:
        """The chat messages of a request, in transformers' format, with encoded videos."""
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        if messages.extract_media()[2]:
            raise NotImplementedError(f"DeCo reads text, images and videos; {task} has audio.")
        messages = messages.to_hf_messages()
        for message in messages:
            for part in message["content"]:
                if part["type"] == "video":
                    if {"video_start", "video_end"} & part.keys() or isinstance(part["video"], dict):
                        raise NotImplementedError(f"DeCo reads whole videos; {task} asks for a part of one.")
                    part["video"] = self._encode_video(part["video"])
            for kind in ("image", "video"):
                token = getattr(self.processor, f"{kind}_token")
                message["content"] = _interleave(message["content"], kind, token)
        return messages

    @torch.inference_mode()
    def _generate(self, inputs, until=None, do_sample=None, **generation_kwargs) -> list[GenerationResult]:
        for name in generation_kwargs.keys() - {*_GENERATION_KWARGS, *_SAMPLING_KWARGS}:
            logger.warning_once(f"DeCo ignores the generation argument {name} of the task or of --gen_kwargs.")
        temperature = generation_kwargs.get("temperature")
        sample = temperature != 0 and bool(temperature if do_sample is None else do_sample)
        arguments = {name: generation_kwargs.get(name) for name in _GENERATION_KWARGS}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        # with greedy decoding, values of the checkpoint's generation config would cause a warning
        arguments |= {name: generation_kwargs.get(name) if sample else None for name in _SAMPLING_KWARGS}
        arguments["logits_processor"] = LogitsProcessorList([RefuseNaN()])
        if "max_new_tokens" not in arguments and self.model.generation_config.max_new_tokens is None:
            arguments["max_new_tokens"] = MAX_NEW_TOKENS
        stop_strings = [until] if isinstance(until, str) else [stop for stop in until or [] if stop]
        prompt_length = inputs["input_ids"].shape[1]
        if stop_strings:
            arguments |= {"stop_strings": stop_strings, "tokenizer": self.processor.tokenizer}

        generated = self.model.generate(**inputs, do_sample=sample, **arguments)
        answers = generated[:, prompt_length:]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        texts = [min((text.partition(stop)[0] for stop in stop_strings), key=len, default=text) for text in texts]
        input_tokens = inputs["attention_mask"].sum(1).tolist()
        output_tokens = (answers != self.processor.tokenizer.pad_token_id).sum(1).tolist()
        counts = list(zip(input_tokens, output_tokens, strict=True))
        if self.max_length and num_positions(self.model, inputs) + answers.shape[1] > self.max_length:
            logger.warning_once(
                f"Some prompts and their answers are longer than the language model's context of {self.max_length} "
                f"tokens; choose a smaller pooled_grid_size or image_positions=sequence."
            )
        return [GenerationResult(text, TokenCounts(*count)) for text, count in zip(texts, counts, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not implemented: lmms-eval does not run tasks that compare likelihoods on chat models."""
        raise NotImplementedError(
            "DeCo supports generate_until tasks only; lmms-eval has no loglikelihood for chat models."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Not implemented: in these tasks, each round depends on the last answer."""
        raise NotImplementedError("DeCo supports generate_until tasks only, not generate_until_multi_round.")


def _parse_grid(size: int | str | None, name: str = "pooled_grid_size") -> tuple[int, int] | None:
    """The grid of a `--model_args`: 8 (lmms-eval has made it a number) or "8x12"."""
    return None if size is None else parse_grid(parse_grid_option(str(size)), name)


def _interleave(content: list[dict], kind: str, token: str | None) -> list[dict]:
    """Move a message's images, or videos, to the marks in its text (`<image>`), which some tasks write for LLaVA. If
    the numbers differ, the content is unchanged."""
    media = [part for part in content if part["type"] == kind]
    num_marks = sum(part["text"].count(token) for part in content if token and part["type"] == "text")
    if num_marks == 0 or num_marks != len(media):
        return content
    interleaved, rest = [], iter(media)
    for part in (part for part in content if part["type"] != kind):
        first, *pieces = part["text"].split(token) if part["type"] == "text" else (None,)
        interleaved.append(part if first is None else {"type": "text", "text": first})
        for piece in pieces:
            interleaved += [next(rest), {"type": "text", "text": piece}]
    return [part for part in interleaved if part.get("text") != ""]
