# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's own answers about pictures, as training data.

python -m modeling_deco.training.answer --model deco-7b --images photos/ --out data/own
"""

import lazy_loader

# The stub, `__init__.pyi`, lists the public names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
