# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Train a DeCo with TRL."""
