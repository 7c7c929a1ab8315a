# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The comparison of projectors: a small one from start to end, and what its table says."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("trl")

from tiny_training import CONFIGS
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.training.trainer import DecoSFTTrainer
from modeling_deco.worlds.digits import comparison_report, comparison_run
from modeling_deco.worlds.digits.comparison import CompareArguments, Run, check, planned_runs
from modeling_deco.worlds.digits.curve import forced_accuracy
from modeling_deco.worlds.digits.deco_model import build_model
from modeling_deco.worlds.digits.evaluate import answer
from modeling_deco.worlds.digits.processor import build_processor
from modeling_deco.worlds.digits.questions import questions, score
from modeling_deco.worlds.digits.scenes import render

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, tower_dir):
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    processor = build_processor(12)
    build_model(tower_dir, processor, "mlp").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def arguments(folder, output_dir, **kwargs):
    fields = {
        "backbones": str(folder),
        "output_dir": str(output_dir),
        "projectors": {"mlp": {}, "avg_pool": {}, "qformer": SIZES},
        "pooled_grid_sizes": [2],
        "seeds": [1],
        "eval_steps": 1,
        "num_eval_pictures": 2,
        "num_test_pictures": 2,
        "num_pointing_pictures": 2,
        "parallel_runs": 2,
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
        },
        **kwargs,
    }
    return CompareArguments(**fields)


def in_threads(monkeypatch):
    """Train in threads of this process instead of new processes."""
    monkeypatch.setattr(
        comparison_run, "ProcessPoolExecutor", lambda number, mp_context: ThreadPoolExecutor(min(number, 1))
    )


