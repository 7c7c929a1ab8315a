# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Learning from the full grid: the loss by hand, the teacher that stays, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

import tiny_training
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_training import arguments, build_dataset, conversation, conversations, launch, launch_on_cpus, run
from trl import ModelConfig, TrlParser

from modeling_deco.training import CacheArguments, CacheError, DecoArguments, DecoSFTConfig, DecoSFTTrainer
from modeling_deco.training.collator import IGNORE_INDEX, DecoCollator, expand_images
from modeling_deco.training.distillation import kl_divergence

TARGETS = r".*language_model.*\.(q_proj|v_proj|down_proj)"
FULL_GRID = 6
ELASTIC = {"distill": "logits", "pooled_grid_sizes": [1, 2, 3], "learning_rate": 1e-2}


def lora(**kwargs) -> LoraConfig:
    settings = {"r": 4, "target_modules": TARGETS, "modules_to_save": ["multi_modal_projector"]} | kwargs
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def build_trainer(output_dir, peft_config=None, examples=None, model=None, **kwargs) -> DecoSFTTrainer:
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    settings |= {"max_steps": 3, "save_strategy": "no", "train_sampling_strategy": "sequential"} | ELASTIC | kwargs
    dataset = build_dataset(examples)
    return DecoSFTTrainer(
        model=model or tiny.build_model(image_positions="patch"),
        args=DecoSFTConfig(output_dir=str(output_dir), **settings),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)) if "eval_strategy" in kwargs else None,
        processing_class=tiny_training.build_processor(),
        peft_config=peft_config,
    )


def losses_of(trainer, name="loss") -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def log_probabilities(model, example, grid, independent_turns=False) -> torch.Tensor:
    """Of all next tokens, at the tokens of the answers."""
    processor = tiny_training.build_processor()
    collator = DecoCollator(processor, independent_turns=independent_turns)
    batch = expand_images(collator([example]), grid, processor)
    is_learned = batch.pop("labels")[0, 1:] != IGNORE_INDEX
    with torch.no_grad():
        return model(**batch).logits[0, :-1][is_learned].log_softmax(-1)


def by_hand(student, examples, grid, **kwargs) -> float:
    """The divergence of a model at a grid from the untrained one at the full grid, averaged over tokens."""
    teacher, total, number = tiny.build_model(image_positions="patch"), 0.0, 0
    for example in examples:
        expected = log_probabilities(teacher, example, FULL_GRID, **kwargs)
        found = log_probabilities(student, example, grid, **kwargs)
        total += (expected.exp() * (expected - found)).sum().item()
        number += len(expected)
    return total / number


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent_turns", [False, True])
def test_the_loss_is_that_by_hand_before_training_and_after(independent_turns, tmp_path):
    """Batches of two images, one and none, over two micro-batches, with the step's own grid."""
    turns = {"independent_turns": independent_turns}
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = build_trainer(
        tmp_path, lora(), eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3, **settings, **turns
    )
    examples = conversations(6)
    untrained = tiny.build_model(image_positions="patch")
    expected = by_hand(untrained, examples, trainer.grid_of_step(0), **turns)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1
    # evaluation's grid is the model's own; Trainer averages over batches of 3 and 1
    student = trainer.model.eval()
    batches = [by_hand(student, examples[start:end], None, **turns) for start, end in ((0, 3), (3, 4))]
    assert losses_of(trainer, "eval_loss") == [pytest.approx((3 * batches[0] + batches[1]) / 4, rel=1e-4)]


