# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What other programs need to run DeCo."""
