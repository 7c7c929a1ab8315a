# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From a model's name to its checkpoint: what is not there, or no DeCo, is said in one line."""

import json
import os
from pathlib import Path

import pytest
import tiny

from modeling_deco.conversion import ConversionError
from modeling_deco.conversion import export as export_checkpoint
from modeling_deco.loading import checkpoint_name, load_config


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "model").mkdir(parents=True)
    (tmp_path / "models" / "deco-7b").mkdir(parents=True)
    (tmp_path / "model.safetensors").touch()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("models/deco-7b", "models/deco-7b"),
        (Path("models/deco-7b"), "models/deco-7b"),
        ("~/model", "{home}/model"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_a_folder_and_a_hub_id_are_names_of_checkpoints(here, name, path):
    assert checkpoint_name(name) == path.format(home=os.environ["HOME"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deco-7b", r"^There is no folder deco-7b; a Hub id would be owner/name\.$"),
        ("", r"^There is no folder ''; a Hub id"),
        ("./deco-7b", r"^There is no folder \./deco-7b; a Hub id"),
        ("~/deco-7b", r"^There is no folder ~/deco-7b; a Hub id"),
        ("~nobody-at-all/deco-7b", r"^There is no folder ~nobody-at-all/deco-7b; a Hub id"),
        ("/models/deco-7b", r"^There is no folder /models/deco-7b; a Hub id"),
        ("a/b/c", r"^There is no folder a/b/c; a Hub id"),
        ("owner/a name", r"^There is no folder owner/a name; a Hub id"),
        ("owner/", r"^There is no folder owner/; a Hub id"),
        ("owner/" + 300 * "a", r"^There is no folder owner/a+; a Hub id"),
        (
            "models/deco-13b",
            r"^There is no folder models/deco-13b\. The Hub is not asked, since models is a folder here",
        ),
        ("model.safetensors", r"^model\.safetensors is a file; a model is a folder or a Hub id"),
    ],
)
def test_a_mistyped_name_is_said_at_once(here, name, message):
    """Sockets are blocked, and a name that is looked for on the Hub would end in another message."""
    with pytest.raises(ValueError, match=message):
        load_config(name)


@pytest.mark.parametrize("fields", [{"model_type": "llava"}, {}])
def test_what_is_no_deco_is_refused_in_the_same_words_by_every_door(fields, tmp_path):
    from modeling_deco.inference import load
    from modeling_deco.info import describe

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(fields))
    words = rf"{model} is a {fields.get('model_type')!r} model, not a DeCo\. deco convert makes one of a LLaVA; "
    for door in (load_config, load, describe):
        with pytest.raises(ValueError, match=words):
            door(str(model))
    with pytest.raises(ConversionError, match=words):
        export_checkpoint(model, tmp_path / "exported")


def test_the_config_is_the_saved_one(tmp_path):
    config = tiny.build_config(pooled_grid_size=[2, 3])
    config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).to_dict() == config.to_dict()
