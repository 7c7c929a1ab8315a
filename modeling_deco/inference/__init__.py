# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint, ask it questions, and know what an answer costs."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..utils.decoding import ImageError  # noqa: F401
    from .costs import describe, kv_cache_bytes  # noqa: F401
    from .generation import encode, sampling, stream, stream_call, with_system  # noqa: F401
    from .images import read_image  # noqa: F401
    from .limits import ImageLimits  # noqa: F401
    from .loading import load, load_config, load_model, load_processor  # noqa: F401
    from .picture_reader import PictureReader  # noqa: F401
    from .prompt_cache import PromptCache  # noqa: F401
    from .quantization import quantize_to_int8  # noqa: F401

_MODULE_OF = {
    "ImageError": "..utils.decoding",
    "ImageLimits": ".limits",
    "PictureReader": ".picture_reader",
    "PromptCache": ".prompt_cache",
    "describe": ".costs",
    "encode": ".generation",
    "kv_cache_bytes": ".costs",
    "load": ".loading",
    "load_config": ".loading",
    "load_model": ".loading",
    "load_processor": ".loading",
    "quantize_to_int8": ".quantization",
    "read_image": ".images",
    "sampling": ".generation",
    "stream": ".generation",
    "stream_call": ".generation",
    "with_system": ".generation",
}
__all__ = [*_MODULE_OF]


def __getattr__(name: str):  # torch is loaded when a name is first used
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name], __name__), name)