def test_at_the_full_grid_a_fresh_adapter_has_nothing_to_learn(tmp_path):
    model = tiny.build_model(image_positions="patch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = build_trainer(tmp_path, lora(lora_dropout=0.0), pooled_grid_sizes=[FULL_GRID], model=model)
    trainer.train()
    assert losses_of(trainer) == losses_of(trainer, "grad_norm") == [0, 0, 0]
    trained = trainer.model.get_base_model().model.multi_modal_projector.modules_to_save["default"].state_dict()
    assert all(torch.equal(value, before[f"model.multi_modal_projector.{name}"]) for name, value in trained.items())


def test_the_student_learns_and_the_teacher_stays(tmp_path, monkeypatch):
    from modeling_deco.training import trainer as module

    states = []
    monkeypatch.setattr(module, "kl_divergence", lambda *args: states.append(args[:2]) or kl_divergence(*args))
    examples = [conversation(index) for index in range(4)]
    trainer = build_trainer(
        tmp_path, lora(lora_dropout=0.3), examples, pooled_grid_sizes=[2], max_steps=12,
        per_device_train_batch_size=4, gradient_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    losses, teachers = losses_of(trainer), [teacher for _, teacher in states]
    assert losses[-1] < 0.5 * losses[0]
    assert all(student.requires_grad and not teacher.requires_grad for student, teacher in states)
    assert all(torch.equal(teacher, teachers[0]) for teacher in teachers)  # no dropout either


def test_the_tower_encodes_an_image_once_for_teacher_and_student(tmp_path):
    calls = {}
    for name, targets in (("frozen", TARGETS), ("adapted", r".*(vision_tower|language_model).*\.q_proj")):
        trainer = build_trainer(tmp_path, lora(target_modules=targets), max_steps=2, gradient_checkpointing=False)
        tower, calls[name] = trainer.model.get_base_model().model.vision_tower, 0
        real = type(tower.encoder.layers[0]).forward

        def counted(*args, name=name, real=real, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        tower.encoder.layers[0].forward = counted.__get__(tower.encoder.layers[0])
        trainer.train()
        assert "forward" not in vars(tower)
    assert calls == {"frozen": 2, "adapted": 4}


@pytest.mark.parametrize(
    "fields",
    [{"model_type": "llama"}, {"model_type": "cohere", "logit_scale": 0.0625}]
    + [{"model_type": "granite", "logits_scaling": 8.0}, {"model_type": "gemma2", "final_logit_softcapping": 3.0}],
    ids=lambda fields: fields["model_type"],
)
def test_logits_are_scaled_and_capped_as_the_language_models(fields):
    from modeling_deco.modeling_deco import _finish_logits

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 8, generator=generator).requires_grad_() for _ in range(2))
    head, config = torch.nn.Linear(8, 64), SimpleNamespace(**fields)
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace(text_config=config))
    expected = torch.nn.functional.kl_div(
        *(_finish_logits(head(states), config).log_softmax(-1) for states in (student, teacher.detach())),
        log_target=True,
        reduction="sum",
    )
    (expected_gradient,) = torch.autograd.grad(expected, student)
    found = kl_divergence(student, teacher.detach(), model)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], expected_gradient)
    assert kl_divergence(student[:0], teacher[:0], model).item() == 0


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation") / "model"
    return tiny_training.save_checkpoint(folder, image_positions="patch")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_training.save_dataset(tmp_path_factory.mktemp("distillation") / "data")


CONFIG = "tune_without_labels.yaml"
SMALL = {"pooled_grid_sizes": [1, 2, 3], "train_sampling_strategy": "sequential"}


def history(trainer) -> list[tuple[float, float]]:
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def test_cached_features_give_the_losses_of_images(checkpoint, data, tmp_path):
    settings = SMALL | {"distill": "logits", "max_steps": 4, "per_device_train_batch_size": 6}
    images = run(checkpoint, data, tmp_path / "images", CONFIG, **settings)
    words = arguments(checkpoint, data, "unused", CONFIG, feature_cache=tmp_path / "cache", **settings)
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments))
    tiny_training.load_script("cache_features.py").main(*parser.parse_args_and_config(words))
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert set(manifest["grids"]) == {"1x1", "2x2", "3x3", "6x6"}
    cached = run(checkpoint, data, tmp_path / "cached", CONFIG, feature_cache=tmp_path / "cache", **settings)
    torch.testing.assert_close(torch.tensor(history(cached)), torch.tensor(history(images)), atol=1e-6, rtol=1e-5)


def test_a_cache_without_the_full_grid_is_refused(checkpoint, data, tmp_path):
    words = arguments(checkpoint, data, "unused", CONFIG, feature_cache=tmp_path / "cache", **SMALL)
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments))
    tiny_training.load_script("cache_features.py").main(*parser.parse_args_and_config(words))
    with pytest.raises(CacheError, match=r"has the grids 1x1, 2x2, 3x3, but not 6x6\. Write one with all grids"):
        run(checkpoint, data, tmp_path / "out", CONFIG, feature_cache=tmp_path / "cache", distill="logits", **SMALL)


