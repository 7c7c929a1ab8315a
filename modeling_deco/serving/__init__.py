# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""An HTTP server with the interface of OpenAI."""
