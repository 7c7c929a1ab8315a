# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The training recipe: what each config trains, what a run writes, what stops it, and how it resumes."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("trl")

import datasets
import tiny_training
from datasets import IterableDataset
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from tiny_training import CONFIGS, arguments, build_dataset, conversation, conversations, launch, parse, run, sft
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.chat_templates import PLAIN_CHAT_TEMPLATE
from modeling_deco.training import DecoCollator, DecoSFTConfig, DecoSFTTrainer, expand_images
from modeling_deco.training.checkpoints import INCOMPLETE
from modeling_deco.training.data import load
from modeling_deco.training.models import merge_adapter, read_sizes
from modeling_deco.training.parts import part_of
from modeling_deco.training.plots import plot_training
from modeling_deco.training.sampler import ModalityLengthSampler


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_training.save_checkpoint(tmp_path_factory.mktemp("sft") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_training.save_dataset(tmp_path_factory.mktemp("sft") / "data")


def build_trainer(output_dir, examples=None, model=None, **kwargs) -> DecoSFTTrainer:
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1} | kwargs
    settings = {"save_strategy": "steps" if "save_steps" in kwargs else "no"} | settings
    return DecoSFTTrainer(
        model=model or tiny.build_model(),
        args=DecoSFTConfig(output_dir=str(output_dir), **settings),
        train_dataset=build_dataset(examples),
        processing_class=tiny_training.build_processor(),
    )


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "tiny.jinja"
    path.write_text(tiny_training.CHAT_TEMPLATE)
    return path


@pytest.mark.newest
@pytest.mark.parametrize(
    "config", ["stage1.yaml", "stage2_full.yaml", "stage2_lora.yaml", "stage2_qlora.yaml", "digits.yaml"]
)
def test_after_two_steps_each_parameter_moved_or_is_bit_equal_as_the_config_declares(
    config, checkpoint, data, template, tmp_path, monkeypatch
):
    """The frozen parts are in bfloat16, the trained ones in float32, and no gradient runs through a frozen tower."""
    if "qlora" in config:
        pytest.importorskip("bitsandbytes")
        checkpoint = tiny_training.save_checkpoint(tmp_path / "wide", hidden_size=64)
    if config == "digits.yaml":
        data = tiny_training.save_dataset(tmp_path / "data", [conversation(index, num_turns=2) for index in range(12)])
    declared = yaml.safe_load((CONFIGS / config).read_text())
    grids = {"pooled_grid_sizes": [1, 2, 3]} if "pooled_grid_sizes" in declared else {}
    before, differentiated = {}, []
    real = DecoSFTTrainer.train

    def recorded(self, **kwargs):
        before.update({name: parameter.detach().clone() for name, parameter in self.model.named_parameters()})
        self._unwrapped().model.vision_tower.register_forward_hook(
            lambda *call: differentiated.append(call[-1].hidden_states[-1].requires_grad)
        )
        return real(self, **kwargs)

    monkeypatch.setattr(DecoSFTTrainer, "train", recorded)
    # Adapters start at zero output: the gradient of A is zero in the first step, and it moves in the second.
    trainer = run(
        checkpoint, data, tmp_path / "out", config, max_steps=2, chat_template=template, dtype="bfloat16", bf16=True,
        per_device_train_batch_size=4, **grids,
    )  # fmt: skip
    after = dict(trainer.model.named_parameters())
    moved = {name for name, parameter in after.items() if not torch.equal(before[name], parameter.detach())}
    for name in sorted(after):
        is_adapter = "lora_" in name
        is_copy = "modules_to_save" in name  # PEFT's: the frozen original lies beside it
        if declared.get("use_peft"):
            expected = is_adapter or is_copy
        else:
            expected = part_of(name) not in declared["freeze"]
        assert (name in moved) == expected, f"{name} {'moved' if name in moved else 'is equal'}"
    if declared.get("use_peft"):
        adapted = {re.search(r"layers\.\d+\.\w+\.(\w+)\.lora_A", name)[1] for name in moved if "lora_A" in name}
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert not any("vision_tower" in name for name in moved)
    assert {before[name].dtype for name in moved} == {after[name].dtype for name in moved} == {torch.float32}
    if "qlora" not in config:
        assert {before[name].dtype for name in after.keys() - moved} == {torch.bfloat16}
    assert set(differentiated) == {False}
    assert trainer.args.max_length == declared["max_length"]


@pytest.fixture
def backbones(tmp_path):
    return tiny_training.save_backbones(tmp_path)


