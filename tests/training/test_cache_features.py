# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Training on cached features is training on images; a cache that is not the run's is refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Image as ImageFeature
from safetensors.torch import load_file

pytest.importorskip("trl")

import tiny_training
from tiny_training import arguments, conversation, conversations, launch, launch_on_cpus, run
from trl import ModelConfig, TrlParser

from modeling_deco import DecoForConditionalGeneration, DecoProcessor
from modeling_deco.training import (
    CacheArguments,
    CacheError,
    DecoArguments,
    DecoSFTConfig,
    DecoSFTTrainer,
    FeatureCache,
    feature_cache,
    feature_cache_writer,
    load_data,
)
from modeling_deco.training.feature_cache import features_as_pixels
from modeling_deco.training.feature_cache_writer import MultiGridPool
from modeling_deco.utils import script as command

cache_features = tiny_training.load_script("cache_features.py")

FROZEN = {"freeze": "vision_tower", "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
SMALL_SHARDS = 5 * 14 * 32 * 4 / 1e9  # five images at 1 x 1, 2 x 2 and 3 x 3 in float32
ELASTIC = {"pooled_grid_sizes": [1, 2, 3], "shard_gigabytes": SMALL_SHARDS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_training.save_checkpoint(tmp_path_factory.mktemp("cache") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_training.save_dataset(tmp_path_factory.mktemp("cache") / "data")  # 24 samples, 24 images


@pytest.fixture(scope="module")
def cached(checkpoint, data, tmp_path_factory):
    """A cache of three grids in five shards."""
    folder = tmp_path_factory.mktemp("cache") / "features"
    build(checkpoint, data, folder, **ELASTIC)
    return folder


def parse_cache(words):
    return TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments)).parse_args_and_config(words)


def build(model, data, folder, config=None, **kwargs) -> FeatureCache:
    words = arguments(model, data, "unused", config, feature_cache=folder, **FROZEN | kwargs)
    return cache_features.main(*parse_cache(words))


def history(trainer) -> torch.Tensor:
    return torch.tensor([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log])


def count_calls(monkeypatch, model_class=DecoForConditionalGeneration) -> list[int]:
    """Record the number of images in each later call of a vision tower."""
    calls = []
    real = model_class.from_pretrained.__func__

    def hooked(cls, *args, **kwargs):
        loaded = real(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # beside what was found in the files
        model.base_model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        return loaded

    monkeypatch.setattr(model_class, "from_pretrained", classmethod(hooked))
    return calls


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grids", "strategy"),
    [({}, "sequential"), ({"pooled_grid_sizes": [1, 2, 3]}, "group_by_length")],
    ids=["own grid", "elastic"],
)
def test_losses_and_weights_are_those_of_training_on_images(grids, strategy, checkpoint, data, tmp_path, cached):
    settings = FROZEN | grids | {"train_sampling_strategy": strategy, "max_steps": 8}
    expected = run(checkpoint, data, tmp_path / "images", **settings)
    found = run(checkpoint, data, tmp_path / "features", **settings, feature_cache=cached)
    torch.testing.assert_close(history(found), history(expected), atol=1e-6, rtol=1e-6)
    before, images, features = (
        load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "images", tmp_path / "features")
    )
    assert features.keys() == images.keys()  # the tower too
    for name in images:
        torch.testing.assert_close(features[name], images[name], atol=1e-6, rtol=1e-5)
        assert torch.equal(features[name], before[name]) == ("vision_tower" in name)


