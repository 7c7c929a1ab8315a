# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes for conversions that are ended, or whose streams and memory are watched."""

import pytest
from fresh_process import FreshProcesses

MODULES = [
    "torch",
    "safetensors.torch",
    "modeling_deco",
    "modeling_deco.cli",
    "modeling_deco.conversion",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip",
]


@pytest.fixture(scope="session")
def fresh():
    """Forks a process for each call; everything that a conversion imports is imported once."""
    processes = FreshProcesses(modules=MODULES)
    yield processes
    processes.close()
