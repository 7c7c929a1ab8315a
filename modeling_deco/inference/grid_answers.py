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

from ..configuration_deco import fit_grid, num_image_tokens
from ..modeling_deco import IMAGE_INPUTS
from .costs import now
from .generation import RefuseNaN, check_length, encode, sampling

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """The vision tower's output for a picture, and the time that it took."""

    patch_features: torch.Tensor  # (1, num_patches, vision_hidden_size)
    patch_grid: Grid
    seconds: float


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

    Raises:
        ValueError: a question, or the chat template, cannot be used.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, texts: Iterable[str], max_new_tokens: int):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
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
        inputs = encode(self.processor, _message(image, text), 1).to(self.model.device)
        image_inputs = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
        calls: list[tuple] = []
        hook = self.model.model.multi_modal_projector.register_forward_pre_hook(
            lambda projector, args: calls.append((now(args[0]), *args))
        )
        start = now(image_inputs["pixel_values"])
        try:
            self.model.model.get_image_features(**image_inputs, return_dict=True)
        finally:
            hook.remove()
        ((end, patch_features, patch_grid, _),) = calls
        return EncodedPicture(patch_features, patch_grid, end - start)

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
                sizes = torch.tensor([pooled_grid])
                (features[id(picture)],) = self.model.model.project_features(
                    picture.patch_features, [picture.patch_grid], sizes
                )
            rows.append(self._prompt(text, num_image_tokens(pooled_grid)))
            grids.append(pooled_grid)
        padded = self.processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
        of_rows = [features[id(picture)] for picture, _ in asked]
        return {
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=of_rows)},
            "pooled_grid_sizes": torch.tensor(grids, device=self.model.device),
            "spatial_shapes": torch.tensor([picture.patch_grid for picture, _ in asked], device=self.model.device),
        }

    def _prompt(self, text: str, num_tokens: int) -> list[int]:
        """The ids of a prompt whose image has a number of tokens."""
        ids, image = self._prompts[text], self.processor.image_token_id
        place = ids.index(image)
        return [*ids[:place], *[image] * num_tokens, *ids[place + 1 :]]


def grid_of(patch_grid: Grid, grid: Grid, full_grid: Grid) -> Grid:
    """The grid that a picture of `patch_grid` is pooled to where others are pooled to `grid`.

    They differ only for a tower that gives pictures of different shapes different patches (SigLIP 2 NaFlex): `grid` is
    cut to the picture's patches, and `full_grid`, the config's patch grid, means all of them.
    """
    return patch_grid if grid == full_grid else fit_grid(grid, patch_grid)


def _message(image: Image.Image, text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
