# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The columns that training data have: their names, and the types in which the package writes them."""

from datasets import Features, List, Value
from datasets import Image as ImageFeature

IMAGE_TAG = "<image>"
CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")
COLUMNS = ("id", *CONVERSATIONS, "image", "images")  # what is read from a row
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features({"id": Value("string"), "images": List(ImageFeature()), "messages": MESSAGES})
