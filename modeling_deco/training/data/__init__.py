# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Training data: built from LLaVA-format JSON, and loaded from folders or from the Hub.

python -m modeling_deco.training.data llava.json --images images/ --out data/
"""

from .build import build_data
from .llava import DataError
from .load import load_data, repeat_and_shuffle

__all__ = ["DataError", "build_data", "load_data", "repeat_and_shuffle"]
