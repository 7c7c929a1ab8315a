# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo vision-language models for Transformers.

`import modeling_deco` registers DeCo with AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
and AutoProcessor.
"""

from pathlib import Path

import lazy_loader

from ._registration import register_with_auto_classes

__version__ = "0.1.0"

# A small DeCo that was trained on handwritten digits (MODEL_CARD.md). Commands that name no model use it where
# `everyday_checkpoint()` is not available.
SHIPPED_CHECKPOINT = Path(__file__).with_name("checkpoints") / "deco-digits"

# The stub, `__init__.pyi`, lists the public names. torch is imported when one of them is first used.
__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["SHIPPED_CHECKPOINT", *__all__]


def __dir__():
    return __all__


register_with_auto_classes()
