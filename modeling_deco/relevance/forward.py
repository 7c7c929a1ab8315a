# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The forward pass over image, prompt and answer, which keeps attentions and the graph for gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..inference.quantization import Int8Linear
from ..modeling_deco import IMAGE_INPUTS
from ..views import Grid, TokenMap
from .maps import view_patches, without_newlines

_MASK = "pixel_attention_mask"
_IMAGE_INPUTS = (*IMAGE_INPUTS, "batch_num_images")

# Classes that compute attention in a projector and return its weights as second output.
# private, seen in transformers 5.19 to 5.24
ATTENTION_CLASSES = {"qformer": "Blip2QFormerMultiHeadAttention", "resampler": "Idefics2PerceiverAttention"}


@dataclass
class ProjectorCall:
    """Inputs and outputs of the projector for an image of one view."""

    patch_features: torch.Tensor | None = None  # (1, num_patches, vision_hidden_size)
    image_features: torch.Tensor | None = None  # (1, num_queries, text_hidden_size)
    attentions: list[torch.Tensor] = field(default_factory=list)  # (1, heads, num_queries, keys)
    is_cross: list[bool] = field(default_factory=list)  # whether it is cross-attention


class EncodedImage(NamedTuple):
    """The part of a forward pass that encodes the image, with its graph."""

    outputs: BaseModelOutputWithPooling
    call: ProjectorCall
    maps: list[TokenMap]
    places: dict[str, torch.LongTensor]  # arguments from which the model computes positions
    view_grid: Grid  # of a view's patches


