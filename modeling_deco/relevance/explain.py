# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Relevance maps: which image tokens, and which patches, the words of an answer rest on.

    relevance = explain(model, processor, image, "What colour is the 7?")
    plot_relevance(relevance).savefig("relevance.png")
    relevance.average(["red"]).text_to_patch  # (1, num_patches)

`rules.py` describes the method.
"""

import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ..inference.generation import check_length, encode
from .forward import ATTENTION_CLASSES, EncodedImage, encode_image, evaluation, generate, run_answer
from .maps import view_patches
from .rules import POOLING, explain_by_attention, explain_by_gae

METHODS = ("gae", "attention")


@dataclass(frozen=True, eq=False)
class Relevance:
    """Relevance of an image for an answer, with one entry for each token, or for each word after `by_word`.

    The tensors are float32 on the CPU. They are not negative and not normalized: compare values within a map. Patches
    and queries are in row-major order: `text_to_patch.unflatten(1, patch_grid)`. The maps leave out the prefix tokens
    of the vision tower (CLS, registers), and padding.

    A picture of several views has one map, over the patches of its stitched tiles without padding. Its queries are
    those of the overview, if there is one, and then those of the stitched map. Newlines are left out. Each patch of
    the overview gives its relevance to the patches that cover the same area, in proportion to what they cover, and the
    two are added. So the sum of the map is that of overview and tiles.

    Attributes:
        answer: text of the answer.
        tokens: text that each entry adds. If a character has several tokens, all but the last are empty.
        token_ids: ids of each entry: one id, or those of a word.
        word_ids: index in `answer.split()` of the word that each entry belongs to; None for white space.
        patch_grid: `(rows, cols)` of the patches.
        pooled_grid: `(rows, cols)` of the queries, which are the projector's outputs. Of several views, the stitched
            map's.
        has_grid: whether queries have a position in the image; those of "qformer" and "resampler" have none.
        text_to_query: `(num_entries, num_queries)`.
        query_to_patch: `(num_entries, num_queries, num_patches)`. With method "gae" it differs between tokens.
        text_to_patch: `(num_entries, num_patches)`; for a token it is `text_to_query @ query_to_patch`.
        image: `(height, width, 3)`, uint8: the image as the model sees it, after resizing, cropping or padding; of
            several views, the stitched tiles without padding.
        overview_grid: `(rows, cols)` of the overview's queries, which come first; None without an overview.
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
    overview_grid: tuple[int, int] | None = None

    def by_word(self) -> "Relevance":
        """Average over the tokens of each word. White space separates words.

        Tokens without a letter or digit, such as a full stop, are ignored. A word that has only such tokens is left
        out, unless the answer has no other words.
        """
        entries: dict[int, list[int]] = {}
        for index, (word, text) in enumerate(zip(self.word_ids, _whole_characters(self.tokens), strict=True)):
            if word is not None and any(character.isalnum() for character in text):
                entries.setdefault(word, []).append(index)
        if not entries:
            entries = {0: list(range(len(self.tokens)))}
        words = ["".join(self.tokens[group[0] : group[-1] + 1]).strip() for group in entries.values()]
        return self._mean(list(entries.values()), words, list(entries))

    def average(self, words: list[str]) -> "Relevance":
        """Average over all occurrences of the given words, as one entry.

        Raises:
            ValueError: a word is not in the answer, or no word is given.
        """
        grouped = self.by_word()
        for word in words:
            if word not in grouped.tokens:
                raise ValueError(
                    f"{word!r} is not a word of the answer; choose from {', '.join(map(repr, grouped.tokens))}."
                )
        group = [index for index, word in enumerate(grouped.tokens) if word in words]
        if not group:
            raise ValueError("average needs at least one word.")
        return grouped._mean(
            [group], [" ".join(grouped.tokens[index] for index in group)], [grouped.word_ids[group[0]]]
        )

    def _mean(self, groups: list[list[int]], tokens: list[str], word_ids: list[int | None]) -> "Relevance":
        means = {
            name: torch.stack([getattr(self, name)[group].mean(0) for group in groups])
            for name in ("text_to_query", "query_to_patch", "text_to_patch")
        }
        token_ids = [[token for index in group for token in self.token_ids[index]] for group in groups]
        return replace(self, tokens=tokens, token_ids=token_ids, word_ids=word_ids, **means)


