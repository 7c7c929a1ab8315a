# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Code that comes with a checkpoint is not run, whatever stdin answers to transformers' question."""

import ast
import json
import shutil
from pathlib import Path

import hostile
import pytest
import tiny
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app

ROOT = Path(__file__).parents[2]
AUTO_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoModelForImageTextToText": "evil.Evil",
    "AutoProcessor": "evil.Evil",
    "AutoImageProcessor": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}


@pytest.fixture
def deco(tmp_path):
    """The shipped checkpoint, with code that leaves a file behind when it is imported."""
    folder = shutil.copytree(SHIPPED_CHECKPOINT, tmp_path / "deco", ignore=shutil.ignore_patterns("*.py"))
    spoil(folder)
    return folder


def spoil(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'evil.py')!r}[:-7] + 'it-ran', 'w')\nclass Evil: pass\n")
    custom = folder / "custom_generate"
    custom.mkdir(exist_ok=True)
    shutil.copy(folder / "evil.py", custom / "generate.py")


def edit(path, **changes):
    hostile.write_json(path, {**(json.loads(path.read_text()) if path.exists() else {}), **changes})


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), input="y\n" * 1000)


def ran(folder) -> bool:
    return bool(list(folder.rglob("it-ran")) or list(folder.rglob("it_ran")))


def foreign_config(folder):
    edit(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)


def foreign_tower(folder):
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit(folder / "config.json", vision_config={**vision, "model_type": "evil", "auto_map": AUTO_MAP})


def tower_without_a_model(folder):
    """A config that transformers has, of which AutoModel has no class."""
    edit(folder / "config.json", vision_config={"model_type": "vit_mae", "auto_map": AUTO_MAP, "num_hidden_layers": 2})


def foreign_tokenizer(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=AUTO_MAP)


def foreign_image_processor(folder):
    for path in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if path.exists():
            parts = json.loads(path.read_text())
            parts["image_processor"] = {"image_processor_type": "Evil", "auto_map": AUTO_MAP}
            edit(path, **parts, image_processor_type="Evil")


def foreign_processor(folder):
    edit(folder / "processor_config.json", processor_class="Evil", auto_map=AUTO_MAP)


KINDS = [
    foreign_config,
    foreign_tower,
    tower_without_a_model,
    foreign_tokenizer,
    foreign_image_processor,
    foreign_processor,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["info", "ask"])
def test_a_folder_whose_code_is_needed_ends_in_one_line(command, kind, deco, tmp_path):
    kind(deco)
    if command == "info":
        result = run("info", deco)
    else:
        tiny.picture(0).save(tmp_path / "a.png")
        result = run("ask", tmp_path / "a.png", "What is this?", "--model", deco)
    assert not ran(tmp_path)
    assert "run the custom code" not in result.output
    if result.exit_code:  # what info does not need may be anything
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
        is_of_the_config = kind in (foreign_config, foreign_tower, tower_without_a_model)
        assert ("needs code that comes with it" in result.stderr) == (not is_of_the_config), result.stderr


@pytest.mark.parametrize("part", ["source", "vision_tower", "base_model"])
def test_a_conversion_runs_no_code(part, tmp_path):
    place = hostile.Place(tmp_path, "LoRA")
    folder = place.source if part == "source" else Path(place.options[part])
    spoil(folder)
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        edit(folder / name, auto_map=AUTO_MAP)
    if part == "vision_tower":
        edit(folder / "config.json", model_type="evil")
        edit(folder / "preprocessor_config.json", image_processor_type="Evil")
    result = run("convert", *place.arguments())
    assert not ran(tmp_path)
    assert "run the custom code" not in result.output
    assert (result.exit_code == 2) == (part == "vision_tower"), result.output


def test_every_load_says_that_it_trusts_no_code():
    """Where `trust_remote_code` is not given, transformers asks on stdin."""
    silent = []
    for folder in ("modeling_deco", "conversion", "recipes", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and _may_load_code(call.func):
                    given = {keyword.arg for keyword in call.keywords}
                    if "trust_remote_code" not in given and not any(_is_arguments(k) for k in call.keywords):
                        silent.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not silent


def _may_load_code(function) -> bool:
    is_load = isinstance(function, ast.Attribute) and function.attr in ("from_pretrained", "from_config")
    name = ast.unparse(function.value) if is_load else ""
    return name.startswith("Auto") or name.endswith("Processor")


def _is_arguments(keyword) -> bool:
    """`**arguments` that have it."""
    return keyword.arg is None and "arguments" in ast.unparse(keyword.value)
