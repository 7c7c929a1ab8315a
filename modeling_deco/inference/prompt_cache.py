# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys and values of earlier prompts and answers, for the prompts that begin with them: the next turn of a
conversation runs neither the vision tower nor the language model on what came before."""

from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ..configuration_deco import num_image_tokens
from ..modeling_deco import CACHE_NAME, IMAGE_INPUTS
from .errors import is_out_of_memory

# arguments of `generate` that are not about what the model computes of a prompt
_BESIDE_THE_PROMPT = {"generation_config", "logits_processor", "stopping_criteria", "streamer", "tokenizer"}

# layers whose whole state is one key and one value per token, as long as no sliding window is full
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class PromptCache:
    """A model's `generate`, without what an earlier call has computed already.

    The answer is the one of `generate`, up to rounding in the model's dtype (in int8 on a CPU: of int8, whose scale is
    one for all tokens of a call). An image counts as the same where all of its pixels and its grid are. What
    cannot be continued exactly runs as if nothing were kept: beam search and assisted generation, static and quantized
    caches, recurrent layers, sliding windows that have been filled, rotary embeddings that change with a prompt's
    length, and prompts with padding or given by more than ids and images.

    Threads may share it. Who can measure the time to an answer can learn whether its prompt was asked before.

    Args:
        model: a `DecoForConditionalGeneration`, whose weights stay as they are (or call `clear`).
        max_bytes: of keys and values kept between calls, on the model's devices. Least recently used entries are
            evicted first.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: float = 2**30):
        self.model = model
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the last is the latest
        self._lock = Lock()

    @property
    def _text_config(self):
        return self.model.config.get_text_config(decoder=True)

    @property
    def num_bytes(self) -> int:
        """Of the keys and values kept now."""
        return sum(entry.num_bytes for entry in self._entries)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._entries = []

    def generate(self, **inputs) -> torch.LongTensor:
        """`model.generate`, whose arguments and errors these are. A lack of memory also clears this cache."""
        prompt = self._read(inputs)
        if prompt is None:
            return self.model.generate(**inputs)
        cache, length = self._take(prompt)
        num_seen = sum(image.end <= length for image in prompt.images)
        for name in IMAGE_INPUTS:
            if num_seen > 0 and inputs.get(name) is not None:
                inputs[name] = inputs[name][num_seen:]
                if num_seen == len(prompt.images):
                    del inputs[name]
        try:
            sequences = self.model.generate(**inputs, **{CACHE_NAME: cache})
        except Exception as error:
            if is_out_of_memory(error):
                self.clear()
            else:  # also of a client that has left: streamers end generation by raising
                self._keep(cache, prompt, prompt.token_ids)
            raise
        self._keep(cache, prompt, sequences[0].cpu())
        return sequences

    def _read(self, inputs: dict) -> "_Prompt | None":
        """The prompt that is asked, or None where this is not for us."""
        config = self.model.config
        others = {name: value for name, value in inputs.items() if name not in _BESIDE_THE_PROMPT}
        # as `generate` does: arguments count before the given config, and that before the model's
        generation_config = deepcopy(inputs.get("generation_config")) or GenerationConfig()
        generation_config.update(**self.model.generation_config.to_dict(), defaults_only=True)
        others = generation_config.update(**others)
        mask = others.pop("attention_mask", None)
        is_plain = (
            "input_ids" in others
            and others.keys() <= {"input_ids", *IMAGE_INPUTS}  # the rest may change what is computed of a prompt
            and (mask is None or bool(mask.all()))
            and generation_config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and generation_config.num_return_sequences in (None, 1)
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
            and generation_config.prefill_chunk_size is None
            and not generation_config.return_dict_in_generate
        )
        # whose frequencies depend on the longest position of a call, so that the same token's keys do, too
        rope = str(getattr(self._text_config, "rope_parameters", None))
        if not is_plain or "dynamic" in rope or "longrope" in rope or len(inputs["input_ids"]) != 1:
            return None
        if not set(getattr(self._text_config, "layer_types", None) or ()) <= _LAYER_TYPES:
            return None
        token_ids = inputs["input_ids"][0].cpu()
        pixels = [
            inputs[name] for name in IMAGE_INPUTS if name != "pooled_grid_sizes" and inputs.get(name) is not None
        ]
        num_images = len(pixels[0]) if pixels else 0
        grids = inputs.get("pooled_grid_sizes")
        grids = [config.pooled_grid] * num_images if grids is None else [tuple(grid) for grid in grids.tolist()]
        places = (token_ids == config.image_token_id).nonzero().flatten().tolist()
        if {len(rows) for rows in pixels} - {len(grids)} or sum(map(num_image_tokens, grids)) != len(places):
            return None  # the model says what is wrong
        images = []
        for grid, *parts in zip(grids, *pixels, strict=True):
            own_places, places = places[: num_image_tokens(grid)], places[num_image_tokens(grid) :]
            images.append(_Image(own_places[0], own_places[-1] + 1, grid, _digest(parts)))
        return _Prompt(token_ids, images)

    def _take(self, prompt: "_Prompt") -> tuple[DynamicCache, int]:
        """A cache of the prompt's beginning, as long as one is known, and its length."""
        with self._lock:
            lengths = [entry.shared_length(prompt) for entry in self._entries]
            length = max(lengths, default=0)
            if length == 0:
                return DynamicCache(config=self._text_config), 0
            entry = self._entries[lengths.index(length)]
            # What goes on from an entry replaces it, whose memory is so free as soon as it is copied into the longer
            # one. From where a prompt only begins alike, its own conversation may yet go on.
            if length >= entry.num_prompt_tokens - 1:
                self._entries.remove(entry)
        states = [(keys[..., :length, :], values[..., :length, :]) for keys, values in entry.states]
        return DynamicCache(states, config=self._text_config), length  # which copies them

    def _keep(self, cache: DynamicCache, prompt: "_Prompt", token_ids: torch.LongTensor) -> None:
        states = [(keys, values) for keys, values, *_ in cache]
        length = _whole_length(states)
        if length != cache.get_seq_length():  # of a sliding window that has been filled there are fewer states
            return
        token_ids = token_ids[:length]  # the last one has not been run; of a broken answer all are unknown
        entry = _Entry(token_ids, prompt.images, states, min(len(prompt.token_ids), length))
        if entry.num_bytes > self.max_bytes:
            return
        with self._lock:
            self._entries.append(entry)
            while self.num_bytes > self.max_bytes:
                del self._entries[0]


