# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The `tests` package of transformers: what its source distribution has of it, and here stand-ins for the helpers that
the suites import and the distribution leaves out."""

from fetch import SUITES

if not SUITES.exists():
    raise ImportError(f"{SUITES} does not exist; run python tests/common/fetch.py.")

__path__.append(str(SUITES))
