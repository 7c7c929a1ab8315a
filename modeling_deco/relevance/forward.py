# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The forward pass whose attentions and gradients are read: image, prompt and answer, with its graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..inference.quantization import Int8Linear
from ..modeling_deco import IMAGE_INPUTS

# What computes attention in a projector, and gives its weights as second output.
# private, seen in transformers 5.19 to 5.24
ATTENTION_CLASSES = {"qformer": "Blip2QFormerMultiHeadAttention", "resampler": "Idefics2PerceiverAttention"}


@dataclass
class ProjectorCall:
    """What went into the projector for the image, and what came out."""

    patch_features: torch.Tensor | None = None  # (1, num_patches, vision_hidden_size)
    patch_grid: tuple[int, int] | None = None
    pooled_grid: tuple[int, int] | None = None
    image_features: torch.Tensor | None = None  # (1, num_queries, text_hidden_size)
    attentions: list[torch.Tensor] = field(default_factory=list)  # (1, heads, num_queries, keys)
    is_cross: list[bool] = field(default_factory=list)  # whether an attention's keys come from elsewhere


class EncodedImage(NamedTuple):
    """The image's part of a forward pass, with its graph."""

    outputs: BaseModelOutputWithPooling
    call: ProjectorCall


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass with its graph. Attentions are `(1, heads, tokens, tokens)`, one for each layer."""

    projector_type: str
    tower: tuple[torch.Tensor, ...]
    projector: ProjectorCall
    language: tuple[torch.Tensor, ...]
    patches: slice  # among the tower's tokens
    queries: torch.Tensor  # positions of the image's placeholders
    positions: list[int]  # where the explained tokens are predicted
    margins: list[torch.Tensor]  # of the explained tokens


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
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


def encode_image(deco, inputs, method: str) -> EncodedImage:
    """The vision tower's pass over the image, and the projector's."""
    image_inputs = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
    # with this, activations have a graph though all parameters be frozen
    image_inputs["pixel_values"] = image_inputs["pixel_values"].clone().requires_grad_(method == "gae")
    with torch.set_grad_enabled(method == "gae"), _eager_attention(deco):
        with _recorded(deco.model.multi_modal_projector, deco.config.projector_type) as call:
            outputs = deco.model.get_image_features(**image_inputs, output_attentions=True, return_dict=True)
    return EncodedImage(outputs, call)


def generate(deco, inputs, image: EncodedImage, generate_kwargs: dict) -> list[int]:
    """The token ids of the model's answer about an image that has been encoded."""
    text_inputs = {name: value for name, value in inputs.items() if name not in IMAGE_INPUTS}
    features = [features.detach() for features in image.outputs.pooler_output]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    generated = deco.generate(**text_inputs, mm_encoder_outputs=encoded, **generate_kwargs)
    return generated[0, inputs["input_ids"].shape[1] :].tolist()


def run_answer(deco, image: EncodedImage, sequence: list[int], targets: list[int], method: str) -> ForwardPass:
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
    run = ForwardPass(
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
def _recorded(projector: nn.Module, projector_type: str) -> Iterator[ProjectorCall]:
    call = ProjectorCall()

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
        if type(module).__name__ == ATTENTION_CLASSES.get(projector_type):
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
