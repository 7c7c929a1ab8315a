# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a frozen vision tower over all images once, and keep its pooled features for training.

    accelerate launch recipes/cache_features.py --config recipes/configs/stage1.yaml \
        --data_path blip558k --vision_model_name_or_path openai/clip-vit-large-patch14-336 \
        --model_name_or_path lmsys/vicuna-7b-v1.5 --feature_cache features --pooled_grid_sizes 6 12 24

The arguments are those of the run of `recipes/sft.py` that reads the cache, which tell what its features depend on.
All grids come from one pass of the tower; without `--pooled_grid_sizes` it is the model's. Processes share the images,
shard by shard, each with the whole tower. A run that was killed goes on at the shards that are missing.
"""

import json
import logging
import math
import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from trl import ModelConfig, TrlParser

from ..processing_deco import read_images
from ..projectors import pool_patch_grid
from ..utils.errors import one_line
from ..utils.script import run
from .collator import DecoCollator
from .data import load_data
from .feature_cache import (
    MANIFEST,
    PATCHES,
    CacheError,
    FeatureCache,
    feature_dtype,
    feature_shape,
    fingerprint,
    grids_of_run,
    image_keys,
    key_digest,
    key_tensor,
)
from .sft import DecoArguments, load
from .trainer import DecoSFTConfig

logger = logging.getLogger(__name__)

INCOMPLETE = ".incomplete"  # the suffix of a file until it is whole


@dataclass
class CacheArguments:
    """Of the cache alone."""

    shard_gigabytes: float = field(
        default=1.0, metadata={"help": "Size of a shard; each process holds one in memory, and loses one when killed."}
    )


class PoolToAll(torch.nn.Module):
    """Stands in a projector's place: pools to each grid, and projects nothing."""

    def __init__(self, names: list[str], patch_grid: tuple[int, int]):
        super().__init__()
        self.names, self.patch_grid = names, patch_grid

    def forward(self, patch_features, patch_grid, pooled_grid):
        if self.names == [PATCHES]:
            if tuple(patch_grid) != self.patch_grid:
                raise CacheError(
                    f"An image has {patch_grid[0]} x {patch_grid[1]} patches, not {self.patch_grid[0]} x "
                    f"{self.patch_grid[1]}, and the projector reads patches: only avg_pool's features can be cached."
                )
            return patch_features
        grids = [tuple(map(int, name.split("x"))) for name in self.names]
        return torch.cat([pool_patch_grid(patch_features, patch_grid, grid) for grid in grids], dim=1)


class Images(torch.utils.data.Dataset):
    """The images of a data set, decoded as the data set does, by `(row, position)`."""

    def __init__(self, dataset, places: list[tuple[int, int]]):
        self.feature = dataset.features["images"].feature
        self.dataset = dataset.select_columns("images").with_format("arrow")
        self.places = places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        row, position = self.places[index]
        image = self.dataset[row]["images"][0][position].as_py()
        try:
            return self.feature.decode_example(image)
        except Exception as error:  # of many kinds, by decoders
            raise CacheError(f"Row {row}, {image['path']}: {one_line(error)}") from error


def cache_features(
    args: DecoArguments, training_args: DecoSFTConfig, model_args: ModelConfig, cache_args: CacheArguments
) -> FeatureCache:
    """Write what is missing of the cache `training_args.feature_cache`; every process of a launch calls it.

    Raises:
        CacheError: the run does not train on fixed features, the folder holds another cache, or the disk is too small.
    """
    if training_args.feature_cache is None:
        raise CacheError("Name the folder of the cache: --feature_cache.")
    if "vision_tower" not in training_args.freeze and not model_args.use_peft:
        raise CacheError("The run trains the vision tower, whose features change: only a frozen one has a cache.")
    if args.streaming:
        raise CacheError("--feature_cache is for data on a disk: not with --streaming.")
    if is_fsdp_enabled() or is_deepspeed_zero3_enabled():
        raise CacheError("Each process needs the whole tower: launch with ddp.yaml, not with FSDP or ZeRO-3.")
    model, processor = load(args, model_args)
    dataset = load_data([*args.data_path, *(args.eval_data_path or ())])
    names = grids_of_run(model, processor, training_args, evaluates=args.eval_data_path is not None)
    if names != [PATCHES]:
        DecoCollator(processor).check_grids(dataset, [list(map(int, name.split("x"))) for name in names])
    places = {}
    for row, keys in enumerate(image_keys(dataset)):
        for position, key in enumerate(keys):
            places.setdefault(key, (row, position))
    keys, places = list(places), list(places.values())

    error = missing = None
    if training_args.process_index == 0:
        try:
            cache = _prepare(model, processor, training_args, names, keys, cache_args.shard_gigabytes)
            missing = [shard for shard, problem in enumerate(cache.problems().values()) if problem]
            _check_space(cache, missing)
        except (CacheError, OSError) as failure:
            error = one_line(failure)
    error, missing = broadcast_object_list([error, missing])  # a later look would find what others have written since
    if error is not None:
        raise CacheError(error)
    cache = FeatureCache(Path(training_args.feature_cache), model.config, names)
    cache.check(fingerprint(model, processor, training_args))
    mine = missing[training_args.process_index :: training_args.world_size]
    logger.info(
        f"{len(keys):,} images, {cache.num_shards} shards, {cache.num_shards - len(missing)} of them there already; "
        f"process {training_args.process_index} computes {len(mine)}"
    )
    _write_shards(cache, mine, model, processor, Images(dataset, places), keys, training_args)
    PartialState().wait_for_everyone()
    return cache


