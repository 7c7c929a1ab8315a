# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Train a DeCo with TRL: trainer, collator, data, and a cache of the vision tower's features."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import CacheArguments, DecoArguments  # noqa: F401
    from .collator import DecoCollator, expand_images  # noqa: F401
    from .config import DecoSFTConfig  # noqa: F401
    from .data import DataError, build_data, load_data  # noqa: F401
    from .feature_cache import CacheError, FeatureCache  # noqa: F401
    from .trainer import DecoSFTTrainer  # noqa: F401

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
__all__ = [*_MODULE_OF]


def __getattr__(name: str):  # the data work without TRL, which takes seconds to import
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
