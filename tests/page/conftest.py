# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the page share: the shipped model, the folder of uploads, and an upload."""

from importlib.util import find_spec

import pytest

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.inference.loading import load
from modeling_deco.worlds.digits.scenes import render

if find_spec("gradio") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def shipped():
    return load(str(SHIPPED_CHECKPOINT))


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def upload(uploads):
    """What an event gets of an uploaded image: 7 yellow, 1 green, 2 purple, 4 white."""
    path = uploads / "digits.png"
    render("test", index=46, seed=2026, min_digits=3).image.save(path)
    return {"path": str(path)}
