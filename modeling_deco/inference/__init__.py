# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint, ask it, and know what an answer costs."""
