# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Cached features of images of several views and of videos give the losses of training on the files."""

import pytest
import tiny
import tiny_training
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_training import arguments, conversation, run, save_dataset, save_family, view_conversation

pytest.importorskip("trl")
pytest.importorskip("av")

from tiny_videos import video
from trl import ModelConfig, TrlParser

from modeling_deco import DecoForConditionalGeneration, DecoProcessor
from modeling_deco.training import CacheArguments, CacheError, DecoArguments, DecoSFTConfig
from modeling_deco.training.answer.engines import TransformersEngine
from modeling_deco.training.data.columns import FEATURES_WITH_VIDEOS

cache_features = tiny_training.load_script("cache_features.py")

SIZES = [(30, 40), (60, 25), (20, 90)]
FROZEN = {"freeze": "vision_tower", "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
FROZEN |= {"max_steps": 4, "image_positions": "sequence", "fps": 2.0, "max_frames": 5}


def build(model, data, folder, **kwargs):
    words = arguments(model, data, "unused", feature_cache=folder, **FROZEN | kwargs)
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments))
    return cache_features.main(*parser.parse_args_and_config(words))


def losses(trainer) -> torch.Tensor:
    return torch.tensor([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with a picture, three, none, a clip, and a clip with a picture."""
    folder = tmp_path_factory.mktemp("maps")
    rows = []
    for seed, (images, clips) in enumerate([(1, 0), (3, 0), (0, 0), (0, 1), (1, 1), (0, 0), (0, 2), (1, 0)]):
        row = view_conversation(seed, SIZES[:images], [1] * clips)
        row["videos"] = []
        for number in range(clips):
            path = folder / f"{seed}-{number}.mp4"
            path.write_bytes(video(10 * (1 + seed % 3) + number, rate=10))
            row["videos"].append(str(path))
        rows.append(row)
    (folder / "data" / "data").mkdir(parents=True)

    Dataset.from_list(rows, features=FEATURES_WITH_VIDEOS).to_parquet(folder / "data" / "data" / "train.parquet")
    return folder / "data"


RUNS = {
    "llava_next_video": {"pooled_grid_sizes": [2, 6], "pooled_video_grid_sizes": [1, 3], "frames_per_token_grid": 2},
    "llava_onevision": {"max_image_tokens": [20, 60], "add_timestamps": True, "shard_gigabytes": 2e-5},
}


@pytest.mark.parametrize("family", ["llava_onevision", pytest.param("llava_next_video", marks=pytest.mark.slow)])
def test_losses_are_those_of_training_on_files(family, data, tmp_path):
    save_family(tmp_path / "model", family)
    settings = dict(RUNS[family])
    cache = build(tmp_path / "model", data, tmp_path / "features", **settings)
    settings.pop("shard_gigabytes", None)
    assert (cache.num_shards > 1) == (family == "llava_onevision")
    expected = run(tmp_path / "model", data, tmp_path / "files", **FROZEN | settings)
    settings["feature_cache"] = tmp_path / "features"
    found = run(tmp_path / "model", data, tmp_path / "cached", **FROZEN | settings)
    torch.testing.assert_close(losses(found), losses(expected), atol=1e-5, rtol=1e-5)
    for change, message in (
        ({"fps": 1.0}, "stale: videos, fps is 2.0 there and 1.0"),
        ({"max_frames": 3}, "stale: videos, max_frames is 5 there and 3"),
    ):
        with pytest.raises(CacheError, match=message):
            run(tmp_path / "model", data, tmp_path / "other", **FROZEN | settings | change)


@pytest.mark.slow
def test_full_grids_that_are_interpolated_are_kept_as_patches(data, tmp_path):
    save_family(tmp_path / "model", "llava_onevision", pooled_grid_size=6, pooled_video_grid_size=3)
    build(tmp_path / "model", data, tmp_path / "features")
    expected = run(tmp_path / "model", data, tmp_path / "files", **FROZEN)
    found = run(tmp_path / "model", data, tmp_path / "cached", **FROZEN, feature_cache=tmp_path / "features")
    torch.testing.assert_close(losses(found), losses(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_tiles_of_a_model_of_one_view_are_cached(tmp_path):
    data = save_dataset(tmp_path / "data", [conversation(seed, 1 + seed % 2) for seed in range(4)])
    tiny.build_model().save_pretrained(tmp_path / "model")
    tiny_training.build_processor(patch_size=4).save_pretrained(tmp_path / "model")
    settings = {"freeze": "vision_tower", "tiles": 4, "pooled_grid_sizes": [3, 12], "max_steps": 2}
    words = arguments(tmp_path / "model", data, "unused", feature_cache=tmp_path / "features", **settings)
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments))
    cache_features.main(*parser.parse_args_and_config(words))
    expected = run(tmp_path / "model", data, tmp_path / "files", **settings)
    settings["feature_cache"] = tmp_path / "features"
    found = run(tmp_path / "model", data, tmp_path / "cached", **settings)
    torch.testing.assert_close(losses(found), losses(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(CacheError, match="stale: views, tiles is 4 there and 9"):
        run(tmp_path / "model", data, tmp_path / "other", **settings | {"tiles": 9})


@pytest.mark.slow
def test_the_config_for_videos_trains_what_it_declares(data, tmp_path):
    save_family(tmp_path / "model", "llava_next_video")
    before = load_file(tmp_path / "model" / "model.safetensors")
    settings = {"max_steps": 2, "pooled_video_grid_sizes": [1, 3], "image_positions": "sequence", "max_frames": 3}
    trainer = run(tmp_path / "model", data, tmp_path / "out", "stage2_video.yaml", **settings, learning_rate=1e-2)
    assert trainer.data_collator.add_timestamps
    assert trainer.processing_class.max_frames == 3
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if "vision_tower" in name
    }


def test_answers_are_about_all_views(tmp_path):
    save_family(tmp_path / "model", "llava_next")
    model = DecoForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = DecoProcessor.from_pretrained(tmp_path / "model")
    shown = [{"type": "image", "image": tiny.picture(0, 60, 25)}, {"type": "text", "text": "what is this ?"}]
    (answer,) = TransformersEngine(model, processor, max_new_tokens=4)([[{"role": "user", "content": shown}]])
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", processor_kwargs={"pooled_grid_size": 6},
    )  # fmt: skip
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answer.fault == ""