def _prepare(model, processor, training_args, names, keys, shard_gigabytes) -> FeatureCache:
    """The cache in the folder, which is begun where there is none."""
    folder = Path(training_args.feature_cache)
    images = {"number": len(keys), "xxh3_128": key_digest(keys)}
    found = fingerprint(model, processor, training_args)
    if not (folder / MANIFEST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.suffix != INCOMPLETE for path in folder.iterdir()):
            raise CacheError(f"--feature_cache {folder} has other files in it: name an empty folder, or a new one.")
        bytes_per_image = _bytes_per_image(model, names, training_args)
        manifest = {
            "fingerprint": found,
            "grids": names,
            "images": images,
            "images_per_shard": max(1, int(shard_gigabytes * 1e9 / bytes_per_image)),
            "bytes_per_image": bytes_per_image,
        }
        _replace(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n"))
    cache = FeatureCache(folder, model.config, names)
    cache.check(found)
    if cache.manifest["images"] != images:
        raise CacheError(
            f"--feature_cache {folder} is of other images, {cache.manifest['images']['number']:,} of them; these data "
            f"have {len(keys):,}. Name another folder, or remove it."
        )
    return cache


def _bytes_per_image(model, names, training_args) -> int:
    numbers = sum(math.prod(feature_shape(model.config, name)) for name in names)
    return numbers * feature_dtype(model, training_args).itemsize


def _check_space(cache: FeatureCache, missing: list[int]) -> None:
    needed = sum(len(cache.images_of(shard)) for shard in missing) * cache.manifest["bytes_per_image"]
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise CacheError(
            f"--feature_cache {cache.folder} needs {needed / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free: "
            f"name a folder on a larger disk, or fewer or smaller grids."
        )


@torch.inference_mode()
def _write_shards(cache: FeatureCache, shards: list[int], model, processor, images, keys, training_args) -> None:
    names, device = cache.manifest["grids"], training_args.device
    deco = model.base_model
    deco.language_model = None  # nothing reads it, and it may fill the device
    deco.multi_modal_projector = PoolToAll(names, deco.config.patch_grid)
    deco.to(device).eval()
    autocast_dtype = feature_dtype(deco, training_args)
    tokens = [feature_shape(deco.config, name)[0] for name in names]

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
    batches = iter(tqdm(loader, desc="images", unit="batch", disable=training_args.process_index != 0 or None))
    for shard in shards:
        numbers = cache.images_of(shard)
        features = {
            name: torch.empty(len(numbers), *feature_shape(deco.config, name), dtype=autocast_dtype) for name in names
        }
        done = 0
        while done < len(numbers):
            inputs = {name: value.to(device) for name, value in next(batches).items()}
            with torch.autocast(device.type, autocast_dtype, enabled=training_args.bf16 or training_args.fp16):
                pooled = torch.stack(deco.get_image_features(**inputs, return_dict=True).pooler_output)
            for name, part in zip(names, pooled.split(tokens, dim=1), strict=True):
                features[name][done : done + len(pooled)] = part
            done += len(pooled)
        tensors = features | {"keys": key_tensor(keys[numbers.start : numbers.stop])}
        _replace(cache.shards[shard], partial(save_file, tensors, metadata={"cache": cache.mark}))


def _replace(path: Path, write) -> None:
    """`write` a file that appears when it is whole."""
    staged = path.with_name(path.name + INCOMPLETE)
    try:
        write(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def main(words: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments))
    run("cache_features", lambda: cache_features(*parser.parse_args_and_config(words)))
