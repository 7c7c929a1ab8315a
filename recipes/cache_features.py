# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["modeling-deco[train]"]
# ///
"""Run a frozen vision tower over all images and videos once, and keep its pooled features for training.

    accelerate launch recipes/cache_features.py --config recipes/configs/stage1.yaml \
        --data_path blip558k --vision_model_name_or_path openai/clip-vit-large-patch14-336 \
        --model_name_or_path lmsys/vicuna-7b-v1.5 --feature_cache features --pooled_grid_sizes 6 12 24

Give it the arguments of the run of `recipes/sft.py` that reads the cache: the features depend on them. All grids come
from one pass of the tower; without `--pooled_grid_sizes`, the model's own grid is cached. The processes of a launch
share the images shard by shard, each with the whole tower. Run it again after it was killed: it computes the shards
that are missing. Features of videos, pooled to `--pooled_video_grid_sizes`, are in the folder `videos` of the cache.
"""

import logging

from trl import ModelConfig, TrlParser

from modeling_deco.training import CacheArguments, DecoArguments, DecoSFTConfig, FeatureCache
from modeling_deco.training.data import load_data
from modeling_deco.training.feature_cache_maps_writer import write_caches
from modeling_deco.training.feature_cache_writer import check_cacheable
from modeling_deco.training.models import load_model_and_processor
from modeling_deco.utils.script import run


def main(
    args: DecoArguments, training_args: DecoSFTConfig, model_args: ModelConfig, cache_args: CacheArguments
) -> FeatureCache:
    check_cacheable(args, training_args, model_args)

    # Model
    model, processor = load_model_and_processor(args, model_args)

    # Dataset
    dataset = load_data([*args.data_path, *(args.eval_data_path or ())])

    # Features
    return write_caches(
        model, processor, dataset, training_args, cache_args, evaluates=args.eval_data_path is not None
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments))
    run("cache_features", lambda: main(*parser.parse_args_and_config()))
