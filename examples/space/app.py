# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page as a Hub Space. Its variable MODEL_ID names the model; without it the shipped one answers. With the secret
DECO_PASSWORD users must enter that."""

import os

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.page.app import launch

if __name__ == "__main__":
    password = os.environ.get("DECO_PASSWORD") or None
    launch(os.environ.get("MODEL_ID") or str(SHIPPED_CHECKPOINT), host="0.0.0.0", password=password)