@pytest.mark.newest
def test_stage_1_joins_two_backbones(backbones, data, tmp_path):
    vision, text = backbones
    run(text, data, tmp_path / "out", "stage1.yaml", vision_model_name_or_path=vision, pooled_grid_size=2)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(model, DecoForConditionalGeneration)
    assert model.config.pooled_grid_size == processor.pooled_grid_size == 2
    assert processor.chat_template == PLAIN_CHAT_TEMPLATE
    frozen = load_file(text / "model.safetensors")
    kept = dict(model.model.language_model.named_parameters())
    assert torch.equal(frozen["model.layers.0.mlp.up_proj.weight"], kept["layers.0.mlp.up_proj.weight"])


PROJECTORS = ["mlp", "qformer", "c_abstractor"]
PROJECTORS += [pytest.param(name, marks=pytest.mark.slow) for name in ("resampler", "d_abstractor")]


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_stage_1_trains_every_projector_and_nothing_else(projector_type, backbones, data, tmp_path):
    vision, text = backbones
    sizes = {"hidden_size": 16, "num_hidden_layers": 1}
    extra = {} if projector_type == "mlp" else {"projector_config": json.dumps(sizes)}
    if projector_type in ("qformer", "resampler", "d_abstractor"):
        extra["projector_config"] = json.dumps(sizes | {"num_attention_heads": 2})
    trainer = run(
        text, data, tmp_path / "out", "stage1.yaml", vision_model_name_or_path=vision, projector_type=projector_type,
        pooled_grid_size=6 if projector_type == "mlp" else 2, max_steps=2, gradient_checkpointing=True, **extra,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.projector_type == projector_type
    untrained = load_file(text / "model.safetensors")
    for name, value in model.model.language_model.state_dict().items():
        assert torch.equal(value, untrained[f"model.{name}"]), name
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in model.state_dict() if "multi_modal_projector" in name}
    state = {name: trainer.optimizer.state[parameter] for name, parameter in trainer.model.named_parameters()}
    moved = [name for name in trained if state[name]["exp_avg"].abs().max() > 0]
    assert len(moved) > 0.8 * len(trained)  # a key has no use for its bias, a query's first weights for the rest


def test_sizes_that_are_no_json_object_are_refused():
    for value in ("{bad", "[1]", "3"):
        with pytest.raises(ValueError, match=r"--projector_config must be a JSON object, .*got '"):
            read_sizes(value)


def test_stage_1_learns_the_caption_and_its_line_break():
    processor = tiny.build_processor(chat_template=PLAIN_CHAT_TEMPLATE)
    row = DecoCollator(processor).tokenize(conversation(0))
    assert processor.decode(row["input_ids"]) == "<image> a red cat ."
    assert processor.decode([label for label in row["labels"] if label >= 0]) == "a red cat ."


@pytest.mark.parametrize("is_partly_frozen", [False, True])
def test_a_trained_tower_is_checkpointed_with_its_gradients(is_partly_frozen, tmp_path, monkeypatch):
    gradients = {}
    for name in (True, False):
        trainer = build_trainer(
            tmp_path / str(name), gradient_checkpointing=name, examples=conversations(2), max_grad_norm=0
        )
        if is_partly_frozen:  # the tower's last layers are trained, and nothing before them
            tower = trainer.model.model.vision_tower
            tower.requires_grad_(False)
            tower.encoder.layers[-1].requires_grad_(True)
        stepped = torch.optim.AdamW.step

        def step(self, *args, stepped=stepped, trainer=trainer, name=name, **kwargs):
            gradients[name] = {
                key: value.grad.clone() for key, value in trainer.model.named_parameters() if value.grad is not None
            }
            return stepped(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        trainer.train()
        monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    trained = {name.split("layers.")[1][0] for name in gradients[True] if "vision_tower.encoder.layers" in name}
    assert trained == ({"1"} if is_partly_frozen else {"0", "1"})
    assert gradients[True].keys() == gradients[False].keys()
    for name in gradients[True]:
        torch.testing.assert_close(gradients[True][name], gradients[False][name])


def test_evaluation_pools_to_the_models_grid_whatever_the_steps_grid(tmp_path):
    seen = []
    trainer = DecoSFTTrainer(
        model=tiny.build_model(),
        args=DecoSFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=2,
            pooled_grid_sizes=[1, 2], eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
        ),
        train_dataset=build_dataset([conversation(index) for index in range(8)]),
        eval_dataset=build_dataset([conversation(index) for index in range(4)]),
        processing_class=tiny_training.build_processor(),
    )  # fmt: skip
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.training, kwargs.get("pooled_grid_sizes"))), with_kwargs=True
    )
    trainer.train()
    assert [grids for is_training, grids in seen if not is_training] == [None] * 2  # the model's own
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    examples = [conversation(index) for index in range(4)]
    batch = expand_images(trainer.data_collator(examples), None, trainer.processing_class)
    assert (batch["input_ids"] == tiny.IMAGE_TOKEN_ID).sum() == 4 * 9
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
    assert losses[-1] == pytest.approx(expected, rel=1e-4)