def test_a_comparison_from_start_to_end(backbones, tmp_path, monkeypatch, recipe):
    seen = []  # pictures of each step, run by run
    prepare_inputs = DecoSFTTrainer._prepare_inputs

    def record(trainer, inputs):
        seen.append(inputs["pixel_values"].sum(dim=(1, 2, 3)))
        return prepare_inputs(trainer, inputs)

    monkeypatch.setattr(DecoSFTTrainer, "_prepare_inputs", record)
    in_threads(monkeypatch)
    args, script = arguments(backbones, tmp_path), recipe("compare_projectors")
    script.main(args)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(result["projector_type"], result["num_tokens"]) for result in results] == [
        ("mlp", 144),
        ("avg_pool", 4),
        ("qformer", 4),
    ]
    for result in results:
        assert [point["step"] for point in result["curve"]] == [0, 1, 2]
        assert [step for step, _ in result["loss"]] == [1, 2]
    backbone = AutoModelForImageTextToText.from_pretrained(backbones).state_dict()
    for run in planned_runs(args):
        model = AutoModelForImageTextToText.from_pretrained(run.folder(args) / "model")
        assert model.config.projector_type == run.projector_type
        for name, value in model.state_dict().items():
            if name.startswith("model.vision_tower."):
                assert torch.equal(value, backbone[name]), name
            elif name.endswith("q_proj.weight"):
                assert not torch.equal(value, backbone[name]), name
    for name in ("curves.png", "tokens.png", "relevance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(results) + 2

    # all projectors see the same pictures in the same order
    steps = len(seen) // 3
    for step in range(steps):
        assert torch.equal(seen[step], seen[steps + step])
        assert torch.equal(seen[step], seen[2 * steps + step])
    assert not torch.equal(seen[0], seen[1])

    # started again, no run is missing
    monkeypatch.setattr(comparison_run, "train_run", lambda *call: pytest.fail("trained again"))
    monkeypatch.setattr(script, "write_report", lambda found, args: reported.extend(found))
    reported = []
    script.main(args)
    assert reported == results
    with pytest.raises(
        ValueError, match=r"mlp-144-1/result\.json was made with other settings\. Choose another output_dir"
    ):
        script.main(arguments(backbones, tmp_path, num_eval_pictures=3))


def test_the_projector_is_trained_alone_at_first(backbones, tmp_path):
    args = arguments(backbones, tmp_path, alignment_steps=2, projectors={"avg_pool": {}})
    (run,) = planned_runs(args)
    comparison_run.train_run(args, run)
    warm = AutoModelForImageTextToText.from_pretrained(backbones).state_dict()
    torch.manual_seed(run.seed)
    begun = comparison_run.build_model(args, run)[0].state_dict()
    for name, value in AutoModelForImageTextToText.from_pretrained(run.folder(args) / "model").state_dict().items():
        if "multi_modal_projector" in name:
            assert not torch.equal(value, begun[name]), name
        else:
            assert torch.equal(value, warm[name]), name


def test_runs_start_from_the_backbones_and_a_projector_of_their_own(backbones):
    args, run = arguments(backbones, "runs"), Run("qformer", 2, seed=1)
    torch.manual_seed(5)
    one, _ = comparison_run.build_model(args, run)
    torch.manual_seed(6)
    other, processor = comparison_run.build_model(args, run)
    assert processor.pooled_grid_size == 2
    warm = AutoModelForImageTextToText.from_pretrained(backbones).state_dict()
    for name, value in one.state_dict().items():
        if "multi_modal_projector" not in name:
            assert torch.equal(value, warm[name]), name
    assert not torch.equal(
        one.model.multi_modal_projector.query_tokens, other.model.multi_modal_projector.query_tokens
    )


def test_seeds_are_finished_one_after_the_other(backbones, tmp_path):
    args = arguments(backbones, tmp_path, seeds=[1, 2], pooled_grid_sizes=[2, 3])
    assert [run.name for run in planned_runs(args)] == [
        *("mlp-144-1", "avg_pool-4-1", "avg_pool-9-1", "qformer-4-1", "qformer-9-1"),
        *("mlp-144-2", "avg_pool-4-2", "avg_pool-9-2", "qformer-4-2", "qformer-9-2"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projectors": {"perceiver": {}}}, "projector_type must be one of .* got 'perceiver'"),
        ({"projectors": {"qformer": {"depth": 3}}}, "got 'depth'"),
        ({"pooled_grid_sizes": [13]}, "pooled_grid_size=13: 13 x 13 is larger than the"),
        (
            {"training": {"max_steps": 2, "learning_rates": 1}},
            "training has learning_rates, which DecoSFTConfig does",
        ),
        ({"training": {"max_steps": 2, "seed": 1}}, "training has seed. Remove it: the comparison sets it itself"),
        ({"training": {"bf16": False}}, "training needs max_steps of at least 1, got None"),
        ({"alignment_steps": 3}, "alignment_steps must be 0 to max_steps=2, got 3"),
        ({"num_pointing_pictures": 1}, "num_pointing_pictures must be at least 2, got 1"),
        ({"parallel_runs": 0}, "parallel_runs must be at least 1, got 0"),
        ({"seeds": []}, r"seeds must be a non-empty list, got \[\]"),
        ({"projectors": ["mlp"]}, r"projectors must be a non-empty dict, got \['mlp'\]"),
        ({"min_digits": 5, "max_digits": 4}, "min_digits=5 and max_digits=4 must satisfy"),
        ({"backbones": "nowhere"}, "backbones='nowhere' is not the folder of a DeCo checkpoint"),
        ({"backbones": str(SHIPPED_CHECKPOINT)}, "has projector_type='avg_pool', so the comparison would favour this"),
    ],
    ids=str,
)
def test_invalid_arguments_are_named(changes, message, backbones):
    with pytest.raises(ValueError, match=message):
        check(arguments(backbones, "unused", **changes))


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_fails_ends_the_comparison(processes, backbones, tmp_path, monkeypatch):
    args = arguments(backbones, tmp_path, seeds=[1, 2, 3], parallel_runs=1)
    (tmp_path / "runs").write_text("no folder can be made here")
    if not processes:
        in_threads(monkeypatch)
    with pytest.raises(RuntimeError, match="The run mlp-144-1 failed: "):
        comparison_run.train_runs(args, planned_runs(args))


def test_forced_accuracy_is_that_of_greedy_answers():
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_CHECKPOINT)
    processor = AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT)
    model.config.pooled_grid_size = processor.pooled_grid_size = 1  # a budget at which many answers are wrong
    scenes = [render("test", index, min_digits=2, max_digits=6) for index in range(12)]
    pictures = [(scene, questions(scene, np.random.default_rng(index))) for index, scene in enumerate(scenes)]
    found = forced_accuracy(model, processor, pictures)
    asked = [(scene.image, question) for scene, of_scene in pictures for question in of_scene]
    texts = answer(model, processor, [image for image, _ in asked], [question.text for _, question in asked], 1)
    hits = {}
    for (_, question), text in zip(asked, texts, strict=True):
        hits.setdefault(question.kind, []).append(score(question, text))
    assert 0 < np.mean(hits["existence"]) < 1  # neither is a test of nothing
    for kind in ("existence", "count", "colour", "read", "relation"):
        assert found[kind] == round(100 * float(np.mean(hits[kind])), 2), kind


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_configs_are_read(device):
    fields = yaml.safe_load((CONFIGS / "compare_projectors" / f"{device}.yaml").read_text())
    args = CompareArguments(**fields)
    assert set(args.projectors) == set(comparison_report.NAMES)
    assert len(args.seeds) >= 3
    assert len(args.pooled_grid_sizes) >= 2


