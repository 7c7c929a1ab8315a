# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Which patches of an image the words of an answer rest on."""

from .explain import Relevance, explain
from .figure import plot_relevance

__all__ = ["Relevance", "explain", "plot_relevance"]