def test_each_picture_is_encoded_once_per_step_and_per_evaluation(tmp_path):
    calls = []
    trainer = DecoSFTTrainer(
        model=tiny.build_model(),
        args=DecoSFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=2,
            gradient_accumulation_steps=2, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2,
            per_device_eval_batch_size=3, gradient_checkpointing=False,
        ),
        train_dataset=build_dataset([conversation(index) for index in range(8)]),
        eval_dataset=build_dataset([conversation(index, num_images=2) for index in range(5)]),
        processing_class=tiny_training.build_processor(),
    )  # fmt: skip
    trainer.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len((args or list(kwargs.values()))[0])), with_kwargs=True
    )
    trainer.train()
    assert calls == [2, 2, 2, 2, 6, 4]  # two micro-batches a step; the last batch of the evaluation has two rows


def test_the_order_of_samples_is_the_data_seeds(checkpoint, data, tmp_path, monkeypatch):
    settings = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}
    orders = {}
    for seed, data_seed in ((1, 5), (2, 5), (1, 6), (5, None), (1, 0), (0, None)):
        loader = build_trainer(tmp_path, seed=seed, data_seed=data_seed, **settings).get_train_dataloader()
        orders[seed, data_seed] = [sample_id for batch in loader for sample_id in batch["sample_ids"]]
    assert orders[1, 5] == orders[2, 5] == orders[5, None] != orders[1, 6]
    assert orders[1, 0] == orders[0, None] != orders[1, 5]
    monkeypatch.setattr(sft, "load_model_and_processor", lambda *args: 1 / 0)
    shuffled = []
    real = IterableDataset.shuffle

    def shuffle(self, seed=None, **kwargs):
        shuffled.append(seed)
        return real(self, seed=seed, **kwargs)

    monkeypatch.setattr(IterableDataset, "shuffle", shuffle)
    for data_seed in (5, 6):
        with pytest.raises(ZeroDivisionError):
            run(checkpoint, data, tmp_path / "out", streaming=True, seed=1, data_seed=data_seed)
    assert shuffled == [5, 6]


def test_parts_have_their_learning_rates(tmp_path):
    trainer = build_trainer(
        tmp_path, learning_rate=1e-3, projector_learning_rate=2e-5, vision_tower_learning_rate=3e-6, weight_decay=0.1
    )
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert set(rates) == set(names.values())
    assert rates["model.multi_modal_projector.linear_1.weight"] == (2e-5, 0.1)
    assert rates["model.multi_modal_projector.linear_1.bias"] == (2e-5, 0.0)
    assert rates["model.vision_tower.encoder.layers.0.mlp.fc1.weight"] == (3e-6, 0.1)
    assert rates["model.language_model.layers.0.mlp.up_proj.weight"] == (1e-3, 0.1)
    assert rates["lm_head.weight"] == (1e-3, 0.1)
    assert trainer.create_optimizer() is optimizer
    trainer = build_trainer(tmp_path, learning_rate=1e-3, projector_learning_rate=0.0, vision_tower_learning_rate=0.0)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {1e-3, 0.0}


# --- batches ---------------------------------------------------------------------------------------------------------


def test_the_grid_of_a_step_depends_on_seed_and_step_alone(tmp_path):
    drawn = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        trainer = build_trainer(tmp_path / name, pooled_grid_sizes=[1, 2, 3], seed=seed)
        drawn[name] = [trainer.grid_of_step(step) for step in range(300)]
    assert drawn["one"] == drawn["again"] != drawn["other"]
    assert drawn["one"][1:] != drawn["other"][:-1]  # nor the same, a step later
    assert {grid: drawn["one"].count(grid) > 70 for grid in (1, 2, 3)} == {1: True, 2: True, 3: True}
    trainer.args.pooled_grid_weights = [0.0, 1.0, 3.0]
    counts = [[trainer.grid_of_step(step) for step in range(400)].count(grid) for grid in (1, 2, 3)]
    assert counts[0] == 0
    assert 70 < counts[1] < 130


def test_a_step_pools_every_batch_of_it_to_its_grid(tmp_path):
    trainer = build_trainer(
        tmp_path, pooled_grid_sizes=[1, 2, 3], gradient_accumulation_steps=2, max_steps=6,
        examples=[conversation(index) for index in range(12)], per_device_train_batch_size=2,
    )  # fmt: skip
    seen = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((trainer.state.global_step, kwargs["pooled_grid_sizes"].tolist())),
        with_kwargs=True,
    )
    trainer.train()
    assert len(seen) == 12
    for step, grids in seen:
        side = trainer.grid_of_step(step)
        assert grids == [[side, side]] * 2
    assert len({grids[0][0] for _, grids in seen}) > 1


