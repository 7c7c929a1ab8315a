# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page as a Hub Space.

The variable MODEL_ID names the model; default: that of `deco page`. If the secret DECO_PASSWORD is set, users must
enter it.
"""

import os

from modeling_deco.page import launch

if __name__ == "__main__":
    password = os.environ.get("DECO_PASSWORD") or None
    launch(os.environ.get("MODEL_ID") or None, host="0.0.0.0", password=password)
