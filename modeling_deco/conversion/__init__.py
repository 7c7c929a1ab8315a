# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA checkpoints to DeCo checkpoints, and back."""

from ..utils.errors import InputError
from .convert import convert
from .export import export

__all__ = ["InputError", "convert", "export"]