def test_a_resumed_run_has_the_losses_of_the_whole_one(checkpoint, data, tmp_path):
    settings = SMALL | {"distill": "logits", "max_steps": 4, "save_steps": 2, "save_total_limit": 9}
    whole = run(checkpoint, data, tmp_path / "whole", CONFIG, **settings)
    resumed = run(
        checkpoint, data, tmp_path / "out", CONFIG, **settings,
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2",
    )  # fmt: skip
    assert history(resumed) == history(whole)


@pytest.mark.newest
def test_the_config_tunes_adapters_and_projector_with_and_without_distillation(checkpoint, data, tmp_path):
    for name, settings in (("answers", {}), ("logits", {"distill": "logits"})):
        trainer = run(
            checkpoint, data, tmp_path / name, CONFIG, max_steps=2, learning_rate=1e-2, merge_adapter=True,
            **SMALL, **settings,
        )  # fmt: skip
        trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert {name for name in trained if "vision_tower" in name} == set()
        assert all("lora_" in name or "modules_to_save" in name for name in trained)
        config = json.loads((tmp_path / name / "merged" / "config.json").read_text())
        assert config["image_positions"] == "patch"
    answers, logits = (load_file(tmp_path / name / "merged" / "model.safetensors") for name in ("answers", "logits"))
    assert not torch.equal(*(weights["model.multi_modal_projector.linear_1.weight"] for weights in (answers, logits)))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_not_the_teacher_is_refused(tmp_path):
    in_place = get_peft_model(tiny.build_model(), lora(modules_to_save=None))
    in_place.get_base_model().model.multi_modal_projector.requires_grad_(True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = tiny.build_model(projector_type="qformer", projector_config=sizes)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for peft_config, settings, message in (
        (None, {}, "this run has no adapter and trains the model in place"),
        (None, {"freeze": ["language_model"]}, "this run has no adapter"),
        (None, {"model": in_place}, r"trains weights in place \(.*multi_modal_projector.*and 1 more\)"),
        (lora(bias="all"), {}, r"trains weights in place \(.*bias"),
        (lora(modules_to_save=None), {}, "nothing trains the projector. Set --lora_modules_to_save"),
        (lora(init_lora_weights="pissa"), {}, "init_lora_weights='pissa' changes the weights"),
        (lora(modules_to_save=["multi_modal_projector", "lm_head"]), {}, "one lm_head for teacher and student"),
        (prompt, {}, "PROMPT_TUNING put new tokens beside those of the text"),
        (lora(), {"model": qformer, "pooled_grid_sizes": None}, "projector_type='qformer' has one grid"),
        (lora(), {"distill": "answers"}, "distill must be 'logits' or left out, got 'answers'"),
        (lora(), {"loss_type": "dft"}, "is a loss of its own; leave out loss_type"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            build_trainer(tmp_path, peft_config, **settings)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_other_adapters_learn(settings, tmp_path):
    trainer = build_trainer(tmp_path, lora(**settings), max_steps=2)
    expected = by_hand(tiny.build_model(image_positions="patch"), conversations(8), trainer.grid_of_step(0))
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-4)


def test_a_projector_that_is_frozen_on_purpose_is_not_trained(tmp_path):
    trainer = build_trainer(tmp_path, lora(modules_to_save=None), freeze=["vision_tower", "multi_modal_projector"])
    trainer.train()
    assert losses_of(trainer)[0] > 0


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.enable_socket  # processes talk over localhost
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_have_the_losses_of_one(config, checkpoint, tmp_path):
    """In each step one process has images, and the other has none."""
    examples = [conversation(index, num_images=0 if index % 8 > 3 else 1 + index % 2) for index in range(32)]
    data = tiny_training.save_dataset(tmp_path / "data", examples)
    settings = SMALL | {"distill": "logits", "max_steps": 4, "save_steps": 4, "learning_rate": 1e-2, "lora_dropout": 0}
    for name, size, start in (
        ("one", 8, launch),
        ("two", 4, lambda words: launch_on_cpus(words, config)),
    ):
        words = arguments(checkpoint, data, tmp_path / name, CONFIG, per_device_train_batch_size=size, **settings)
        result = start(words)
        assert result.returncode == 0, result.stderr
    one, two = (
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        for name in ("one", "two")
    )
    one, two = (
        torch.tensor([(log["loss"], log["grad_norm"]) for log in logs if "loss" in log]) for logs in (one, two)
    )
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
        assert expected[name].any()  # B starts at zero
