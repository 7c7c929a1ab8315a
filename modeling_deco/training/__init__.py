# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Train a DeCo with TRL: trainer, collator, data, and a cache of the vision tower's features."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import CacheArguments, DecoArguments
    from .collator import DecoCollator, expand_images
    from .config import DecoSFTConfig
    from .data import DataError, build_data, load_data
    from .feature_cache import CacheError, FeatureCache
    from .trainer import DecoSFTTrainer

_MODULE_OF = {
    "CacheArguments": "arguments",
    "CacheError": "feature_cache",
    "DataError": "data",
    "DecoArguments": "arguments",
    "DecoCollator": "collator",
    "DecoSFTConfig": "config",
    "DecoSFTTrainer": "trainer",
    "FeatureCache": "feature_cache",
    "build_data": "data",
    "expand_images": "collator",
    "load_data": "data",
}


def __getattr__(name: str):  # the data work without TRL, which takes seconds to import
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


__all__ = [
    "CacheArguments",
    "CacheError",
    "DataError",
    "DecoArguments",
    "DecoCollator",
    "DecoSFTConfig",
    "DecoSFTTrainer",
    "FeatureCache",
    "build_data",
    "expand_images",
    "load_data",
]
