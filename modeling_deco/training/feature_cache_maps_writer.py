# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the shards of images of several views, and of videos, whose frames are read and encoded a few at a time."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from ..processing_deco import read_images
from ..utils.errors import one_line
from ..utils.staging import staged_file
from ..videos import read_video
from .arguments import CacheArguments
from .config import DecoSFTConfig
from .costs import tiles_single_images
from .feature_cache import CacheError, FeatureCache, feature_dtype, key_tensor
from .feature_cache_maps import VideoCache, ViewCache, has_videos, image_cache_class
from .feature_cache_writer import UniqueImages, prepare_cache, write_shards

_FRAMES = 16  # of a video, that are encoded together


class _Part:
    """Views of an item in the order of the item: all of an image, some of a video."""

    def __init__(self, item: int, pixels: torch.Tensor, size: tuple[int, ...], seconds: list[float] | None = None):
        self.item, self.pixels, self.size, self.seconds = item, pixels, size, seconds


class _Parts(IterableDataset):
    """The parts of the items of shards. Each worker of the loader reads every n-th item."""

    def __init__(self, items: UniqueImages, numbers: list[int], processor, tiles: int | None, frames_per_part: int):
        self.items, self.numbers, self.processor, self.tiles = items, numbers, processor, tiles
        self.frames_per_part = frames_per_part

    def __iter__(self) -> Iterator[_Part]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in self.numbers[start::step]:
            if self.items.column == "videos":
                yield from self._of_video(number)
            else:
                yield self._of_image(number)

    def _of_image(self, number: int) -> _Part:
        (image,) = read_images([self.items[number]])
        is_tiled = self.items.is_tiled[number]
        images = [image] if is_tiled else [[image, image]]  # as one of several
        inputs, _ = self.processor._process_images(images, tiles=self.tiles, return_tensors="pt")
        height, width = (int(side) for side in inputs["image_sizes"][0])
        return _Part(number, torch.as_tensor(inputs["pixel_values"][0]), (height, width, int(is_tiled)))

    def _of_video(self, number: int) -> Iterator[_Part]:
        video = self.items.reference(number)
        try:
            frames = read_video(video, self.processor.fps, self.processor.max_frames)
            while some := list(islice(frames, self.frames_per_part)):
                pixels = self.processor.frame_pixels([frame for _, frame in some])
                yield _Part(number, pixels, (len(some),), [second for second, _ in some])
        except Exception as error:  # decoders raise many kinds
            row, _ = self.items.places[number]
            raise CacheError(f"Row {row}, its video cannot be read: {one_line(error)}") from error


def write_caches(
    model, processor, dataset, training_args: DecoSFTConfig, cache_args: CacheArguments, evaluates: bool
) -> FeatureCache:
    """Write the features of a data set's images and videos. Returns the cache of the images.

    Args:
        evaluates: whether the run evaluates, at the model's own grid.
    """
    image_class = image_cache_class(model, training_args)
    of_images = UniqueImages(dataset, "images", image_class is ViewCache and tiles_single_images(processor))
    caches: list[tuple[type[FeatureCache], UniqueImages]] = [(image_class, of_images)]
    if has_videos(dataset):
        caches.insert(0, (VideoCache, UniqueImages(dataset, "videos")))
    for cache_class, items in caches:  # that of the images last: it takes the model apart
        names = cache_class.names_of_run(model, processor, training_args, evaluates)
        cache, missing = prepare_cache(model, processor, items, training_args, names, cache_args, cache_class)
        if isinstance(cache, ViewCache):
            write_map_shards(cache, missing, model, processor, items, training_args)
        else:
            write_shards(cache, missing, model, processor, items, training_args)
    return cache


@torch.inference_mode()
def write_map_shards(
    cache: ViewCache, missing: list[int], model, processor, items: UniqueImages, training_args: DecoSFTConfig
) -> None:
    """Compute this process's share of the missing shards, and wait for the other processes."""
    device = training_args.device
    deco, dtype = model.base_model, feature_dtype(model, training_args)
    deco.language_model = None
    deco.to(device).eval()
    averaged = processor.frames_per_token_grid
    for shard in missing[training_args.process_index :: training_args.world_size]:
        numbers = list(cache.images_of(shard))
        parts = _Parts(items, numbers, processor, training_args.tiles, averaged * max(1, _FRAMES // averaged))
        loader = DataLoader(parts, batch_size=None, num_workers=training_args.dataloader_num_workers)
        found: dict[int, list[tuple[_Part, dict[str, torch.Tensor]]]] = {number: [] for number in numbers}
        for part in tqdm(loader, desc=cache.column, disable=training_args.process_index != 0 or None):
            with torch.autocast(device.type, dtype, enabled=training_args.bf16 or training_args.fp16):
                _, features = deco.encode_views(deco._tower_inputs(part.pixels.to(device)))
                pooled = {name: _pooled(deco, cache, features, name, part.size) for name in cache.manifest["grids"]}
            part.pixels = None
            found[part.item].append((part, {name: value.to("cpu", dtype) for name, value in pooled.items()}))
        tensors = _tensors(cache, numbers, found)
        tensors["keys"] = key_tensor(items.keys[numbers[0] : numbers[-1] + 1])
        with staged_file(cache.shards[shard]) as incomplete:
            save_file(tensors, incomplete, metadata={"cache": cache.mark})
    PartialState().wait_for_everyone()


def _pooled(deco, cache: ViewCache, features: torch.Tensor, name: str, size: tuple[int, ...]) -> torch.Tensor:
    maps = cache.maps(name, size)
    num_views = sum(token_map.num_views for token_map in maps)
    return deco.pool_maps(features[:num_views], [maps])


def _tensors(
    cache: ViewCache, numbers: list[int], found: dict[int, list[tuple[Any, dict]]]
) -> dict[str, torch.Tensor]:
    """The tensors of a shard, without its keys."""
    tensors = {
        name: torch.cat([pooled[name] for number in numbers for _, pooled in found[number]])
        for name in cache.manifest["grids"]
    }
    if isinstance(cache, VideoCache):
        sizes: list[tuple[int, ...]] = [(sum(part.size[0] for part, _ in found[number]),) for number in numbers]
        seconds = [second for number in numbers for part, _ in found[number] for second in part.seconds]
        tensors["seconds"] = torch.tensor(seconds, dtype=torch.float64)
    else:
        sizes = [found[number][0][0].size for number in numbers]
    return tensors | {"sizes": torch.tensor(sizes)}
