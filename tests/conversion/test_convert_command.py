# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco convert` and `deco export`: their output, the commands that help and documents show, logits and uploads."""

import inspect
import json
import re
import shlex
from pathlib import Path

import llava_sources
import pytest
from documents import commands
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import modeling_deco.conversion
from modeling_deco.cli import app
from modeling_deco.conversion import InputError, convert, export
from modeling_deco.conversion.parity import compare_logits
from modeling_deco.conversion.weights import read_weights

HUB_FORMAT = "llava-hf on the Hub, sharded"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llava_sources.write(HUB_FORMAT, tmp_path_factory.mktemp("source")).folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- output ----------------------------------------------------------------------------------------------------------


def test_stdout_is_the_destination_alone(source, tmp_path):
    result = run("convert", source, tmp_path / "deco", "--pooled-grid-size", "3x2")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'deco'}\n")


def test_stderr_says_what_was_found_and_done(source, tmp_path):
    lines = run("convert", source, tmp_path / "deco", "--pooled-grid-size", "3x2").stderr.splitlines()
    assert lines[0] == f"{source}: llava-hf, 6 x 6 patches, 6 tokens per image"
    assert re.fullmatch(rf"{tmp_path / 'deco'}: 64 tensors, .*B, read back and equal to the source's", lines[-1])
    assert all(re.fullmatch(r"[\d.]+kB of [\d.]+kB", line) for line in lines[1:-1])
    assert len(lines) > 5


def test_export_takes_a_converted_checkpoint_back(source, tmp_path):
    run("convert", source, tmp_path / "deco")
    result = run("export", tmp_path / "deco", tmp_path / "llava")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'llava'}\n")
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["model_type"] == "llava"


# --- the commands that are shown -------------------------------------------------------------------------------------


def shown_commands() -> list[str]:
    help_texts = "\n".join(command.callback.__doc__ for command in app.registered_commands)
    in_help = re.findall(r"^ *(deco (?:convert|export) .*)$", help_texts, re.MULTILINE)
    in_documents = [line for line in commands() if line.startswith(("deco convert ", "deco export "))]
    return sorted({*in_help, *in_documents})


OPTIONS = {"--pooled-grid-size": "pooled_grid_size", "--vision-tower": "vision_tower", "--base-model": "base_model"}


@pytest.mark.parametrize("command", shown_commands())
def test_a_command_that_is_shown_is_understood(command, monkeypatch):
    calls = []
    for name, function in (("convert", convert), ("export", export)):
        signature = inspect.signature(function)
        monkeypatch.setattr(
            modeling_deco.conversion,
            name,
            lambda *args, signature=signature, **kwargs: calls.append(signature.bind(*args, **kwargs).arguments),
        )
    program, name, source, destination, *options = shlex.split(command, comments=True)
    assert run(name, source, destination, *options).exit_code == 0
    expected = {"source": source, "destination": Path(destination)}
    expected |= {OPTIONS[option]: value for option, value in zip(options[::2], options[1::2], strict=True)}
    if "pooled_grid_size" in expected:
        expected["pooled_grid_size"] = [int(expected["pooled_grid_size"])] * 2
    assert {name: value for name, value in calls[0].items() if value not in (None, False)} == expected


def test_help_shows_a_command_for_each_format():
    text = run("convert", "--help").stdout
    for words in ("llava-hf", "original code", "stage 1", "LoRA", "AvgPoolProjector"):
        assert words in text
    assert text.count("deco convert ") >= 6


# --- logits ----------------------------------------------------------------------------------------------------------


def test_check_logits_reports_that_they_are_equal(source, tmp_path):
    result = run("convert", source, tmp_path / "deco", "--check-logits")
    report = json.loads((tmp_path / "deco" / "conversion_report.json").read_text())
    assert (result.exit_code, report["parity"]["max_abs_difference"]) == (0, 0.0)
    assert report["parity"]["num_logits"] > 10_000


def test_check_logits_reports_the_difference_that_a_cast_makes(source, tmp_path):
    report = convert(source, tmp_path / "deco", dtype="bfloat16", check_logits=True)
    assert 0 < report["parity"]["max_abs_difference"] < 1


def test_logits_of_another_model_are_refused(source, tmp_path):
    convert(source, tmp_path / "deco")
    path = tmp_path / "deco" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.multi_modal_projector.linear_1.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="The logits of .* differ from LLaVA's on .* by up to"):
        compare_logits(source, tmp_path / "deco", is_cast=False)


def test_check_logits_is_for_llava_hf(tmp_path):
    original = llava_sources.write("original, safetensors", tmp_path / "source")
    with pytest.raises(InputError, match="--check-logits compares with transformers' LLaVA; .* is original"):
        convert(original.folder, tmp_path / "deco", **original.arguments, check_logits=True)
    assert not (tmp_path / "deco").exists()


# --- uploads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: calls.append(("create", repo_id)))

    def upload_folder(self, repo_id, folder_path, **kwargs):
        calls.append(("upload", repo_id, len(read_weights(Path(folder_path)))))

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def test_a_converted_checkpoint_is_uploaded_when_it_is_complete(source, tmp_path, uploads):
    assert run("convert", source, tmp_path / "deco", "--push-to-hub", "me/deco").exit_code == 0
    assert uploads == [("create", "me/deco"), ("upload", "me/deco", 64)]


def test_who_is_not_logged_in_hears_it_before_the_work(source, tmp_path, monkeypatch):
    def whoami(self):
        raise LocalTokenNotFoundError("Token is required.\nMore lines.")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    result = run("convert", source, tmp_path / "deco", "--push-to-hub", "me/deco")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"deco convert: --push-to-hub me/deco: Token is required\..*hf auth login`\)\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_repository_is_refused_before_the_work(source, tmp_path):
    result = run("convert", source, tmp_path / "deco", "--push-to-hub", "not a/valid/id")
    assert result.exit_code == 2
    assert re.fullmatch(r"deco convert: --push-to-hub not a/valid/id: .*\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_fails_leaves_the_checkpoint(source, tmp_path, uploads, monkeypatch):
    def upload_folder(self, **kwargs):
        raise OSError("the line is cut")

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    result = run("convert", source, tmp_path / "deco", "--push-to-hub", "me/deco")
    assert result.exit_code == 2
    assert re.search(r"is complete, but its upload to 'me/deco' failed: the line is cut", result.stderr)
    assert (tmp_path / "deco" / "model.safetensors").exists()
