# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits on a background: pictures, questions and their answers."""
