# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders and other data sets, loaded for trainers."""

import json
import shutil

import datasets
import numpy as np
import pytest
import tiny
from datasets import load_dataset
from llava_records import IMAGE, TAG, record, talk, text, write

from modeling_deco.training.data import load_data
from modeling_deco.training.data.columns import MESSAGES

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_several_folders_are_one_after_the_other(make, streaming, tmp_path):
    first = make([record("1"), record("2", None, talk("a", "b"))], name="first")
    second = make([record("3", ["a.jpg", "b.png"], talk("<image><image>", "c"))], name="second")
    rows = load_data([str(first), str(second)], streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    assert rows.column_names == ["id", "messages", "images"]
    assert [len(row["images"]) for row in rows] == [1, 0, 2]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_numbers_as_ids_of_others_become_texts_and_data_of_ours_are_not_copied(make, streaming, monkeypatch, tmp_path):
    numbered = load_dataset(str(make([record("1")])), split="train").cast_column("id", datasets.Value("int64"))
    (tmp_path / "numbered").mkdir()
    numbered.to_parquet(tmp_path / "numbered" / "train.parquet")
    rows = load_data([str(tmp_path / "numbered"), str(tmp_path / "out")], streaming=streaming)
    assert [row["id"] for row in rows] == ["1", "1"]
    assert [row["images"][0].size for row in rows] == [(40, 30)] * 2
    monkeypatch.delattr(datasets.Dataset, "cast_column")
    assert load_data(str(tmp_path / "out"), streaming=streaming).features["id"] == datasets.Value("string")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_pure_text_of_others_gets_a_column_of_no_images(make, streaming, tmp_path):
    """Their contents are texts, and they have more columns."""
    (tmp_path / "texts").mkdir()
    message = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with open(tmp_path / "texts" / "train.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": message, "source": index}) + "\n" for index in range(3))
    rows = load_data([str(tmp_path / "texts"), str(make([record()]))], streaming=streaming)
    rows = list(rows)
    assert [row["images"] for row in rows[:3]] == [[]] * 3
    assert rows[0]["messages"][0] == {"role": "user", "content": [text("Hello")]}
    assert rows[3]["messages"][0]["content"][0] == IMAGE
    assert rows[3]["images"][0].size == (40, 30)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_other_data_are_refused_with_what_to_do(streaming, tmp_path):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw" / "train.json", [record()])
    with pytest.raises(ValueError, match="raw has no column 'messages', but .*conversations") as error:
        load_data(str(tmp_path / "raw"), streaming=streaming)
    assert "python -m modeling_deco.training.data SRC.json --images DIR --out OUT" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_no_folder_is_refused_and_not_taken_from_the_cache(make, monkeypatch, tmp_path):
    """If datasets does not find a name without an owner, it loads what its cache has of any folder of that name."""
    load_data(str(make([record()], name="absent")))
    shutil.rmtree(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "llava.json", [record()])
    for path in ("llava.json", "absent", "./absent/data", "/absent/data", "a/b/c"):
        with pytest.raises(ValueError, match="is neither a folder of data nor a Hub id. Make such a folder with"):
            load_data(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_the_split_that_is_asked_for_is_read(streaming, tmp_path):
    for split in ("train", "test"):
        row = {"id": split, "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    assert [row["id"] for row in load_data(str(tmp_path), streaming=streaming, split="test")] == ["test"]


@pytest.fixture
def trained(tmp_path):
    """Options with which a trainer takes two steps on four rows."""
    return {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }


WORDS = "what is this ?"


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_sft_trainer_takes_the_data_as_they_are(make, streaming, trained):
    trl = pytest.importorskip("trl")
    records = [
        record("1", conversations=talk(f"{TAG}{WORDS}", "a red cat .")),
        record("2", None, talk("what ?", "a dog .")),
        record("3", ["a.jpg", "b.png"], talk("<image><image>" + WORDS, "two ?")),
        record("4", conversations=talk(f"{WORDS}\n<image>", "a cat .")),
    ]
    trainer = trl.SFTTrainer(
        model=tiny.build_model(),
        args=trl.SFTConfig(**trained),
        train_dataset=load_data(str(make(records)), streaming=streaming),
        processing_class=tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE),
    )
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_dpo_trainer_takes_preferences_as_they_are(checkpoint, photos, streaming, trained, tmp_path):
    trl = pytest.importorskip("trl")
    turn = MESSAGES
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "prompt": turn,
            "chosen": turn,
            "rejected": turn,
            "note": datasets.Value("string"),
        }
    )
    row = {
        "images": [str(photos / "a.jpg")],
        "prompt": [{"role": "user", "content": [IMAGE, text(WORDS)]}],
        "chosen": [{"role": "assistant", "content": [text("a cat .")]}],
        "rejected": [{"role": "assistant", "content": [text("a dog .")]}],
        "note": "of no interest",
    }
    (tmp_path / "preferences").mkdir()
    datasets.Dataset.from_list([row] * 4, features=features).to_parquet(tmp_path / "preferences" / "train.parquet")
    preferences = load_data(str(tmp_path / "preferences"), streaming=streaming)
    assert preferences.column_names == ["prompt", "chosen", "rejected", "images"]
    trainer = trl.DPOTrainer(
        model=str(checkpoint),
        args=trl.DPOConfig(**trained),
        train_dataset=preferences,
        processing_class=tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE),
    )
    assert np.isfinite(trainer.train().training_loss)
