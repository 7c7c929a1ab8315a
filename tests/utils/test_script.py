# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How recipes end: bad input in one line, a failure on the way in one line, a bug with its traceback."""

import pytest

pytest.importorskip("trl")

import tiny_training
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateSyntaxError
from safetensors import SafetensorError

from modeling_deco.training.data.images import check_reference
from modeling_deco.utils import script as command


def raises(error):
    def main():
        raise error

    return main


def in_training(error):
    def _inner_training_loop():
        raise error

    return _inner_training_loop


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (lambda: check_reference(""), 2, "an image is an empty path"),
        (raises(ValueError("no such\n  field")), 2, "no such field"),
        (raises(FileNotFoundError(2, "No such file", "a.yaml")), 2, "[Errno 2] No such file: 'a.yaml'"),
        (raises(ImportError("No module named 'bitsandbytes'")), 2, "No module named 'bitsandbytes'"),
        (raises(OSError("x/y is not a local folder")), 2, "x/y is not a local folder"),
        (raises(TemplateSyntaxError("unexpected '}'", 1)), 2, "unexpected '}' line 1"),
        (raises(DatasetGenerationError("An error occurred")), 2, "An error occurred"),
        (raises(OSError(28, "No space left on device")), 1, "[Errno 28] No space left on device"),
        (raises(SafetensorError("No space left on device")), 1, "No space left on device"),
        (raises(RuntimeError("PytorchStreamWriter failed writing")), 1, "PytorchStreamWriter failed writing"),
        (in_training(OSError(27, "File too large")), 1, "[Errno 27] File too large"),
    ],
)  # fmt: skip
def test_what_users_can_change_is_one_line(main, code, line, capsys):
    with pytest.raises(SystemExit) as stop:
        command.run("recipe", main)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"recipe: {line}\n"


@pytest.mark.parametrize("error", [KeyError("images"), TypeError("not iterable"), RuntimeError("shapes")])
def test_a_bug_has_its_traceback(error):
    with pytest.raises(type(error)):
        command.run("recipe", raises(error))


def test_an_error_of_a_library_in_training_is_a_bug():
    with pytest.raises(ValueError, match="too many values to unpack"):
        command.run("recipe", in_training(ValueError("too many values to unpack")))


def test_an_error_that_python_raises_in_the_package_is_a_bug():
    scope = {}
    exec(compile("def fail():\n    return int('no number')\n", command.__file__, "exec"), scope)
    with pytest.raises(ValueError, match="invalid literal"):
        command.run("recipe", scope["fail"])


# --- the training recipe ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_training.save_checkpoint(tmp_path_factory.mktemp("command") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_training.save_dataset(tmp_path_factory.mktemp("command") / "data", tiny_training.conversations(4))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"model_name_or_path": "absent/model/x"}, "absent/model/x"),
        ({"data_path": "absent.json"}, "absent.json is neither a folder of data nor a Hub id"),
        ({"chat_template": "absent.jinja"}, "'absent.jinja' is neither the path of a Jinja file nor one of"),
        ({"freeze": "tower"}, "freeze names 'tower'; the parts are"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"config": "absent.yaml"}, "absent.yaml"),
        ({"max_length": 3}, "samples are longer than max_length=3"),
        ({"use_peft": True, "lora_target_modules": "no_such_layer"}, "no_such_layer"),
        ({"resume_from_checkpoint": "absent/checkpoint-3"}, "absent/checkpoint-3"),
    ],
)
def test_sft_ends_bad_input_with_one_line(settings, line, checkpoint, data, tmp_path, capsys):
    words = tiny_training.arguments(**{"model": checkpoint, "data": data, "output_dir": tmp_path / "out"}, **settings)
    with pytest.raises(SystemExit) as stop:
        command.run("sft", lambda: tiny_training.sft.main(*tiny_training.parse(words)))
    assert stop.value.code == 2
    found = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sft: ")]
    assert len(found) == 1
    assert line in found[0]


@pytest.mark.slow
@pytest.mark.enable_socket
def test_of_several_processes_one_tells(checkpoint, tmp_path):
    words = tiny_training.arguments(checkpoint, "absent.json", tmp_path / "out")
    result = tiny_training.launch_on_cpus(words, "ddp.yaml")
    assert result.returncode != 0
    assert result.stderr.count("sft: absent.json is neither a folder of data nor a Hub id") == 1
    assert 'recipes/sft.py", line' not in result.stderr


@pytest.mark.slow
def test_a_script_ends_with_one_line(checkpoint, tmp_path):
    result = tiny_training.launch(tiny_training.arguments(checkpoint, "absent.json", tmp_path / "out"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "FutureWarning" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("sft: absent.json is neither a folder of data nor a Hub id")
