# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The features of a frozen vision tower, on a disk. `recipes/cache_features.py` writes them, the trainer reads them.

A cache is a folder of safetensors files and a `cache.json`, which has all that the features depend on: the weights and
the config of the tower, the image processor, the dtype. A shard has the features of some images, one tensor per grid,
such as `"12x12"`: `(images, 144, vision_hidden_size)`, or `"patches"` for projectors that read patches. It also has
the keys of the images. A key is a digest of the bytes of an image or, if the data have paths, of its path and size. So
the data may have other texts, another order and fewer images than the data for which the cache was written. Features
are read from the file by mmap.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from accelerate.utils import broadcast_object_list
from datasets import Dataset, List, Value
from safetensors import SafetensorError, safe_open
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .. import num_image_tokens
from ..configuration_deco import parse_grid
from ..pixels import NORMALIZATION
from ..views import largest_grid
from .data.media import MIME_TYPES

MANIFEST = "cache.json"
COMMAND = "python recipes/cache_features.py"
PATCHES = "patches"  # the name of features that are not pooled
_IRRELEVANT = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # fields of a tower's config


class CacheError(ValueError):
    """Features cannot be cached, or a cache does not fit the run. The message is one line that says what to do."""


def grid_name(pooled_grid_size) -> str:
    """The name of a grid's features, such as `"12x12"`."""
    rows, cols = parse_grid(pooled_grid_size)
    return f"{rows}x{cols}"


def grids_of_run(model, processor, args, evaluates: bool) -> list[str]:
    """The names of the features that a run reads."""
    if model.config.projector_type != "avg_pool":
        return [PATCHES]
    grids = list(args.pooled_grid_sizes or ())
    grids += [largest_grid(model.config.patch_grid, most, num_image_tokens) for most in args.max_image_tokens or ()]
    if evaluates or not grids:
        grids.append(processor.pooled_grid_size)
    if args.distill is not None:  # the teacher's
        grids.append(model.config.patch_grid)
    return list(dict.fromkeys(map(grid_name, grids)))


def fingerprint(model, processor, args, image_processor=None) -> dict[str, Any]:
    """All that features depend on except the images, as JSON values. Dropout is not among it: a frozen tower has none.

    Args:
        image_processor: what prepares the images. Default: the processor's.
    """
    tower = model.base_model.vision_tower
    config = model.config.vision_config.to_diff_dict()
    image_processor = image_processor or processor.image_processor
    weights_dtype = next(tower.parameters()).dtype
    parts = {
        "dtype": {"of the tower": str(weights_dtype), "of the features": str(feature_dtype(model, args))},
        "vision tower": {name: value for name, value in config.items() if name not in _IRRELEVANT}
        | {"weights": _digest(tower)},
        # PIL and torchvision resize differently, but to_dict() has the same name for both
        "image preprocessing": json.loads(image_processor.to_json_string())
        | {"type": type(image_processor).__name__, "normalization": NORMALIZATION},
    }
    if model.config.vision_position_embedding is not None:
        parts["vision tower"]["position embedding"] = model.config.vision_position_embedding
    return json.loads(json.dumps(parts))


def feature_dtype(model, args) -> torch.dtype:
    """The dtype of autocast, to which the first linear layer casts its input, or else the tower's."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return next(model.base_model.vision_tower.parameters()).dtype


def feature_shape(config, name: str) -> tuple[int, int]:
    """`(tokens, vision_hidden_size)` of the features of one image."""
    grid = config.patch_grid if name == PATCHES else tuple(map(int, name.split("x")))
    return num_image_tokens(grid), config.vision_hidden_size


def _digest(module: torch.nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def image_keys(dataset: Dataset, column: str = "images", tiles_single_images: bool = False) -> list[list[bytes]]:
    """The key, 16 bytes, of each image, or video, of each row.

    Args:
        column: `"images"` or `"videos"`.
        tiles_single_images: whether an image has other features, and so another key, if its row has several.

    Raises:
        CacheError: a file cannot be read, or the data set is streamed or has a custom transform.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        raise CacheError(
            "--feature_cache needs data on a disk, with images that do not change. Leave out --streaming, or remove "
            "the custom transform."
        )
    keys = []
    if column not in dataset.column_names:
        return [[] for _ in range(len(dataset))]
    for table in dataset.select_columns(column).with_format("arrow").iter(1000):
        keys += [[_key(file) for file in files or ()] for files in table[column].to_pylist()]
    if tiles_single_images:
        keys = [[_of_several(key) for key in row] if len(row) > 1 else row for row in keys]
    return keys


def _of_several(key: bytes) -> bytes:
    return xxhash.xxh3_128_digest(b"of several " + key)


def _key(image: Any) -> bytes:
    if isinstance(image, list):  # the frames of a video
        return xxhash.xxh3_128_digest(b"".join(map(_key, image)))
    if image["bytes"] is not None:
        return xxhash.xxh3_128_digest(image["bytes"])
    try:
        return xxhash.xxh3_128_digest(f"{Path(image['path']).stat().st_size} {image['path']}".encode())
    except OSError as error:
        kind = "video" if str(MIME_TYPES.guess_type(image["path"])[0]).startswith("video/") else "image"
        raise CacheError(f"The {kind} {image['path']} of the data cannot be read: {error.strerror}.") from None