class _Image(NamedTuple):
    """An image of a prompt, whose placeholders are the tokens from `start` to before `end`."""

    start: int
    end: int
    grid: tuple[int, int]
    digest: bytes


class _Prompt(NamedTuple):
    token_ids: torch.LongTensor  # (sequence,), on the CPU
    images: list[_Image]


@dataclass(eq=False)
class _Entry:
    """The tokens of a prompt and its answer, as far as they have been run, and their keys and values."""

    token_ids: torch.LongTensor  # (sequence,), on the CPU
    images: list[_Image]
    states: list[tuple[torch.Tensor, torch.Tensor]]  # per layer, each (1, heads, sequence, head_dim)
    num_prompt_tokens: int

    def shared_length(self, prompt: _Prompt) -> int:
        """Tokens at the prompt's beginning that are the same here. An image counts whole or not at all."""
        longest = min(len(self.token_ids), len(prompt.token_ids) - 1)  # the last token's logits are wanted
        differences = (self.token_ids[:longest] != prompt.token_ids[:longest]).nonzero().flatten().tolist()
        length = differences[0] if differences else longest
        for image in prompt.images:
            if image.start < length and (image.end > length or image not in self.images):
                return image.start
        return length

    @property
    def num_bytes(self) -> int:
        # a tensor may be a view of a larger storage
        return sum(tensor.untyped_storage().nbytes() for layer in self.states for tensor in layer)


def _whole_length(states: list[tuple[torch.Tensor | None, torch.Tensor | None]]) -> int | None:
    """Tokens that every layer has keys and values of; None where they differ, as after an error in between."""
    # a layer that has not run has no tensors, or empty ones of one dimension
    lengths = {() if tensor is None else tuple(tensor.shape[-2:-1]) for layer in states for tensor in layer}
    return lengths.pop()[0] if len(lengths) == 1 and () not in lengths else None


def _digest(tensors: list[torch.Tensor]) -> bytes:
    digest = blake2b()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
    return digest.digest()


__all__ = ["PromptCache"]
