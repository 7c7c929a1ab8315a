# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page of `deco page` and of a Hub Space: ask about an image at any token budget, and see which patches each word
of the answer is based on.

Once the model is loaded, neither the server nor the browser sends requests to other hosts.
"""

try:
    import gradio  # noqa: F401
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(f'The page needs {error.name}: pip install ".[page]" in a clone of modeling-deco') from None

from .app import build_app
from .layout import build_page
from .server import launch

__all__ = ["build_app", "build_page", "launch"]
