# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page as a Hub Space. Its variable MODEL_ID names the model; without it the shipped one answers."""

import os

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.page import launch

if __name__ == "__main__":
    launch(os.environ.get("MODEL_ID") or str(SHIPPED_CHECKPOINT), host="0.0.0.0")
