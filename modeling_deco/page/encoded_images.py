# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Images that the vision tower has encoded, so that each is encoded once for all questions and budgets."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..inference.costs import now


@dataclass(frozen=True, eq=False)
class _EncodedImage:
    """The vision tower's output for an image, on the CPU."""

    inputs: list[torch.Tensor | None]  # the vision tower's inputs
    patch_features: torch.Tensor  # (1, num_patches, vision_hidden_size)
    patch_grid: tuple[int, int]
    seconds: float


class EncodedImages:
    """Keeps the vision tower's output for the images that were used most recently.

    Attributes:
        seconds: time from the pixels to the image's tokens in the last answer. For an image that was kept, the vision
            tower's time is that of its one run. 0 if the tokens were in the prompt cache.
    """

    def __init__(self, model: PreTrainedModel, max_images: int = 8):
        self.model = model.model
        self.encode = self.model.get_image_features
        self.max_images = max_images
        self.kept: list[_EncodedImage] = []  # most recently used last
        self.seconds = 0.0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the block runs, `generate` uses this object's `get_image_features` in place of the model's.

        The argument `mm_encoder_outputs` of `generate` would do the same, but the prompt cache does not take it.
        """
        self.seconds = 0.0
        self.model.get_image_features = self.get_image_features
        try:
            yield
        finally:
            del self.model.get_image_features  # the instance's attribute; the class has its own

    def get_image_features(
        self, pixel_values, pooled_grid_sizes=None, pixel_attention_mask=None, spatial_shapes=None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """`DecoModel.get_image_features` of one image."""
        inputs = [pixel_values, pixel_attention_mask, spatial_shapes]
        start = now(pixel_values)
        image = next((kept for kept in self.kept if all(map(_is_same, kept.inputs, inputs))), None)
        if image is None:
            image, features = self._encode(inputs, pooled_grid_sizes)
        else:
            self.kept.remove(image)
            start -= image.seconds
            patch_features = image.patch_features.to(pixel_values.device)
            features = self.model.project_features(patch_features, [image.patch_grid], pooled_grid_sizes)
        self.seconds = now(features[0]) - start
        self.kept = [*self.kept, image][-self.max_images :]
        return BaseModelOutputWithPooling(pooler_output=features)

    def _encode(self, inputs: list, pooled_grid_sizes) -> tuple[_EncodedImage, list[torch.Tensor]]:
        """What to keep of an image, and its tokens. The projector's inputs are the vision tower's output."""
        pixel_values, *others = inputs
        start, calls = now(pixel_values), []
        hook = self.model.multi_modal_projector.register_forward_pre_hook(
            lambda projector, args: calls.append((now(args[0]), *args))
        )
        try:
            features = self.encode(pixel_values, pooled_grid_sizes, *others, return_dict=True).pooler_output
        finally:
            hook.remove()
        ((end, patch_features, patch_grid, _),) = calls
        kept = [None if part is None else part.cpu() for part in inputs]
        return _EncodedImage(kept, patch_features.cpu(), patch_grid, end - start), features


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other.cpu())
