# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Helpers that all parts of the package use: errors, files, programs, measurements."""
