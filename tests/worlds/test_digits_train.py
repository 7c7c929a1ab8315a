# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo's training on the digits world: packed questions equal separate ones, and a stopped run resumes exactly."""

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from safetensors.torch import load_file
from transformers import HfArgumentParser

from modeling_deco.training.collator import IGNORE_INDEX, DecoCollator, expand_images
from modeling_deco.training.trainer import DecoSFTConfig
from modeling_deco.worlds.digits.deco_model import build_model, whiten_projector
from modeling_deco.worlds.digits.processor import build_processor
from modeling_deco.worlds.digits.tower_model import build_tower
from modeling_deco.worlds.digits.training import DigitsTrainer, PlateauCheck, build_optimizer, claim_folder
from modeling_deco.worlds.digits.training_data import build_dataset


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor, tower_dir):
    torch.manual_seed(0)
    return build_model(tower_dir, processor).eval()


@pytest.fixture(scope="module")
def examples():
    return list(build_dataset(3, seed=5))


@pytest.mark.parametrize("side", [3, 6])
def test_packed_questions_have_the_logits_and_labels_of_separate_ones(side, model, processor, examples):
    batch = expand_images(DecoCollator(processor, independent_turns=True)(examples), side, processor)
    labels = batch.pop("labels")
    with torch.no_grad():
        packed_logits = model(**batch).logits
    num_picture_tokens = 2 + side * side  # <bos> <user> <image> ...
    for row, example in enumerate(examples):
        offset = num_picture_tokens
        for user, assistant in zip(example["messages"][::2], example["messages"][1::2], strict=True):
            content = [{"type": "image", "image": example["images"][0]}, {"type": "text", "text": user["content"]}]
            inputs = processor.apply_chat_template(
                [[{"role": "user", "content": content}, assistant]],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"pooled_grid_size": side},
            )
            with torch.no_grad():
                logits = model(**inputs).logits[0, num_picture_tokens:]
            packed = slice(offset, offset + len(logits))
            torch.testing.assert_close(packed_logits[row, packed], logits, atol=1e-5, rtol=1e-5)
            answer = processor.decode(labels[row, packed][labels[row, packed] != IGNORE_INDEX])
            assert answer.removesuffix("<eos>").strip() == assistant["content"]
            offset += len(logits)
        assert (labels[row, offset:] == IGNORE_INDEX).all()
        assert (labels[row, :num_picture_tokens] == IGNORE_INDEX).all()


def test_pictures_depend_on_their_index_alone():
    few, many = build_dataset(3, seed=5), build_dataset(30, seed=5)
    assert few[2]["messages"] == many[2]["messages"]
    assert np.array_equal(few[2]["images"][0], many[2]["images"][0])
    assert not np.array_equal(few[2]["images"][0], build_dataset(3, seed=6)[2]["images"][0])


def test_optimizer_covers_every_parameter_once_and_the_tower_at_its_own_rate(model):
    optimizer = build_optimizer(model, muon_rate=0.02, adamw_rate=2e-3, tower_factor=0.1)
    covered = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(parameter) for parameter in model.parameters())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["model.language_model.layers.0.mlp.up_proj.weight"])] == 0.02
    assert rates[id(named["model.vision_tower.encoder.layers.0.mlp.fc1.weight"])] == pytest.approx(0.002)
    assert rates[id(named["model.multi_modal_projector.linear_1.weight"])] == 0.02
    assert rates[id(named["model.multi_modal_projector.linear_1.bias"])] == 2e-3
    assert rates[id(named["model.language_model.embed_tokens.weight"])] == 2e-3


@pytest.mark.parametrize(("projector_type", "grid"), [("avg_pool", 6), ("mlp", 12)])
def test_whitened_projector_sees_every_direction_of_the_features_alike(projector_type, grid, tower_dir):
    processor = build_processor(grid)
    torch.manual_seed(0)
    model = build_model(tower_dir, processor, projector_type).eval()
    pictures = [image for example in build_dataset(40, seed=5) for image in example["images"]]
    pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    seen = []
    model.model.multi_modal_projector.linear_1.register_forward_hook(lambda *call: seen.append(call[-1]))
    whiten_projector(model, pixel_values)
    with torch.no_grad():
        model.get_image_features(pixel_values)
    hidden_states = seen[0].flatten(0, 1)
    variances = torch.linalg.eigvalsh(torch.cov(hidden_states.T))
    assert hidden_states.mean(0).abs().max() < 1e-2
    assert variances.max() < 1.05
    assert (variances > 0.95).float().mean() > 0.5  # the others were numerical noise, and stay small


def test_a_run_on_the_plateau_stops_with_what_to_do(model, processor):
    state = type("State", (), {"global_step": 7})
    with pytest.raises(RuntimeError, match=r"at step 7 \d+\.\d % of the existence answers.*below 80\.0 %.*--seed"):
        PlateauCheck(processor, 7, 80.0, num_pictures=3).on_step_end(None, state, None, model=model)


def test_the_first_steps_have_one_grid_and_later_ones_every_grid():
    trainer = object.__new__(DigitsTrainer)
    trainer.first_elastic_step = 20
    trainer.args = DecoSFTConfig(output_dir="unused", use_cpu=True, bf16=False, pooled_grid_sizes=[3, 4, 6, 12])
    sides = [trainer.grid_of_step(step) for step in range(60)]
    assert sides[:20] == [None] * 20
    assert set(sides[20:]) == {3, 4, 6, 12}


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, monkeypatch, recipe):
    train = recipe("digits/train")
    parser = HfArgumentParser(train.DigitsArguments)
    options = [
        "--num_steps",
        "4",
        "--batch_size",
        "2",
        "--plateau_step",
        "100",
        "--save_steps",
        "2",
        "--bf16",
        "false",
    ]

    def call(name):
        train.main(*parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path / name), *options]))
        return load_file(tmp_path / name / "final" / "model.safetensors")

    for name in ("straight", "stopped"):
        torch.manual_seed(0)
        build_tower().save_pretrained(tmp_path / name / "tower")
    expected = call("straight")

    real_step, steps = DigitsTrainer.training_step, []

    def failing_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real_step(*args, **kwargs)

    monkeypatch.setattr(DigitsTrainer, "training_step", failing_step)
    with pytest.raises(KeyboardInterrupt):
        call("stopped")
    monkeypatch.setattr(DigitsTrainer, "training_step", real_step)
    found = call("stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_folder_belongs_to_one_run(tmp_path):
    claim_folder(tmp_path / "run", {"seed": 1})
    claim_folder(tmp_path / "run", {"seed": 1})
    with pytest.raises(ValueError, match=r"run holds a run with --seed 1, not 2\. Choose another folder"):
        claim_folder(tmp_path / "run", {"seed": 2})
    (tmp_path / "other" / "final").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"other holds a model but no arguments\.json of this recipe"):
        claim_folder(tmp_path / "other", {"seed": 1})
