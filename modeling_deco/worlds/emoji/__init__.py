# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A world of everyday things, drawn by several artists: scenes, questions, training and evaluation."""
