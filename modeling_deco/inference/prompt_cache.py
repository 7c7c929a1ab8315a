# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Keep the keys and values of earlier prompts and answers for the prompts that begin with them.

The next turn of a conversation then runs neither the vision tower nor the language model on the earlier turns.
"""

from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling_deco import CACHE_NAME, IMAGE_INPUTS, VIDEO_INPUTS
from ..positions import set_next_position
from ..views import TokenMap, num_map_tokens, num_map_views
from .errors import is_out_of_memory

# arguments of `generate` that do not change what the model computes for a prompt
_BESIDE_THE_PROMPT = {"generation_config", "logits_processor", "stopping_criteria", "streamer", "tokenizer"}

_ROWS = {"image": IMAGE_INPUTS, "video": VIDEO_INPUTS}  # arguments with one row for each
_GRIDS = ("pooled_grid_sizes", "pooled_video_sizes")
_OF_THE_PROMPT = {"input_ids", *IMAGE_INPUTS, *VIDEO_INPUTS, "batch_num_images", "mm_encoder_outputs"}

# layers whose state is one key and one value for each token, as long as no sliding window is full
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class PromptCache:
    """Runs `model.generate`, but reuses what an earlier call has computed for the beginning of the prompt.

    The answer is that of `generate`, up to rounding in the dtype of the model. (In int8 on a CPU it is rounding to
    int8, because all tokens of a call share one scale.) Two images or videos are the same if their pixels and
    grids are equal.

    Where the result could differ, the call runs without the cache: beam search and assisted generation, static and
    quantized caches, recurrent layers, full sliding windows, rotary embeddings that depend on the length of the
    prompt, padded prompts, and inputs other than ids, images and videos.

    Several threads may share a cache. A user who measures the time to an answer can learn whether the prompt was asked
    before.

    Args:
        model: a `DecoForConditionalGeneration`. Call `clear` after you change its weights.
        max_bytes: maximum size of the keys and values that are kept between calls, on the devices of the model. Least
            recently used entries are evicted first.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: float = 2**30):
        self.model = model
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the last one is the most recent
        self._lock = Lock()

    @property
    def _text_config(self):
        return self.model.config.get_text_config(decoder=True)

    @property
    def num_bytes(self) -> int:
        """Size of the keys and values in the cache."""
        return sum(entry.num_bytes for entry in self._entries)

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._entries = []

    def generate(self, **inputs) -> torch.LongTensor:
        """Call `model.generate` with its arguments. A lack of memory also clears the cache."""
        prompt = self._read(inputs)
        if prompt is None:
            return self.model.generate(**inputs)
        cache, length = self._take(prompt)
        if prompt.image_positions == "patch" and length > 0:
            # whole images are behind
            set_next_position(cache, self.model.model.position_behind(inputs, length), length)
        for modality, names in _ROWS.items():
            found = prompt.inserts[modality]
            _drop_rows(inputs, modality, names, sum(insert.end <= length for insert in found), len(found))
        try:
            sequences = self.model.generate(**inputs, **{CACHE_NAME: cache})
        except Exception as error:
            if is_out_of_memory(error):
                self.clear()
            else:  # also if a client has left: streamers end generation with an error
                self._keep(cache, prompt, prompt.token_ids)
            raise
        self._keep(cache, prompt, sequences[0].cpu())
        return sequences

    def _read(self, inputs: dict) -> "_Prompt | None":
        """Read the prompt from the arguments of `generate`; None if the cache cannot be used."""
        others = {name: value for name, value in inputs.items() if name not in _BESIDE_THE_PROMPT}
        # as in `generate`: arguments override the given config, which overrides the model's config
        generation_config = deepcopy(inputs.get("generation_config")) or GenerationConfig()
        generation_config.update(**self.model.generation_config.to_dict(), defaults_only=True)
        others = generation_config.update(**others)
        mask = others.pop("attention_mask", None)
        image_positions = self.model.model.check_image_positions(others.pop("image_positions", None))
        is_plain = (
            "input_ids" in others
            and others.keys() <= _OF_THE_PROMPT  # others may change what is computed for it
            and (mask is None or bool(mask.all()))
            and generation_config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and generation_config.num_return_sequences in (None, 1)
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
            and generation_config.prefill_chunk_size is None
            and not generation_config.return_dict_in_generate
        )
        # the frequencies of these embeddings, and so the keys, depend on the longest position of a call
        rope = str(getattr(self._text_config, "rope_parameters", None))
        if not is_plain or "dynamic" in rope or "longrope" in rope or len(inputs["input_ids"]) != 1:
            return None
        if not set(getattr(self._text_config, "layer_types", None) or ()) <= _LAYER_TYPES:
            return None
        token_ids = inputs["input_ids"][0].cpu()
        deco = self.model.model
        maps = deco.token_maps(inputs)
        inserts: dict[str, list[_Insert]] = {}
        for modality, names in _ROWS.items():
            is_placeholder = deco.find_placeholders(token_ids[None], None, modality)[0]
            found = _find_inserts(inputs, modality, names, is_placeholder, maps[modality])
            if found is None:
                return None  # the model reports the error
            inserts[modality] = found
        return _Prompt(token_ids, inserts, inputs.get("batch_num_images") is not None, image_positions)

    def _take(self, prompt: "_Prompt") -> tuple[DynamicCache, int]:
        """Build a cache for the longest known beginning of the prompt, and return it with its length."""
        with self._lock:
            lengths = [entry.shared_length(prompt) for entry in self._entries]
            length = max(lengths, default=0)
            if length == 0:
                return DynamicCache(config=self._text_config), 0
            entry = self._entries[lengths.index(length)]
            # A prompt that continues an entry replaces it, so that its memory is free once it is copied. An entry
            # that shares only its beginning stays, because its own conversation may continue.
            if length >= entry.num_prompt_tokens - 1:
                self._entries.remove(entry)
        states = [(keys[..., :length, :], values[..., :length, :]) for keys, values in entry.states]
        return DynamicCache(states, config=self._text_config), length  # copies them

    def _keep(self, cache: DynamicCache, prompt: "_Prompt", token_ids: torch.LongTensor) -> None:
        states = [(keys, values) for keys, values, *_ in cache]
        length = _whole_length(states)
        if length is None or length != cache.get_seq_length():  # a full sliding window has fewer states
            return
        token_ids = token_ids[:length]  # the last token has not been run; after an error none of the answer is known
        entry = _Entry(token_ids, prompt.inserts, prompt.image_positions, states, min(len(prompt.token_ids), length))
        if entry.num_bytes > self.max_bytes:
            return
        with self._lock:
            self._entries.append(entry)
            while self.num_bytes > self.max_bytes:
                del self._entries[0]


