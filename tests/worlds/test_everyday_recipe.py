# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The one command that trains deco-everyday: each step reads what an earlier one wrote."""

import argparse
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("sklearn")


def test_each_step_finds_its_program_and_its_input(recipe, tmp_path):
    args = argparse.Namespace(output_dir=tmp_path, seed=3, scale=0.01, iconify=None)
    written = set()
    for name, result, command in recipe("everyday").steps(args):
        if command[0] == "-m":
            assert find_spec(command[1]) is not None, name
        else:
            assert Path(command[0]).is_file()
            assert Path(command[command.index("--config") + 1]).is_file()
        for option in ("--tower", "--model", "--model_name_or_path", "--data_path"):
            if option in command:
                assert Path(command[command.index(option) + 1]) in written, (name, option)
        for option in ("--out", "--output_dir"):
            if option in command:
                folder = Path(command[command.index(option) + 1])
                written.add(folder)
                assert result is None or result == folder or result.parent == folder, name
    assert tmp_path / "deco-everyday" in written


def test_stage_2_has_the_chat_template_of_the_language_model(recipe, tmp_path):
    args = argparse.Namespace(output_dir=tmp_path, seed=0, scale=1.0, iconify=None)
    commands = {name: command for name, _, command in recipe("everyday").steps(args)}
    template = commands["stage 2"][commands["stage 2"].index("--chat_template") + 1]
    assert Path(template) == Path(commands["joining"][commands["joining"].index("--out") + 1]) / "chat_template.jinja"


def test_a_scale_of_nothing_is_refused(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe("everyday").main(["--output_dir", str(tmp_path), "--scale", "0"])
    assert "--scale must be positive, got 0.0" in capsys.readouterr().err
