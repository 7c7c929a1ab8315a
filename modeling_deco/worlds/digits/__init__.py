# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of handwritten digits, questions with exact answers, and the models that are trained on them."""
