# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line without a command's work: help, version, completion, and what they import."""

import json
import os
import subprocess
import sys

from typer.testing import CliRunner

import modeling_deco
from modeling_deco.cli import app

COMMANDS = [command.callback.__name__ for command in app.registered_commands]
SHOW_HELP = """
import json, sys
from typer.testing import CliRunner
from modeling_deco.cli import app

commands = json.loads(sys.argv[1])
helps = {command: CliRunner().invoke(app, [command, "--help"]).stdout for command in commands}
helps[""] = CliRunner().invoke(app, ["--help"]).stdout
heavy = {"torch", "transformers", "PIL", "huggingface_hub", "numpy", "gradio", "uvicorn", "starlette"}
print(json.dumps([helps, sorted(heavy & set(sys.modules))]))
"""


def test_help_has_examples_and_imports_nothing_heavy():
    process = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, json.dumps(COMMANDS)], capture_output=True, text=True, check=True
    )
    helps, heavy = json.loads(process.stdout)
    assert heavy == []
    assert {command for command in COMMANDS if f"  deco {command} " in helps[command]} == set(COMMANDS)
    assert all(command in helps[""] for command in COMMANDS)


def test_the_shell_can_complete():
    environment = {**os.environ, "_DECO_COMPLETE": "complete_bash", "COMP_WORDS": "deco co", "COMP_CWORD": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "modeling_deco.cli"], env=environment, capture_output=True, text=True
    )
    assert "convert" in process.stdout


def test_version_is_the_packages():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"modeling-deco {modeling_deco.__version__}\n"
