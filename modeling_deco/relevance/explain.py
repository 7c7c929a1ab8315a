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
from .forward import ATTENTION_CLASSES, encode_image, evaluation, generate, run_answer
from .rules import POOLING, explain_by_attention, explain_by_gae

METHODS = ("gae", "attention")


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
    if method == "attention" and projector_type not in (*POOLING, *ATTENTION_CLASSES):
        raise ValueError(f"projector_type {projector_type!r} has no attention to patches; use method='gae'.")
    if answer is not None and generate_kwargs:
        raise ValueError(f"An answer is given, so that {', '.join(generate_kwargs)} would have no effect.")
    for name in ("return_dict_in_generate", "num_return_sequences"):
        if name in generate_kwargs:
            raise ValueError(f"{name} cannot be given: explain takes the token ids of one answer.")

    with evaluation(deco):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = encode(processor, [{"role": "user", "content": content}], pooled_grid_size).to(deco.device)
        check_length(deco, inputs)
        prompt_ids, tokenizer = inputs["input_ids"][0].tolist(), processor.tokenizer
        image = encode_image(deco, inputs, method)
        if answer is None:
            answer_ids = generate(deco, inputs, image, generate_kwargs)
        else:
            answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if deco.config.image_token_id in answer_ids:
            raise ValueError(f"The answer holds {processor.image_token!r}, which stands for an image; leave it out.")
        explained = [index for index, token in enumerate(answer_ids) if token not in tokenizer.all_special_ids]
        if not explained:
            raise ValueError("The answer is empty: it has no token to explain.")
        token_ids = [answer_ids[index] for index in explained]

        targets = [len(prompt_ids) + index for index in explained]
        run = run_answer(deco, image, [*prompt_ids, *answer_ids], targets, method)
        explain_token = explain_by_gae if method == "gae" else explain_by_attention
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
        has_grid=projector_type not in ATTENTION_CLASSES,
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
