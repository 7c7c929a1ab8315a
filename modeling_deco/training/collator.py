# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From conversations to batches: labels for what is learned, and placeholders for images and videos.

A batch is made in two steps. `DecoCollator` tokenizes in the workers of the data loader, with one placeholder per
image and video. `expand_images` then gives each as many placeholders as it has tokens at the grid of the step. The
trainer samples that grid, so all ranks have the same one, and so does a resumed run.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, zip_longest
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
from ..views import num_map_tokens
from .costs import Cost, LargestCosts, tiles_single_images
from .data.columns import COLUMNS
from .data.dataset import report_faults, undecoded
from .data.images import image_size, open_image
from .data.rows import read_row
from .data.videos import Clip, most_frames, read_clip
from .feature_cache import PATCHES, FeatureCache, grid_name
from .feature_cache_maps import VideoCache, budget_name

IGNORE_INDEX = -100
POSITIONS_ADVICE = "Set --image_positions sequence, or drop such samples with --overlong_samples drop."
PADDING, SHARED = -1, 0  # owners of tokens; turns of a conversation are 1, 2, ...


@dataclass
class DecoCollator:
    """Collates conversations, `{"messages": [...], "images": [...]}` and optionally `"videos"` and an `"id"`, in all
    the layouts of `modeling_deco.training.data.rows`.

    The labels are the tokens that the chat template puts between `{% generation %}` and `{% endgeneration %}`: the
    answers and their end of turn. Images, prompts and padding are -100. A sequence begins as the processor begins
    it at inference; TRL's own collator does not do so for templates without a beginning-of-sequence token.

    A batch of text alone gets one blank image, in its padding, where no token attends to it. So every rank runs the
    vision tower in every step, as FSDP and ZeRO-3 need, and the gradient of the projector is zero. A batch of videos
    gets one if the model has a newline for images only, which DDP would otherwise miss.

    Args:
        processor: of the model that is trained. Videos are read with its `fps` and `max_frames`.
        independent_turns: each question and its answer attend to the images and to themselves, not to earlier turns.
            For conversations that are lists of questions about one image, in which an answer may give away another.
        max_length: the most tokens that a sample may have, with its images and videos at the largest grid.
        largest_grid: the largest grid that an image may have. Default: the processor's.
        largest_video_grid: the largest grid that a frame may have. Default: the processor's.
        max_image_tokens: the largest budget of an image in tokens, if steps may use budgets in place of grids.
        tiles: tiles that each image is cut into, for models without `image_grid_pinpoints`.
        add_timestamps: whether the time of frames is written before their tokens.
        feature_cache: has the features of the images. Examples then have numbers of cached images in place of images.
        video_cache: the same for videos.
        grids: the grids that steps may use; none may be larger than the patch grid of an image.
        max_positions: the positions of the language model, if images keep those of their patches.
        patches_per_image: the most patches that an image has, for `max_positions`, if it has one view.
    """

    processor: DecoProcessor
    independent_turns: bool = False
    max_length: int | None = None
    largest_grid: int | list[int] | None = None
    largest_video_grid: int | list[int] | None = None
    max_image_tokens: int | None = None
    tiles: int | None = None
    add_timestamps: bool = False
    feature_cache: FeatureCache | None = None
    video_cache: VideoCache | None = None
    grids: list[int] | None = None
    max_positions: int | None = None
    patches_per_image: int = 0

    def __post_init__(self):
        self.costs = LargestCosts(
            self.processor, self.largest_grid, self.max_image_tokens, self.largest_video_grid, self.patches_per_image
        )
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not has_generation_markers(self.processor.chat_template or ""):
            raise ValueError(
                "The chat template has no {% generation %} marks around the assistant's answers, so nothing says "
                f"what is learned. Choose one that has: --chat_template {', '.join(CHAT_TEMPLATES)}, or a Jinja file."
            )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a compact batch, in which each image is one placeholder, and each video one, or with timestamps one for
        each grid of its tokens.

        Returns:
            `input_ids`, `labels` and `owners` `(batch, sequence)`, padded on the right; the outputs of the image
            processor, such as `pixel_values` `(num_images, 3, height, width)`, or with a cache `patch_features`, a
            dict of features by grid; with videos `pixel_values_videos` `(num_videos, max_num_frames, 3, height,
            width)` and `num_frames`, a list; and `sample_ids`, a list.

        Raises:
            ValueError: a sample cannot be read, is longer than `max_length`, or takes more than `max_positions`.
        """
        examples = [self._open(self.read(example)) for example in examples]
        images = [image for example in examples for image in example["images"]]
        videos = [video for example in examples for video in example["videos"]]
        rows = [self.tokenize(example) for example in examples]
        for example, row in zip(examples, rows, strict=True):
            length = self.count_tokens(row)
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"Sample {example.get('id')!r} has {length} tokens, with {_media_of(example)}, but "
                    f"max_length={self.max_length}. Raise it, or set --overlong_samples drop."
                )
            self.check_positions(example, row)
        settings = self.processor.view_settings or {}
        has_own_newline = settings.get("image_newline") and not settings.get("video_newline")
        is_blank = not images and (not videos or has_own_newline)
        if is_blank:
            shortest = min(rows, key=lambda row: len(row["input_ids"]))  # lengthens the batch the least
            shortest["input_ids"] = shortest["input_ids"] + [self.processor.image_token_id]
            shortest["labels"] = shortest["labels"] + [IGNORE_INDEX]
            shortest["owners"] = shortest["owners"] + [PADDING]
        batch = {
            "input_ids": _padded(rows, "input_ids", self.processor.tokenizer.pad_token_id),
            "labels": _padded(rows, "labels", IGNORE_INDEX),
            "owners": _padded(rows, "owners", PADDING),
            "sample_ids": [str(example.get("id", "unnamed")) for example in examples],
        }
        num_images = [len(example["images"]) for example in examples]
        if self.video_cache is not None and videos:
            batch["video_features"] = self.video_cache.read(videos)
            batch["num_frames"] = [size[0] for size in self.video_cache.sizes(videos)]
        elif videos:
            batch["pixel_values_videos"] = pad_sequence([clip.pixels for clip in videos], batch_first=True)
            batch["num_frames"] = [len(clip.seconds) for clip in videos]
        if not images and not is_blank:
            return batch
        if self.feature_cache is not None:
            return batch | self.feature_cache.image_inputs(images, num_images)
        inputs = self._image_inputs(images or [Image.new("RGB", (8, 8))], num_images)
        of_images = [example for example in examples for _ in example["images"]]
        for example, patch_grid in zip(of_images, inputs.get("spatial_shapes", ()), strict=False):
            with _naming(example):
                for grid in self.grids or ():
                    check_grid(grid, tuple(patch_grid.tolist()), of="an image", name="pooled_grid_sizes")
        return batch | inputs

    def _image_inputs(self, images: list, num_images: list[int]) -> dict[str, Any]:
        if tiles_single_images(self.processor):
            given = iter(images)
            images = [[next(given) for _ in range(number)] for number in num_images if number] or [images]
        inputs, _ = self.processor._process_images(images, tiles=self.tiles, return_tensors="pt")
        return dict(inputs)

    def check_grids(self, dataset: Dataset, grids: list) -> None:
        """Check that no grid is larger than the patch grid of an image, if the image processor keeps the shapes of
        images (SigLIP 2, NaFlex).

        Raises:
            ValueError: a grid is larger; the message has the number of such samples, and the first of them.
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
        """The example in the form of `read_row`. A ValueError names the sample."""
        if self.feature_cache is not None:  # images and videos are numbers
            numbers = {name: list(example.get(name) or ()) for name in ("images", "videos")}
            return read_row(example | {name: [b""] * len(given) for name, given in numbers.items()}) | numbers
        with _naming(example):
            example = read_row(example)
            if example["videos"] and self.processor.video_token is None:
                raise ValueError("it has a video, but the model takes none: its tokenizer has no token '<video>'")
            return example

    def _open(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example with its images as pictures, and its videos as `Clip`s."""
        if self.feature_cache is not None:
            return example
        with _naming(example):
            images = read_images([open_image(image) for image in example["images"]])
            return {
                **example,
                "images": images,
                "videos": [read_clip(video, self.processor) for video in example["videos"]],
            }

    def tokenize(self, example: dict[str, Any]) -> dict[str, Any]:
        """`input_ids`, `labels` and `owners` of a conversation from `read`, with one placeholder per image and video,
        or with timestamps one for each grid of a video's tokens; and `costs`, the `Cost` of each placeholder."""
        with _naming(example):
            seconds = [self._seconds(video) for video in example.get("videos", ())]
            if self.feature_cache is not None:
                sizes = self.feature_cache.sizes(example["images"])
                costs = self.costs.of_sizes([(height, width) for height, width, *_ in sizes])
            else:
                costs = self.costs.of_images(example["images"])
            for seconds_of_video in seconds:
                of_grids = self.costs.of_video(len(seconds_of_video))
                costs += of_grids if self.add_timestamps else [Cost(*map(sum, zip(*of_grids, strict=True)))]
            texts = [self._compact_text(seconds_of_video) for seconds_of_video in seconds]
            tokenize = self._tokenize_turns if self.independent_turns else self._tokenize_whole
            row = tokenize(example["messages"], texts)
            self._count_placeholders(row["input_ids"], "image", len(example["images"]))
            self._count_placeholders(row["input_ids"], "video", len(costs) - len(example["images"]))
        return {**row, "costs": costs}

    def _count_placeholders(self, ids: list[int], kind: str, expected: int) -> None:
        token, token_id = (getattr(self.processor, f"{kind}_{name}") for name in ("token", "token_id"))
        if token_id is not None and ids.count(token_id) != expected:
            raise ValueError(
                f"the chat template and the texts have {ids.count(token_id)} {token} for {expected} {kind}s."
            )

    # --- text --------------------------------------------------------------------------------------------------------

    def _seconds(self, video: Any) -> list[float]:
        """The time of each frame. If the video is not opened, there are at least as many."""
        if self.video_cache is not None:
            return self.video_cache.seconds(video)
        if isinstance(video, Clip):
            return video.seconds
        num_frames = most_frames(video, self.processor.fps, self.processor.max_frames)
        return [number / self.processor.fps for number in range(num_frames)]

    def _compact_text(self, seconds: list[float]) -> str:
        """What the processor writes for a video, with one placeholder in place of neighbouring ones."""
        token, frame_size = str(self.processor.video_token), self.processor.frame_size
        size = self.processor.video_size(len(seconds), frame_size)
        text = self.processor.video_text(size, frame_size, seconds if self.add_timestamps else None)
        return re.sub(f"(?:{re.escape(token)})+", token, text)

    def _tokenize_whole(self, messages: list[dict], video_texts: list[str]) -> dict[str, list[int]]:
        ids, labels = self._tokenize(messages, video_texts)
        return {"input_ids": ids, "labels": labels, "owners": [SHARED] * len(ids)}

    def _tokenize_turns(self, messages: list[dict], video_texts: list[str]) -> dict[str, list[int]]:
        # Each question becomes a conversation of its own; their common prefix is kept once.
        system = messages[:1] if messages[0]["role"] == "system" else []
        questions, answers = messages[len(system) :: 2], messages[len(system) + 1 :: 2]
        shown, *later = [[part for part in question["content"] if part["type"] != "text"] for question in questions]
        asked = [[part for part in question["content"] if part["type"] == "text"] for question in questions]
        roles = {question["role"] for question in questions}, {answer["role"] for answer in answers}
        if any(later) or roles != ({"user"}, {"assistant"}) or len(questions) != len(answers):
            raise ValueError(
                "its turns are not independent: they must be questions and answers, all images in the first question."
            )
        turns = [
            self._tokenize([*system, {"role": "user", "content": [*shown, *question]}, answer], video_texts)
            for question, answer in zip(asked, answers, strict=True)
        ]
        start = _end_of_images(turns[0][0], {self.processor.image_token_id, self.processor.video_token_id})
        prefix = turns[0][0][:start]
        if any(ids[:start] != prefix for ids, _ in turns):
            raise ValueError("the chat template puts more of a question than its images before the last image.")
        if any(labels[start] != IGNORE_INDEX for _, labels in turns[1:]):
            raise ValueError("the chat template puts no question before an answer, so turns would follow one another.")
        row = {"input_ids": list(prefix), "labels": [IGNORE_INDEX] * start, "owners": [SHARED] * start}
        for owner, (ids, labels) in enumerate(turns, start=1):
            row["input_ids"] += ids[start:]
            row["labels"] += labels[start:]
            row["owners"] += [owner] * (len(ids) - start)
        return row

    def _tokenize(self, messages: list[dict], video_texts: list[str]) -> tuple[list[int], list[int]]:
        tokenizer = self.processor.tokenizer
        (text,), (answers,) = render_jinja_template(
            [messages],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        if video_texts:
            text, answers = _with_video_texts(text, answers, str(self.processor.video_token), video_texts)
        starts_with_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        encoded = tokenizer(text, add_special_tokens=not starts_with_bos, return_offsets_mapping=True)
        if encoded["input_ids"].count(self.processor.image_token_id) != text.count(self.processor.image_token):
            raise ValueError(f"The tokenizer does not keep {self.processor.image_token!r} as one token.")
        labels = [
            token if any(start < last and end > first for first, last in answers) else IGNORE_INDEX
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        return encoded["input_ids"], labels

    def count_tokens(self, row: dict[str, list]) -> int:
        """The tokens of a tokenized conversation, with its images and videos at the largest grid."""
        return len(row["input_ids"]) + sum(cost.num_tokens - 1 for cost in row["costs"])

    def count_positions(self, row: dict[str, list]) -> int:
        """The positions of a tokenized conversation whose images and frames keep those of their patches. Independent
        turns all begin behind the images."""
        tokens_of = Counter(row["owners"])
        num_shared = tokens_of.pop(SHARED, 0)
        return num_shared + max(tokens_of.values(), default=0) + sum(cost.num_positions - 1 for cost in row["costs"])

    def check_positions(self, example: dict[str, Any], row: dict[str, list]) -> None:
        """Raise a ValueError if a sample takes more than `max_positions`."""
        num_positions = self.count_positions(row)
        if self.max_positions is not None and num_positions > self.max_positions:
            raise ValueError(
                f"Sample {example.get('id')!r} takes {num_positions} positions, because its {_media_of(example)} keep "
                f"those of {sum(cost.num_positions for cost in row['costs'])} patches, but the language model has "
                f"{self.max_positions} (max_position_embeddings). {POSITIONS_ADVICE}"
            )


def _columns_of_images(dataset: Dataset) -> list[str]:
    return [name for name in dataset.column_names if name in COLUMNS]


@contextmanager
def _naming(example: dict[str, Any]) -> Iterator[None]:
    """Begin the message of a ValueError with the name of the sample."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Sample {example.get('id')!r}: {error}") from error


def _media_of(example: dict[str, Any]) -> str:
    videos = f" and {len(example['videos'])} video(s)" if example["videos"] else ""
    return f"{len(example['images'])} image(s){videos}"


def expand_images(
    batch: dict[str, Any],
    pooled_grid_size,
    processor: DecoProcessor,
    max_image_tokens: int | None = None,
    pooled_video_grid_size=None,
) -> dict[str, Any]:
    """Give each image and video of a compact batch the tokens of a grid.

    Args:
        batch: from `DecoCollator`, on any device.
        pooled_grid_size: an int (square) or `[rows, cols]`. None means the processor's grid; the result then has no
            `pooled_grid_sizes`, so its graph is static. (SigLIP 2's images of any shape have at most as many tokens as
            patches.)
        processor: of the model.
        max_image_tokens: in place of `pooled_grid_size`, the most tokens of an image.
        pooled_video_grid_size: of a frame. None means the processor's.

    Returns:
        The model's inputs with `labels`; cached features are its `pixel_values`, for `features_as_pixels`.
        `attention_mask` is `(batch, sequence)`. For independent turns it is `(batch, 1, sequence, sequence)`, true
        where a token may attend. From that the model knows the positions of every turn, which continue those of the
        images, so that the logits equal those of one sample per turn.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("owners", "sample_ids", "num_frames")}
    owners = batch["owners"]
    is_image = batch["input_ids"] == processor.image_token_id
    repeats = (owners != PADDING).long()  # rows are padded again
    grids: list = []
    if "pixel_values" in batch or "patch_features" in batch:
        grids, num_tokens, pixels = _images_at(batch, pooled_grid_size, max_image_tokens, processor)
        repeats[is_image] = torch.tensor(num_tokens, device=repeats.device)
        inputs.pop("patch_features", None)
        inputs["pixel_values"] = pixels
    if "num_frames" in batch:
        sizes, num_tokens, pixels = _videos_at(batch, pooled_video_grid_size, processor)
        is_video = batch["input_ids"] == processor.video_token_id
        repeats[is_video] = torch.tensor(num_tokens, device=repeats.device)
        inputs.pop("video_features", None)
        inputs["pixel_values_videos"] = pixels
        inputs["pooled_video_sizes"] = torch.tensor(sizes, device=owners.device)
    padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
    for name, value in padding.items():
        inputs[name] = _repeated(batch[name], repeats, value)
    owners = _repeated(owners, repeats, PADDING)
    if grids and (pooled_grid_size is not None or max_image_tokens is not None):
        inputs["pooled_grid_sizes"] = torch.tensor(grids, device=owners.device)
    if (owners > SHARED).any():
        inputs["attention_mask"] = independent_mask(owners)
    else:
        inputs["attention_mask"] = (owners != PADDING).long()
    return inputs


def _images_at(batch: dict[str, Any], pooled_grid_size, max_image_tokens: int | None, processor: DecoProcessor):
    """The grid and the number of tokens of each image, and the pixels or features of all."""
    own = processor.pooled_grid_size if pooled_grid_size is None else pooled_grid_size
    if "patch_features" not in batch:
        grids = processor.image_grids(batch, pooled_grid_size, max_image_tokens)
        return grids, [num_map_tokens(maps) for maps in processor.image_maps(batch, grids)], batch["pixel_values"]
    by_name = batch["patch_features"]
    if "image_sizes" in batch:  # several views
        sizes = [(height, width) for height, width in batch["image_sizes"].tolist()]
        blank = torch.empty(len(sizes), 1, 3, *processor.frame_size, device="meta")
        image_inputs = {**batch, "pixel_values": blank, "image_sizes": sizes}
        grids = processor.image_grids(image_inputs, pooled_grid_size, max_image_tokens)
        num_tokens = [num_map_tokens(maps) for maps in processor.image_maps(image_inputs, grids)]
        # a projector without pooling has one grid
        name = budget_name(own, max_image_tokens) if len(by_name) > 1 else next(iter(by_name))
        return grids, num_tokens, by_name[name]
    if max_image_tokens is not None:
        blank = torch.empty(1, 3, *processor.frame_size, device="meta")
        (own,) = processor.image_grids({"pixel_values": blank}, None, max_image_tokens)
    num_images = int((batch["input_ids"] == processor.image_token_id).sum())
    grids = [parse_grid(own)] * num_images
    features = by_name[PATCHES] if PATCHES in by_name else by_name[grid_name(own)]
    return grids, [num_image_tokens(grid) for grid in grids], features


def _videos_at(batch: dict[str, Any], pooled_video_grid_size, processor: DecoProcessor):
    """The size of each video, the number of tokens of each placeholder, and the pixels or features of all."""
    frame_size = processor.frame_size
    sizes = [processor.video_size(number, frame_size, pooled_video_grid_size) for number in batch["num_frames"]]
    maps = [processor.video_maps(size, frame_size) for size in sizes]
    if (batch["input_ids"] == processor.video_token_id).sum() == len(maps):
        num_tokens = [num_map_tokens(maps_of_video) for maps_of_video in maps]
    else:  # with timestamps, each grid of tokens has a placeholder
        num_tokens = [token_map.num_tokens for maps_of_video in maps for token_map in maps_of_video]
    if "video_features" in batch:
        return sizes, num_tokens, batch["video_features"][grid_name(sizes[0][2:])]
    return sizes, num_tokens, batch["pixel_values_videos"]


def independent_mask(owners: torch.Tensor) -> torch.Tensor:
    """The mask `(batch, 1, sequence, sequence)` of turns that attend to shared tokens and to themselves alone."""
    length = owners.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=owners.device).tril()
    same_turn = owners[:, :, None] == owners[:, None, :]
    return ((same_turn | (owners == SHARED)[:, None, :]) & causal)[:, None]


def _with_video_texts(
    text: str, answers: list[tuple[int, int]], video_token: str, video_texts: list[str]
) -> tuple[str, list[tuple[int, int]]]:
    """A rendered conversation with the compact texts of its videos in place of their tokens, and the places of its
    answers in the result."""
    pieces = text.split(video_token)
    if len(pieces) != len(video_texts) + 1:  # refused later, with the numbers
        return text, answers
    ends = list(accumulate(len(piece) for piece in pieces))
    starts_of_tokens = [end + number * len(video_token) for number, end in enumerate(ends[:-1])]
    grown = [len(video_text) - len(video_token) for video_text in video_texts]

    def moved(place: int) -> int:
        return place + sum(more for start, more in zip(starts_of_tokens, grown, strict=True) if start < place)

    joined = "".join(chain.from_iterable(zip_longest(pieces, video_texts, fillvalue="")))
    return joined, [(moved(start), moved(end)) for start, end in answers]


def _end_of_images(ids: list[int], placeholders: set[int | None]) -> int:
    """The position after the last image or video, or 0 if there is none."""
    return max((position for position, token in enumerate(ids) if token in placeholders), default=-1) + 1


def _padded(rows: list[dict[str, list[int]]], name: str, value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)


def _repeated(tokens: torch.Tensor, repeats: torch.Tensor, value: int) -> torch.Tensor:
    rows = [row.repeat_interleave(times) for row, times in zip(tokens, repeats, strict=True)]
    return pad_sequence(rows, batch_first=True, padding_value=value)
