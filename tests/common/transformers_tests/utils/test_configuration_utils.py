# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Replacement. `ConfigTester` sets these fields only on configs without sub-configs, and DeCo has sub-configs."""

config_common_kwargs = {}
