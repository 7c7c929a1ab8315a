# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A run is split into the files that are shipped, and what is assembled from them is the run."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.inference.everyday import assemble
from modeling_deco.inference.loading import load
from modeling_deco.utils.errors import InputError
from modeling_deco.worlds.emoji import ship as module
from modeling_deco.worlds.emoji.ship import ship

pytest.importorskip("gguf")
import tiny_everyday


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_everyday.build_run(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def shipped(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "deco-everyday"
    out.mkdir()
    (out / "README.md").write_text("A card.")
    return out, ship(source[0], out, source[1])


@pytest.fixture(scope="module")
def assembled(source, shipped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled")
    assemble(shipped[0], source[1], folder)
    return folder


def test_the_files_are_those_that_the_report_names(shipped):
    out, report = shipped
    assert set(report["bytes"]) == {
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "multi_modal_projector.safetensors",
        "processor_config.json",
        "vision_tower.safetensors",
    }
    assert (out / "README.md").read_text() == "A card."
    assert 0 < report["logit_difference"] < 0.01  # it is rounded to float16, and no more
    tower = load_file(out / "vision_tower.safetensors")
    assert {weight.dtype for weight in tower.values() if weight.dim() > 1} == {torch.float16}
    assert {weight.dtype for weight in tower.values() if weight.dim() == 1} == {torch.float32}


def test_what_is_assembled_is_what_peft_merges_from_the_shipped_adapter(source, shipped, assembled, tmp_path):
    base = DecoForConditionalGeneration.from_pretrained(source[0].with_name("base"))
    merged = PeftModel.from_pretrained(base, shipped[0] / "adapter").merge_and_unload().state_dict()
    model, _ = load(assembled)
    for key, weight in model.state_dict().items():
        if ".language_model." in key:
            assert torch.equal(weight, merged[key]), key
    untouched = load(source[0].with_name("base"))[0].state_dict()
    changed = {key for key, weight in model.state_dict().items() if not torch.equal(weight, untouched[key])}
    assert "model.language_model.layers.1.self_attn.v_proj.weight" in changed
    assert "model.language_model.layers.1.self_attn.k_proj.weight" not in changed


def test_the_tower_and_the_projector_are_the_runs_rounded(source, assembled):
    run, assembled = load(source[0])[0].state_dict(), load(assembled)[0].state_dict()
    for key, weight in run.items():
        if "language_model" not in key and "lm_head" not in key:
            assert torch.equal(assembled[key], weight.half().float() if weight.dim() > 1 else weight), key


def test_it_is_a_folder_like_any_other(assembled):
    assert {path.name for path in assembled.iterdir()} >= {
        *("config.json", "model.safetensors", "processor_config.json", "chat_template.jinja", "tokenizer.json"),
        *("generation_config.json", "modeling_deco.py", "README.md"),
    }
    config = json.loads((assembled / "config.json").read_text())
    assert (config["dtype"], config["image_positions"]) == ("float32", "patch")
    assert "AutoModelForImageTextToText" in config["auto_map"]
    assert json.loads((assembled / "generation_config.json").read_text())["max_new_tokens"] == 128
    assert not (assembled / "adapter").exists()


def _train_the_language_model(run, gguf):
    weights = load_file(run.with_name("base") / "model.safetensors")
    weights["model.language_model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, run.with_name("base") / "model.safetensors", {"format": "pt"})


def _use_dora(run, gguf):
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"q_proj": 4}}))


def _name_the_base(run, gguf):
    config = json.loads((run / "adapter_config.json").read_text())
    shutil.copytree(config["base_model_name_or_path"], run, dirs_exist_ok=True)
    (run / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_train_the_language_model, r"layers\.0\.mlp\.up_proj\.weight is not that of tiny\.gguf"),
        (_use_dora, r"rank_pattern in adapter_config\.json of .* is \{'q_proj': 4\}; leave it out"),
        (_name_the_base, "is not an adapter; train with LoRA"),
    ],
)
def test_another_run_is_refused(tmp_path, damage, message):
    run, gguf = tiny_everyday.build_run(tmp_path / "source")
    damage(run, gguf)
    with pytest.raises(InputError, match=message):
        ship(run, tmp_path / "out", gguf)


def test_a_file_that_is_too_large_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(InputError, match=r"adapter_model.safetensors has [\d,]+ bytes; at most 10,000 are shipped"):
        ship(source[0], tmp_path / "out", source[1])


def test_a_merge_with_a_wrong_scale_is_noticed(source, tmp_path, monkeypatch):
    def wrong(weights, adapter):
        merge(weights, adapter)
        for weight in weights.values():
            weight *= 1.2

    merge = module.assemble.__globals__["merge_adapter"]
    monkeypatch.setitem(module.assemble.__globals__, "merge_adapter", wrong)
    with pytest.raises(InputError, match=r"its logits differ from the run's by 0\.\d+, more than 0\.05"):
        ship(source[0], tmp_path / "out", source[1])


def test_the_command_ends_in_one_line_without_a_run(tmp_path):
    command = [sys.executable, "-m", "modeling_deco.worlds.emoji.ship", "--model", tmp_path, "--out", tmp_path / "out"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith("ship: ")