def _whole_characters(tokens: list[str]) -> list[str]:
    """Replace each empty token, which is a part of a character, by the token that completes the character."""
    texts, following = [], ""
    for token in reversed(tokens):
        following = token or following
        texts.append(following)
    return texts[::-1]


def _find_word_ids(tokens: list[str]) -> list[int | None]:
    """Index of the word that each token belongs to: the last word that it overlaps."""
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
    """Text that each token adds. A part of a character adds nothing until the character is complete."""
    tokens, text = [], ""
    for end in range(1, len(token_ids) + 1):
        longer = tokenizer.decode(token_ids[:end], clean_up_tokenization_spaces=False)
        if longer.endswith("\ufffd") and end < len(token_ids):
            longer = text
        tokens.append(longer[len(text) :])
        text = longer
    return tokens


def explain(
    model,
    processor,
    image,
    question: str,
    answer: str | None = None,
    pooled_grid_size: int | list | tuple | None = None,
    method: str = "gae",
    image_positions: str | None = None,
    max_image_tokens: int | None = None,
    tiles: int | None = None,
    **generate_kwargs,
) -> Relevance:
    """Compute relevance maps for the tokens of an answer about one image.

    The prompt is one user turn with the image and the question. The image is encoded once for both the answer and its
    maps. For each token, the forward pass over image, prompt and answer is differentiated with respect to activations,
    so that parameters may be frozen or quantized and their `.grad` does not change. During the pass attention is eager
    and dropout is off; both are restored afterwards, also after an error. The call works within `no_grad` and
    `inference_mode`. Apart from the maps, memory does not grow with the number of tokens.

    Args:
        model: a `DecoForConditionalGeneration`, which PEFT may wrap.
        processor: the model's `DecoProcessor`, with a chat template.
        image: whatever the chat template accepts: PIL image, path, URL.
        answer: text to explain. Default: the answer that the model generates.
        pooled_grid_size: token budget of the image, or of each of its views. Default: the processor's.
        method: `"gae"`, or `"attention"`, a baseline without gradients: the attention of the language model, averaged
            over heads and layers, times the pooling matrix or the averaged attention from queries to patches.
        image_positions: `"patch"` or `"sequence"`. Default: the config's.
        max_image_tokens, tiles: as in `DecoProcessor.__call__`.
        generate_kwargs: arguments of `model.generate`. A `streamer` receives the answer before its maps are computed.

    Returns:
        `Relevance` with one entry for each token that is not special.

    Raises:
        ValueError: the prompt leaves no room for an answer, the method is unknown, `method="attention"` is used with
            an abstractor, which has no attention to patches, the answer is empty or contains the image token, an
            argument of `generate` changes what it returns, or a part of the model does not return its attention.
    """
    deco = _find_deco(model)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    projector_type = deco.config.projector_type
    if method == "attention" and projector_type not in (*POOLING, *ATTENTION_CLASSES):
        raise ValueError(f"projector_type {projector_type!r} has no attention to patches; use method='gae'.")
    if answer is not None and generate_kwargs:
        raise ValueError(f"{', '.join(generate_kwargs)} has no effect on a given answer; leave it out.")
    for name in ("return_dict_in_generate", "num_return_sequences"):
        if name in generate_kwargs:
            raise ValueError(f"{name} cannot be set: explain needs the token ids of one answer.")

    with evaluation(deco):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        budget = {"max_image_tokens": max_image_tokens, "tiles": tiles}
        inputs = encode(processor, [{"role": "user", "content": content}], pooled_grid_size, **budget).to(deco.device)
        check_length(deco, inputs | {"image_positions": image_positions})
        prompt_ids, tokenizer = inputs["input_ids"][0].tolist(), processor.tokenizer
        image = encode_image(deco, inputs, method)
        if answer is None:
            answer_ids = generate(deco, inputs, image, {"image_positions": image_positions, **generate_kwargs})
        else:
            answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if deco.config.image_token_id in answer_ids:
            raise ValueError(f"The answer contains {processor.image_token!r}, which marks an image; leave it out.")
        explained = [index for index, token in enumerate(answer_ids) if token not in tokenizer.all_special_ids]
        if not explained:
            raise ValueError("The answer is empty: it has no token to explain.")
        token_ids = [answer_ids[index] for index in explained]

        targets = [len(prompt_ids) + index for index in explained]
        run = run_answer(deco, image, [*prompt_ids, *answer_ids], targets, method, image_positions)
        explain_token = explain_by_gae if method == "gae" else explain_by_attention
        maps = [explain_token(run, index) for index in range(len(explained))]

    text_to_query, query_to_patch = (torch.stack(part) for part in zip(*maps, strict=True))
    *overview, whole = run.token_maps
    tokens = _decode_one_by_one(tokenizer, token_ids)
    return Relevance(
        answer=tokenizer.decode(token_ids).strip(),
        tokens=tokens,
        token_ids=[[token] for token in token_ids],
        word_ids=_find_word_ids(tokens),
        patch_grid=whole.patch_grid,
        pooled_grid=whole.pooled_grid,
        has_grid=projector_type not in ATTENTION_CLASSES,
        text_to_query=text_to_query,
        query_to_patch=query_to_patch,
        text_to_patch=(text_to_query[:, None] @ query_to_patch)[:, 0],
        image=_picture(inputs["pixel_values"], processor.image_processor, image, deco.config.patch_size),
        overview_grid=overview[0].pooled_grid if overview else None,
    )


