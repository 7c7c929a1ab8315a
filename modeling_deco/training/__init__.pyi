# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
# The public names of modeling_deco.training.

from .arguments import CacheArguments as CacheArguments
from .arguments import DecoArguments as DecoArguments
from .collator import DecoCollator as DecoCollator
from .collator import expand_images as expand_images
from .config import DecoSFTConfig as DecoSFTConfig
from .data import DataError as DataError
from .data import build_data as build_data
from .data import load_data as load_data
from .feature_cache import CacheError as CacheError
from .feature_cache import FeatureCache as FeatureCache
from .trainer import DecoSFTTrainer as DecoSFTTrainer
