# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The `tests` package of transformers: the modules of its source distribution, and here replacements of the helper
modules that the suites import but the distribution does not have."""

from fetch import SUITES

if not SUITES.exists():
    raise ImportError(f"{SUITES} does not exist; run python tests/common/fetch.py.")

__path__.append(str(SUITES))
