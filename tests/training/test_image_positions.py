# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Training with the positions of patches: what sets them, where they are kept, and when they do not suffice."""

import json

import pytest
import tiny
import torch

pytest.importorskip("trl")

import tiny_training
from tiny_training import build_dataset, conversation, conversations, run
from transformers import AutoModelForImageTextToText

from modeling_deco.training import DecoSFTConfig, DecoSFTTrainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_training.save_checkpoint(tmp_path_factory.mktemp("positions") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_training.save_dataset(tmp_path_factory.mktemp("positions") / "data")


def saved(folder) -> str:
    return json.loads((folder / "config.json").read_text())["image_positions"]


# --- what sets them --------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_checkpoints_positions_or_sets_its_own(checkpoint, data, tmp_path):
    losses = {}
    for name, settings in (("own", {}), ("patch", {"image_positions": "patch"})):
        trainer = run(checkpoint, data, tmp_path / name, **settings)
        losses[name] = trainer.state.log_history[0]["loss"]
    assert (saved(tmp_path / "own"), saved(tmp_path / "patch")) == ("sequence", "patch")
    assert losses["own"] != losses["patch"]
    again = run(tmp_path / "patch", data, tmp_path / "again")
    assert again.model.config.image_positions == saved(tmp_path / "again") == "patch"


def test_an_adapter_has_the_positions_of_its_base_model_or_is_merged(checkpoint, data, tmp_path):
    settings = {"use_peft": True, "lora_target_modules": r".*language_model.*\.(q_proj|v_proj)"}
    with pytest.raises(
        ValueError, match=r"which are 'sequence' in .*--image_positions patch, set --merge_adapter true"
    ):
        run(checkpoint, data, tmp_path / "out", image_positions="patch", **settings)
    run(checkpoint, data, tmp_path / "same", image_positions="sequence", **settings)
    trainer = run(
        checkpoint, data, tmp_path / "merged", image_positions="patch", merge_adapter=True, max_steps=2,
        learning_rate=0.1, **settings,
    )  # fmt: skip
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged" / "merged")
    assert merged.config.image_positions == "patch"
    inputs = {"input_ids": torch.tensor([tiny.prompt("what", 9, "is this ?")]), "pixel_values": tiny.pixels(1)}
    with torch.no_grad():
        expected, found = (model.eval()(**inputs).logits for model in (trainer.model, merged))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "patch"),
        ({"image_positions": "sequence"}, "sequence"),
        ({"projector_type": "resampler"}, "sequence"),  # its tokens have no places
        ({"use_peft": True, "lora_target_modules": r".*language_model.*\.q_proj"}, "patch"),
    ],
)
def test_joined_backbones_keep_places_where_they_can(settings, expected, data, tmp_path):
    vision, text = tiny_training.save_backbones(tmp_path)
    if "projector_type" in settings:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        settings = settings | {"projector_config": json.dumps(sizes)}
    out = tmp_path / "out"
    run(text, data, out, vision_model_name_or_path=vision, pooled_grid_size=2, chat_template="plain", **settings)
    assert saved(out / "base" if "use_peft" in settings else out) == expected


def test_positions_that_a_new_projector_does_not_have_are_refused(data, tmp_path):
    vision, text = tiny_training.save_backbones(tmp_path)
    sizes = json.dumps({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    with pytest.raises(ValueError, match="projector_type='resampler' have none; use 'sequence'"):
        run(
            text, data, tmp_path / "out", vision_model_name_or_path=vision, pooled_grid_size=2,
            projector_type="resampler", projector_config=sizes, image_positions="patch",
        )  # fmt: skip


# --- the language model's positions ----------------------------------------------------------------------------------


def build_trainer(output_dir, examples, max_positions, image_positions="patch", **kwargs) -> DecoSFTTrainer:
    model = tiny.build_model(image_positions=image_positions)
    model.config.text_config.max_position_embeddings = max_positions
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1}
    return DecoSFTTrainer(
        model=model,
        args=DecoSFTConfig(output_dir=str(output_dir), save_strategy="no", **settings, **kwargs),
        train_dataset=kwargs.pop("dataset", None) or examples,
        processing_class=tiny_training.build_processor(),
    )


def test_samples_that_take_too_many_positions_are_refused_or_dropped_before_training(tmp_path, caplog):
    # 14 tokens of text or more, and 36 positions for an image of 9 tokens
    dataset = build_dataset(conversations(6))
    message = (
        r"2 of 6 samples take more positions than the language model has \(max_position_embeddings=80\), because "
        r"images keep those of all their patches: sample-1 \(98 positions\), sample-4 \(86 positions\)\. "
        r"Set --image_positions sequence, or drop such samples with --overlong_samples drop\."
    )
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, dataset, 80)
    build_trainer(tmp_path, dataset, 98)
    build_trainer(tmp_path, dataset, 80, image_positions="sequence")
    trainer = build_trainer(tmp_path, dataset, 80, overlong_samples="drop")
    assert trainer.train_dataset["id"][:] == ["sample-0", "sample-2", "sample-3", "sample-5"]
    assert "because images keep those of all their patches" in caplog.text
    streamed = build_trainer(tmp_path, dataset.to_iterable_dataset(), 80, overlong_samples="drop")
    assert [row["id"] for row in streamed.train_dataset] == ["sample-0", "sample-2", "sample-3", "sample-5"]
    with pytest.raises(
        ValueError, match=r"'sample-1' takes 98 positions, because its 2 image\(s\) keep those of 72 patches"
    ):
        streamed.data_collator([conversation(1, num_images=2, num_turns=2)])


def test_independent_turns_all_begin_behind_the_images(tmp_path):
    example = conversation(0, num_turns=4)
    trainer = build_trainer(tmp_path, build_dataset([example]), 256, independent_turns=True)
    (counted,) = trainer.train_dataset["num_positions"][:]
    batch = trainer._expanded(trainer.data_collator([example]), 2)
    seen = []
    language_model = trainer.model.model.language_model
    language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    trainer.model(**batch)
    assert counted == seen[0].max() + 1 < trainer.train_dataset["length"][0] - 9 + 36
