# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""TRL's DPOTrainer on image preferences, unchanged."""

import math

import pytest
import tiny
import torch

pytest.importorskip("trl")

import tiny_training
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

# The last pair has no image. Chosen and rejected answers have unlike lengths.
PREFERENCES = [
    {"picture": 0, "question": "what is this ?", "chosen": "a red cat .", "rejected": "a dog ."},
    {"picture": 1, "question": "is this a dog ?", "chosen": "the dog is blue .", "rejected": "two"},
    {"picture": None, "question": "what is a cat ?", "chosen": "a cat .", "rejected": "is this red ?"},
]
# `post_layernorm` is never run: features are hidden states. A key's bias shifts all scores of a row alike, which the
# softmax undoes, so its gradient is rounding.
WITHOUT_GRADIENT = ("post_layernorm.weight", "post_layernorm.bias", "k_proj.bias")


def dataset(preferences):
    return Dataset.from_list(
        [
            {
                "images": [] if row["picture"] is None else [tiny.picture(row["picture"])],
                "prompt": [{"role": "user", "content": row["question"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in preferences
        ]
    )


def test_pictures_of_several_views_are_preferred_too(tmp_path):
    tiny_training.save_family(tmp_path / "model", "llava_onevision")
    trainer, before = train(tmp_path / "model", tmp_path / "out")
    first, second = (log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert second < first
    assert not torch.equal(trainer.model.state_dict()["model.image_newline"], before["model.image_newline"])


def train(checkpoint, output_dir, peft_config=None, num_steps=2, preferences=PREFERENCES):
    """The trainer after steps on the same batch, and the model's weights before."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = DPOConfig(
        output_dir=str(output_dir),
        max_steps=num_steps,
        per_device_train_batch_size=len(preferences),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=dataset(preferences),
        processing_class=AutoProcessor.from_pretrained(checkpoint),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, before


@pytest.fixture(scope="module")
def full(checkpoint, tmp_path_factory):
    return train(checkpoint, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(checkpoint, tmp_path_factory):
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    peft_config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    return train(checkpoint, tmp_path_factory.mktemp("lora"), peft_config)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def log_probability(model, processor, row, answer):
    """The log-probability of an answer, summed over its tokens, from a separate forward pass."""
    image = {} if row["picture"] is None else {"images": tiny.picture(row["picture"])}
    prompt = f"<s>user : {'<image>' if image else ''}{row['question']} assistant : "
    num_prompt = processor(text=prompt, return_tensors="pt", **image)["input_ids"].shape[1]
    inputs = processor(text=prompt + answer, return_tensors="pt", **image)
    with torch.no_grad():
        log_probabilities = model(**inputs).logits[0, num_prompt - 1 : -1].log_softmax(-1)
    answer_ids = inputs["input_ids"][0, num_prompt:]
    assert len(answer_ids) == len(answer.split())
    return log_probabilities.gather(-1, answer_ids[:, None]).sum().item()


@pytest.mark.parametrize("way", ["full", "lora"])
def test_the_first_loss_is_log_2_and_the_next_is_lower(way, request):
    trainer, _ = request.getfixturevalue(way)
    first, second = logged(trainer, "loss")
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert second < first - 1e-3
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("kind", ["chosen", "rejected"])
def test_answers_are_scored_with_their_image(kind, way, request, checkpoint, model):
    trainer, _ = request.getfixturevalue(way)
    processor = AutoProcessor.from_pretrained(checkpoint)
    expected = [log_probability(model, processor, row, row[kind]) for row in PREFERENCES]
    assert logged(trainer, f"logps/{kind}")[0] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    without_images = [log_probability(model, processor, {**row, "picture": None}, row[kind]) for row in PREFERENCES]
    assert sum(without_images) != pytest.approx(sum(expected), abs=0.1)


def test_every_parameter_with_a_gradient_moves(full):
    trainer, before = full
    equal = {name for name, tensor in trainer.model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in equal if not name.endswith((*WITHOUT_GRADIENT, "position_ids"))} == set()
    assert "model.vision_tower.post_layernorm.weight" in equal


def test_the_reference_stays_what_the_policy_was(full):
    trainer, before = full
    reference = trainer.ref_model.state_dict()
    assert reference.keys() == before.keys()
    assert [name for name in before if not torch.equal(reference[name], before[name])] == []


def test_with_lora_adapters_move_and_all_else_is_bit_equal(lora):
    trainer, before = lora
    assert trainer.ref_model is None
    adapters, base = {}, {}
    for name, tensor in trainer.model.base_model.model.state_dict().items():
        (adapters if ".lora_" in name else base)[name.replace(".base_layer.", ".")] = tensor
    assert len(adapters) == 2 * 3 * 2  # A and B of three linears in each of two layers
    assert all(tensor.abs().sum() > 0 for tensor in adapters.values())  # B starts at zero
    assert base.keys() == before.keys()
    assert [name for name in before if not torch.equal(base[name], before[name])] == []


def test_a_batch_of_text_alone_moves_the_language_model_alone(checkpoint, tmp_path):
    trainer, before = train(checkpoint, tmp_path, preferences=PREFERENCES[2:])
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    moved = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {name.removeprefix("model.").split(".")[0] for name in moved} == {"language_model", "lm_head"}
