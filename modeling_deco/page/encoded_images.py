# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Images that the vision tower has encoded, so that each is encoded once for all questions and budgets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..inference.costs import now
from ..inference.encoded_views import replaced_tower, timed_tower


@dataclass(frozen=True, eq=False)
class _EncodedViews:
    """The vision tower's output for the views of images, on the CPU."""

    inputs: dict[str, Any]  # the vision tower's, on the CPU
    patch_features: torch.Tensor  # (num_views, num_patches, vision_hidden_size)
    seconds: float


class EncodedImages:
    """Keeps the vision tower's output for the images and frames that were used most recently.

    Attributes:
        seconds: for images and for videos, the time from their pixels to their tokens in the last answer. For those
            that were kept, the vision tower's time is that of its one run. Empty if the tokens were in the prompt
            cache.
    """

    def __init__(self, model: PreTrainedModel, max_images: int = 8):
        self.model = model.model
        self.max_images = max_images
        self.kept: list[_EncodedViews] = []  # most recently used last
        self.seconds: dict[str, float] = {}
        self._saved = 0.0  # seconds of towers that did not run again

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the block runs, `generate` takes the vision tower's output from here."""
        self.seconds = {}
        own = {name: getattr(self.model, name) for name in ("get_image_features", "get_video_features")}
        with replaced_tower(self.model, self._encode_views):
            for name in own:
                setattr(self.model, name, self._timed(name, own[name]))
            try:
                yield
            finally:
                for name in own:
                    delattr(self.model, name)  # the instance's attribute; the class has its own

    def _timed(self, name: str, get_features: Callable) -> Callable:
        @wraps(get_features)  # `generate` reads the signature
        def timed(*args, **kwargs):
            start, self._saved = now(self.model.get_input_embeddings().weight), 0.0
            outputs = get_features(*args, **kwargs)
            self.seconds[name] = now(self.model.get_input_embeddings().weight) - start + self._saved
            return outputs

        return timed

    def _encode_views(self, tower_inputs: dict, **kwargs):
        """`DecoModel.encode_views`."""
        kept = next((kept for kept in self.kept if _are_same(kept.inputs, tower_inputs)), None)
        if kept is None:
            outputs, encoded = timed_tower(self.model, tower_inputs, **kwargs)
            on_cpu = {name: part.cpu() if torch.is_tensor(part) else part for name, part in tower_inputs.items()}
            kept = _EncodedViews(on_cpu, encoded.patch_features.cpu(), encoded.seconds)
            patch_features = encoded.patch_features
        else:
            self.kept.remove(kept)
            self._saved += kept.seconds
            outputs = BaseModelOutputWithPooling()
            patch_features = kept.patch_features.to(tower_inputs["pixel_values"].device)
        self.kept = [*self.kept, kept][-self.max_images :]
        return outputs, patch_features


def _are_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(_is_same(part, other[name]) for name, part in one.items())


def _is_same(one, other) -> bool:
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and torch.equal(one, other.cpu())
    return one is other