def test_batches_are_of_one_modality_and_similar_length():
    rng = np.random.default_rng(0)
    lengths, has_images = rng.integers(10, 1000, 1000).tolist(), rng.random(1000) < 0.8
    sampler = ModalityLengthSampler(lengths, has_images, batch_size=16, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(1000))
    batches = [order[start : start + 16] for start in range(0, 1000, 16)]
    assert sum(len({bool(has_images[sample]) for sample in batch}) == 1 for batch in batches) >= len(batches) - 2
    spread = np.mean([np.ptp([lengths[sample] for sample in batch]) for batch in batches[:-2]])
    assert spread < 150  # of 990 in random batches
    assert max(lengths) in [lengths[sample] for sample in batches[0]]
    assert list(sampler) == order
    sampler.epoch = 1
    assert list(sampler) != order


def test_all_batches_of_a_step_are_of_one_modality(tmp_path):
    trainer = build_trainer(
        tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=2,
        gradient_accumulation_steps=4, examples=conversations(24),
    )  # fmt: skip
    batches = [batch["sample_ids"] for batch in trainer.get_train_dataloader()]
    text = {f"sample-{index}" for index in range(2, 24, 3)}
    steps = [{sample in text for batch in batches[start : start + 4] for sample in batch} for start in (0, 4, 8)]
    assert sorted(steps, key=str) == [{False}, {False}, {True}]


def test_samplers_of_tiny_and_one_sided_data_give_every_sample():
    for has_images in ([True] * 3, [False] * 5, [True] * 4 + [False], []):
        sampler = ModalityLengthSampler(list(range(len(has_images))), has_images, batch_size=4, seed=0)
        assert sorted(sampler) == list(range(len(has_images)))


