# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipes as modules, the shipped checkpoint, and a tower that has not been trained."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
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


@pytest.fixture
def drawn_art(tmp_path, monkeypatch):
    """An art folder in which every set shows every concept as an ellipse."""
    pytest.importorskip("sklearn")
    from modeling_deco.worlds.emoji import art
    from modeling_deco.worlds.emoji.concepts import CONCEPTS

    for name in (name for names in art.SETS.values() for name in names):
        folder = tmp_path / "art" / name
        folder.mkdir(parents=True)
        for number, concept in enumerate(CONCEPTS.values()):
            image = Image.new("RGBA", (64, 64))
            fill = (number % 256, 40, 200, 255)
            ImageDraw.Draw(image).ellipse((8, 16, 56, 48), fill=fill)
            for icon in art._icons(name, concept.name)[:1]:
                image.save(folder / f"{icon}.png")
    monkeypatch.setattr(art, "art_folder", lambda: tmp_path / "art")
    caches = (art.icon_names, art.icon, art.concepts_of)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "art"
    for cached in caches:
        cached.cache_clear()
