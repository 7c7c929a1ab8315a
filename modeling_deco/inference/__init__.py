# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint, ask it questions, and know what an answer costs."""

import lazy_loader

# The stub, `__init__.pyi`, lists the public names. torch is imported when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