def _find_deco(model: nn.Module) -> nn.Module:
    # by name: code that comes with a checkpoint has its own class, and PEFT may wrap it
    for module in model.modules():
        if type(module).__name__ == "DecoForConditionalGeneration":
            return module
    raise ValueError(f"explain needs a DecoForConditionalGeneration, got a {type(model).__name__}.")


def _picture(pixels: torch.Tensor, image_processor, image: EncodedImage, patch_size: int) -> np.ndarray:
    """Undo the normalization of the pixels under the patches of the picture. Returns `(height, width, 3)`."""
    *others, whole = [token_map for token_map in image.maps if token_map.num_tokens > 0]
    first_view = sum(token_map.num_views for token_map in others)
    view, patch = view_patches(whole, image.view_grid)
    pixels = _pixels_of_patches(pixels.detach().float().cpu(), image.view_grid, patch_size)[first_view + view, patch]
    pixels = pixels.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (height, width, 3)
    if getattr(image_processor, "include_top", False):  # EfficientNet's own divides twice
        pixels = pixels * torch.tensor(image_processor.image_std)
    if image_processor.do_normalize:
        pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    return pixels.round().clamp(0, 255).to(torch.uint8).numpy()


def _pixels_of_patches(pixels: torch.Tensor, view_grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """The pixels of each view's patches, `(num_views, num_patches, patch_size, patch_size, 3)`."""
    if pixels.ndim == 3:  # SigLIP 2's flat patches: (1, max_num_patches, patch_size * patch_size * 3)
        return pixels.unflatten(2, (patch_size, patch_size, 3))
    views, (rows, cols) = pixels.flatten(0, -4), view_grid
    height, width = views.shape[-2:]  # a network that rounds up sees less of the last patches
    missing = (max(0, cols * patch_size - width), max(0, rows * patch_size - height))
    views = nn.functional.pad(views, (0, missing[0], 0, missing[1]), mode="replicate")
    views = views[:, :, : rows * patch_size, : cols * patch_size]
    patches = views.unflatten(3, (cols, patch_size)).unflatten(2, (rows, patch_size))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
