# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Relevance maps: which projector outputs, and which patches, an answer's words rest on.

    relevance = explain(model, processor, image, "What colour is the 7?")
    plot_relevance(relevance).savefig("relevance.png")
    relevance.average(["red"]).text_to_patch  # (1, num_patches)

GAE (Chefer et al. 2021, arXiv 2103.15679) composed over the projector, after the R-GAE of the DeCo paper (arXiv
2405.20985). Every attention is weighted by the gradient of the answer token's score, `A = mean over heads of max(0,
gradient * attention)`, and relevance R, which begins as the identity, goes through a layer by `R += A R`. The score
is not the logit alone but its margin over the best other token's (contrastive explanations, arXiv 2202.10419): logits
mean something only against each other, and what raises all of them is no reason for one. Between language model and
vision tower stands the projector:

- "avg_pool", "mlp": the pooling is linear and known, so its matrix is exact; the MLP, token by token, adds nothing.
- "qformer": GAE's rules for self-attention among queries, and for their cross-attention to patches.
- "resampler": the rule for self-attention over patches and latents together, of which only latents are updated.
- "c_abstractor", "d_abstractor": gradient x input, since convolutions and sampled attention have no attention map.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..inference.generation import check_length, encode
from ..inference.quantization import Int8Linear
from ..modeling_deco import IMAGE_INPUTS
from ..projectors import pool_patch_grid

METHODS = ("gae", "attention")
LEVELS = ("patch", "query", "both")

# What computes attention in a projector, and gives its weights as second output.
# private, seen in transformers 5.19 to 5.24
_ATTENTION_CLASSES = {"qformer": "Blip2QFormerMultiHeadAttention", "resampler": "Idefics2PerceiverAttention"}
_POOLING = ("avg_pool", "mlp")


# --- result ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Relevance:
    """Relevance of the picture for an answer, one entry per token, or per word after `by_word` and `average`.

    Tensors are float32 on the CPU, not negative, and not normalized: what matters is where a map is high. Patches and
    queries stand row by row: `text_to_patch.unflatten(1, patch_grid)`. What ends on the vision tower's prefix tokens
    (CLS, registers) is not in the maps.

    Attributes:
        answer: the text.
        tokens: what each entry adds to the text; the pieces of one character are empty, save for the last.
        token_ids: the ids of each entry: one, or those of a word.
        word_ids: which word of `answer.split()` each entry belongs to; None for white space.
        patch_grid: `(rows, cols)` of the patches.
        pooled_grid: `(rows, cols)` of the projector's outputs, the queries.
        has_grid: whether queries have a place in the picture; those of "qformer" and "resampler" have none.
        text_to_query: `(num_entries, num_queries)`.
        query_to_patch: `(num_entries, num_queries, num_patches)`; by GAE it differs from token to token.
        text_to_patch: `(num_entries, num_patches)`, per token `text_to_query @ query_to_patch`.
        image: `(height, width, 3)`, uint8, the picture as the model saw it: resized, cropped or padded.
    """

    answer: str
    tokens: list[str]
    token_ids: list[list[int]]
    word_ids: list[int | None]
    patch_grid: tuple[int, int]
    pooled_grid: tuple[int, int]
    has_grid: bool
    text_to_query: torch.Tensor
    query_to_patch: torch.Tensor
    text_to_patch: torch.Tensor
    image: np.ndarray

    def by_word(self) -> "Relevance":
        """The mean over each word's tokens; words are what stands between white space.

        Tokens without a letter or digit, such as a full stop, do not count, and words of such alone are left out
        (unless the answer has no others).
        """
        entries = {}
        for index, (word, text) in enumerate(zip(self.word_ids, _whole_characters(self.tokens), strict=True)):
            if word is not None and any(character.isalnum() for character in text):
                entries.setdefault(word, []).append(index)
        if not entries:
            entries = {0: list(range(len(self.tokens)))}
        words = ["".join(self.tokens[group[0] : group[-1] + 1]).strip() for group in entries.values()]
        return self._mean(list(entries.values()), words, list(entries))

    def average(self, words: list[str]) -> "Relevance":
        """The mean over chosen words, all their occurrences, as one entry.

        Raises:
            ValueError: a word is not in the answer.
        """
        grouped = self.by_word()
        for word in words:
            if word not in grouped.tokens:
                raise ValueError(
                    f"{word!r} is not a word of the answer; its words are {', '.join(map(repr, grouped.tokens))}."
                )
        group = [index for index, word in enumerate(grouped.tokens) if word in words]
        if not group:
            raise ValueError("average needs at least one word.")
        return grouped._mean(
            [group], [" ".join(grouped.tokens[index] for index in group)], [grouped.word_ids[group[0]]]
        )

    def _mean(self, groups: list[list[int]], tokens: list[str], word_ids: list[int]) -> "Relevance":
        means = {
            name: torch.stack([getattr(self, name)[group].mean(0) for group in groups])
            for name in ("text_to_query", "query_to_patch", "text_to_patch")
        }
        token_ids = [[token for index in group for token in self.token_ids[index]] for group in groups]
        return replace(self, tokens=tokens, token_ids=token_ids, word_ids=word_ids, **means)


def _whole_characters(tokens: list[str]) -> list[str]:
    """`tokens` with each empty one, a piece of a character, replaced by what completes it."""
    texts, following = [], ""
    for token in reversed(tokens):
        following = token or following
        texts.append(following)
    return texts[::-1]


def _find_word_ids(tokens: list[str]) -> list[int | None]:
    """The word that each token belongs to, the last one that it touches."""
    words = [(match.start(), match.end()) for match in re.finditer(r"\S+", "".join(tokens))]
    word_ids, start = [], 0
    for token in tokens:
        end = start + len(token)
        touched = [index for index, (first, last) in enumerate(words) if first < end and start < last]
        word_ids.append(touched[-1] if touched else None)
        start = end
    for index in range(len(tokens) - 2, -1, -1):
        if not tokens[index]:
            word_ids[index] = word_ids[index + 1]
    return word_ids


def _decode_one_by_one(tokenizer, token_ids: list[int]) -> list[str]:
    """What each token adds to the text. A piece of a character adds nothing before the character is complete."""
    tokens, text = [], ""
    for end in range(1, len(token_ids) + 1):
        longer = tokenizer.decode(token_ids[:end], clean_up_tokenization_spaces=False)
        if longer.endswith("\ufffd") and end < len(token_ids):
            longer = text
        tokens.append(longer[len(text) :])
        text = longer
    return tokens


# --- explaining ------------------------------------------------------------------------------------------------------


def explain(
    model,
    processor,
    image,
    question: str,
    answer: str | None = None,
    pooled_grid_size: int | list | tuple | None = None,
    method: str = "gae",
    **generate_kwargs,
) -> Relevance:
    """Relevance maps for the tokens of an answer about one image.

    The prompt is the chat template's for one user turn of image and question. The image is encoded once, for the
    answer and for its maps. The forward pass over image, prompt and answer is differentiated for one token at a time,
    with respect to activations: parameters may be frozen or quantized and their `.grad` is not touched. Attention is
    eager during that pass, dropout off, and both are put back, also after an error; so is `no_grad` or
    `inference_mode` around the call. Memory does not grow with the number of tokens, save for the maps themselves.

    Args:
        model: a `DecoForConditionalGeneration`, as it is or wrapped by PEFT.
        processor: its `DecoProcessor`, with a chat template.
        image: whatever the chat template takes: PIL image, path, URL.
        answer: text to explain. Default: what the model generates.
        pooled_grid_size: token budget; default: the processor's.
        method: `"gae"`, or `"attention"`, a baseline without gradients: attention averaged over heads and layers of
            the language model, then the pooling matrix, or the averaged attention of queries to patches.
        generate_kwargs: of `model.generate`; with a `streamer` the answer is there before its maps.

    Returns:
        `Relevance` with one entry per token, special tokens left out.

    Raises:
        ValueError: a prompt that leaves no room for an answer, an unknown method, the attention of an abstractor,
            which has none to patches, an answer without tokens or with an image token, arguments of `generate` that
            make it return other than one answer, or a part of the model that does not give each layer's attention.
    """
    deco = _find_deco(model)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    projector_type = deco.config.projector_type
    if method == "attention" and projector_type not in (*_POOLING, *_ATTENTION_CLASSES):
        raise ValueError(f"projector_type {projector_type!r} has no attention to patches; use method='gae'.")
    if answer is not None and generate_kwargs:
        raise ValueError(f"An answer is given, so that {', '.join(generate_kwargs)} would have no effect.")
    for name in ("return_dict_in_generate", "num_return_sequences"):
        if name in generate_kwargs:
            raise ValueError(f"{name} cannot be given: explain takes the token ids of one answer.")

    with _evaluation(deco):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = encode(processor, [{"role": "user", "content": content}], pooled_grid_size).to(deco.device)
        check_length(deco, inputs)
        prompt_ids, tokenizer = inputs["input_ids"][0].tolist(), processor.tokenizer
        image = _encode_image(deco, inputs, method)
        if answer is None:
            answer_ids = _generate(deco, inputs, image, generate_kwargs)
        else:
            answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if deco.config.image_token_id in answer_ids:
            raise ValueError(f"The answer holds {processor.image_token!r}, which stands for an image; leave it out.")
        explained = [index for index, token in enumerate(answer_ids) if token not in tokenizer.all_special_ids]
        if not explained:
            raise ValueError("The answer is empty: it has no token to explain.")
        token_ids = [answer_ids[index] for index in explained]

        targets = [len(prompt_ids) + index for index in explained]
        run = _run(deco, image, [*prompt_ids, *answer_ids], targets, method)
        explain_token = _explain_by_gae if method == "gae" else _explain_by_attention
        maps = [explain_token(run, index) for index in range(len(explained))]

    text_to_query, query_to_patch = (torch.stack(part) for part in zip(*maps, strict=True))
    tokens = _decode_one_by_one(tokenizer, token_ids)
    return Relevance(
        answer=tokenizer.decode(token_ids).strip(),
        tokens=tokens,
        token_ids=[[token] for token in token_ids],
        word_ids=_find_word_ids(tokens),
        patch_grid=run.projector.patch_grid,
        pooled_grid=run.projector.pooled_grid,
        has_grid=projector_type not in _ATTENTION_CLASSES,
        text_to_query=text_to_query,
        query_to_patch=query_to_patch,
        text_to_patch=(text_to_query[:, None] @ query_to_patch)[:, 0],
        image=_picture(inputs, processor.image_processor, run.projector.patch_grid, deco.config),
    )


def _find_deco(model: nn.Module) -> nn.Module:
    # by name, since code that came with a checkpoint has a class of its own, and PEFT wraps either
    for module in model.modules():
        if type(module).__name__ == "DecoForConditionalGeneration":
            return module
    raise ValueError(f"explain needs a DecoForConditionalGeneration, got a {type(model).__name__}.")


def _picture(inputs, image_processor, patch_grid: tuple[int, int], config) -> np.ndarray:
    """The pixels under the patches as `(height, width, 3)`, normalization undone."""
    pixels = inputs["pixel_values"][0].detach().float().cpu()
    (rows, cols), patch_size = patch_grid, config.vision_config.patch_size
    if pixels.ndim == 2:  # SigLIP 2's flat patches: (max_num_patches, patch_size * patch_size * 3)
        patches = pixels[: rows * cols].reshape(rows, cols, patch_size, patch_size, 3)
        pixels = patches.transpose(1, 2).reshape(rows * patch_size, cols * patch_size, 3)
    else:
        pixels = pixels[:, : rows * patch_size, : cols * patch_size].permute(1, 2, 0)  # (height, width, 3)
    if image_processor.do_normalize:
        pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    return pixels.round().clamp(0, 255).to(torch.uint8).numpy()


# --- the forward pass ------------------------------------------------------------------------------------------------


@dataclass
class _ProjectorCall:
    """What went into the projector for the image, and what came out."""

    patch_features: torch.Tensor | None = None  # (1, num_patches, vision_hidden_size)
    patch_grid: tuple[int, int] | None = None
    pooled_grid: tuple[int, int] | None = None
    image_features: torch.Tensor | None = None  # (1, num_queries, text_hidden_size)
    attentions: list[torch.Tensor] = field(default_factory=list)  # (1, heads, num_queries, keys)
    is_cross: list[bool] = field(default_factory=list)  # whether an attention's keys come from elsewhere


class _EncodedImage(NamedTuple):
    """The image's part of a forward pass, with its graph."""

    outputs: BaseModelOutputWithPooling
    call: _ProjectorCall


@dataclass(frozen=True)
class _Run:
    """One forward pass with its graph. Attentions are `(1, heads, tokens, tokens)`, one for each layer."""

    projector_type: str
    tower: tuple[torch.Tensor, ...]
    projector: _ProjectorCall
    language: tuple[torch.Tensor, ...]
    patches: slice  # among the tower's tokens
    queries: torch.Tensor  # positions of the image's placeholders
    positions: list[int]  # where the explained tokens are predicted
    margins: list[torch.Tensor]  # of the explained tokens


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, out of a caller's `no_grad` or `inference_mode`; all is put back at the end."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("The model was loaded under torch.inference_mode() and cannot be differentiated.")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("A model in int8 cannot be differentiated; load it without.")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks the weights of a 4-bit layer that is in evaluation mode,
        # for good, and cannot differentiate through it any more. The mode has no other effect on it.
        if type(module).__name__ == "Linear4bit":
            module.training = True
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention that gives its weights, in all parts; modules look the implementation up at each call."""
    configs = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs.update((id(config), config) for config in _with_sub_configs(module.config))
    # private, seen in transformers 5.19 to 5.24
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = {"": "eager"}  # a dict, since a string also goes to configs below
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = {"": implementation}


def _with_sub_configs(config) -> Iterator:
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _with_sub_configs(getattr(config, name))


def _encode_image(deco, inputs, method: str) -> _EncodedImage:
    """The vision tower's pass over the image, and the projector's."""
    image_inputs = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
    # with this, activations have a graph though all parameters be frozen
    image_inputs["pixel_values"] = image_inputs["pixel_values"].clone().requires_grad_(method == "gae")
    with torch.set_grad_enabled(method == "gae"), _eager_attention(deco):
        with _recorded(deco.model.multi_modal_projector, deco.config.projector_type) as call:
            outputs = deco.model.get_image_features(**image_inputs, output_attentions=True, return_dict=True)
    return _EncodedImage(outputs, call)


def _generate(deco, inputs, image: _EncodedImage, generate_kwargs: dict) -> list[int]:
    """The token ids of the model's answer about an image that has been encoded."""
    text_inputs = {name: value for name, value in inputs.items() if name not in IMAGE_INPUTS}
    features = [features.detach() for features in image.outputs.pooler_output]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    generated = deco.generate(**text_inputs, mm_encoder_outputs=encoded, **generate_kwargs)
    return generated[0, inputs["input_ids"].shape[1] :].tolist()


def _run(deco, image: _EncodedImage, sequence: list[int], targets: list[int], method: str) -> _Run:
    """The language model's pass over `sequence`, of which the tokens at `targets` are explained."""
    positions = [target - 1 for target in targets]
    input_ids = torch.tensor([sequence[: targets[-1]]], device=deco.device)
    with torch.set_grad_enabled(method == "gae"), _eager_attention(deco):
        outputs = deco(
            input_ids=input_ids,
            mm_encoder_outputs={"image": image.outputs},
            logits_to_keep=torch.tensor(positions),
            output_attentions=True,
            use_cache=False,
            return_dict=True,
        )
        tokens = [sequence[target] for target in targets]
        margins = [_margin(logits, token) for logits, token in zip(outputs.logits[0], tokens, strict=True)]
    call, num_prefix_tokens = image.call, deco.config.num_prefix_tokens
    run = _Run(
        projector_type=deco.config.projector_type,
        tower=_check_layers(image.outputs.attentions, deco.config.vision_config, "vision tower"),
        projector=call,
        language=_check_layers(outputs.attentions, deco.config.text_config, "language model"),
        patches=slice(num_prefix_tokens, num_prefix_tokens + call.patch_features.shape[1]),
        queries=(input_ids[0] == deco.config.image_token_id).nonzero()[:, 0].cpu(),
        positions=positions,
        margins=margins,
    )
    if method == "gae":
        _check_graph((*run.tower, *call.attentions, *run.language))
    return run


def _margin(logits: torch.Tensor, token: int) -> torch.Tensor:
    """How far the token's logit is above the best other one's."""
    rivals = logits.detach().clone()
    rivals[token] = -torch.inf
    return (logits[token] - logits[rivals.argmax()]).float()


@contextmanager
def _recorded(projector: nn.Module, projector_type: str) -> Iterator[_ProjectorCall]:
    call = _ProjectorCall()

    def record_call(module, args, image_features):
        call.patch_features, call.patch_grid, call.pooled_grid = args
        call.image_features = image_features

    def give_graph(module, args, kwargs):
        # before the first cross-attention, frozen queries depend on nothing that is differentiated
        queries = kwargs.get("hidden_states")
        if queries is not None and not queries.requires_grad:
            kwargs["hidden_states"] = queries.detach().requires_grad_()
        return args, kwargs

    def record_attention(module, args, kwargs, output):
        call.attentions.append(output[1])
        call.is_cross.append(kwargs.get("encoder_hidden_states") is not None)

    handles = [projector.register_forward_hook(record_call)]
    for module in projector.modules():
        if type(module).__name__ == _ATTENTION_CLASSES.get(projector_type):
            handles.append(module.register_forward_pre_hook(give_graph, with_kwargs=True))
            handles.append(module.register_forward_hook(record_attention, with_kwargs=True))
    try:
        yield call
    finally:
        for handle in handles:
            handle.remove()


def _check_layers(attentions, config, part: str) -> tuple[torch.Tensor, ...]:
    attentions = tuple(attention for attention in attentions or () if attention is not None)
    if len(attentions) != config.num_hidden_layers:
        raise ValueError(
            f"The {part} ({config.model_type}) has {config.num_hidden_layers} layers and gives {len(attentions)} "
            f"attentions; relevance needs one of each."
        )
    return attentions


def _check_graph(attentions: tuple[torch.Tensor, ...]) -> None:
    num_cut = sum(not attention.requires_grad for attention in attentions)
    if num_cut > 0:
        raise ValueError(
            f"{num_cut} of {len(attentions)} attentions cannot be differentiated. If the model is in 4 bits, on a CPU "
            f"with AVX512-BF16, bitsandbytes repacked its weights at their first use: load it anew and explain first."
        )


# --- rules -----------------------------------------------------------------------------------------------------------


def _explain_by_gae(run: _Run, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text-to-Query `(num_queries,)` and Query-to-Patch `(num_queries, num_patches)` of one token."""
    call = run.projector
    attentions = [*run.tower, *call.attentions, *run.language]
    *gradients, feature_gradient = torch.autograd.grad(
        run.margins[index], [*attentions, call.image_features], retain_graph=True, allow_unused=True
    )
    maps = [_weigh(attention, gradient) for attention, gradient in zip(attentions, gradients, strict=True)]
    num_tower, num_language = len(run.tower), len(run.language)
    tower, projector, language = maps[:num_tower], maps[num_tower:-num_language], maps[-num_language:]

    position = torch.eye(language[0].shape[-1])[run.positions[index]]
    text_to_query = _propagate(position, language)[run.queries]
    num_tower_tokens = tower[0].shape[-1]
    if run.projector_type == "qformer":
        tower_relevance = _normalize_rows(_propagate(torch.eye(num_tower_tokens), tower))
        return text_to_query, _qformer_relevance(projector, call.is_cross, tower_relevance[run.patches, run.patches])
    if run.projector_type in _POOLING:
        query_to_patch = _pooling_matrix(call)
    elif run.projector_type == "resampler":
        query_to_patch = _resampler_relevance(projector)
    else:
        query_to_patch = _gradient_times_input(call.image_features, call.patch_features, feature_gradient)
    query_to_token = torch.zeros(len(query_to_patch), num_tower_tokens)
    query_to_token[:, run.patches] = query_to_patch
    return text_to_query, _propagate(query_to_token, tower)[:, run.patches]


def _explain_by_attention(run: _Run, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The baseline's Text-to-Query and Query-to-Patch of one token."""
    call = run.projector
    rows = [attention[0, :, run.positions[index]].float().mean(0).cpu() for attention in run.language]
    text_to_query = torch.stack(rows).mean(0)[run.queries]
    if run.projector_type in _POOLING:
        return text_to_query, _pooling_matrix(call)
    maps = [attention[0].float().mean(0).cpu() for attention in call.attentions]
    if run.projector_type == "qformer":
        maps = [attention_map for attention_map, cross in zip(maps, call.is_cross, strict=True) if cross]
    num_patches = call.patch_features.shape[1]
    return text_to_query, torch.stack(maps).mean(0)[:, :num_patches]


def _weigh(attention: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """`(rows, columns)`: attention times gradient, clamped, then averaged over heads."""
    if gradient is None:  # the score does not depend on it
        return torch.zeros(attention.shape[-2:])
    return (attention.detach().float() * gradient.float()).clamp(min=0).mean(1)[0].cpu()


def _propagate(rows: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
    """Rows of relevance through layers of self-attention: `rows @ R` where each layer did `R += A R`.

    From the last layer to the first, so that few rows cost `rows * tokens ** 2` per layer and not `tokens ** 3`.
    """
    for attention_map in reversed(maps):
        rows = rows + rows @ attention_map
    return rows


def _normalize_rows(relevance: torch.Tensor) -> torch.Tensor:
    """GAE's normalization: what was added to the identity sums to 1 in each row, or stays nothing."""
    identity = torch.eye(len(relevance))
    return _divide_by_sum(relevance - identity) + identity


def _divide_by_sum(rows: torch.Tensor) -> torch.Tensor:
    mass = rows.sum(-1, keepdim=True)
    return rows / mass.where(mass > 0, 1)


def _pooling_matrix(call: _ProjectorCall) -> torch.Tensor:
    """`(num_queries, num_patches)`: the share that each patch has in each pooled feature."""
    num_patches = call.patch_grid[0] * call.patch_grid[1]
    return pool_patch_grid(torch.eye(num_patches)[None], call.patch_grid, call.pooled_grid)[0]


def _qformer_relevance(maps: list[torch.Tensor], is_cross: list[bool], patch_relevance: torch.Tensor) -> torch.Tensor:
    num_queries = maps[0].shape[0]
    query_to_query = torch.eye(num_queries)
    query_to_patch = torch.zeros(num_queries, len(patch_relevance))
    for attention_map, cross in zip(maps, is_cross, strict=True):
        if cross:
            added = _normalize_rows(query_to_query).T @ attention_map @ patch_relevance
            query_to_patch = query_to_patch + added
        else:
            query_to_patch = query_to_patch + attention_map @ query_to_patch
            query_to_query = query_to_query + attention_map @ query_to_query
    return query_to_patch


def _resampler_relevance(maps: list[torch.Tensor]) -> torch.Tensor:
    num_queries, num_tokens = maps[0].shape
    num_patches = num_tokens - num_queries
    query_to_patch = torch.zeros(num_queries, num_patches)
    for attention_map in maps:
        to_patches, to_queries = attention_map.split([num_patches, num_queries], dim=1)
        query_to_patch = query_to_patch + to_patches + to_queries @ query_to_patch
    return query_to_patch


def _gradient_times_input(
    image_features: torch.Tensor, patch_features: torch.Tensor, feature_gradient: torch.Tensor
) -> torch.Tensor:
    """Share of each patch in what each query gives the score: `max(0, sum(patch * d(gradient . query) / d patch))`."""
    rows = []
    for query in range(image_features.shape[1]):
        weights = torch.zeros_like(image_features)
        weights[:, query] = feature_gradient[:, query]
        (gradient,) = torch.autograd.grad(image_features, patch_features, weights, retain_graph=True)
        rows.append((patch_features.detach().float() * gradient.float()).sum(-1)[0].clamp(min=0).cpu())
    return _divide_by_sum(torch.stack(rows))


# --- figure ----------------------------------------------------------------------------------------------------------

_MAX_COLUMNS = 6
_PANEL_WIDTH = 1.9  # inches
_LONGEST_TITLE = 20  # characters, which is what fits above a panel


def plot_relevance(relevance: Relevance, level: str = "patch"):
    """Draw the picture and, for each word of the answer, its heat map over the greyed picture.

    Each map has its own scale, from nothing to its peak, and says how high that is beside other words: one that
    does not come from the picture has a low one.

    Args:
        relevance: of tokens or words; tokens are averaged by word.
        level: `"patch"` for Text-to-Patch, `"query"` for Text-to-Query (on the pooled grid, without the picture where
            queries have no place in it), `"both"` for one above the other.

    Returns:
        A matplotlib `Figure`: `figure.savefig(path)`, or the last expression of a notebook's cell after `%matplotlib
        inline`.

    Raises:
        ValueError: an unknown level.
        ImportError: matplotlib is missing.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Drawing relevance needs matplotlib: pip install matplotlib") from None
    words = relevance.by_word()
    levels = ("patch", "query") if level == "both" else (level,)
    num_panels = 1 + len(words.tokens)
    num_columns = min(num_panels, _MAX_COLUMNS)
    num_rows = math.ceil(num_panels / num_columns) * len(levels)
    height, width = words.image.shape[:2]
    size = (_PANEL_WIDTH * num_columns + 1, (_PANEL_WIDTH * height / width + 0.4) * num_rows)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for index, drawn_level in enumerate(levels):
        panels = grid[index :: len(levels)].flatten()
        _draw_picture(panels[0], words, drawn_level)
        for word, axes in enumerate(panels[1:num_panels]):
            heat_map = _draw_word(axes, words, word, drawn_level)
    # as high as the first row of panels
    bar = figure.colorbar(heat_map, ax=grid[:, -1], fraction=0.08, shrink=1 / num_rows, anchor=(0, 1), ticks=[0, 1])
    bar.ax.set_yticklabels(["0", "max"], size="small")
    bar.set_label("relevance", size="small", labelpad=-12)
    return figure


def _draw_picture(axes, words: Relevance, level: str) -> None:
    (rows, cols), unit = (words.patch_grid, "patches") if level == "patch" else (words.pooled_grid, "tokens")
    has_grid = level == "patch" or words.has_grid
    axes.imshow(words.image)
    axes.set_title(f"{rows} x {cols} {unit}" if has_grid else f"{rows * cols} {unit}, no grid", size="medium")


def _draw_word(axes, words: Relevance, index: int, level: str):
    """One word's heat map with its title and its peak; returns it for the colour bar."""
    heat_map = draw_heat_map(axes, words, index, level)
    word = words.tokens[index]
    if len(word) > _LONGEST_TITLE:
        word = word[: _LONGEST_TITLE - 3] + "..."
    axes.set_title(word, parse_math=False, weight="bold", size="medium")
    peak = describe_peak(words, index, level)
    axes.text(0.5, -0.02, peak, transform=axes.transAxes, ha="center", va="top", size="x-small", color="0.4")
    return heat_map


def draw_heat_map(axes, relevance: Relevance, index: int, level: str = "patch"):
    """Draw one entry's heat map on matplotlib's `axes`, over the greyed picture where the entry has a place there.

    Returns:
        matplotlib's image of the map, scaled to its own peak, for a colour bar.
    """
    maps, grid = _maps(relevance, level)
    heat = maps[index].unflatten(0, grid).numpy()
    heat = heat / (heat.max() or 1)
    height, width = relevance.image.shape[:2]
    opacity = 1
    if level == "patch" or relevance.has_grid:
        axes.imshow(relevance.image.mean(-1), cmap="gray", vmin=0, vmax=1.8 * 255)
        opacity = 0.1 + 0.6 * heat  # the picture shows through
    return axes.imshow(
        heat, cmap="inferno", vmin=0, vmax=1, alpha=opacity, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
    )


def describe_peak(relevance: Relevance, index: int, level: str = "patch") -> str:
    """How high an entry's map is beside the others': one that does not come from the picture has a low peak."""
    maps, _ = _maps(relevance, level)
    highest = maps.max().item()
    return f"peak: {maps[index].max().item() / highest:.0%} of the highest" if highest > 0 else "no relevance"


def _maps(relevance: Relevance, level: str) -> tuple[torch.Tensor, tuple[int, int]]:
    if level == "patch":
        return relevance.text_to_patch, relevance.patch_grid
    return relevance.text_to_query, relevance.pooled_grid


__all__ = ["Relevance", "explain", "plot_relevance"]
