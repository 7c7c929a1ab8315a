# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipes as modules, the shipped checkpoint, and a tower that has not been trained."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_deco import SHIPPED_CHECKPOINT

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="session")
def recipe():
    """`recipe("digits/train")`: the script as a module."""

    def load(name: str):
        spec = spec_from_file_location(f"recipe_{Path(name).name}", RECIPES / f"{name}.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shipped():
    """The shipped checkpoint's model and processor."""
    return (
        AutoModelForImageTextToText.from_pretrained(SHIPPED_CHECKPOINT),
        AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT),
    )


@pytest.fixture(scope="session")
def tower_dir(tmp_path_factory):
    from modeling_deco.worlds.digits.tower_model import build_tower

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tower")
    build_tower().save_pretrained(folder)
    return folder
