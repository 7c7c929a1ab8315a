# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Stand-in. `ConfigTester` sets these fields on configs without sub-configs only: DeCo has some."""

config_common_kwargs = {}