@dataclass
class FeatureCache:
    """A cache that a run reads.

    Args:
        folder: of the cache.
        config: the model's.
        names: of the features that are read.

    Raises:
        CacheError: the folder has no cache, or its cache has no features of these names.
    """

    folder: Path
    config: Any
    names: list[str]
    manifest: dict[str, Any] = field(init=False)

    column: ClassVar[str] = "images"  # of the data

    def __post_init__(self):
        self._files = {}
        self.manifest = read_manifest(self.folder)
        lacking = [name for name in self.names if name not in self.manifest["grids"]]
        if lacking:
            raise CacheError(
                f"--feature_cache {self.folder} has the grids {', '.join(self.manifest['grids'])}, but not "
                f"{', '.join(lacking)}. Write one with all grids in another folder, with `{COMMAND}`."
            )

    @classmethod
    def of_run(cls, model, processor, args, evaluates: bool) -> "FeatureCache":
        """Open the cache `args.feature_cache`, and check that it has the features that this run would compute.

        Raises:
            CacheError: its features are others, or a shard is missing, broken or of another cache.
        """
        if is_deepspeed_zero3_enabled():
            raise CacheError(
                "--feature_cache compares the weights of the tower, which ZeRO-3 splits. Use DDP or FSDP2."
            )
        folder = cls.place(Path(args.feature_cache))
        cache = cls(folder, model.config, cls.names_of_run(model, processor, args, evaluates))
        # the first process computes it, because under FSDP the others may have no weights yet
        found = [cls.fingerprint(model, processor, args) if args.process_index == 0 else None]
        cache.check(broadcast_object_list(found)[0])
        problems = {path.name: problem for path, problem in cache.problems().items() if problem}
        if problems:
            name, problem = next(iter(problems.items()))
            raise CacheError(
                f"--feature_cache {cache.folder} lacks {len(problems)} of {cache.num_shards} shards ({name}: "
                f"{problem}). Run `{COMMAND}` with the arguments of this run; it computes what is missing."
            )
        return cache

    @classmethod
    def place(cls, folder: Path) -> Path:
        """The folder of this cache, from that of `--feature_cache`."""
        return folder

    @classmethod
    def names_of_run(cls, model, processor, args, evaluates: bool) -> list[str]:
        """The names of the features that a run reads."""
        return grids_of_run(model, processor, args, evaluates)

    @classmethod
    def fingerprint(cls, model, processor, args) -> dict[str, Any]:
        """All that the features depend on, except the files."""
        return fingerprint(model, processor, args)

    def shapes(self, file, num_items: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of an open shard."""
        shapes: dict[str, tuple[int, ...]] = {
            name: (num_items, *feature_shape(self.config, name)) for name in self.manifest["grids"]
        }
        return shapes | {"keys": (num_items, 16)}

    def check(self, expected: dict[str, Any]) -> None:
        """Compare the fingerprint with the cache's. A CacheError names the first difference."""
        for part, fields in expected.items():
            cached = self.manifest["fingerprint"].get(part, {})
            for name in sorted(fields.keys() | cached.keys()):
                if fields.get(name) != cached.get(name):
                    raise CacheError(
                        f"--feature_cache {self.folder} is stale: {part}, {name} is {cached.get(name)!r} there and "
                        f"{fields.get(name)!r} in this run. Write one in another folder with `{COMMAND}` and the "
                        f"arguments of this run, or leave out --feature_cache."
                    )

    # --- shards ------------------------------------------------------------------------------------------------------

    @property
    def num_shards(self) -> int:
        return math.ceil(self.manifest["images"]["number"] / self.manifest["images_per_shard"])

    @property
    def shards(self) -> list[Path]:
        return [
            self.folder / f"features-{shard:05d}-of-{self.num_shards:05d}.safetensors"
            for shard in range(self.num_shards)
        ]

    def images_of(self, shard: int) -> range:
        """The numbers of the images of a shard."""
        first = shard * self.manifest["images_per_shard"]
        return range(first, min(first + self.manifest["images_per_shard"], self.manifest["images"]["number"]))

    @property
    def mark(self) -> str:
        """A digest that all shards of this cache have in their metadata, and shards of another cache do not."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.manifest, sort_keys=True).encode())

    def problems(self) -> dict[Path, str]:
        """For each shard what is wrong with it, or an empty text. The values of features are not read."""
        return {path: self._problem(path, len(self.images_of(shard))) for shard, path in enumerate(self.shards)}

    def _problem(self, path: Path, num_images: int) -> str:
        try:
            with safe_open(path, "pt") as file:  # compares the header with the length of the file
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                is_ours = (file.metadata() or {}).get("cache") == self.mark
                is_whole = is_ours and shapes == self.shapes(file, num_images)
        except FileNotFoundError:
            return "missing"
        except (OSError, SafetensorError) as error:
            return f"broken, {error}"
        return "" if is_whole else "of another cache"

    def _open(self, shard: int):
        if shard not in self._files:
            self._files[shard] = safe_open(self.shards[shard], "pt")
        return self._files[shard]

    def __getstate__(self):
        return self.__dict__ | {"_files": {}}  # each process opens the files itself

    # --- what training reads -----------------------------------------------------------------------------------------

    def refer(self, dataset: Dataset) -> Dataset:
        """The data set with the numbers of cached images (or videos) in place of them, so that none is decoded.

        Raises:
            CacheError: some are not in the cache; the message has their number and the first sample with one.
        """
        if self.column not in dataset.column_names:
            return dataset
        numbers: dict[bytes, int] = {}
        for shard in range(self.num_shards):
            keys = self._open(shard).get_tensor("keys").numpy()
            numbers |= {key.tobytes(): number for key, number in zip(keys, self.images_of(shard), strict=True)}
        keys = image_keys(dataset, self.column, self.manifest.get("tiles_single_images", False))
        lacking = {key: row for row, keys_of_row in enumerate(keys) for key in keys_of_row if key not in numbers}
        if lacking:
            row = min(lacking.values())
            name = dataset[row]["id"] if "id" in dataset.column_names else f"row {row}"
            raise CacheError(
                f"--feature_cache {self.folder} lacks {len(lacking)} {self.column} of these data; the first is in "
                f"sample {name!r}. Write a cache of these data in another folder with `{COMMAND}`."
            )
        references = [[numbers[key] for key in keys_of_row] for keys_of_row in keys]
        return dataset.remove_columns(self.column).add_column(self.column, references, feature=List(Value("int64")))

    def read(self, images: list[int]) -> dict[str, torch.Tensor]:
        """The features `(images, tokens, vision_hidden_size)` by grid. Without images, zeros for one blank image."""
        if not images:
            return {PATCHES: torch.zeros(1, *feature_shape(self.config, PATCHES))}
        places = [divmod(image, self.manifest["images_per_shard"]) for image in images]
        return {
            name: torch.stack([self._open(shard).get_slice(name)[row] for shard, row in places]) for name in self.names
        }

    def sizes(self, items: list[int]) -> list[tuple[int, ...]]:
        """`(height, width, ...)` of cached images, or as many places if all have one view."""
        return [(0, 0)] * len(items)

    def image_inputs(self, images: list[int], num_images: list[int]) -> dict[str, Any]:
        """What the collator adds to a batch.

        Args:
            images: numbers of cached images.
            num_images: of each sample.
        """
        return {"patch_features": self.read(images)}


@contextmanager
def features_as_pixels(model) -> Iterator[None]:
    """Inside this context, a model takes cached features as its `pixel_values`.

    They are `(images, tokens, vision_hidden_size)`: of the patch grid or, if the projector is `"avg_pool"`, pooled to
    the grid of the call, the same for all images. Those of images of several views and of videos are what the
    projector gets of all maps, `(rows, vision_hidden_size)`. The projector still runs within the model's `forward`, as
    DDP and FSDP2 need.

    Args:
        model: a `DecoModel`.
    """

    def get_image_features(
        pixel_values, pooled_grid_sizes=None, *args, image_sizes=None, batch_num_images=None, **kwargs
    ) -> BaseModelOutputWithPooling:
        if image_sizes is not None:
            maps = model.image_maps(pooled_grid_sizes, None, None, image_sizes, batch_num_images)
            return BaseModelOutputWithPooling(pooler_output=model.project_pooled(pixel_values, maps))
        grid = model.config.patch_grid
        is_pooled = pixel_values.shape[1] != num_image_tokens(grid)
        if is_pooled and model.config.projector_type == "avg_pool":  # the others refuse pooled features
            grid = model.config.pooled_grid if pooled_grid_sizes is None else tuple(pooled_grid_sizes[0].tolist())
        features = model.project_features(pixel_values, grid, pooled_grid_sizes)
        return BaseModelOutputWithPooling(pooler_output=features)

    def patch_grids(pixel_values=None, spatial_shapes=None) -> tuple[int, int]:
        return model.config.patch_grid

    def get_video_features(pixel_values_videos, pooled_video_sizes, **kwargs) -> BaseModelOutputWithPooling:
        maps = video_maps(pooled_video_sizes)
        return BaseModelOutputWithPooling(pooler_output=model.project_pooled(pixel_values_videos, maps))

    video_maps = model.video_maps
    model.get_image_features, model.patch_grids = get_image_features, patch_grids
    model.get_video_features = get_video_features
    model.video_maps = lambda sizes=None, pixel_values_videos=None: video_maps(sizes)
    try:
        yield
    finally:  # of this instance; the class keeps its own
        del model.get_image_features, model.patch_grids, model.get_video_features, model.video_maps


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CacheError(
            f"--feature_cache {folder} has no {MANIFEST} of cached features. Write them with `{COMMAND}` and the "
            f"arguments of this run."
        ) from None


def key_digest(keys: list[bytes]) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(keys))


def key_tensor(keys: list[bytes]) -> torch.Tensor:
    """The keys as a tensor `(images, 16)`, as a shard has them."""
    return torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16).copy())
