# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo vision-language models for Transformers.

`import modeling_deco` registers DeCo with AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
and AutoProcessor.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ._registration import register_with_auto_classes

if TYPE_CHECKING:
    from .configuration_deco import DecoConfig, num_image_tokens
    from .modeling_deco import DecoForConditionalGeneration, DecoModel, DecoPreTrainedModel
    from .processing_deco import DecoProcessor
    from .projectors import (
        AvgPoolProjector,
        CAbstractorProjector,
        DAbstractorProjector,
        MlpProjector,
        QFormerProjector,
        ResamplerProjector,
        pool_patch_grid,
    )
    from .relevance.explain import Relevance, explain, plot_relevance

__version__ = "0.1.0"

# A small DeCo that was trained on handwritten digits (MODEL_CARD.md): what commands use when no model is named.
SHIPPED_CHECKPOINT = Path(__file__).with_name("checkpoints") / "deco-digits"

_MODULE_OF = {
    "AvgPoolProjector": "projectors",
    "CAbstractorProjector": "projectors",
    "DAbstractorProjector": "projectors",
    "DecoConfig": "configuration_deco",
    "DecoForConditionalGeneration": "modeling_deco",
    "DecoModel": "modeling_deco",
    "DecoPreTrainedModel": "modeling_deco",
    "DecoProcessor": "processing_deco",
    "MlpProjector": "projectors",
    "QFormerProjector": "projectors",
    "Relevance": "relevance.explain",
    "ResamplerProjector": "projectors",
    "explain": "relevance.explain",
    "num_image_tokens": "configuration_deco",
    "plot_relevance": "relevance.explain",
    "pool_patch_grid": "projectors",
}


def __getattr__(name: str):  # torch is loaded when a class is first asked for, as in transformers
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_MODULE_OF})


register_with_auto_classes()

__all__ = [
    "SHIPPED_CHECKPOINT",
    "AvgPoolProjector",
    "CAbstractorProjector",
    "DAbstractorProjector",
    "DecoConfig",
    "DecoForConditionalGeneration",
    "DecoModel",
    "DecoPreTrainedModel",
    "DecoProcessor",
    "MlpProjector",
    "QFormerProjector",
    "Relevance",
    "ResamplerProjector",
    "explain",
    "num_image_tokens",
    "plot_relevance",
    "pool_patch_grid",
]