# --- the report ------------------------------------------------------------------------------------------------------


def result(projector_type="avg_pool", num_tokens=4, seed=1, final=90.0, curve=(10, 50, 90), **kwargs):
    kinds = ("existence", "count", "colour", "relation", "locate", "read")
    return {
        "projector_type": projector_type,
        "num_tokens": num_tokens,
        "seed": seed,
        "parameters": 1234,
        "seconds": 10.0,
        "accuracy": {kind: {"accuracy": final} for kind in kinds},
        "pointing_game": {"gae": {"hit_rate": 70.0}, "chance": {"hit_rate": 5.0}},
        "curve": [{"step": 10 * i, "accuracy": dict.fromkeys(kinds, value)} for i, value in enumerate(curve)],
        **kwargs,
    }


def test_groups_count_equally_and_so_do_kinds_within_a_group():
    accuracy = {"existence": 30, "count": 60, "colour": 90, "relation": 100, "locate": 50, "read": 15}
    groups = [comparison_report.group_accuracy(accuracy, group) for group in comparison_report.GROUPS]
    assert groups == [60, 75, 15]
    assert comparison_report.steps_to({"curve": [{"step": 7, "accuracy": accuracy}]}, 50) == 7
    assert comparison_report.steps_to({"curve": [{"step": 7, "accuracy": accuracy}]}, 50.1) is None


def test_the_table_has_mean_and_spread_over_seeds():
    results = [result(seed=1, final=80.0), result(seed=2, final=90.0), result("mlp", 144, final=99.0)]
    header, _, pooled, mlp, _, notes = comparison_report.table(results, threshold=60).splitlines()
    assert "steps to 60 %" in header
    assert pooled.startswith(
        "| average pooling (DeCo) | 4 | 1,234 | 85.0 ± 7.1 | 85.0 ± 7.1 | 85.0 ± 7.1 | 70.0 ± 0.0 |"
    )
    assert "| 20, 20 |" in pooled
    assert "chance is 5.0" in notes
    assert mlp.startswith("| none (MLP) | 144 | 1,234 | 99.0 |")


def test_the_table_says_where_a_threshold_was_not_reached():
    results = [result(seed=1), result(seed=2, curve=(10, 20, 30))]
    assert "| 20, - |" in comparison_report.table(results, threshold=60)


def test_run_names_tell_runs_apart():
    assert Run("qformer", 6, 3).name == "qformer-36-3"
