# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a feature cache: a frozen vision tower runs over every image once, and its pooled features are kept.

The processes of a launch share the images shard by shard, each with the whole tower. All grids come from one pass.
"""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from trl import ModelConfig

from ..processing_deco import read_images
from ..projectors import pool_patch_grid
from ..utils.errors import one_line
from ..utils.staging import INCOMPLETE, staged_file
from .arguments import CacheArguments, DecoArguments
from .collator import DecoCollator
from .config import DecoSFTConfig
from .costs import tiles_single_images
from .distributed import on_first_process
from .feature_cache import (
    MANIFEST,
    PATCHES,
    CacheError,
    FeatureCache,
    feature_dtype,
    feature_shape,
    image_keys,
    key_digest,
    key_tensor,
)
from .feature_cache_maps import VIDEOS, ViewCache, most_bytes

logger = logging.getLogger(__name__)


class MultiGridPool(torch.nn.Module):
    """Takes the place of a projector: pools the patches to each grid, and projects nothing.

    Args:
        names: of the grids, or of the patches alone.
        patch_grid: of the vision tower, `(rows, cols)`.
    """

    def __init__(self, names: list[str], patch_grid: tuple[int, int]):
        super().__init__()
        self.names, self.patch_grid = names, patch_grid

    def forward(self, patch_features, patch_grid, pooled_grid):
        if self.names == [PATCHES]:
            if tuple(patch_grid) != self.patch_grid:
                raise CacheError(
                    f"An image has {patch_grid[0]} x {patch_grid[1]} patches, not {self.patch_grid[0]} x "
                    f"{self.patch_grid[1]}, and the projector reads patches. Only avg_pool can have such a cache."
                )
            return patch_features
        grids = [(int(rows), int(cols)) for rows, cols in (name.split("x") for name in self.names)]
        return torch.cat([pool_patch_grid(patch_features, patch_grid, grid) for grid in grids], dim=1)


class UniqueImages(torch.utils.data.Dataset):
    """The images of a data set, or its videos, without repetitions; `keys` has the cache key of each.

    Args:
        dataset: from `load_data`.
        column: `"images"` or `"videos"`.
        tiles_single_images: whether an image of several in its row is another item than the same image alone.
    """

    def __init__(self, dataset: Dataset, column: str = "images", tiles_single_images: bool = False):
        places: dict[bytes, tuple[int, int]] = {}
        numbers = []
        for row, keys in enumerate(image_keys(dataset, column, tiles_single_images)):
            for position, key in enumerate(keys):
                places.setdefault(key, (row, position))
            numbers.append(len(keys))
        self.keys, self.places = list(places), list(places.values())
        self.dataset, self.column = dataset, column
        self.is_tiled = [not tiles_single_images or numbers[row] == 1 for row, _ in self.places]
        self.encoded: Any = dataset.select_columns(column).with_format("arrow") if self.places else None
        self.feature: Any = dataset.features[column].feature if self.places else None

    def __len__(self):
        return len(self.places)

    def reference(self, index: int) -> Any:
        """An image or a video as it is stored."""
        row, position = self.places[index]
        return self.encoded[row][self.column][0][position].as_py()

    def __getitem__(self, index):
        row, _ = self.places[index]
        image = self.reference(index)
        try:
            return self.feature.decode_example(image)
        except Exception as error:  # decoders raise many kinds
            raise CacheError(f"Row {row}, {image['path']}: {one_line(error)}") from error


def check_cacheable(args: DecoArguments, training_args: DecoSFTConfig, model_args: ModelConfig) -> None:
    """Check that a run's features can be cached at all.

    Raises:
        CacheError: the run trains the vision tower, streams its data, or splits weights over processes.
    """
    if training_args.feature_cache is None:
        raise CacheError("No folder is named for the cache; set --feature_cache.")
    if "vision_tower" not in training_args.freeze and not model_args.use_peft:
        raise CacheError("The run trains the vision tower, so its features change. Add vision_tower to --freeze.")
    if args.streaming:
        raise CacheError("--feature_cache needs data on a disk; leave out --streaming.")
    if is_fsdp_enabled() or is_deepspeed_zero3_enabled():
        raise CacheError("Each process needs the whole tower. Launch with ddp.yaml, not with FSDP or ZeRO-3.")


def prepare_cache(
    model,
    processor,
    images: UniqueImages,
    training_args: DecoSFTConfig,
    names: list[str],
    cache_args: CacheArguments,
    cache_class: type[FeatureCache] = FeatureCache,
) -> tuple[FeatureCache, list[int]]:
    """Open the cache `training_args.feature_cache`, or create it. Every process of a launch must call it.

    Args:
        names: of the features to cache, from `cache_class.names_of_run`.
        cache_class: of the cache.

    Returns:
        The cache, and the numbers of the shards that are missing.

    Raises:
        CacheError: the folder has another cache or other files, or the disk is too small.
    """
    assert training_args.feature_cache is not None  # see check_cacheable
    if names != [PATCHES] and cache_class is FeatureCache:
        DecoCollator(processor).check_grids(images.dataset, [list(map(int, name.split("x"))) for name in names])

    def prepare() -> list[int]:
        shard_gigabytes = cache_args.shard_gigabytes
        cache = _open_or_create(model, processor, images, training_args, names, shard_gigabytes, cache_class)
        missing = [shard for shard, problem in enumerate(cache.problems().values()) if problem]
        _check_space(cache, missing)
        return missing

    try:  # by one process alone: a later look would find what others have written since
        missing = on_first_process(training_args, prepare)
    except ValueError as error:
        raise CacheError(str(error)) from None
    cache = cache_class(cache_class.place(Path(training_args.feature_cache)), model.config, names)
    cache.check(cache_class.fingerprint(model, processor, training_args))
    return cache, missing


def _open_or_create(
    model, processor, images, training_args, names, shard_gigabytes, cache_class: type[FeatureCache]
) -> FeatureCache:
    folder = cache_class.place(Path(training_args.feature_cache))
    cached_images = {"number": len(images), "xxh3_128": key_digest(images.keys)}
    found = cache_class.fingerprint(model, processor, training_args)
    if not (folder / MANIFEST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.suffix != INCOMPLETE and path.name != VIDEOS for path in folder.iterdir()):
            raise CacheError(f"--feature_cache {folder} contains other files; name an empty folder, or a new one.")
        if issubclass(cache_class, ViewCache):
            bytes_per_image = most_bytes(model, processor, names, training_args, cache_class)
        else:
            bytes_per_image = _bytes_per_image(model, names, training_args)
        manifest = {
            "fingerprint": found,
            "grids": names,
            "images": cached_images,
            "images_per_shard": max(1, int(shard_gigabytes * 1e9 / bytes_per_image)),
            "bytes_per_image": bytes_per_image,
        }
        if issubclass(cache_class, ViewCache):
            manifest |= {
                "tiles_single_images": cache_class is ViewCache and tiles_single_images(processor),
                "frames_per_token_grid": processor.frames_per_token_grid,
            }
        with staged_file(folder / MANIFEST) as incomplete:
            incomplete.write_text(json.dumps(manifest, indent=1) + "\n")
    cache = cache_class(folder, model.config, names)
    cache.check(found)
    if cache.manifest["images"] != cached_images:
        raise CacheError(
            f"--feature_cache {folder} is of other {cache.column}: it has {cache.manifest['images']['number']:,}, "
            f"these data have {len(images):,}. Name another folder, or remove it."
        )
    return cache


def _bytes_per_image(model, names, training_args) -> int:
    numbers = sum(math.prod(feature_shape(model.config, name)) for name in names)
    return numbers * feature_dtype(model, training_args).itemsize


def _check_space(cache: FeatureCache, missing: list[int]) -> None:
    if isinstance(cache, ViewCache):  # whose items have at most `bytes_per_image`
        return
    needed = sum(len(cache.images_of(shard)) for shard in missing) * cache.manifest["bytes_per_image"]
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise CacheError(
            f"--feature_cache {cache.folder} needs {needed / 1e9:,.1f} GB more, but only {free / 1e9:,.1f} GB are "
            f"free. Name a folder on a larger disk, or cache fewer or smaller grids."
        )


@torch.inference_mode()
def write_shards(
    cache: FeatureCache, missing: list[int], model, processor, images: UniqueImages, training_args: DecoSFTConfig
) -> None:
    """Compute this process's share of the missing shards, and wait for the other processes.

    The model loses its language model and its projector: nothing needs them, and they may fill the device.
    """
    shards = missing[training_args.process_index :: training_args.world_size]
    logger.info(
        f"{len(images):,} images, {cache.num_shards} shards, {cache.num_shards - len(missing)} of them complete; "
        f"process {training_args.process_index} computes {len(shards)}"
    )
    names, device = cache.manifest["grids"], training_args.device
    deco = model.base_model
    deco.language_model = None
    deco.multi_modal_projector = MultiGridPool(names, deco.config.patch_grid)
    deco.to(device).eval()
    dtype = feature_dtype(deco, training_args)
    tokens = [feature_shape(deco.config, name)[0] for name in names]
    batches = iter(_batches(cache, shards, processor, images, training_args))
    for shard in shards:
        numbers = cache.images_of(shard)
        features = {name: torch.empty(len(numbers), *feature_shape(deco.config, name), dtype=dtype) for name in names}
        done = 0
        while done < len(numbers):
            inputs = {name: value.to(device) for name, value in next(batches).items()}
            with torch.autocast(device.type, dtype, enabled=training_args.bf16 or training_args.fp16):
                pooled = torch.stack(deco.get_image_features(**inputs, return_dict=True).pooler_output)
            for name, part in zip(names, pooled.split(tokens, dim=1), strict=True):
                features[name][done : done + len(pooled)] = part
            done += len(pooled)
        tensors = features | {"keys": key_tensor(images.keys[numbers.start : numbers.stop])}
        with staged_file(cache.shards[shard]) as incomplete:
            save_file(tensors, incomplete, metadata={"cache": cache.mark})
    PartialState().wait_for_everyone()


def _batches(cache: FeatureCache, shards: list[int], processor, images: UniqueImages, training_args: DecoSFTConfig):
    """Processed images in batches, none of which has images of two shards."""
    batch_size = training_args.per_device_train_batch_size
    batches = [
        list(cache.images_of(shard)[start : start + batch_size])
        for shard in shards
        for start in range(0, len(cache.images_of(shard)), batch_size)
    ]
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=training_args.dataloader_num_workers,
        collate_fn=lambda images: dict(processor.image_processor(read_images(images), return_tensors="pt")),
    )
    return tqdm(loader, desc="images", unit="batch", disable=training_args.process_index != 0 or None)
