# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Each benchmark at small sizes: it runs, ends with one line of JSON, and its counts are right."""

import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.inference import load
from modeling_deco.worlds.digits.clip_questions import clip_questions
from modeling_deco.worlds.digits.clips import render_clip
from modeling_deco.worlds.digits.evaluate import answer
from modeling_deco.worlds.digits.questions import score
from modeling_deco.worlds.digits.scenes import render

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark("projectors")`: the module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def run(benchmark, capsys):
    """`run("projectors", **options)`: the JSON on the benchmark's last line."""

    def call(name: str, **options) -> dict:
        benchmark(name).main(**options)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.mark.slow
def test_projectors_are_compared_at_llavas_sizes(run, tmp_path):
    report = run("projectors", num_images=1, repeats=1, out=tmp_path)
    assert report == json.loads((tmp_path / "projectors.json").read_text())
    rows = report["projectors"]
    assert rows["avg_pool"]["parameters"] == rows["mlp"]["parameters"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert {name: row["tokens"] for name, row in rows.items()} == dict.fromkeys(rows, 144) | {"mlp": 576}
    assert rows["avg_pool"]["forward_ratio"] == 1
    assert all(
        row[f"{step}_seconds"]["median"] > 0 for row in rows.values() for step in ("forward", "forward_and_backward")
    )


def test_processors_are_compared_on_every_kind_of_input(run, tmp_path):
    report = run("processor", num_images=2, large=(320, 240), repeats=1, out=tmp_path)
    assert report == json.loads((tmp_path / "processor.json").read_text())
    rows = report["backends"]["pil"]
    assert [row["num_images"] for row in rows.values()] == [1, 2, 2, 1, 3, 8]
    for row in rows.values():
        assert row["llava"]["ratio"]["median"] == 1
        assert all(row[name]["images_per_second"]["median"] > 0 for name in ("llava", "deco", "deco-576"))


def test_a_backend_that_is_not_installed_is_reported_as_not_run(run, benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark("processor"), "is_torchvision_available", lambda: False)
    monkeypatch.setattr(benchmark("processor"), "measure", lambda backend, inputs, repeats: "measured")
    report = run("processor", num_images=2, large=(320, 240), repeats=1, out=tmp_path)
    assert report["backends"]["pil"] == "measured"
    assert report["backends"]["torchvision"] == "not run: torchvision is not installed"


# --- training --------------------------------------------------------------------------------------------------------


def fail():
    raise ValueError("no such\n  thing")


def die():
    os._exit(3)


def sleep():
    time.sleep(60)


def say():
    return {"pid": os.getpid()}


@pytest.mark.slow
def test_a_run_has_a_process_of_its_own(benchmark):
    training = benchmark("training")
    assert training.in_a_process(say)["pid"] not in (os.getpid(), training.in_a_process(say)["pid"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "reason"), [(fail, "ValueError: no such thing"), (die, "the process ended with exit code 3")]
)
def test_a_run_that_fails_is_reported_with_the_reason(function, reason, benchmark):
    assert benchmark("training").in_a_process(function) == {"failed": reason}


@pytest.mark.slow
def test_a_run_that_takes_too_long_is_ended(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark("training"), "SECONDS_PER_RUN", 1)
    assert benchmark("training").in_a_process(sleep) == {"failed": "took more than 1 s"}


def test_speed_and_memory_are_compared_with_llava_of_the_same_shape_and_stage(benchmark):
    training = benchmark("training")
    speeds = {"a stage1 avg_pool-144": 6, "a stage1 mlp-576": 2, "b stage1 avg_pool-144": 6, "a stage2 mlp-576": 1}
    rows = {}
    for name, speed in speeds.items():
        shape, stage, projector = name.split()
        rows[name] = {"shape": shape, "stage": stage, "projector": projector, "peak_memory_gib": 12 / speed}
        rows[name]["images_per_second"] = {"median": speed}
    rows["a stage2 avg_pool-144"] = {"shape": "a", "stage": "stage2", "projector": "avg_pool-144", "failed": "killed"}
    training.add_ratios(rows)
    assert rows["a stage1 avg_pool-144"]["over_llava"] == {"speed": 3, "memory": 0.33}
    assert rows["a stage1 mlp-576"]["over_llava"] == {"speed": 1, "memory": 1}
    assert "over_llava" not in rows["b stage1 avg_pool-144"]
    assert "over_llava" not in rows["a stage2 avg_pool-144"]


@pytest.mark.slow
def test_training_is_compared_with_llava_in_every_stage(tmp_path):
    command = [sys.executable, BENCHMARKS / "training.py", "--shape", "tiny", "--repeats", "2"]
    command += ["--projector", "avg_pool-144", "--projector", "mlp-576", "--out", tmp_path / "training.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "training.json").read_text())
    assert (tmp_path / "training.png").stat().st_size > 10_000
    stages = ("stage1", "stage2_full", "stage2_lora", "stage2_qlora")
    rows = report["rows"]
    assert list(rows) == [f"tiny {stage} {projector}" for stage in stages for projector in ("avg_pool-144", "mlp-576")]
    for row in rows.values():
        assert len(row["step_seconds"]) == 2 * (4 - 2)  # of two runs, without their first steps
        assert len(row["losses"]) == 4
        assert row["peak_memory_gib"] > 0
    for projector in ("avg_pool-144", "mlp-576"):
        assert rows[f"tiny stage1 {projector}"]["trained_parameters"] == 2 * (64 * 64 + 64)
        assert rows[f"tiny stage2_full {projector}"]["trained_parameters"] > 2 * (64 * 64 + 64)


# --- unused work -----------------------------------------------------------------------------------------------------


def test_bytes_are_those_that_live_at_once(benchmark):
    given = torch.ones(256)
    with benchmark("unused_work").TensorBytes() as tensors:
        one = given + 1  # 1 KiB each
        view = one[:8]
        two = one + 1
        del one
        three = given.view(16, 16) + two.view(16, 16)
    assert (tensors.peak, tensors.held) == (3 * 1024, 3 * 1024)  # `one` lives on in its view
    del view, two
    assert (tensors.peak, tensors.held) == (3 * 1024, 1024)
    assert three.shape == (16, 16)


@pytest.mark.slow
def test_savings_are_measured_with_and_without_and_the_rest_is_a_handful_of_operators(run, tmp_path):
    report = run("unused_work", vision_layers=3, text_layers=1, num_images=2, repeats=1, out=tmp_path)
    assert report == json.loads((tmp_path / "unused_work.json").read_text())
    layers, states, prefix, pooling, contiguous, grids = report["savings"].values()
    width = 1024
    layer = 4 * (4 * (width * width + width) + 2 * 4 * width * width + 5 * width + 4 * width)  # float32
    assert layers["without"]["stored_bytes"] - layers["with"]["stored_bytes"] == layer
    state = 4 * 577 * width
    kept = states["without"]["kept_bytes"] - states["with"]["kept_bytes"]
    assert kept == 2 * state  # embeddings and the first of two layers
    assert prefix["without"]["kept_bytes"] - prefix["with"]["kept_bytes"] == 2 * 4 * 896  # of two images
    assert pooling["without"]["peak_bytes"] > 3 * pooling["with"]["peak_bytes"]
    assert all(saving["ratio"]["median"] > 0 for saving in (contiguous, grids))
    operators = report["forward"]["operators_outside"]
    assert operators["aten.masked_scatter.default"] == operators["aten.cat.default"] == 1
    assert operators["aten.item.default"] == 1  # that the placeholders are as many as the features
    assert sum(operators.values()) <= 16


def test_inference_is_compared_with_llava_and_with_the_limit(run, tmp_path):
    report = run(
        "inference",
        shapes=["digits"],
        grids=[6],
        variants=["default", "int8"],
        batch_sizes=[2],
        repeats=1,
        new_tokens=3,
        out=tmp_path,
    )
    (rows,) = report["results"].values()
    assert [(row["variant"], row["model"], row["image_tokens"]) for row in rows] == [
        (variant, *subject) for variant in ("default", "int8") for subject in (("LLaVA", 144), ("DeCo", 36))
    ]
    llava, deco, llava_int8, deco_int8 = rows
    assert llava["first_token_speedup"] == llava["first_token_speedup_alike"] == 1
    assert llava_int8["first_token_speedup_alike"] == 1 != llava_int8["first_token_speedup"]
    # keys and values of 2 prompts, in 4 layers, of 4 heads of 32 numbers, in float32
    assert deco["kv_cache_bytes"] == 2 * 2 * 4 * (36 + 40) * 4 * 32 * 4
    assert llava["kv_cache_bytes"] / deco["kv_cache_bytes"] == (144 + 40) / (36 + 40)
    assert llava["weights_bytes"] > deco["weights_bytes"] > 2 * deco_int8["weights_bytes"]  # of fewer vision layers
    assert llava["peak_bytes"] > llava["weights_bytes"] + llava["kv_cache_bytes"]
    assert (tmp_path / "inference.png").exists()


def test_inference_compares_a_convolutional_tower_with_the_full_grid(run, tmp_path):
    report = run("inference", shapes=["lite0"], num_layers=1, variants=["int8"], repeats=1, new_tokens=3, out=tmp_path)
    (rows,) = report["results"].values()
    found = [(row["variant"], row["model"], row["image_tokens"]) for row in rows]
    tokens = [("full grid", 196), ("DeCo", 49), ("DeCo", 25), ("DeCo", 16)]
    assert found == [(variant, *row) for variant in ("default", "int8") for row in tokens]
    assert all(row["seconds"]["vision_tower"]["median"] > 0 for row in rows)


@torch.inference_mode()
def test_inference_gives_llava_and_deco_the_same_weights(benchmark):
    inference = benchmark("inference")
    deco, llava = inference.build("digits")
    deco = inference.at_grid(deco, 12)  # of the patches
    inputs = inference.build_inputs(deco, 2)
    assert torch.equal(deco(**inputs).logits, llava(**inputs).logits)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("shape", "num_tokens"), [("next", (3 * 576 + 24, 3 * 64 + 8)), ("onevision", (2 * 729 + 27, 2 * 81 + 9))]
)
def test_inference_gives_llavas_of_high_resolution_and_deco_the_same_weights(
    shape, num_tokens, benchmark, monkeypatch
):
    inference, shapes = benchmark("inference"), benchmark("shapes")

    def small_config(*args):
        config = shapes.build_views_config(*args)
        for part in (config.vision_config, config.text_config):
            part.hidden_size, part.intermediate_size, part.num_attention_heads = 32, 48, 2
        return config

    monkeypatch.setattr(inference, "build_views_config", small_config)
    deco, llava = inference.build(shape, num_layers=1)
    picture = {"next": (336, 672), "onevision": (384, 384)}[shape]
    (side, _) = deco.config.patch_grid
    for grid, expected in zip((side, side // 3), num_tokens, strict=True):
        pooled = inference.at_grid(deco, grid)
        inputs = inference.build_inputs(pooled, 1, picture)
        assert inputs["input_ids"].shape[1] == expected + shapes.NUM_TEXT_TOKENS
        logits = pooled(**inputs, logits_to_keep=1).logits
        assert grid != side or torch.equal(logits, llava(**inputs, logits_to_keep=1).logits)
    for model in (deco, llava):
        patches = torch.randn(len(inputs["pixel_values"][0]), side * side, model.config.vision_config.hidden_size)
        assert inference.project(model, patches, inputs["image_sizes"])() is not None


@pytest.mark.slow
def test_inference_compiles_at_several_batch_sizes(run, tmp_path, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, mode, **kwargs: compile(*args, **kwargs | {"backend": "eager"})
    )
    sizes = {"shapes": ["digits"], "grids": [6], "batch_sizes": [1, 2], "repeats": 1, "new_tokens": 3}
    report = run("inference", variants=["compiled"], **sizes, out=tmp_path)
    assert [row["variant"] for rows in report["results"].values() for row in rows[2:]] == ["compiled"] * 4


def test_inference_shares_the_tower_of_all_grids_which_may_be_compiled(benchmark):
    deco, _ = benchmark("inference").build("digits")
    assert benchmark("inference").at_grid(deco, 3).model.vision_tower is deco.model.vision_tower


def test_inference_counts_weights_of_torchao_as_they_are_stored(benchmark):
    torchao = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(64, 32, bias=False)
    tensors_of = benchmark("inference").tensors_of
    assert sum(tensor.nbytes for tensor in tensors_of(linear.weight)) == 4 * 32 * 64
    torchao.quantize_(linear, torchao.Int8DynamicActivationInt8WeightConfig())
    assert sum(tensor.nbytes for tensor in tensors_of(linear.weight)) == pytest.approx(32 * 64, rel=0.1)


def test_scaling_counts_the_work_of_each_point(run, tmp_path):
    report = run("scaling", shape="tiny", num_layers=1, repeats=1, out=tmp_path)
    curves = report["curves"]
    assert [row["image_tokens"] for row in curves["image_tokens"]] == [1, 4, 16, 36, 64, 144, 256, 400, 576]
    assert len({row["flops"]["vision_tower"] for row in curves["image_tokens"]}) == 1
    for name in ("images_per_prompt", "batch_size"):
        one, *_, eight = curves[name]
        assert eight["flops"]["vision_tower"] == 8 * one["flops"]["vision_tower"]
    # attention is within a prompt; the angles of positions are counted once for all prompts
    assert eight["flops"]["language_model"] == pytest.approx(8 * one["flops"]["language_model"], rel=1e-3)
    assert eight["kv_cache_bytes"] == 8 * one["kv_cache_bytes"]
    work = report["work_at_7b"]["image_tokens"]["144"]
    layers, hidden, inner = 32, 4096, 11008
    assert work["kv_cache_bytes"] == 2 * layers * hidden * (144 + 40) * 2
    linears = 2 * layers * (4 * hidden**2 + 3 * hidden * inner) * (144 + 40)
    assert linears < work["language_model_flops"] < 1.05 * linears  # attention is the rest


def test_conversations_are_timed_turn_by_turn(run, tmp_path):
    report = run("chat", shape="tiny", num_layers=1, turns=3, answer_tokens=4, repeats=1, out=tmp_path)
    assert [row["prompt_tokens"] for row in report["time_to_first_token"]] == [168, 196, 224]


# --- full grid -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return load(SHIPPED_CHECKPOINT, device="cpu", dtype="float32")


@pytest.mark.parametrize("image_positions", ["patch", "sequence"])
def test_answers_that_are_read_off_drafts_are_those_of_generate(benchmark, shipped, image_positions, monkeypatch):
    full_grid, (model, processor) = benchmark("full_grid"), shipped
    pictures = full_grid.read_pictures(model.model.vision_tower, processor, "test", range(2))
    found = full_grid.greedy_answers(model, processor, pictures, 4, image_positions)
    monkeypatch.setattr(model.config, "image_positions", image_positions)
    for index, (turns, answers) in enumerate(zip(pictures.turns, found, strict=True)):
        image, texts = render("test", index, min_digits=2).image, [turn.question.text for turn in turns]
        with torch.autocast("cpu", torch.bfloat16):  # as the benchmark
            assert answers == answer(model, processor, [image] * len(texts), texts, 4)


def test_other_ways_to_fewer_tokens_are_what_they_say(benchmark, shipped):
    full_grid, (model, _) = benchmark("full_grid"), shipped
    features = torch.randn(1, 144, 128)
    project = model.model.multi_modal_projector.project
    patches = features.view(12, 12, 128)
    expected = torch.stack([patches[row, col] for row in (1, 4, 7, 10) for col in (1, 4, 7, 10)])
    torch.testing.assert_close(full_grid.central_patches(model, features, 4)[0], project(expected))
    means = project(patches).view(4, 3, 4, 3, 128).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(full_grid.pooled_after_mlp(model, features, 4)[0], means)


def test_a_conversation_teaches_every_answer_at_varied_distances(benchmark, shipped):
    full_grid, (model, processor) = benchmark("full_grid"), shipped
    (turns,) = full_grid.read_pictures(model.model.vision_tower, processor, "test", range(1)).turns
    distances = set()
    for seed in range(8):
        row = full_grid.conversation(turns, processor.tokenizer, np.random.default_rng(seed))
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == token]
        assert sorted(learned) == sorted(token for turn in turns for token in turn.answer)
        distances.add(row["input_ids"].index(turns[0].asked[-1]) - row["input_ids"].index(processor.image_token_id))
    assert len(distances) > 4


@pytest.mark.slow
def test_positions_and_tuning_without_labels_are_measured_from_the_same_starts(run, tmp_path):
    options = {"seeds": [1, 2], "small": True, "runs": tmp_path / "runs", "out": tmp_path}
    report = run("positions", **options)
    assert report == json.loads((tmp_path / "positions.json").read_text())
    starts = ["llama fixed", "llama varied", "qwen2 fixed", "qwen2 varied"]
    assert list(report["untrained"]) == starts
    assert list(report["untrained"]["llama fixed"]["average pooling"]) == [
        *("144", "100", "64", "49", "36", "25", "16", "9", "4")
    ]
    assert list(report["elastic"]) == [f"{name} {positions}" for name in starts for positions in ("patch", "sequence")]
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    assert report["untrained"] == run("positions", **options)["untrained"]  # from its cells
    tuned = run("without_labels", **options)["tuned"]
    assert list(tuned) == ["fixed", "varied"]
    assert len(tuned["fixed"]) == 2 * 2 * 1 + 2
    assert all(path.stat().st_mtime_ns == written for path, written in cells.items())


# --- tiles and clips -------------------------------------------------------------------------------------------------


def test_answers_about_stitched_tiles_are_those_of_generate(benchmark, shipped):
    tiles, (model, processor) = benchmark("tiles"), shipped
    pictures = tiles.read_pictures(processor, model.model.vision_tower, "test", 1, scale=2, tiles=4)
    found = tiles.measure(model, processor, pictures, scale=2, tiles=4)
    image = render("test", 0, seed=2, min_digits=2, scale=2).image
    questions = [turn.question for turn in pictures.turns[0] if turn.question.kind in ("colour", "read")]
    prompts = [f"<bos><user><image>{question.text}<assistant>" for question in questions]
    for grid in (6, 24):
        options = {"tiles": 4, "pooled_grid_size": grid, "add_special_tokens": False, "padding": True}
        inputs = processor(images=[image] * len(prompts), text=prompts, return_tensors="pt", **options)
        with torch.autocast("cpu", torch.bfloat16):  # as the benchmark
            generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = {question.kind: [score(question, text)] for question, text in zip(questions, answers, strict=True)}
        assert {kind: found[str(grid)][kind] for kind in right} == right


def test_a_box_within_its_tile_is_what_the_tower_sees_there(benchmark):
    tiles = benchmark("tiles")
    box = (100, 90, 124, 118)  # of 192 x 192 pixels: the center is in the tile on the lower right
    question = tiles.Question("locate", "", "", box=tuple(edge / 2 for edge in box))
    assert tiles.within_tile(question, 4).box == (4, -6, 28, 22)
    assert tiles.within_tile(question, 1) == question


def test_answers_about_clips_are_those_of_generate(benchmark, monkeypatch):
    videos, said = benchmark("videos"), []
    model, processor = videos.build_model()
    budget = videos.Budget(2, 3)
    clips = videos.read_clips(model.model.vision_tower, "test", 1)
    monkeypatch.setattr(videos, "score_clip", lambda question, text, clip: said.append(text))
    videos.measure(model, processor, clips, budget, "in order")
    clip = render_clip("test", 0)
    texts = [question.text for question in clip_questions(clip, np.random.default_rng(0))][:2]
    with torch.autocast("cpu", torch.bfloat16):  # as the benchmark
        assert videos.answers_about(model, processor, list(clip.frames), texts, budget) == said[:2]
    assert len(set(said)) > 1


@pytest.mark.slow
def test_tiles_and_one_view_are_trained_and_measured(run, tmp_path):
    options = {"small": True, "runs": tmp_path / "runs", "out": tmp_path}
    report = run("tiles", **options)
    assert report == json.loads((tmp_path / "tiles.json").read_text())
    assert (tmp_path / "tiles.png").exists()
    assert list(report["accuracy"]) == ["untrained", "tiles", "one view", "tiles, longer"]
    assert {scale: list(found) for scale, found in report["accuracy"]["tiles"].items()} == {
        "1": ["1"],
        "2": ["1", "4", "9"],
        "3": ["1", "4", "9"],
    }
    assert list(report["accuracy"]["untrained"]["3"]["9"]) == ["576", "324", "144", "64", "36", "16"]
    assert report["accuracy"] == run("tiles", **options)["accuracy"]  # from its cells


@pytest.mark.slow
def test_clips_are_learned_and_asked_at_every_budget(run, tmp_path):
    pytest.importorskip("av")
    options = {"small": True, "runs": tmp_path / "runs", "out": tmp_path}
    report = run("videos", **options)
    assert report == json.loads((tmp_path / "videos.json").read_text())
    assert [row["tokens"] for row in report["accuracy"]] == [540, 270, 180, 240, 120, 80, 60, 48, 240]
    assert report["files"]["questions"] == 7
    assert report["accuracy"] == run("videos", **options)["accuracy"]  # from its cells


@pytest.fixture
def gpu_script(tmp_path):
    """`gpu_script(reply, **environment)`: run benchmarks/gpu.sh with a stand-in for Python.

    It records its arguments and then runs the shell command `reply`.
    """

    def call(reply: str, **environment) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        stand_in, asked = tmp_path / "python", tmp_path / "asked"
        stand_in.write_text(
            f'#!/bin/bash\n[ "$1" = -c ] && exit\nprintf "%q " "$@" >> {asked}\necho >> {asked}\n{reply}\n'
        )
        stand_in.chmod(0o755)
        command = [BENCHMARKS / "gpu.sh", tmp_path / "results"]
        environment = {**os.environ, "PYTHON": str(stand_in), **environment}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return result, [shlex.split(line) for line in asked.read_text().splitlines()] if asked.exists() else []

    return call


def test_the_script_for_gpus_passes_valid_options(gpu_script, benchmark):
    result, asked = gpu_script("")
    assert result.returncode == 0, result.stdout
    assert len(asked) == 10
    for path, *arguments in asked:
        if path == "-m":
            continue
        app = typer.Typer()
        app.command()(benchmark(Path(path).stem).main)
        typer.main.get_command(app).make_context(path, arguments)


def test_the_script_for_gpus_continues_after_a_failure_and_names_it(gpu_script):
    result, asked = gpu_script('case "$1" in *training.py) echo "no memory"; exit 3;; esac')
    assert len(asked) == 10
    assert result.returncode == 1
    assert result.stdout.count("not completed") == 1
    assert "not completed: training: exit code 3, see" in result.stdout
    assert "no memory" in result.stdout


@pytest.mark.slow
def test_the_script_for_gpus_ends_in_time_and_names_what_it_left_out(gpu_script):
    began = time.monotonic()
    result, asked = gpu_script("sleep 20", LIMIT="12")
    assert time.monotonic() - began < 20
    assert len(asked) == 1
    assert "not completed: inference: exit code 124" in result.stdout
    assert result.stdout.count("no time left") == 9


def test_the_script_for_gpus_needs_a_gpu(gpu_script):
    result, _ = gpu_script("", PYTHON="false")  # every command fails, so the check for CUDA does too
    assert (result.returncode, result.stdout) == (1, "There is no CUDA device: nothing was run.\n")