def test_batches_of_text_alone_have_the_losses_of_training_on_images(checkpoint, tmp_path):
    examples = [conversation(index, num_images=0 if index % 4 > 1 else 2) for index in range(8)]
    data = tiny_training.save_dataset(tmp_path / "data", examples)
    build(checkpoint, data, tmp_path / "features")
    settings = FROZEN | {"max_steps": 4}
    expected = run(checkpoint, data, tmp_path / "images", **settings)
    found = run(checkpoint, data, tmp_path / "cached", **settings, feature_cache=tmp_path / "features")
    torch.testing.assert_close(history(found), history(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", ["stage2_lora.yaml", pytest.param("stage1.yaml", marks=pytest.mark.slow)])
def test_losses_are_equal_in_bfloat16(config, checkpoint, data, tmp_path):
    template = tmp_path / "tiny.jinja"
    template.write_text(tiny_training.CHAT_TEMPLATE)
    settings = {"dtype": "bfloat16", "bf16": True, "chat_template": template, "max_steps": 4}
    settings |= {"train_sampling_strategy": "sequential"}
    words = settings | {"freeze": ["vision_tower", "language_model"]}
    cache = build(checkpoint, data, tmp_path / "features", config, **words)
    assert load_file(cache.shards[0])["3x3"].dtype == torch.bfloat16
    expected = run(checkpoint, data, tmp_path / "images", config, **settings)
    found = run(checkpoint, data, tmp_path / "cached", config, **settings, feature_cache=tmp_path / "features")
    torch.testing.assert_close(history(found), history(expected), atol=1e-3, rtol=2**-8)


PROJECTORS = ["mlp", "c_abstractor"]
PROJECTORS += [pytest.param(name, marks=pytest.mark.slow) for name in ("qformer", "resampler", "d_abstractor")]


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_projectors_that_read_patches_have_the_losses_of_training_on_images(projector_type, data, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if projector_type == "c_abstractor":
        sizes.pop("num_attention_heads")
    model = tiny.build_model(
        projector_type=projector_type,
        projector_config=None if projector_type == "mlp" else sizes,
        pooled_grid_size=6 if projector_type == "mlp" else 3,
    )
    model.save_pretrained(tmp_path / "model")
    tiny_training.build_processor(pooled_grid_size=model.config.pooled_grid_size).save_pretrained(tmp_path / "model")
    grids = {"pooled_grid_sizes": [2, 3, 6]} if projector_type == "c_abstractor" else {}
    cache = build(tmp_path / "model", data, tmp_path / "features", **grids)
    assert cache.names == ["patches"]
    settings = FROZEN | grids | {"max_steps": 4, "per_device_train_batch_size": 3}
    expected = run(tmp_path / "model", data, tmp_path / "images", **settings)
    found = run(tmp_path / "model", data, tmp_path / "out", **settings, feature_cache=tmp_path / "features")
    torch.testing.assert_close(history(found), history(expected), atol=1e-5, rtol=1e-5)


def test_stage_2_reads_the_cache_of_stage_1_where_it_does_not_pad_images(data, tmp_path):
    vision, text = tiny_training.save_backbones(tmp_path)
    joined = {"vision_model_name_or_path": vision, "pooled_grid_size": 3}
    build(text, data, tmp_path / "features", "stage1.yaml", **joined)
    settings = FROZEN | {"feature_cache": tmp_path / "features", "max_steps": 2}
    run(text, data, tmp_path / "align", "stage1.yaml", **settings | joined)
    template = tmp_path / "tiny.jinja"
    template.write_text(tiny_training.CHAT_TEMPLATE)
    settings |= {"chat_template": template}
    with pytest.raises(CacheError, match="stale: image preprocessing, "):  # stage2_full.yaml pads them
        run(tmp_path / "align", data, tmp_path / "tuned", "stage2_full.yaml", **settings)
    settings |= {"pad_images": False}
    found = run(tmp_path / "align", data, tmp_path / "tuned", "stage2_full.yaml", **settings)
    settings.pop("feature_cache")
    expected = run(tmp_path / "align", data, tmp_path / "images", "stage2_full.yaml", **settings)
    torch.testing.assert_close(history(found), history(expected), atol=1e-6, rtol=1e-6)


def test_neither_the_tower_nor_a_decoder_of_images_runs(checkpoint, data, tmp_path, cached, monkeypatch):
    calls = count_calls(monkeypatch)
    monkeypatch.setattr(ImageFeature, "decode_example", lambda *args, **kwargs: pytest.fail("an image is decoded"))
    run(checkpoint, data, tmp_path / "out", **FROZEN, max_steps=4, feature_cache=cached)
    assert calls == []


def test_workers_of_the_data_loader_read_the_same(checkpoint, data, tmp_path, cached):
    settings = FROZEN | {"max_steps": 3, "pooled_grid_sizes": [1, 3], "feature_cache": cached}
    expected = run(checkpoint, data, tmp_path / "alone", **settings)
    found = run(checkpoint, data, tmp_path / "workers", **settings, dataloader_num_workers=2)
    assert torch.equal(history(found), history(expected))


def test_evaluation_reads_the_cache_at_the_models_own_grid(checkpoint, data, tmp_path, cached):
    held_out = tiny_training.save_dataset(tmp_path / "held-out", [conversation(index) for index in range(40, 44)])
    settings = FROZEN | {"eval_data_path": held_out, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    settings |= {"pooled_grid_sizes": [1, 2]}
    cache = build(checkpoint, data, tmp_path / "features", **settings)
    assert cache.manifest["grids"] == ["1x1", "2x2", "3x3"]
    assert cache.manifest["images"]["number"] == 24 + 4
    losses = [
        [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        for trainer in (
            run(checkpoint, data, tmp_path / "images", **settings),
            run(checkpoint, data, tmp_path / "out", **settings, feature_cache=tmp_path / "features"),
        )
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    with pytest.raises(CacheError, match=r"lacks 4 images of these data; the first is in sample 'sample-40'"):
        run(checkpoint, data, tmp_path / "other", **settings, feature_cache=cached)


# --- what is in a cache ----------------------------------------------------------------------------------------------


def test_several_grids_come_from_one_pass_and_are_means_of_patches(checkpoint, data, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    cache = build(
        checkpoint, data, tmp_path / "features", pooled_grid_sizes=[2, 3, 6, 4], per_device_train_batch_size=5
    )
    assert calls == [5, 5, 5, 5, 4]
    features = cache.read([0, 17])
    assert list(features) == ["2x2", "3x3", "6x6", "4x4"]

    monkeypatch.undo()
    model, processor = (
        DecoForConditionalGeneration.from_pretrained(checkpoint),
        DecoProcessor.from_pretrained(checkpoint),
    )
    images = [example_image for example in conversations() for example_image in example["images"]]
    pixels = processor.image_processor([images[0], images[17]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    patches = states[:, 1:].unflatten(1, (6, 6))
    for side in (2, 3, 4, 6):
        for row in range(side):
            for col in range(side):
                rows = slice(row * 6 // side, math.ceil((row + 1) * 6 / side))
                cols = slice(col * 6 // side, math.ceil((col + 1) * 6 / side))
                expected = patches[:, rows, cols].mean((1, 2))
                found = features[f"{side}x{side}"][:, row * side + col]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_features_are_computed_in_the_precision_of_training(checkpoint, data, tmp_path):
    cache = build(checkpoint, data, tmp_path / "features", bf16=True)  # float32 weights under bfloat16 autocast
    found = cache.read([0, 1])["3x3"].float()
    model, processor = (
        DecoForConditionalGeneration.from_pretrained(checkpoint),
        DecoProcessor.from_pretrained(checkpoint),
    )
    model.model.multi_modal_projector = MultiGridPool(["3x3"], (6, 6))
    images = conversations(2)[0]["images"] + conversations(2)[1]["images"][:1]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    errors = []
    for enabled in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = torch.stack(model.get_image_features(pixels).pooler_output)
        errors.append((found - expected.bfloat16().float()).abs().max())
    assert errors[0] < 0.1 * errors[1]


def test_an_image_of_several_samples_is_computed_once(checkpoint, tmp_path, monkeypatch):
    examples = [conversation(0, num_images=2), conversation(0), conversation(1), conversation(0)]
    data = tiny_training.save_dataset(tmp_path / "data", examples)
    calls = count_calls(monkeypatch)
    cache = build(checkpoint, data, tmp_path / "features")
    assert sum(calls) == cache.manifest["images"]["number"] == 3
    dataset = cache.refer(load_data(str(data)))
    assert dataset["images"][:] == [[0, 1], [0], [2], [0]]


@pytest.fixture
def data_with_paths(tmp_path):
    """A function that writes a folder of data whose images are files under `tmp_path/images`."""
    (tmp_path / "images").mkdir()

    def save(name, examples):
        rows = []
        for example in examples:
            paths = []
            for number, image in enumerate(example["images"]):
                paths.append(str(tmp_path / "images" / f"{example['id']}-{number}.png"))
                if not Path(paths[-1]).exists():
                    image.save(paths[-1])
            rows.append({**example, "images": paths})
        return tiny_training.save_dataset(tmp_path / name, rows)

    return save


def test_other_texts_another_order_and_fewer_images_need_no_other_cache(checkpoint, data_with_paths, tmp_path):
    cache = build(checkpoint, data_with_paths("all", [conversation(index) for index in range(6)]), tmp_path / "cache")
    others = [conversation(index, num_turns=2) for index in (5, 1, 3)]
    dataset = cache.refer(load_data(str(data_with_paths("some", others))))
    assert dataset["images"][:] == [[5], [1], [3]]


def test_an_image_that_has_changed_or_is_new_is_refused(checkpoint, data_with_paths, tmp_path):
    examples = [conversation(index) for index in range(6)]
    data = data_with_paths("data", examples)
    build(checkpoint, data, tmp_path / "features")
    tiny.picture(99, 50, 50).save(tmp_path / "images" / "sample-4-0.png")
    with pytest.raises(CacheError, match=r"lacks 1 images of these data; the first is in sample 'sample-4'"):
        run(checkpoint, data, tmp_path / "out", **FROZEN, feature_cache=tmp_path / "features")
    with pytest.raises(CacheError, match=r"is of other images: it has 6, these data have 6\. Name another folder"):
        build(checkpoint, data, tmp_path / "features")
    (tmp_path / "images" / "sample-4-0.png").unlink()
    with pytest.raises(CacheError, match=r"The image .*sample-4-0\.png of the data cannot be read: No such file"):
        run(checkpoint, data, tmp_path / "out", **FROZEN, feature_cache=tmp_path / "features")


# --- a run that was killed -------------------------------------------------------------------------------------------


def test_a_run_that_failed_resumes_at_the_first_missing_shard(checkpoint, data, tmp_path, cached, monkeypatch):
    folder, real = tmp_path / "features", feature_cache_writer.save_file

    def failing(tensors, path, **kwargs):
        real(tensors, path, **kwargs)
        if "00002" in path.name:
            raise OSError("No space left on device")

    monkeypatch.setattr(feature_cache_writer, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        build(checkpoint, data, folder, **ELASTIC)
    monkeypatch.setattr(feature_cache_writer, "save_file", real)
    finished = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(path.name for path in finished) == [
        "cache.json", "features-00000-of-00005.safetensors", "features-00001-of-00005.safetensors",
    ]  # fmt: skip
    with pytest.raises(
        CacheError, match=r"lacks 3 of 5 shards \(features-00002-of-00005.safetensors: missing\)\. Run"
    ):
        run(checkpoint, data, tmp_path / "out", **FROZEN, feature_cache=folder)
    calls = count_calls(monkeypatch)
    build(checkpoint, data, folder, **ELASTIC | {"shard_gigabytes": 1.0})  # the size is what it was
    assert sum(calls) == 24 - 2 * 5
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in cached.iterdir()
    }
    calls.clear()
    build(checkpoint, data, folder, **ELASTIC)
    assert calls == []


@pytest.mark.slow
def test_a_run_killed_at_any_time_leaves_nothing_half_written(checkpoint, tmp_path):
    data = tiny_training.save_dataset(tmp_path / "data", [conversation(index) for index in range(300)])
    two_images = 2 * 9 * 32 * 4 / 1e9
    words = arguments(
        checkpoint, data, "unused", **FROZEN, feature_cache=tmp_path / "killed", shard_gigabytes=two_images
    )
    command = [sys.executable, str(tiny_training.RECIPES / "cache_features.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def num_shards():
        return len(list((tmp_path / "killed").glob("*.safetensors")))

    kills, process = 0, None
    while process is None or process.returncode != 0:
        seen = num_shards()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and num_shards() < seen + 40:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    whole = build(checkpoint, data, tmp_path / "whole", shard_gigabytes=two_images)
    assert whole.num_shards == 150
    expected, found = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("whole", "killed")
    )
    assert found == expected


def test_a_truncated_shard_is_refused_and_made_again(checkpoint, data, tmp_path, cached):
    folder = copy(cached, tmp_path / "features")
    shard = folder / "features-00001-of-00005.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=r"lacks 1 of 5 shards \(features-00001-of-00005\.safetensors: broken, Error"):
        run(checkpoint, data, tmp_path / "out", **FROZEN, feature_cache=folder)
    build(checkpoint, data, folder, **ELASTIC)
    assert shard.read_bytes() == whole


def test_a_shard_of_another_cache_is_refused(checkpoint, data, tmp_path, cached):
    folder, other = copy(cached, tmp_path / "features"), tmp_path / "other"
    weights = DecoForConditionalGeneration.from_pretrained(checkpoint)
    weights.model.vision_tower.post_layernorm.bias.data += 1
    weights.save_pretrained(tmp_path / "model")
    tiny_training.build_processor().save_pretrained(tmp_path / "model")
    build(tmp_path / "model", data, other, **ELASTIC)
    name = "features-00004-of-00005.safetensors"
    (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(CacheError, match=rf"lacks 1 of 5 shards \({name}: of another cache\)"):
        run(checkpoint, data, tmp_path / "out", **FROZEN, feature_cache=folder)


# --- what is refused -------------------------------------------------------------------------------------------------


def changed_weights(model, processor):
    model.model.vision_tower.encoder.layers[1].mlp.fc2.bias.data[3] += 1e-6


def changed_activation(model, processor):
    model.config.vision_config.hidden_act = "gelu"


def changed_mean(model, processor):
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]


def test_a_stale_cache_is_refused_by_training_and_by_another_build(checkpoint, data, tmp_path, cached):
    for number, (change, message) in enumerate(
        [
            (changed_weights, r"vision tower, weights is '\w{32}' there and '\w{32}' in this run"),
            (changed_activation, "vision tower, hidden_act is 'quick_gelu' there and 'gelu' in this run"),
            (changed_mean, r"image preprocessing, image_mean is \[0.48145466, .*\] there and \[0.5, 0.5, 0.5\] in"),
        ]
    ):
        model = DecoForConditionalGeneration.from_pretrained(checkpoint)
        processor = DecoProcessor.from_pretrained(checkpoint)
        change(model, processor)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        with pytest.raises(CacheError, match=f"is stale: {message}"):
            run(folder, data, tmp_path / "out", **FROZEN, feature_cache=cached)
        with pytest.raises(CacheError, match=f"is stale: {message}"):
            build(folder, data, cached, **ELASTIC)


def test_a_fingerprint_has_what_makes_other_features(monkeypatch):
    model, processor = tiny.build_model(), tiny_training.build_processor()
    fingerprints = []

    def changed(bf16=False, fp16=False) -> set[str]:
        found = feature_cache.fingerprint(model, processor, SimpleNamespace(bf16=bf16, fp16=fp16))
        fingerprints.append(
            {f"{part}, {name}": value for part, fields in found.items() for name, value in fields.items()}
        )
        *_, before, now = [{}, *fingerprints]
        return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}

    changed()
    assert changed(fp16=True) == {"dtype, of the features"}
    assert fingerprints[-1]["dtype, of the features"] == "torch.float16"
    assert changed(bf16=True) == {"dtype, of the features"}
    model.model.vision_tower.to(torch.bfloat16)
    assert changed(bf16=True) == {"dtype, of the tower", "vision tower, weights"}
    monkeypatch.setattr(feature_cache, "NORMALIZATION", 0)
    assert changed(bf16=True) == {"image preprocessing, normalization"}
    pil = type(processor.image_processor)  # torchvision's has the same fields, and resizes in another way
    processor.image_processor.__class__ = type("CLIPImageProcessor", (pil,), {})
    assert changed(bf16=True) == {"image preprocessing, type"}
    assert changed(bf16=True) == set()


def test_a_run_with_other_features_is_refused(checkpoint, data, tmp_path, cached):
    for settings, message in [
        ({"bf16": True}, r"stale: dtype, of the features is 'torch.float32' there and 'torch.bfloat16' in this run"),
        ({"bf16": True, "dtype": "bfloat16"}, "stale: dtype, of the features is 'torch.float32' there"),
        ({"pad_images": True}, "stale: image preprocessing, .* in this run"),
        (
            {"pooled_grid_sizes": [3, 4]},
            "but not 4x4. Write one with all grids in another folder",
        ),
        ({"streaming": True}, "Leave out --streaming"),
        ({"freeze": "language_model"}, "this run trains the tower. Add vision_tower to --freeze"),
        (
            {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]},
            "this run trains the tower. Add vision_tower to --freeze and keep adapters off it",
        ),
    ]:
        with pytest.raises(CacheError, match=message):
            run(checkpoint, data, tmp_path / "out", **FROZEN | settings, feature_cache=cached)


def test_images_that_a_transform_changes_are_refused(cached, tmp_path):
    dataset = tiny_training.build_dataset()
    dataset.set_transform(lambda rows: rows)
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "freeze": ["vision_tower"]}
    with pytest.raises(CacheError, match="or remove the custom transform"):
        DecoSFTTrainer(
            model=tiny.build_model(),
            args=DecoSFTConfig(output_dir=str(tmp_path), feature_cache=str(cached), **settings),
            train_dataset=dataset,
            processing_class=tiny_training.build_processor(),
        )


def test_what_cannot_be_cached_is_refused(checkpoint, data, tmp_path):
    for settings, message in [
        ({"freeze": "language_model"}, "The run trains the vision tower, so its features change"),
        ({"streaming": True}, "leave out --streaming"),
        ({"shard_gigabytes": 1e-9, "pooled_grid_sizes": [2, 7]}, "7 x 7 is larger than the 6 x 6 patches"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(checkpoint, data, tmp_path / "features", **settings)
        assert not list(tmp_path.glob("features/*.safetensors"))


def test_a_frozen_tower_does_not_drop_at_random(data, tmp_path):
    model = tiny.build_model()
    model.config.vision_config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "model")
    tiny_training.build_processor().save_pretrained(tmp_path / "model")
    build(tmp_path / "model", data, tmp_path / "features")
    settings = FROZEN | {"max_steps": 3, "seed": 1}
    plain = run(tmp_path / "model", data, tmp_path / "plain", **settings)
    cached = run(tmp_path / "model", data, tmp_path / "cached", feature_cache=tmp_path / "features", **settings)
    torch.testing.assert_close(history(cached), history(plain), rtol=1e-5, atol=1e-5)


def test_sharded_weights_are_refused(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache_writer, "is_fsdp_enabled", lambda: True)
    with pytest.raises(CacheError, match=r"Launch with ddp\.yaml, not with FSDP"):
        build(checkpoint, data, tmp_path / "features")


def test_a_folder_without_a_cache_is_refused(checkpoint, data, tmp_path):
    with pytest.raises(
        CacheError,
        match=r"has no cache\.json of cached features\. Write them with `python recipes",
    ):
        run(checkpoint, data, tmp_path / "out", **FROZEN, feature_cache=tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CacheError, match="contains other files; name an empty folder"):
        build(checkpoint, data, tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_the_tower_runs(checkpoint, data, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    monkeypatch.setattr(feature_cache_writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 27_647}))
    with pytest.raises(CacheError, match=r"needs 0\.0 GB more, but only 0\.0 GB are free"):  # 24 x 9 x 32 x 4 bytes
        build(checkpoint, data, tmp_path / "features")
    assert calls == []
    monkeypatch.setattr(feature_cache_writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 27_648}))
    build(checkpoint, data, tmp_path / "features")
    assert sum(calls) == 24


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_command_says_in_one_line_which_image_is_broken(
    num_workers, checkpoint, data_with_paths, tmp_path, capsys
):
    data = data_with_paths("data", conversations(6))
    (tmp_path / "images" / "sample-4-1.png").write_bytes(b"no picture")
    words = arguments(
        checkpoint, data, "unused", **FROZEN, feature_cache=tmp_path / "features", dataloader_num_workers=num_workers
    )
    with pytest.raises(SystemExit, match="2"):
        command.run("cache_features", lambda: cache_features.main(*parse_cache(words)))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "sample-4-1.png" in line]
    assert line.startswith(
        f"cache_features: Row 4, {tmp_path / 'images' / 'sample-4-1.png'}: cannot identify image file"
    )


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.enable_socket  # processes talk over localhost
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_share_the_shards_and_train_as_one_does_on_images(config, checkpoint, tmp_path, cached):
    examples = [conversation(index, num_images=0 if index % 8 > 3 else 1 + index % 2) for index in range(32)]
    data = tiny_training.save_dataset(tmp_path / "data", examples)
    folder, settings = tmp_path / "features", FROZEN | {"pooled_grid_sizes": [1, 2, 3]}
    words = arguments(checkpoint, data, "unused", **settings, feature_cache=folder, shard_gigabytes=SMALL_SHARDS)
    result = launch_on_cpus(words, "ddp.yaml", script="cache_features.py")
    assert result.returncode == 0, result.stderr
    assert "process 0 computes 3" in result.stderr
    assert "process 1 computes 2" in result.stderr
    build(checkpoint, data, tmp_path / "one", **settings, shard_gigabytes=SMALL_SHARDS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()
    }

    settings |= {"max_steps": 4, "save_steps": 4}
    result = launch(arguments(checkpoint, data, tmp_path / "images", per_device_train_batch_size=8, **settings))
    assert result.returncode == 0, result.stderr
    words = arguments(
        checkpoint, data, tmp_path / "out", per_device_train_batch_size=4, **settings, feature_cache=folder
    )
    result = launch_on_cpus(words, config)  # in each step one process has images, and the other has none
    assert result.returncode == 0, result.stderr
    losses = [
        [(log["loss"], log["grad_norm"]) for log in json.loads(path.read_text())["log_history"] if "loss" in log]
        for path in (tmp_path / name / "checkpoint-4" / "trainer_state.json" for name in ("images", "out"))
    ]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-5, rtol=1e-5)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("images", "out"))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.enable_socket
def test_under_fsdp_a_stale_cache_is_refused_by_all_processes(checkpoint, data, tmp_path, cached):
    words = arguments(checkpoint, data, tmp_path / "out", **FROZEN, feature_cache=cached, pad_images=True)
    result = launch_on_cpus(words, "fsdp2.yaml")
    assert result.returncode == 1  # the launcher's
    assert result.stderr.count("is stale: image preprocessing") == 1
    assert "modeling_deco.training.feature_cache.CacheError" not in result.stderr


# --- the model's side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "grid"),
    [("clip", [3, 3]), ("clip", [6, 6]), ("siglip", [2, 5]), ("siglip2", [2, 5]), ("dinov2_with_registers", [2, 5])],
)
def test_the_model_takes_pooled_features_for_pixels(vision, grid):
    model = tiny.build_model(vision, pooled_grid_size=grid)
    pixels, tokens = tiny.pixels(2), grid[0] * grid[1]
    inputs = tiny.batch(tiny.prompt("what", tokens, "?"), tiny.prompt(tokens))
    inputs["pooled_grid_sizes"] = torch.tensor([grid] * 2)
    with torch.no_grad():
        expected = model(**inputs, pixel_values=pixels).logits
        projector = model.model.multi_modal_projector
        model.model.multi_modal_projector = MultiGridPool(["1x1", f"{grid[0]}x{grid[1]}"], (6, 6))
        features = torch.stack(model.get_image_features(pixels).pooler_output)[:, 1:]
        model.model.multi_modal_projector = projector
        with features_as_pixels(model.model):
            torch.testing.assert_close(model(**inputs, pixel_values=features).logits, expected)
            inputs.pop("pooled_grid_sizes")
            torch.testing.assert_close(model(**inputs, pixel_values=features).logits, expected)
        assert torch.equal(model(**inputs, pixel_values=pixels).logits, expected)  # as before


def test_pooled_features_are_refused_by_projectors_that_read_patches():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny.build_model(projector_type="qformer", projector_config=sizes)
    with (
        features_as_pixels(model.model),
        pytest.raises(ValueError, match="9 patch features do not fill a grid of 6 x 6 = 36 patches"),
    ):
        model(**tiny.batch(tiny.prompt(9)), pixel_values=torch.zeros(1, 9, 32))