def test_grouped_epochs_differ_and_survive_a_resume(tmp_path):
    settings = {"train_sampling_strategy": "group_by_length", "max_steps": 8, "save_steps": 1, "logging_steps": 1}
    settings |= {"examples": conversations(24), "per_device_train_batch_size": 8}  # three steps are an epoch
    whole = build_trainer(tmp_path, **settings)
    epochs, sampler = [], type(whole._get_train_sampler()).__iter__

    def note(self):
        epochs.append(list(sampler(self)))
        return iter(epochs[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(whole._get_train_sampler()), "__iter__", note)
        whole.train()
    assert len({tuple(order) for order in epochs}) == len(epochs) == 3
    for step in (3, 5):
        resumed = build_trainer(tmp_path / str(step), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses_of(resumed.state.log_history) == losses_of(whole.state.log_history)


def test_lengths_are_at_the_largest_grid(tmp_path):
    trainer = build_trainer(tmp_path, pooled_grid_sizes=[1, 6], examples=conversations(3))
    # <s> user : [image] what is this ? assistant : a red cat . </s>: 14 tokens and 36 per image
    assert trainer.train_dataset["length"][:] == [14 + 36, trainer.train_dataset["length"][1], 12]
    assert trainer.train_dataset["has_images"][:] == [True, True, False]


def test_samples_that_are_too_long_are_refused_or_dropped_with_numbers(tmp_path, caplog):
    arguments = {"max_length": 30, "examples": conversations(6)}
    message = r"3 of 6 samples are longer.*max_length=30.*sample-1 \(44 tokens\).*--overlong_samples drop"
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, **arguments, overlong_samples="refuse")
    trainer = build_trainer(tmp_path, **arguments, overlong_samples="drop")
    assert trainer.train_dataset["id"][:] == ["sample-0", "sample-2", "sample-5"]
    assert "3 of 6 samples are longer than max_length=30" in caplog.text
    trainer.train()


@pytest.fixture
def _fast_streams(monkeypatch):
    monkeypatch.setattr(load, "SHUFFLE_BUFFER_SIZE", 8)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # of 5 seconds


@pytest.mark.usefixtures("_fast_streams")
def test_a_streamed_sample_that_is_too_long_is_refused_or_dropped(checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match=r"Sample 'sample-\d+' has \d+ tokens.*max_length=30"):
        run(checkpoint, data, tmp_path / "refuse", streaming=True, max_length=30, max_steps=12)
    run(checkpoint, data, tmp_path / "drop", streaming=True, max_length=30, max_steps=3, overlong_samples="drop")
    assert (tmp_path / "drop" / "model.safetensors").exists()


# --- what a run writes -----------------------------------------------------------------------------------------------


def test_the_result_loads_and_answers(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "plot_training", plot_training)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("mine")  # a folder of other things is written into
    trainer = run(
        checkpoint, data, tmp_path / "out", eval_data_path=data, eval_strategy="steps", eval_steps=1, max_steps=2
    )
    assert (tmp_path / "out" / "log.txt").read_text() == "mine"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    expected = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    content = [{"type": "image", "image": tiny.picture(0)}, {"type": "text", "text": "what is this ?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    with Image.open(tmp_path / "out" / "training.png") as plot:
        assert plot.size == (1200, 480)
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 100
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [1, 2]


@pytest.mark.newest
def test_an_adapter_loads_on_its_model_and_merged(checkpoint, data, template, tmp_path):
    trainer = run(
        checkpoint, data, tmp_path / "out", "stage2_lora.yaml", max_steps=3, chat_template=template,
        merge_adapter=True, learning_rate=1e-2, projector_learning_rate=1e-2, model_revision="v2",
    )  # fmt: skip
    assert PeftConfig.from_pretrained(tmp_path / "out").revision == "v2"  # or it would be loaded onto another model
    inputs = {"input_ids": torch.tensor([tiny.prompt("what", 9, "is this ?")]), "pixel_values": tiny.pixels(1)}
    trainer.model.eval()
    before = AutoModelForImageTextToText.from_pretrained(checkpoint)
    loaded = {
        "trained": trainer.model,
        "with its adapter": PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "out"),
        "merged": AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "merged"),
        "by its Auto class": AutoModelForImageTextToText.from_pretrained(tmp_path / "out"),
        "before": before,
    }
    with torch.no_grad():
        logits = {name: model.eval()(**inputs).logits for name, model in loaded.items()}
    assert (logits.pop("before") - logits["trained"]).abs().max() > 1e-2
    for name in logits:
        torch.testing.assert_close(logits[name], logits["trained"], atol=1e-4, rtol=1e-4, msg=name)
    assert AutoProcessor.from_pretrained(tmp_path / "out" / "merged").chat_template == tiny_training.CHAT_TEMPLATE


def test_a_folder_without_an_adapter_is_not_merged(checkpoint):
    with pytest.raises(ValueError, match=f"{re.escape(str(checkpoint))} has no adapter"):
        merge_adapter(str(checkpoint))


def test_another_grid_is_the_results_own(checkpoint, data, template, tmp_path):
    settings = {"chat_template": template, "pooled_grid_size": 2}
    run(checkpoint, data, tmp_path / "lora", "stage2_lora.yaml", **settings, merge_adapter=True)
    run(checkpoint, data, tmp_path / "full", "stage2_full.yaml", **settings)
    for folder in (tmp_path / "lora" / "merged", tmp_path / "full"):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert model.config.pooled_grid_size == AutoProcessor.from_pretrained(folder).pooled_grid_size == 2


@pytest.mark.usefixtures("_fast_streams")
@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_works_with_grouped_batches_and_drops_what_is_too_long(
    streaming, checkpoint, data, template, tmp_path
):
    trainer = run(
        checkpoint, data, tmp_path / "out", "stage2_full.yaml", chat_template=template, max_length=30,
        overlong_samples="drop", eval_data_path=data, eval_strategy="steps", eval_steps=1, max_steps=2,
        streaming=streaming,
    )  # fmt: skip
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [1, 2]


def test_a_new_projector_depends_on_the_seed_alone(data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sft, "load_model_and_processor", lambda *args: drawn.append(torch.randn(1).item()) or 1 / 0)
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        with pytest.raises(ZeroDivisionError):
            run("unused", data, tmp_path, seed=seed)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_logs_go_where_report_to_says(checkpoint, data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    run(checkpoint, data, tmp_path / "out", report_to="tensorboard", max_steps=3)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert {"train/mean_token_accuracy", "train/learning_rate", "train/grad_norm"} <= set(events.Tags()["scalars"])


# --- what stops a run, and how it resumes ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_samples(tmp_path, monkeypatch):
    trainer = build_trainer(
        tmp_path, max_steps=5, save_steps=1, per_device_train_batch_size=2, train_sampling_strategy="sequential"
    )
    real = DecoSFTTrainer.compute_loss

    def failing(self, *args, **kwargs):
        return real(self, *args, **kwargs) * (math.nan if self.state.global_step == 2 else 1)

    monkeypatch.setattr(DecoSFTTrainer, "compute_loss", failing)
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 3, on samples sample-4, sample-5\."):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    named = dict(trainer.model.named_parameters())
    assert not (tmp_path / "checkpoint-3").exists()
    assert all(torch.equal(saved[name], parameter) for name, parameter in named.items() if name in saved)


@pytest.mark.newest
def test_a_checkpoint_has_its_name_only_when_it_is_complete(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, max_steps=4, save_steps=1, save_total_limit=2)
    real = DecoSFTTrainer._save_rng_state

    def failing(self, output_dir):  # the last of a checkpoint's parts but one
        if self.state.global_step == 3:
            assert (tmp_path / INCOMPLETE / "checkpoint-3" / "model.safetensors").exists()
            raise OSError("No space left on device")
        real(self, output_dir)

    monkeypatch.setattr(DecoSFTTrainer, "_save_rng_state", failing)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.setattr(DecoSFTTrainer, "_save_rng_state", real)
    resumed = build_trainer(tmp_path, max_steps=4, save_steps=1, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert not (tmp_path / INCOMPLETE).exists()


def test_a_checkpoint_is_replaced_by_a_run_that_resumed_from_an_older_one(tmp_path):
    build_trainer(tmp_path, max_steps=3, save_steps=1).train()
    (tmp_path / "checkpoint-3" / "stale").touch()
    build_trainer(tmp_path, max_steps=3, save_steps=1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "checkpoint-3" / "stale").exists()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()


def test_the_best_checkpoint_has_its_final_name(tmp_path):
    trainer = DecoSFTTrainer(
        model=tiny.build_model(),
        args=DecoSFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=4,
            eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, save_total_limit=1,
            learning_rate=1e-3,
        ),
        train_dataset=build_dataset(),
        eval_dataset=build_dataset(conversations(4)),
        processing_class=tiny_training.build_processor(),
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert INCOMPLETE not in best
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert all(
        torch.equal(value, trainer.model.state_dict()[name])
        for name, value in load_file(f"{best}/model.safetensors").items()
    )


def losses(output_dir) -> dict[int, tuple]:
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return losses_of(json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"])


def losses_of(log_history: list[dict]) -> dict[int, tuple]:
    return {log["step"]: (log["loss"], log["grad_norm"]) for log in log_history if "loss" in log}


@pytest.mark.newest
@pytest.mark.usefixtures("_fast_streams")
@pytest.mark.parametrize(
    ("config", "streaming"),
    [(None, False), ("stage2_lora.yaml", False), pytest.param(None, True, marks=pytest.mark.slow)],
    ids=["full", "LoRA", "streamed"],
)
def test_a_resumed_run_has_the_losses_of_the_whole_one(config, streaming, checkpoint, data, template, tmp_path):
    # 24 samples are 6 steps: the run goes into a second epoch
    settings = {"max_steps": 8, "save_steps": 4, "train_sampling_strategy": "group_by_length", "save_total_limit": 9}
    settings |= {"pooled_grid_sizes": [1, 2, 3], "chat_template": template, "gradient_accumulation_steps": 2}
    settings |= {"streaming": streaming, "resume_from_checkpoint": "latest"}  # begins where there is none
    run(checkpoint, data, tmp_path / "whole", config, **settings)
    for step in (4, 8):  # the last is the end, and a run from there adds nothing
        source = tmp_path / "whole" / f"checkpoint-{step}"
        output_dir = tmp_path / f"from-{step}"
        trainer = run(checkpoint, data, output_dir, config, **settings | {"resume_from_checkpoint": source})
        assert losses_of(trainer.state.log_history) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "stage2_lora.yaml"])
def test_a_run_killed_at_any_step_resumes_bit_for_bit(config, checkpoint, data, template, tmp_path):
    settings = {"max_steps": 40, "save_steps": 2, "chat_template": template, "save_total_limit": 2}
    settings |= {"resume_from_checkpoint": "latest", "pooled_grid_sizes": [1, 2, 3]}
    settings |= {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1}
    whole = launch(arguments(checkpoint, data, tmp_path / "whole", config, **settings))
    assert whole.returncode == 0, whole.stderr
    words = arguments(checkpoint, data, tmp_path / "killed", config, **settings)
    rng, kills = np.random.default_rng(0), 0
    command = [sys.executable, str(CONFIGS.parent / "sft.py"), *words]
    for _ in range(30):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = set((tmp_path / "killed").glob("checkpoint-*"))
        while process.poll() is None and set((tmp_path / "killed").glob("checkpoint-*")) == seen:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait() == 0
    assert kills >= 4
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    name = "model.safetensors" if config is None else "adapter_model.safetensors"
    expected, found = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_an_adapter_of_two_backbones_has_them_joined_beside_it(backbones, data, template, tmp_path):
    vision, text = backbones
    out = tmp_path / "out"
    settings = {"vision_model_name_or_path": vision, "chat_template": template, "use_peft": True, "max_steps": 2}
    settings |= {"lora_target_modules": r".*language_model.*\.(q_proj|v_proj)", "learning_rate": 0.1, "save_steps": 1}
    trainer = run(text, data, out, pooled_grid_size=2, merge_adapter=True, **settings)
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(out / "base")
    base = AutoModelForImageTextToText.from_pretrained(out / "base")
    assert base.config.pooled_grid_size == 2
    tuned, merged = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (out, out / "merged"))
    batch = trainer.data_collator([conversation(0)])
    inputs = expand_images(batch, None, AutoProcessor.from_pretrained(out))
    with torch.no_grad():
        logits = {name: model.eval()(**inputs).logits for name, model in
                  {"trained": trainer.model, "tuned": tuned, "merged": merged, "base": base}.items()}  # fmt: skip
    torch.testing.assert_close(logits["tuned"], logits["trained"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits["merged"], logits["trained"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits["base"], logits["trained"], atol=1e-2)

    before = load_file(out / "base" / "model.safetensors")
    resumed = run(text, data, out, resume_from_checkpoint=out / "checkpoint-1", **settings)
    assert losses_of(resumed.state.log_history) == losses_of(trainer.state.log_history)
    assert all(
        torch.equal(before[name], value) for name, value in load_file(out / "base" / "model.safetensors").items()
    )


# --- the output folder -----------------------------------------------------------------------------------------------


def test_a_folder_with_a_model_is_not_written_into(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_model_and_processor", lambda *args: 1 / 0)  # before the model is loaded
    names = ["config.json", "adapter_config.json", "model-00001-of-00002.safetensors"]
    names += ["checkpoint-3/x", "merged/x", "base/x"]
    for number, name in enumerate(names):
        out = tmp_path / str(number)
        (out / name).parent.mkdir(parents=True)
        (out / name).touch()
        message = rf"has a model or checkpoints \({name.partition('/')[0]}\).*--overwrite_output"
        with pytest.raises(ValueError, match=message):
            run(checkpoint, data, out)
    for permission in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ZeroDivisionError):
            run(checkpoint, data, out, **permission)
    assert (out / name).exists()  # until the run is known to be possible


def test_overwriting_leaves_nothing_of_the_earlier_run(checkpoint, data, template, tmp_path):
    out = tmp_path / "out"
    run(
        checkpoint,
        data,
        out,
        "stage2_lora.yaml",
        max_steps=3,
        save_steps=3,
        chat_template=template,
        merge_adapter=True,
    )
    (out / "notes.txt").write_text("mine")
    run(checkpoint, data, out, max_steps=1, save_steps=1, overwrite_output_dir=True)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (out / "adapter_config.json").exists()
    assert not (out / "merged").exists()
    assert (out / "config.json").exists()
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="--overwrite_output_dir removes what --resume_from_checkpoint needs"):
        run(checkpoint, data, out, overwrite_output_dir=True, resume_from_checkpoint="latest")


def test_a_run_does_not_write_over_what_it_reads(checkpoint, data, tmp_path):
    part = shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint-3")
    for model, out, option in (
        (checkpoint, checkpoint, "model_name_or_path"),
        (checkpoint, data, "data_path"),
        (part, tmp_path / "out", "model_name_or_path"),
    ):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"--output_dir .* contains --{option} .*, which the run reads"):
                run(model, data, out, overwrite_output_dir=overwrite)
    assert (part / "model.safetensors").exists()
    assert (checkpoint / "model.safetensors").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        run(checkpoint, data, tmp_path / "file")


# --- bad input -------------------------------------------------------------------------------------------------------


def test_model_and_data_have_no_default(data, capsys):
    with pytest.raises(SystemExit):
        parse(["--config", str(CONFIGS / "stage1.yaml"), "--output_dir", "unused"])
    assert "--data_path" in capsys.readouterr().err
    words = ["--config", str(CONFIGS / "stage1.yaml"), "--output_dir", "unused", "--data_path", str(data)]
    words += ["--bf16", "false"]
    with pytest.raises(ValueError, match="No model is named; set --model_name_or_path"):
        sft.main(*parse([*words, "--use_cpu", "true"]))


def test_impossible_settings_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = tiny.build_model(projector_type="qformer", projector_config=sizes)
    eager = tiny.build_model()
    eager.set_attn_implementation("eager")
    for settings, message in (
        (
            {"freeze": ["tower"]},
            "freeze names 'tower'; the parts are vision_tower, multi_modal_projector, language_model",
        ),
        ({"pooled_grid_sizes": [2, 7]}, "pooled_grid_sizes=7: 7 x 7 is larger than the 6 x 6 patches"),
        ({"pooled_grid_sizes": [0]}, "positive int"),
        ({"packing": True}, "packing=True works for texts alone"),
        ({"pooled_grid_sizes": [1, 2], "pooled_grid_weights": [1.0]}, "1 numbers for 2 pooled_grid_sizes"),
        ({"pad_token": "<pad>"}, "pad_token='<pad>' has no effect here.*--chat_template"),
        ({"eos_token": "<pad>"}, "eos_token='<pad>' has no effect here.*--chat_template"),
        ({"chat_template_path": "<pad>"}, "chat_template_path='<pad>' has no effect here.*--chat_template"),
        ({"model": eager, "independent_turns": True}, "only sdpa attention takes"),
        (
            {"model": qformer, "pooled_grid_sizes": [2, 3]},
            "projector_type='qformer' has one grid; avg_pool and c_abstractor take any",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_trainer(tmp_path, **settings)


def test_impossible_runs_are_refused(checkpoint, data, template, backbones, tmp_path):
    vision, text = backbones
    joined = {"vision_model_name_or_path": vision, "use_peft": True}
    for model, config, settings, message in (
        (checkpoint, None, {"projector_type": "qformer"}, "has a projector already. Leave out --projector_type"),
        (
            checkpoint,
            None,
            {"freeze": "vision_tower", "dtype": "bfloat16"},
            "frozen parts are in torch.bfloat16.*--bf16 true",
        ),
        (
            checkpoint,
            "stage2_lora.yaml",
            {"freeze": ["vision_tower", "multi_modal_projector"]},
            "multi_modal_projector is in freeze and in PEFT's modules_to_save",
        ),
        (checkpoint, "stage2_lora.yaml", {"pooled_grid_size": 2}, "An adapter keeps its model's grid"),
        (text, None, joined | {"push_to_hub": True, "hub_model_id": "me/it"}, "leave out --push_to_hub and ZeRO-3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, data, tmp_path / "out", config, chat_template=template, **settings)


@pytest.mark.parametrize("config", [None, "stage2_lora.yaml"])
def test_a_pushed_run_has_decos_card(config, checkpoint, data, template, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "cache").install(monkeypatch)
    hub.commit("someone/base", checkpoint)
    run(
        "someone/base",
        data,
        tmp_path / "tuned",
        config,
        chat_template=template,
        push_to_hub=True,
        hub_model_id="me/it",
    )
    card = ModelCard((hub.snapshot("me/it") / "README.md").read_text())
    assert (card.data.pipeline_tag, card.data.base_model) == ("image-text-to-text", ["someone/base"])
    assert card.data.library_name == ("transformers" if config is None else "peft")
    assert {"deco", "token-compression", "trl", "sft"} <= set(card.data.tags)
    assert 'pipeline("image-text-to-text", model="me/it")' in card.text
    weights = "model.safetensors" if config is None else "adapter_model.safetensors"
    assert {weights, "processor_config.json"} <= {path.name for path in hub.snapshot("me/it").iterdir()}


def test_another_model_is_refused_with_what_to_do(data, tmp_path):
    from transformers import VipLlavaConfig

    VipLlavaConfig().save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match=r"is a 'vipllava' model, not a DeCo: .* deco convert makes one of a LLaVA"):
        run(tmp_path / "llava", data, tmp_path / "out")


def test_every_config_is_read_to_the_last_field():
    for path in sorted(CONFIGS.glob("*.yaml")):
        parse(["--config", str(path), "--output_dir", "unused", "--data_path", "unused", "--bf16", "false"])
        assert "Source:" in path.read_text()


# --- the check on a GPU ----------------------------------------------------------------------------------------------

GPU_CHECK = CONFIGS.parent / "gpu_check.sh"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_check_says_what_it_cannot_run(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    command = [GPU_CHECK, "--out", tmp_path / "gpu_check.json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "not run: 7b, stage1, stage2_lora, stage2_qlora: this machine has no CUDA device" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_gpu_check_runs_every_stage(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CI": "1"}
    command = [GPU_CHECK, "--shape", "tiny", "--out", tmp_path / "gpu_check.json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(report["rows"]) == [
        f"tiny {stage} avg_pool-144" for stage in ("stage1", "stage2_full", "stage2_lora", "stage2_qlora")
    ]
    for row in report["rows"].values():
        assert row["images_per_second"]["median"] > 0
        assert row["peak_memory_gib"] > 0
        assert len(row["losses"]) == 6
    assert json.loads(result.stdout.splitlines()[-1]) == report
