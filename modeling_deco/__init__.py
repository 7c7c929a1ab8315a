# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo vision-language models for Transformers.

`import modeling_deco` registers DeCo with AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
and AutoProcessor.
"""

import ast
from importlib import import_module
from pathlib import Path

from ._registration import register_with_auto_classes

__version__ = "0.1.0"

# A small DeCo that was trained on handwritten digits (MODEL_CARD.md). Commands use it when no model is named.
SHIPPED_CHECKPOINT = Path(__file__).with_name("checkpoints") / "deco-digits"

# The stub, `__init__.pyi`, is the one list of public names: type checkers read it, and so does `__getattr__`.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_IMPORTS = [node for node in _STUB.body if isinstance(node, ast.ImportFrom) and node.level == 1]
_MODULE_OF = {alias.name: node.module for node in _IMPORTS for alias in node.names}

__all__ = ["SHIPPED_CHECKPOINT", *_MODULE_OF]


def __getattr__(name: str):  # torch is imported when a class is first used, as in transformers
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_MODULE_OF})


register_with_auto_classes()
