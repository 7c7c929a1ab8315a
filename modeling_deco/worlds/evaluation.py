# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What the evaluations of the worlds share: many questions about each picture, and a mean with its standard error."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, ProcessorMixin

from ..inference.generation import RefuseNaN, sampling
from ..inference.grid_answers import EncodedPicture, Grid, GridAnswers
from ..modeling_deco import CACHE_NAME
from ..positions import next_position, set_next_position


def summary(hits_by_picture: Iterable[Sequence[float]]) -> dict[str, float]:
    """Mean over questions, and its standard error over pictures, the independent units (ratio estimator)."""
    hits_by_picture = list(hits_by_picture)
    right = np.array([sum(hits) for hits in hits_by_picture], dtype=float)
    total = np.array([len(hits) for hits in hits_by_picture], dtype=float)
    mean = right.sum() / total.sum()
    residuals = (right - mean * total) / total.mean()
    standard_error = residuals.std(ddof=1) / np.sqrt(len(total)) if len(total) > 1 else float("nan")
    return {
        "accuracy": round(100 * float(mean), 2),
        "standard_error": round(100 * float(standard_error), 2),
        "questions": int(total.sum()),
    }


@torch.inference_mode()
def answer_about(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    asked: Sequence[tuple[int, str]],
    grids: Iterable[Grid],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> dict[Grid, list[str]]:
    """Greedy answers to questions about pictures, each question on its own, at several grids.

    The vision tower reads each picture once, and the language model once for each grid. Its keys and values serve all
    questions about the picture. So the answers are those of `generate` up to rounding, which int8 may notice: there
    all tokens of a call share one scale.

    Args:
        images: pictures of one shape.
        asked: for each question the place of its picture in `images`, and its text. Neighbours are answered together,
            so sort them by the length of their answers.

    Returns:
        For each grid the answers, in the order of `asked`.
    """
    answers = GridAnswers(model, processor, [text for _, text in asked], max_new_tokens)
    text = asked[0][1]
    pictures = [answers.encode(image, text) for image in images]
    found: dict[Grid, list[str]] = {}
    for grid in grids:
        beginning = _Beginning(answers, pictures, text, grid)
        batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
        found[grid] = [answer for batch in batches for answer in beginning.answer(batch)]
    return found


class _Beginning:
    """The keys and values of prompts up to the end of their pictures."""

    def __init__(self, answers: GridAnswers, pictures: list[EncodedPicture], text: str, grid: Grid):
        self.answers, self.pictures, self.grid = answers, pictures, grid
        inputs = self._inputs([(place, text) for place in range(len(pictures))])
        self.length = 1 + int((inputs["input_ids"][0] == answers.processor.image_token_id).nonzero().max())
        self.input_ids = inputs["input_ids"][:, : self.length]
        inputs |= {"input_ids": self.input_ids, "attention_mask": inputs["attention_mask"][:, : self.length]}
        self.cache = DynamicCache(config=self._text_config)
        answers.model(**inputs, logits_to_keep=1, use_cache=True, **{CACHE_NAME: self.cache})

    @property
    def _text_config(self):
        return self.answers.model.config.get_text_config(decoder=True)

    def _inputs(self, asked: Sequence[tuple[int, str]]) -> dict[str, Any]:
        return self.answers.inputs([(self.pictures[place], text) for place, text in asked], self.grid)

    def answer(self, asked: Sequence[tuple[int, str]]) -> list[str]:
        """Answer questions in one batch. Shorter ones are padded between their picture and their text."""
        model, processor = self.answers.model, self.answers.processor
        inputs = self._inputs(asked)
        rows = [
            ids[mask.bool()][self.length :].tolist()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        texts = processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="left").to(model.device)
        places = torch.tensor([place for place, _ in asked], device=model.device)
        beginning = self.input_ids[places]
        generated = model.generate(
            input_ids=torch.cat([beginning, texts["input_ids"]], dim=1),
            attention_mask=torch.cat([torch.ones_like(beginning), texts["attention_mask"]], dim=1),
            **sampling(0),
            num_beams=1,
            max_new_tokens=self.answers.max_new_tokens,
            logits_processor=LogitsProcessorList([RefuseNaN()]),
            tokenizer=processor.tokenizer,  # for the `stop_strings` of a checkpoint's generation config
            **{CACHE_NAME: self._cache_of(places)},
        )
        answers = generated[:, self.length + texts["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]

    def _cache_of(self, places: torch.LongTensor) -> DynamicCache:
        states = [(keys[places], values[places]) for keys, values, *_ in self.cache]
        cache = DynamicCache(states, config=self._text_config)
        if self.answers.model.model.check_image_positions() == "patch":  # or `generate` numbers all tokens again
            behind = torch.as_tensor(next_position(self.cache)).expand(len(self.pictures), 1)
            set_next_position(cache, behind[places], self.length)
        return cache
