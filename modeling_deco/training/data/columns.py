# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The columns that training data have: their names, and the types in which the package writes them."""

from datasets import Features, List, Value, Video
from datasets import Image as ImageFeature

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")
COLUMNS = ("id", *CONVERSATIONS, "image", "images", "video", "videos")  # what is read from a row
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features({"id": Value("string"), "images": List(ImageFeature()), "messages": MESSAGES})
VIDEOS = List(Video(decode=False))  # `{"bytes": ..., "path": ...}`; datasets would decode them with torchcodec
FEATURES_WITH_VIDEOS = Features({**FEATURES, "videos": VIDEOS})
