# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What the words of an answer rest on: relevance of image patches."""
