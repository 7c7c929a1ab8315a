# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Plug-ins that let other programs run DeCo."""
