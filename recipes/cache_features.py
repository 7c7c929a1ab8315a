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

from modeling_deco.training.cache_features import main

if __name__ == "__main__":
    main()