class _Insert(NamedTuple):
    """An image or a video of a prompt. Its tokens are from `start` up to `end`, which is not included."""

    start: int
    end: int
    maps: list[TokenMap]
    digest: bytes


class _Prompt(NamedTuple):
    token_ids: torch.LongTensor  # (sequence,), on the CPU
    inserts: dict[str, list[_Insert]]  # "image" and "video"
    images_belong_together: bool  # whether the number of images changes how each is encoded
    image_positions: str


@dataclass(eq=False)
class _Entry:
    """The tokens of a prompt and its answer that have been run, with their keys and values."""

    token_ids: torch.LongTensor  # (sequence,), on the CPU
    inserts: dict[str, list[_Insert]]
    image_positions: str
    states: list[tuple[torch.Tensor, torch.Tensor]]  # per layer, each (1, heads, sequence, head_dim)
    num_prompt_tokens: int

    def shared_length(self, prompt: _Prompt) -> int:
        """Number of tokens at the beginning of the prompt that are the same here. No image is shared in part."""
        if prompt.image_positions != self.image_positions:
            return 0
        longest = min(len(self.token_ids), len(prompt.token_ids) - 1)  # the logits of the last token are needed
        differences = (self.token_ids[:longest] != prompt.token_ids[:longest]).nonzero().flatten().tolist()
        length = differences[0] if differences else longest
        for modality, found in prompt.inserts.items():
            for insert in found:
                if insert.start < length and (insert.end > length or insert not in self.inserts[modality]):
                    length = insert.start
        images = prompt.inserts["image"]
        if prompt.images_belong_together and images and images[-1].end > length:
            return min(length, images[0].start)
        return length

    @property
    def num_bytes(self) -> int:
        # a tensor may be a view of a larger storage
        return sum(tensor.untyped_storage().nbytes() for layer in self.states for tensor in layer)


def _find_inserts(
    inputs: dict, modality: str, names: tuple[str, ...], is_placeholder: torch.BoolTensor, maps: list[list[TokenMap]]
) -> list[_Insert] | None:
    """The images or videos of a prompt; None if they are not those of its placeholders."""
    # the maps are made from the sizes
    rows = [inputs[name] for name in names if inputs.get(name) is not None and name not in _GRIDS]
    encoded = (inputs.get("mm_encoder_outputs") or {}).get(modality)
    rows += [] if encoded is None else [encoded.pooler_output]
    number = len(rows[0]) if rows else 0
    maps = maps * number if len(maps) == 1 else maps[:number]  # one entry may stand for all images
    places = is_placeholder.nonzero().flatten().tolist()
    counts = [num_map_tokens(maps_of_one) for maps_of_one in maps]
    if {len(part) for part in rows} - {len(maps)} or sum(counts) != len(places) or 0 in counts:
        return None
    inserts = []
    for maps_of_one, count, *parts in zip(maps, counts, *rows, strict=True):
        own, places = places[:count], places[count:]
        views = num_map_views(maps_of_one)
        parts = [part[:views] if part.ndim == 4 else part for part in parts]  # without padding
        inserts.append(_Insert(own[0], own[-1] + 1, maps_of_one, _digest(parts)))
    return inserts


def _drop_rows(inputs: dict, modality: str, names: tuple[str, ...], num_seen: int, number: int) -> None:
    """Leave out the images or videos whose tokens are in the cache."""
    if num_seen == 0:
        return
    for name in names:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name][num_seen:]
            if num_seen == number:
                del inputs[name]
    if num_seen == number and modality == "image":
        inputs.pop("batch_num_images", None)
    outputs = dict(inputs.get("mm_encoder_outputs") or {})
    encoded = outputs.pop(modality, None)
    if encoded is not None:
        if num_seen < number:
            outputs[modality] = BaseModelOutputWithPooling(pooler_output=encoded.pooler_output[num_seen:])
        inputs["mm_encoder_outputs"] = outputs or None


def _whole_length(states: list[tuple[torch.Tensor | None, torch.Tensor | None]]) -> int | None:
    """Number of tokens for which every layer has keys and values; None if layers differ, as after an error."""
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
