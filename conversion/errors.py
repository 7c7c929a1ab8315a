# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0


class ConversionError(ValueError):
    """A checkpoint cannot be converted. The message is one line that names the thing, its value and what to do."""
