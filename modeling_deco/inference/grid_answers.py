# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers about a picture at several grids, with one pass of the vision tower."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration_deco import fit_grid
from ..modeling_deco import IMAGE_INPUTS
from ..views import num_map_tokens
from .encoded_views import project, replaced_tower, timed_tower
from .generation import RefuseNaN, check_length, encode, sampling

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """The vision tower's output for a picture, and the time that it took."""

    patch_features: torch.Tensor  # (num_views, num_patches, vision_hidden_size)
    patch_grid: Grid  # of a view
    seconds: float
    image_inputs: dict[str, torch.Tensor]  # of the model, without a grid


@dataclass(frozen=True)
class Answer:
    """An answer without white space around it, and whether it ends at the limit on its length."""

    text: str
    is_cut: bool


class GridAnswers:
    """Encodes pictures, and answers questions about them at any grid as plain `generate` does, without sampling.

    Args:
        model: a DeCo whose projector takes any grid.
        texts: the questions.
        max_new_tokens: maximum length of an answer.
        tiles: as in `DecoProcessor.__call__`.

    Raises:
        ValueError: a question, or the chat template, cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        texts: Iterable[str],
        max_new_tokens: int,
        tiles: int | None = None,
    ):
        self.model, self.processor, self.max_new_tokens, self.tiles = model, processor, max_new_tokens, tiles
        end = model.generation_config.eos_token_id
        self._ends = {*(end if isinstance(end, list) else [end]), processor.tokenizer.pad_token_id}
        blank = Image.new("RGB", (64, 64))  # the ids do not depend on the picture
        self._prompts = {
            text: encode(processor, _message(blank, text), 1)["input_ids"][0].tolist() for text in dict.fromkeys(texts)
        }

    @torch.inference_mode()
    def encode(self, image: Image.Image, text: str) -> EncodedPicture:
        """Run the vision tower on a picture.

        Args:
            text: any question.

        Raises:
            ValueError: the processor cannot prepare the picture.
        """
        inputs = encode(self.processor, _message(image, text), 1, tiles=self.tiles).to(self.model.device)
        names = [
            name for name in (*IMAGE_INPUTS, "batch_num_images") if name in inputs and name != "pooled_grid_sizes"
        ]
        image_inputs = {name: inputs[name] for name in names}
        deco, views = self.model.model, []

        def encode_views(tower_inputs, **kwargs):
            outputs, encoded = timed_tower(deco, tower_inputs, **kwargs)
            views.append(encoded)
            return outputs, encoded.patch_features

        with replaced_tower(deco, encode_views):
            deco.get_image_features(**image_inputs, return_dict=True)
        (encoded,) = views
        patch_grid = self.model.config.patch_grid
        if "image_sizes" not in image_inputs:
            found = deco.patch_grids(image_inputs["pixel_values"], image_inputs.get("spatial_shapes"))
            patch_grid = found if isinstance(found, tuple) else found[0]
        # only the shape of the pixels is needed from now on
        pixels = image_inputs["pixel_values"]
        image_inputs["pixel_values"] = pixels.new_zeros(()).expand(pixels.shape)
        return EncodedPicture(encoded.patch_features, patch_grid, encoded.seconds, image_inputs)

    @torch.inference_mode()
    def answer(self, asked: list[tuple[EncodedPicture, str]], grid: Grid) -> list[Answer]:
        """Answer questions about pictures, in one batch."""
        inputs = self.inputs(asked, grid)
        check_length(self.model, inputs)
        length = inputs["input_ids"].shape[1]
        generated = self.model.generate(
            **inputs,
            **sampling(0),
            max_new_tokens=self.max_new_tokens,
            num_beams=1,
            logits_processor=LogitsProcessorList([RefuseNaN()]),
            tokenizer=self.processor.tokenizer,  # for the `stop_strings` of a checkpoint's generation config
        )[:, length:]
        texts = self.processor.batch_decode(generated, skip_special_tokens=True)
        is_full, last = generated.shape[1] == self.max_new_tokens, generated[:, -1].tolist()
        return [
            Answer(text.strip(), is_full and token not in self._ends) for text, token in zip(texts, last, strict=True)
        ]

    @torch.inference_mode()
    def first_token(self, picture: EncodedPicture, text: str, grid: Grid) -> torch.Tensor:
        """The logits of an answer's first token, computed from the vision tower's output."""
        return self.model(**self.inputs([(picture, text)], grid), logits_to_keep=1, use_cache=True).logits

    @torch.inference_mode()
    def inputs(self, asked: list[tuple[EncodedPicture, str]], grid: Grid) -> dict[str, Any]:
        """The model's inputs for questions about encoded pictures."""
        features: dict[int, torch.Tensor] = {}
        rows, grids = [], []
        for picture, text in asked:
            pooled_grid = grid_of(picture.patch_grid, grid, self.model.config.patch_grid)
            if id(picture) not in features:
                features[id(picture)] = self.tokens(picture, pooled_grid)
            rows.append(self._prompt(text, len(features[id(picture)])))
            grids.append(pooled_grid)
        padded = self.processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
        of_rows = [features[id(picture)] for picture, _ in asked]
        if "image_sizes" in asked[0][0].image_inputs:
            sizes = {"image_sizes": torch.cat([picture.image_inputs["image_sizes"] for picture, _ in asked])}
        else:
            sizes = {"spatial_shapes": torch.tensor([picture.patch_grid for picture, _ in asked])}
        return {
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=of_rows)},
            "pooled_grid_sizes": torch.tensor(grids, device=self.model.device),
            **{name: value.to(self.model.device) for name, value in sizes.items()},
        }

    def num_tokens(self, picture: EncodedPicture, grid: Grid) -> int:
        """The tokens of a picture where others are pooled to `grid`."""
        sizes = {name: value for name, value in picture.image_inputs.items() if name != "pixel_attention_mask"}
        own = torch.tensor([grid_of(picture.patch_grid, grid, self.model.config.patch_grid)])
        (maps,) = self.model.model.image_maps(own, **sizes)
        return num_map_tokens(maps)

    def tokens(self, picture: EncodedPicture, grid: Grid) -> torch.Tensor:
        """The tokens of a picture at a grid, `(num_tokens, text_hidden_size)`."""
        (tokens,) = project(
            self.model.model,
            picture.patch_features,
            **picture.image_inputs,
            pooled_grid_sizes=torch.tensor([grid], device=self.model.device),
        )
        return tokens

    def _prompt(self, text: str, num_tokens: int) -> list[int]:
        """The ids of a prompt whose image has a number of tokens."""
        ids, image = self._prompts[text], self.processor.image_token_id
        start, end = ids.index(image), len(ids) - ids[::-1].index(image)
        return [*ids[:start], *[image] * num_tokens, *ids[end:]]


def grid_of(patch_grid: Grid, grid: Grid, full_grid: Grid) -> Grid:
    """The grid that a picture, or a view, of `patch_grid` is pooled to where others are pooled to `grid`.

    They differ only for a tower that gives pictures of different shapes different patches (SigLIP 2 NaFlex): `grid` is
    cut to the picture's patches, and `full_grid`, the config's patch grid, means all of them.
    """
    return patch_grid if grid == full_grid else fit_grid(grid, patch_grid)


def _message(image: Image.Image, text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
