# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands on a LLaVA of transformers, without a conversion: what they answer, what they refuse, what they check."""

import json
import shutil
from pathlib import Path

import llava_sources
import pytest
import tiny
import torch
from fake_hub import FakeHub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_deco import DecoForConditionalGeneration, DecoProcessor
from modeling_deco.cli import app
from modeling_deco.conversion import convert
from modeling_deco.inference import describe, load


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return llava_sources.write("llava-hf on the Hub", tmp_path_factory.mktemp("llava")).folder


@pytest.fixture(scope="module")
def converted(llava):
    convert(llava, llava.parent / "converted", 2)
    return llava.parent / "converted"


@pytest.fixture
def copy(llava, tmp_path):
    return shutil.copytree(llava, tmp_path / "copy")


@pytest.fixture
def picture(tmp_path):
    tiny.picture(seed=3).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def run(*arguments, **options):
    return CliRunner().invoke(app, list(map(str, arguments)), **options)


def ask(picture, model, *options):
    return run(
        "ask", picture, "what is this?", "--model", model, "--dtype", "float32", "--max-new-tokens", 12, *options
    )


@pytest.mark.parametrize("grid", ["2", "3x5", "6"])
def test_an_answer_is_that_of_the_converted_folder(grid, llava, converted, picture):
    answers = [ask(picture, model, "--pooled-grid-size", grid) for model in (llava, converted)]
    assert answers[0].exit_code == 0, answers[0].stderr
    assert answers[0].stdout == answers[1].stdout != ""


def test_without_a_grid_a_llava_keeps_all_its_patches(llava, picture):
    report = json.loads(ask(picture, llava, "--json").stdout)
    assert (report["pooled_grid_size"], report["num_image_tokens"]) == ([6, 6], 36)


def test_a_conversation_goes_on_as_with_the_converted_folder(llava, converted, picture):
    options = ["--image", picture, "--pooled-grid-size", "2", "--dtype", "float32", "--max-new-tokens", 8]
    results = [run("chat", model, *options, input="what is this?\nis it red?\n") for model in (llava, converted)]
    assert results[0].exit_code == 0, results[0].stderr
    assert results[0].stdout == results[1].stdout != ""


def test_info_describes_it_as_its_conversion_at_the_patch_grid(llava, converted):
    about, expected = describe(str(llava)), describe(str(converted))
    own = ("model", "base_model", "pooled_grid_size", "num_image_tokens", "grids")
    assert {name: about[name] for name in about if name not in own} == {
        name: expected[name] for name in expected if name not in own
    }
    assert (about["pooled_grid_size"], about["dtype"], about["license"]) == ([6, 6], "float16", llava_sources.LICENSE)
    assert run("info", llava).exit_code == 0


def test_an_adapter_is_loaded_onto_a_llava(llava, tmp_path):
    base = DecoForConditionalGeneration.from_pretrained(llava, pooled_grid_size=2)
    base.config.name_or_path = str(llava)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    processor = DecoProcessor.from_pretrained(llava, pooled_grid_size=2)
    processor.save_pretrained(tmp_path)
    model, loaded_processor = load(str(tmp_path))
    assert (model.config.pooled_grid_size, loaded_processor.pooled_grid_size) == (2, 2)
    expected = adapted.merge_and_unload().state_dict()
    assert all(torch.allclose(weight, expected[name], atol=1e-3) for name, weight in model.state_dict().items())
    (tmp_path / "processor_config.json").unlink()
    assert load(str(tmp_path))[1].pooled_grid_size == 6  # that of the base


def test_a_llava_on_the_hub_is_used_at_its_revision(llava, tmp_path, monkeypatch, picture):
    hub = FakeHub(tmp_path / "hub").install(monkeypatch)
    hub.commit("me/llava", {"README.md": b"Nothing yet."})
    hub.commit("me/llava", llava, branch="v2")
    expected = ask(picture, llava).stdout
    result = ask(picture, "me/llava", "--revision", "v2")
    assert (result.exit_code, result.stdout) == (0, expected), result.stderr


# --- what is refused, in one line ------------------------------------------------------------------------------------


def edit(path: Path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_part(name, **fields):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", **{name: {**config[name], **fields}})

    return spoil


def change_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NORM, PROJECTOR = "language_model.model.norm.weight", "multi_modal_projector.linear_1.weight"
SPOILS = [
    (as_bin, r"no safetensors files.*deco convert"),
    (lambda folder: edit(folder / "config.json", model_type="qwen2_vl"), r"'qwen2_vl' model, not a DeCo"),
    (lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "awq"}), "quantized weights"),
    (
        edit_part("text_config", num_hidden_layers=10**6),
        r"num_hidden_layers in .* is 1000000; it must be at most 1,024",
    ),
    (edit_part("text_config", hidden_size=2**30), r"hidden_size"),
    (edit_part("text_config", attn_implementation="evil/kernel"), r"is code of the Hub and is not run"),
    (edit_part("text_config", num_hidden_layers=1000), r"has no weights for"),
    (change_tensors(lambda tensors: tensors.pop(NORM)), r"has no weights for 1 of the model's 64 tensors"),
    (change_tensors(lambda tensors: tensors.update({PROJECTOR: torch.zeros(3, 3)})), r"whose shape differs"),
    (change_tensors(lambda tensors: tensors.update({"image_newline": torch.zeros(3)})), r"image_newline"),
    (lambda folder: (folder / "chat_template.json").write_text("{"), r"chat_template\.json is not valid JSON"),
    (
        lambda folder: edit(
            folder / "chat_template.json",
            chat_template="<image>{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        ),
        r"takes more than 10 seconds",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILS[:-1])
def test_a_broken_llava_is_one_line(spoil, message, copy, picture):
    spoil(copy)
    result = ask(picture, copy)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert pytest.raises(ValueError, load, str(copy)).match(message)


@pytest.mark.slow
def test_a_template_that_never_ends_is_one_line(copy, picture):
    spoil, message = SPOILS[-1]
    spoil(copy)
    pytest.raises(ValueError, load, str(copy)).match(message)


def test_no_code_of_a_llava_is_run(copy, picture):
    (copy / "evil.py").write_text(f"open({str(copy / 'it-ran')!r}, 'w')\nclass Evil: pass\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoImageProcessor"), "evil.Evil")
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        edit(copy / name, auto_map=auto_map)
    result = ask(picture, copy)
    assert result.exit_code == 0, result.stderr
    assert not (copy / "it-ran").exists()
