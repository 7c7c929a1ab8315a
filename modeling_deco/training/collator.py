"""From conversations to batches: what is learned is labelled here, and images take their tokens here.

A batch comes in two steps. `DecoCollator` tokenizes in the workers of the data loader, with one placeholder per image.
`expand_images` gives each image the tokens of a grid, which the trainer draws for the step: so all ranks draw the
same, and a resumed run draws what the first would have drawn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.chat_template_utils import render_jinja_template  # private, seen in transformers 5.19 to 5.24
from trl.chat_template_utils import has_generation_markers  # private, seen in trl 1.16

from .. import DecoProcessor, num_image_tokens
from ..chat_templates import CHAT_TEMPLATES
from ..configuration_deco import check_grid, parse_grid
from ..processing_deco import read_images
from .feature_cache import PATCHES, FeatureCache, grid_name
from .records import COLUMNS, image_size, open_image, read_row, report_faults, undecoded

IGNORE_INDEX = -100
PADDING, SHARED = -1, 0  # owners of tokens; the turns of a conversation are 1, 2, ...


@dataclass
class DecoCollator:
    """Collates conversations, `{"messages": [...], "images": [...]}` and, if they have one, an `"id"`, in all the
    layouts of `modeling_deco.training.records`.

    Labels are the tokens that the chat template puts between `{% generation %}` and `{% endgeneration %}`, the answers
    and their end of turn; images, prompts and padding are -100. Beginnings of sequence are set as the processor sets
    them at inference, which TRL's own collator does not for templates without one.

    A batch of text alone gets one blank image in its padding, where no token sees it: every rank then runs the vision
    tower in every step, which FSDP and ZeRO-3 wait for, and the projector's gradient is zero.

    Args:
        processor: of the model that is trained.
        independent_turns: each question and its answer see the images and themselves, not the turns before. For
            conversations that are a list of questions about one image, whose earlier answers give later ones away.
        max_length: most tokens of a sample, its images at their largest.
        largest_grid: the largest grid that an image may take. Default: the processor's.
        feature_cache: where the features of images are read; examples have their numbers in it in place of images.
        grids: that are asked for explicitly, of which none may be larger than the patches of an image.
    """

    processor: DecoProcessor
    independent_turns: bool = False
    max_length: int | None = None
    largest_grid: int | list[int] | None = None
    feature_cache: FeatureCache | None = None
    grids: list[int] | None = None

    def __post_init__(self):
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not has_generation_markers(self.processor.chat_template or ""):
            raise ValueError(
                "The chat template has no {% generation %} marks around the assistant's answers, so it does not say "
                f"what is to be learned. Choose one that has: --chat_template {', '.join(CHAT_TEMPLATES)}, or a "
                "Jinja file."
            )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A compact batch: each image is one placeholder.

        Returns:
            `input_ids`, `labels` and `owners` `(batch, sequence)`, padded on the right; what the image processor gives
            for all images, `pixel_values` `(num_images, 3, height, width)` and more for some, or in its place
            `patch_features`, the cached ones by grid; `sample_ids`, a list.

        Raises:
            ValueError: a sample cannot be read, or is longer than `max_length`.
        """
        examples = [self.read(example) for example in examples]
        images = [image for example in examples for image in self._open(example)]
        rows = [self.tokenize(example) for example in examples]
        for example, row in zip(examples, rows, strict=True):
            length = self.count_tokens(row)
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"Sample {example.get('id')!r} has {length} tokens, {len(example['images'])} image(s) among them, "
                    f"but max_length={self.max_length}. Raise it, or let --overlong_samples drop such samples."
                )
        if not images:
            shortest = min(rows, key=lambda row: len(row["input_ids"]))  # where its tokens lengthen the batch least
            shortest["input_ids"] = shortest["input_ids"] + [self.processor.image_token_id]
            shortest["labels"] = shortest["labels"] + [IGNORE_INDEX]
            shortest["owners"] = shortest["owners"] + [PADDING]
        batch = {
            "input_ids": _padded(rows, "input_ids", self.processor.tokenizer.pad_token_id),
            "labels": _padded(rows, "labels", IGNORE_INDEX),
            "owners": _padded(rows, "owners", PADDING),
            "sample_ids": [str(example.get("id", "unnamed")) for example in examples],
        }
        if self.feature_cache is not None:
            return batch | {"patch_features": self.feature_cache.read(images)}
        images = read_images(images or [Image.new("RGB", (8, 8))])
        inputs = dict(self.processor.image_processor(images, return_tensors="pt"))
        of_images = [example for example in examples for _ in example["images"]]
        for example, patch_grid in zip(of_images, inputs.get("spatial_shapes", ()), strict=False):
            with _naming(example):
                for grid in self.grids or ():
                    check_grid(grid, tuple(patch_grid.tolist()), of="an image", name="pooled_grid_sizes")
        return batch | inputs

    def check_grids(self, dataset: Dataset, grids: list) -> None:
        """Refuse grids that are larger than the patches of an image, where an image processor leaves images their own
        shapes (SigLIP 2, NaFlex).

        Raises:
            ValueError: with the number of such samples, and the first of them.
        """
        if not hasattr(self.processor.image_processor, "max_num_patches"):
            return
        faults, patch_grids = [], {}
        for index, example in enumerate(undecoded(dataset).select_columns(_columns_of_images(dataset))):
            name = example.get("id") or f"row {index}"
            try:
                for size in map(image_size, self.read(example)["images"]):
                    if size not in patch_grids:
                        blank = self.processor.image_processor([Image.new("RGB", size[::-1])], return_tensors="pt")
                        patch_grids[size] = tuple(blank["spatial_shapes"][0].tolist())
                    for grid in grids:
                        check_grid(grid, patch_grids[size], of=f"an image of {size[0]} x {size[1]} pixels")
            except ValueError as error:
                faults.append(f"{name!r}: {error}")
        report_faults(faults, len(dataset))

    def read(self, example: dict[str, Any]) -> dict[str, Any]:
        """`example` as `read_row` has it. Raises a ValueError that names the sample."""
        if self.feature_cache is not None:  # whose numbers are no images
            return {**read_row({**example, "images": [b""] * len(example["images"])}), "images": example["images"]}
        with _naming(example):
            return read_row(example)

    def _open(self, example: dict[str, Any]) -> list[Any]:
        if self.feature_cache is not None:
            return example["images"]
        with _naming(example):
            return [open_image(image) for image in example["images"]]

    def tokenize(self, example: dict[str, Any]) -> dict[str, list[int]]:
        """`input_ids`, `labels` and `owners` of one conversation as `read` has it, images as one placeholder each."""
        messages = example["messages"]
        with _naming(example):
            row = self._tokenize_turns(messages) if self.independent_turns else self._tokenize_whole(messages)
            num_placeholders = row["input_ids"].count(self.processor.image_token_id)
            if num_placeholders != len(example["images"]):
                raise ValueError(
                    f"the chat template and the texts have {num_placeholders} {self.processor.image_token} for "
                    f"{len(example['images'])} images."
                )
        return row

    def _tokenize_whole(self, messages: list[dict]) -> dict[str, list[int]]:
        ids, labels = self._tokenize(messages)
        return {"input_ids": ids, "labels": labels, "owners": [SHARED] * len(ids)}

    def _tokenize_turns(self, messages: list[dict]) -> dict[str, list[int]]:
        # Every question becomes a conversation of its own; what they have in common is kept once.
        system = messages[:1] if messages[0]["role"] == "system" else []
        questions, answers = messages[len(system) :: 2], messages[len(system) + 1 :: 2]
        shown, *later = [[part for part in question["content"] if part["type"] == "image"] for question in questions]
        asked = [[part for part in question["content"] if part["type"] != "image"] for question in questions]
        roles = {question["role"] for question in questions}, {answer["role"] for answer in answers}
        if any(later) or roles != ({"user"}, {"assistant"}) or len(questions) != len(answers):
            raise ValueError(
                "its turns are not independent: they must be questions and answers, all images in the first question."
            )
        turns = [
            self._tokenize([*system, {"role": "user", "content": [*shown, *question]}, answer])
            for question, answer in zip(asked, answers, strict=True)
        ]
        start = _end_of_images(turns[0][0], self.processor.image_token_id)
        prefix = turns[0][0][:start]
        if any(ids[:start] != prefix for ids, _ in turns):
            raise ValueError("the chat template shows more of a question than its images before the last image.")
        if any(labels[start] != IGNORE_INDEX for _, labels in turns[1:]):
            raise ValueError(
                "the chat template shows no question before an answer, so turns would follow one another."
            )
        row = {"input_ids": list(prefix), "labels": [IGNORE_INDEX] * start, "owners": [SHARED] * start}
        for owner, (ids, labels) in enumerate(turns, start=1):
            row["input_ids"] += ids[start:]
            row["labels"] += labels[start:]
            row["owners"] += [owner] * (len(ids) - start)
        return row

    def _tokenize(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        tokenizer = self.processor.tokenizer
        (text,), (answers,) = render_jinja_template(
            [messages],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        starts_with_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        encoded = tokenizer(text, add_special_tokens=not starts_with_bos, return_offsets_mapping=True)
        if encoded["input_ids"].count(self.processor.image_token_id) != text.count(self.processor.image_token):
            raise ValueError(f"The tokenizer does not keep {self.processor.image_token!r} as one token.")
        labels = [
            token if any(start < last and end > first for first, last in answers) else IGNORE_INDEX
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        return encoded["input_ids"], labels

    def count_tokens(self, row: dict[str, list[int]]) -> int:
        """Tokens of a tokenized conversation with its images at their largest."""
        num_images = row["input_ids"].count(self.processor.image_token_id)
        tokens_per_image = num_image_tokens(self.largest_grid or self.processor.pooled_grid_size)
        return len(row["input_ids"]) + num_images * (tokens_per_image - 1)


def _columns_of_images(dataset: Dataset) -> list[str]:
    return [name for name in dataset.column_names if name in COLUMNS]


@contextmanager
def _naming(example: dict[str, Any]) -> Iterator[None]:
    """Errors begin with the sample's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Sample {example.get('id')!r}: {error}") from error


def expand_images(batch: dict[str, Any], pooled_grid_size, processor: DecoProcessor) -> dict[str, Any]:
    """Give each image of a compact batch the tokens of a grid.

    Args:
        batch: from `DecoCollator`, on any device.
        pooled_grid_size: an int (square) or `[rows, cols]`; None stands for the processor's (of
            SigLIP 2's pictures in their own shape: at most their own patches), and then the result has no
            `pooled_grid_sizes` and its graph is static.

    Returns:
        The model's inputs with `labels`; cached features are its `pixel_values`, for `features_as_pixels`.
        `attention_mask` is `(batch, sequence)`; where turns are independent it is
        `(batch, 1, sequence, sequence)`, true where a token may look, and `position_ids` of every turn go on from the
        images, so that logits equal those of one sample per turn.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("owners", "sample_ids")}
    owners = batch["owners"]
    is_image = batch["input_ids"] == processor.image_token_id
    repeats = (owners != PADDING).long()  # rows are padded anew
    if "patch_features" in batch:
        grid = processor.pooled_grid_size if pooled_grid_size is None else pooled_grid_size
        by_grid = inputs.pop("patch_features")
        inputs["pixel_values"] = by_grid[PATCHES] if PATCHES in by_grid else by_grid[grid_name(grid)]
        grids = [parse_grid(grid)] * int(is_image.sum())
    else:
        grids = processor.image_grids(batch, pooled_grid_size)
    repeats[is_image] = torch.tensor([num_image_tokens(grid) for grid in grids], device=repeats.device)
    padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
    for name, value in padding.items():
        inputs[name] = _repeated(batch[name], repeats, value)
    owners = _repeated(owners, repeats, PADDING)
    if pooled_grid_size is not None:
        inputs["pooled_grid_sizes"] = torch.tensor(grids, device=owners.device)
    if (owners > SHARED).any():
        inputs["attention_mask"], inputs["position_ids"] = _independent(owners)
    else:
        inputs["attention_mask"] = (owners != PADDING).long()
    return inputs


def _independent(owners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask `(batch, 1, sequence, sequence)` and positions `(batch, sequence)` of turns that see what is shared and
    themselves alone."""
    length = owners.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=owners.device).tril()
    same_turn = owners[:, :, None] == owners[:, None, :]
    mask = (same_turn | (owners == SHARED)[:, None, :]) & causal
    seen = (mask & (owners != PADDING)[:, None, :]).sum(-1)  # a token's position is how many it sees before itself
    return mask[:, None], (seen - 1).clamp(min=0)


def _end_of_images(ids: list[int], image_token_id: int) -> int:
    """The position after the last image; 0 where there is none."""
    return max((position for position, token in enumerate(ids) if token == image_token_id), default=-1) + 1


def _padded(rows: list[dict[str, list[int]]], name: str, value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)


def _repeated(tokens: torch.Tensor, repeats: torch.Tensor, value: int) -> torch.Tensor:
    rows = [row.repeat_interleave(times) for row, times in zip(tokens, repeats, strict=True)]
    return pad_sequence(rows, batch_first=True, padding_value=value)
