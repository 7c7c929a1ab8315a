# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated data sets with known answers."""