class MapTokens(NamedTuple):
    """A map of tokens, and where its patches and tokens are."""

    token_map: TokenMap
    patches: torch.LongTensor  # (num_patches,), in the outputs of the vision tower, one view after the other
    queries: torch.LongTensor  # (rows * cols,), in the prompt, without newlines


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass with its graph."""

    projector_type: str
    tower: tuple[torch.Tensor, ...]  # for each layer, (num_views, heads, tokens, tokens); none of a feature map
    feature_map: torch.Tensor | None  # of a convolutional tower, (num_views, channels, rows, cols)
    projector: ProjectorCall
    language: tuple[torch.Tensor, ...]  # for each layer, (1, heads, tokens, tokens)
    maps: list[MapTokens]
    positions: list[int]  # positions that predict the explained tokens
    margins: list[torch.Tensor]  # of the explained tokens

    @property
    def token_maps(self) -> list[TokenMap]:
        return [part.token_map for part in self.maps]

    @property
    def queries(self) -> torch.LongTensor:
        return torch.cat([part.queries for part in self.maps])


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and leave the caller's `no_grad` or `inference_mode`; restore both at the end."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("The model was loaded under torch.inference_mode(); load it outside, to differentiate it.")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("A model in int8 cannot be differentiated; load it without int8.")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 permanently repacks the weights of 4-bit layers in evaluation
        # mode and cannot differentiate through them afterwards. The mode has no other effect on these layers.
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
    """Use the attention that returns its weights in all parts. Modules look the implementation up at each call."""
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs.update((id(config), config) for config in _with_sub_configs(module.config))
    # private, seen in transformers 5.19 to 5.24
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = {"": "eager"}  # a string would also set the configs inside
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
    """Run the vision tower and the projector on the image."""
    image_inputs = {name: inputs[name] for name in _IMAGE_INPUTS if name in inputs}
    maps = deco.model.image_maps(**{name: value for name, value in image_inputs.items() if name != _MASK})[0]
    places = {name: value for name, value in image_inputs.items() if name not in ("pixel_values", _MASK)}
    view_grid = deco.config.patch_grid
    if "image_sizes" not in places:  # the patch grid is that of the pixels
        view_grid = maps[0].patch_grid
        places["spatial_shapes"] = torch.tensor([view_grid])
    # activations then have a graph even if all parameters are frozen
    image_inputs["pixel_values"] = image_inputs["pixel_values"].clone().requires_grad_(method == "gae")
    with torch.set_grad_enabled(method == "gae"), _eager_attention(deco):
        with _recorded(deco.model.multi_modal_projector, deco.config.projector_type) as call:
            outputs = deco.model.get_image_features(**image_inputs, output_attentions=True, return_dict=True)
    return EncodedImage(outputs, call, maps, places, view_grid)


def generate(deco, inputs, image: EncodedImage, generate_kwargs: dict) -> list[int]:
    """Generate the token ids of an answer about an encoded image."""
    text_inputs = {name: value for name, value in inputs.items() if name not in _IMAGE_INPUTS}
    features = [features.detach() for features in image.outputs.pooler_output]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    generated = deco.generate(**text_inputs, **image.places, mm_encoder_outputs=encoded, **generate_kwargs)
    return generated[0, inputs["input_ids"].shape[1] :].tolist()


def run_answer(
    deco,
    image: EncodedImage,
    sequence: list[int],
    targets: list[int],
    method: str,
    image_positions: str | None = None,
) -> ForwardPass:
    """Run the language model on `sequence`, whose tokens at `targets` are explained."""
    positions = [target - 1 for target in targets]
    input_ids = torch.tensor([sequence[: targets[-1]]], device=deco.device)
    with torch.set_grad_enabled(method == "gae"), _eager_attention(deco):
        outputs = deco(
            input_ids=input_ids,
            mm_encoder_outputs={"image": image.outputs},
            **image.places,
            image_positions=image_positions,
            logits_to_keep=torch.tensor(positions),
            output_attentions=True,
            use_cache=False,
            return_dict=True,
        )
        tokens = [sequence[target] for target in targets]
        margins = [_margin(logits, token) for logits, token in zip(outputs.logits[0], tokens, strict=True)]
    call, placeholders = image.call, (input_ids[0] == deco.config.image_token_id).nonzero()[:, 0].cpu()
    has_map = deco.config.feature_map is not None
    run = ForwardPass(
        projector_type=deco.config.projector_type,
        tower=() if has_map else _check_layers(image.outputs.attentions, deco.config.vision_config, "vision tower"),
        feature_map=image.outputs.last_hidden_state if has_map else None,
        projector=call,
        language=_check_layers(outputs.attentions, deco.config.text_config, "language model"),
        maps=_find_tokens(image, placeholders, 0 if has_map else deco.config.num_prefix_tokens),
        positions=positions,
        margins=margins,
    )
    if method == "gae":
        _check_graph((*run.tower, *call.attentions, *run.language))
    return run


def _find_tokens(image: EncodedImage, placeholders: torch.LongTensor, num_prefix_tokens: int) -> list[MapTokens]:
    """Where the patches and tokens of an image's maps are. Maps without patches, of very thin pictures, are left out.

    Args:
        placeholders: positions of the image's tokens in the prompt.
    """
    attentions = getattr(image.outputs, "attentions", None)  # a convolutional tower has none
    num_tower_tokens = attentions[-1].shape[-1] if attentions else image.view_grid[0] * image.view_grid[1]
    found, first_view = [], 0
    queries = placeholders.split([token_map.num_tokens for token_map in image.maps])
    for token_map, of_map in zip(image.maps, queries, strict=True):
        if token_map.num_tokens > 0:
            view, patch = view_patches(token_map, image.view_grid)
            in_tower = (first_view + view) * num_tower_tokens + num_prefix_tokens + patch
            found.append(MapTokens(token_map, in_tower.flatten(), without_newlines(of_map, token_map)))
        first_view += token_map.num_views
    return found


def _margin(logits: torch.Tensor, token: int) -> torch.Tensor:
    """Difference between the logit of the token and the highest other logit."""
    rivals = logits.detach().clone()
    rivals[token] = -torch.inf
    return (logits[token] - logits[rivals.argmax()]).float()


@contextmanager
def _recorded(projector: nn.Module, projector_type: str) -> Iterator[ProjectorCall]:
    call = ProjectorCall()

    def record_call(module, args, image_features):
        call.patch_features, call.image_features = args[0], image_features

    def give_graph(module, args, kwargs):
        # frozen queries have no graph before the first cross-attention
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
            f"The {part} ({config.model_type}) has {config.num_hidden_layers} layers but returns {len(attentions)} "
            f"attentions; relevance needs one from each layer."
        )
    return attentions


def _check_graph(attentions: tuple[torch.Tensor, ...]) -> None:
    num_cut = sum(not attention.requires_grad for attention in attentions)
    if num_cut > 0:
        raise ValueError(
            f"{num_cut} of {len(attentions)} attentions cannot be differentiated. On a CPU with AVX512-BF16, "
            f"bitsandbytes repacks 4-bit weights at their first use: load the model again and call explain first."
        )
