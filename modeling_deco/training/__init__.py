# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Train a DeCo with TRL: trainer, collator, data, and a cache of the vision tower's features."""

import lazy_loader

# The stub, `__init__.pyi`, lists the public names. The data can be read without TRL, which takes seconds to import.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
