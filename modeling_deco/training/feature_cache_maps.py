# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Cached features of images of several views, and of videos.

These have as many features as their size asks for. So a shard has the features of all its items one after another, one
tensor per grid, `(rows, vision_hidden_size)`, and the sizes of the items, from which the rows of each follow: what the
projector gets of its maps. Videos are in the folder `videos` of a cache.
"""

import json
import math
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.compute as pc
import torch
from datasets import Dataset

from ..configuration_deco import parse_grid
from ..views import TokenMap, largest_grid, num_map_tokens
from .feature_cache import FeatureCache, feature_dtype, fingerprint, grid_name

VIDEOS = "videos"  # a folder in that of a cache
_BLANK = (8, 8, 1)  # the size of the image of a batch of text


def budget_name(pooled_grid_size=None, max_image_tokens: int | None = None) -> str:
    """The name of features, such as `"12x12"` or `"576 tokens"`."""
    return grid_name(pooled_grid_size) if max_image_tokens is None else f"{max_image_tokens} tokens"


def num_rows(maps: list[TokenMap]) -> int:
    """The features that the projector gets of an image or a video."""
    return sum(token_map.num_pooled for token_map in maps)


@dataclass
class ViewCache(FeatureCache):
    """A cache of images of several views. The size of an item is its height, its width, and whether it is tiled."""

    _sizes: dict[int, torch.Tensor] = field(init=False, default_factory=dict)
    _starts: dict[tuple[int, str], list[int]] = field(init=False, default_factory=dict)

    @classmethod
    def names_of_run(cls, model, processor, args, evaluates: bool) -> list[str]:
        own, full = processor.pooled_grid_size, model.config.patch_grid
        if model.config.projector_type == "mlp":
            return [grid_name(full)]
        names = [budget_name(grid) for grid in args.pooled_grid_sizes or ()]
        names += [budget_name(None, number) for number in args.max_image_tokens or ()]
        if evaluates or not names:
            names.append(budget_name(own))
        if args.distill is not None:  # the teacher's
            names.append(budget_name(full))
        return list(dict.fromkeys(names))

    @classmethod
    def fingerprint(cls, model, processor, args) -> dict[str, Any]:
        config = model.config
        views = {**config.view_settings, "image_grid_pinpoints": config.image_grid_pinpoints, "tiles": args.tiles}
        return fingerprint(model, processor, args) | json.loads(json.dumps({"views": views}))

    @classmethod
    def maps_of(cls, config, manifest: dict[str, Any], name: str, size: tuple[int, ...]) -> list[TokenMap]:
        """The maps of an item of this size, from the name of its features."""
        height, width, is_tiled = size

        def maps_at(grid):
            return config.views.image_maps((height, width), grid, bool(is_tiled))

        if not name.endswith(" tokens"):
            return maps_at(_parse(name))
        most = int(name.removesuffix(" tokens"))
        return maps_at(largest_grid(config.patch_grid, most, lambda grid: num_map_tokens(maps_at(grid))))

    @classmethod
    def largest_sizes(cls, config, processor, args) -> list[tuple[int, ...]]:
        """Sizes among which is that of the largest item."""
        height, width = config.view_size
        side = math.isqrt(args.tiles or 1)
        pinpoints = config.image_grid_pinpoints or [[side * height, side * width]]
        return [(height, width, 1) for height, width in pinpoints]

    def maps(self, name: str, size: tuple[int, ...]) -> list[TokenMap]:
        """The maps of an item, from the name of its features."""
        return self.maps_of(self.config, self.manifest, name, size)

    def shapes(self, file, num_items: int) -> dict[str, tuple[int, ...]]:
        sizes = file.get_tensor("sizes")
        hidden_size = self.config.vision_hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            name: (sum(num_rows(self.maps(name, tuple(size))) for size in sizes.tolist()), hidden_size)
            for name in self.manifest["grids"]
        }
        return shapes | {"keys": (num_items, 16), "sizes": (num_items, sizes.shape[1])}

    def sizes(self, items: list[int]) -> list[tuple[int, ...]]:
        """The sizes of cached items."""
        return [tuple(self._sizes_of(shard)[row].tolist()) for shard, row in self._places(items)]

    def _sizes_of(self, shard: int) -> torch.Tensor:
        if shard not in self._sizes:
            self._sizes[shard] = self._open(shard).get_tensor("sizes")
        return self._sizes[shard]

    def _places(self, items: list[int]) -> list[tuple[int, int]]:
        return [divmod(item, self.manifest["images_per_shard"]) for item in items]

    def _rows(self, shard: int, row: int, name: str) -> slice:
        """The rows of an item in the features of its shard."""
        if (shard, name) not in self._starts:
            numbers = [num_rows(self.maps(name, tuple(size))) for size in self._sizes_of(shard).tolist()]
            self._starts[shard, name] = [0, *accumulate(numbers)]
        return slice(*self._starts[shard, name][row : row + 2])

    def read(self, items: list[int]) -> dict[str, torch.Tensor]:
        """The features `(rows, vision_hidden_size)` of all items by grid. Without items, zeros for one blank image."""
        if not items:
            hidden_size = self.config.vision_hidden_size
            return {name: torch.zeros(num_rows(self.maps(name, _BLANK)), hidden_size) for name in self.names}
        features = {}
        for name in self.names:
            places = [(shard, self._rows(shard, row, name)) for shard, row in self._places(items)]
            features[name] = torch.cat([self._open(shard).get_slice(name)[rows] for shard, rows in places])
        return features

    def image_inputs(self, images: list[int], num_images: list[int]) -> dict[str, Any]:
        """What the collator adds to a batch.

        Args:
            images: numbers of cached images.
            num_images: of each sample.
        """
        sizes = self.sizes(images) if images else [_BLANK]
        inputs = {"patch_features": self.read(images), "image_sizes": torch.tensor([size[:2] for size in sizes])}
        if self.manifest["tiles_single_images"]:
            inputs["batch_num_images"] = torch.tensor([number for number in num_images if number] or [1])
        return inputs


@dataclass
class VideoCache(ViewCache):
    """A cache of videos. The size of an item is its number of frames."""

    column: ClassVar[str] = "videos"

    @classmethod
    def maps_of(cls, config, manifest: dict[str, Any], name: str, size: tuple[int, ...]) -> list[TokenMap]:
        return config.views.video_maps(size[0], manifest["frames_per_token_grid"], _parse(name))

    @classmethod
    def largest_sizes(cls, config, processor, args) -> list[tuple[int, ...]]:
        return [(processor.max_frames,)]

    def seconds(self, item: int) -> list[float]:
        """The time of each frame of a video."""
        ((shard, row),) = self._places([item])
        sizes = self._sizes_of(shard)[:, 0].tolist()
        start = sum(sizes[:row])
        return self._open(shard).get_slice("seconds")[start : start + sizes[row]].tolist()

    def shapes(self, file, num_items: int) -> dict[str, tuple[int, ...]]:
        num_frames = int(file.get_tensor("sizes").sum())
        return super().shapes(file, num_items) | {"seconds": (num_frames,)}

    @classmethod
    def of_run(cls, model, processor, args, evaluates: bool) -> "VideoCache":
        cache = super().of_run(model, processor, args, evaluates)
        assert isinstance(cache, cls)
        return cache

    @classmethod
    def place(cls, folder: Path) -> Path:
        return folder / VIDEOS

    @classmethod
    def names_of_run(cls, model, processor, args, evaluates: bool) -> list[str]:
        own = processor.pooled_video_grid_size or model.config.pooled_video_grid
        grids = list(args.pooled_video_grid_sizes or [own])
        if evaluates:
            grids.append(own)
        if args.distill is not None:
            grids.append(model.config.views.full_video_grid)
        return list(dict.fromkeys(map(grid_name, grids)))

    @classmethod
    def fingerprint(cls, model, processor, args) -> dict[str, Any]:
        parts = fingerprint(model, processor, args, image_processor=processor.video_processor)
        names = ("fps", "max_frames", "frames_per_token_grid")
        reading = {name: getattr(processor, name) for name in names}
        return parts | {"videos": reading | model.config.view_settings}


def has_videos(dataset: Any) -> bool:
    """Whether a data set, or one of a dict of data sets, has a video."""
    if isinstance(dataset, dict):
        return any(map(has_videos, dataset.values()))
    if not isinstance(dataset, Dataset) or "videos" not in dataset.column_names:
        return False
    tables = dataset.select_columns("videos").with_format("arrow").iter(1000)
    return any(pc.any(pc.greater(pc.list_value_length(table["videos"]), 0)).as_py() for table in tables)


def most_bytes(model, processor, names: list[str], args, cache_class: type["ViewCache"]) -> int:
    """The bytes of the largest item of a cache."""
    config, manifest = model.config, {"frames_per_token_grid": processor.frames_per_token_grid}
    sizes = cache_class.largest_sizes(config, processor, args)
    rows = max(sum(num_rows(cache_class.maps_of(config, manifest, name, size)) for name in names) for size in sizes)
    return rows * config.vision_hidden_size * feature_dtype(model, args).itemsize


def image_cache_class(model, args) -> type[FeatureCache]:
    """The kind of cache that a run's images have."""
    has_views = model.config.image_grid_pinpoints is not None or (args.tiles or 1) > 1
    return ViewCache if has_views else FeatureCache


def _parse(name: str) -> tuple[int, int]:
    return parse_grid([int(side) for side in name.split("x")])
