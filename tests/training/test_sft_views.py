# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipe with models of several views and of videos: what is trained, saved, resumed and merged."""

import pytest
import tiny
import tiny_training
import torch
from safetensors.torch import load_file
from tiny_training import run, save_backbones, save_dataset, save_family, view_conversation

pytest.importorskip("trl")

from modeling_deco import DecoForConditionalGeneration, DecoProcessor
from modeling_deco.inference.loading import load_model
from modeling_deco.training.distillation import as_teacher
from modeling_deco.training.newline import first_newline

SIZES = [(30, 40), (60, 25), (20, 90)]
NEWLINE = "model.image_newline"
LORA = {
    "use_peft": True,
    "lora_target_modules": ".*language_model.*q_proj",
    "lora_modules_to_save": "multi_modal_projector",
    "freeze": ["vision_tower", "language_model"],
    "learning_rate": 1e-2,
    "train_sampling_strategy": "sequential",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with one picture, two, and none."""
    rows = [view_conversation(seed, SIZES[: (1, 2, 0)[seed % 3]], num_turns=1 + seed % 2) for seed in range(6)]
    rows = [{name: value for name, value in row.items() if name != "videos"} for row in rows]
    return save_dataset(tmp_path_factory.mktemp("views") / "data", rows)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("views") / "model", "llava_next")


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_stage_1_trains_a_new_newline_with_the_projector(data, tmp_path):
    vision, text = save_backbones(tmp_path)
    template = tmp_path / "tiny.jinja"
    template.write_text(tiny_training.CHAT_TEMPLATE)
    settings = {"vision_model_name_or_path": vision, "image_grid_pinpoints": "[[24, 48], [48, 24], [48, 48]]"}
    settings |= {"image_newline": True, "pooled_grid_size": 3, "chat_template": template, "takes_videos": True}
    settings |= {"image_positions": "sequence"}
    settings |= {"freeze": ["vision_tower", "language_model"], "learning_rate": 1e-2, "fps": 2.0, "max_frames": 4}
    trainer = run(text, data, tmp_path / "out", **settings, max_steps=0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    run(text, data, tmp_path / "out", **settings, max_steps=2, overwrite_output_dir=True)
    after = DecoForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    assert moved == {name for name in before if "multi_modal_projector" in name or name == NEWLINE}
    processor = DecoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.fps, processor.max_frames, processor.video_token) == (2.0, 4, "<video>")
    assert processor.image_processor.image_grid_pinpoints == [[24, 48], [48, 24], [48, 48]]


def test_an_adapter_has_the_newline_and_merges_it(checkpoint, data, tmp_path):
    trainer = run(checkpoint, data, tmp_path / "out", **LORA, max_steps=3, merge_adapter=True)
    base, adapter, merged = (
        load_file(path)
        for path in (
            checkpoint / "model.safetensors",
            tmp_path / "out" / "adapter_model.safetensors",
            tmp_path / "out" / "merged" / "model.safetensors",
        )
    )
    newline = adapter[f"base_model.model.{NEWLINE}"]
    assert not torch.equal(newline, base[NEWLINE])
    assert torch.equal(merged[NEWLINE], newline)
    assert torch.equal(load_model(tmp_path / "out").model.image_newline, newline)
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    expected = ("multi_modal_projector", "image_newline", "language_model.layers.0.self_attn.q_proj")
    assert all(any(part in name for part in (*expected, "q_proj")) for name in moved)
    assert {NEWLINE, "model.multi_modal_projector.linear_1.weight"} <= moved
    with as_teacher(trainer.model), first_newline(trainer.model, trainer._first_newline):
        assert torch.equal(trainer.model.get_base_model().model.image_newline, base[NEWLINE])
    assert torch.equal(trainer.model.get_base_model().model.image_newline, newline)


@pytest.mark.slow
def test_a_resumed_adapter_has_the_losses_of_the_whole_run(checkpoint, data, tmp_path):
    settings = LORA | {"max_steps": 4, "save_steps": 2, "max_image_tokens": [20, 60]}
    whole = run(checkpoint, data, tmp_path / "out", **settings)
    resumed = run(checkpoint, data, tmp_path / "out", **settings, resume_from_checkpoint=tmp_path / "out/checkpoint-2")
    assert losses(resumed)[-2:] == losses(whole)[-2:]


def test_a_frozen_projector_keeps_the_newline(checkpoint, data, tmp_path):
    settings = LORA | {"freeze": ["vision_tower", "multi_modal_projector"]}
    settings.pop("lora_modules_to_save")
    run(checkpoint, data, tmp_path / "out", **settings, merge_adapter=True)
    assert NEWLINE not in "".join(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert torch.equal(merged[NEWLINE], load_file(checkpoint / "model.safetensors")[NEWLINE])


@pytest.mark.slow
def test_distillation_learns_from_all_views(checkpoint, data, tmp_path):
    settings = LORA | {"distill": "logits", "pooled_grid_sizes": [2, 3], "max_steps": 2}
    trainer = run(checkpoint, data, tmp_path / "out", **settings)
    assert all(0 < loss < 10 for loss in losses(trainer))
    full = LORA | {"distill": "logits", "pooled_grid_sizes": [6], "max_steps": 1}
    assert losses(run(checkpoint, data, tmp_path / "full", **full))[0] == pytest.approx(0, abs=1e-5)


def test_settings_of_views_that_have_no_effect_are_refused(checkpoint, data, tmp_path):
    for settings, message in (
        ({"tiles": 4}, "tiles=4: the model has image_grid_pinpoints"),
        ({"image_grid_pinpoints": "[[24, 48]]"}, "image_grid_pinpoints and takes_videos are for two backbones"),
        ({"image_newline": True}, "have no effect without image_grid_pinpoints"),
        ({"pad_images": True}, "--pad_images is for models of one view"),
        ({"fps": 1.0}, "--fps is for models that take videos"),
        ({"pooled_grid_sizes": [2], "max_image_tokens": [9]}, "both choose the grids of a step"),
    ):
        with pytest.raises(ValueError, match=message):
            run(checkpoint, data, tmp_path / "out", **settings)


@pytest.mark.slow
def test_tiles_train_a_model_of_one_view(data, tmp_path):
    model = tiny.build_model()
    model.save_pretrained(tmp_path / "model")
    tiny_training.build_processor(patch_size=4).save_pretrained(tmp_path / "model")
    trainer = run(
        tmp_path / "model", data, tmp_path / "out", tiles=4, pooled_grid_sizes=[3, 12], freeze="vision_tower"
    )
    assert losses(trainer)
