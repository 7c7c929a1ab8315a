# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The entry points of the package, in an environment without the programs that use them."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("group", "module", "name"),
    [
        ("console_scripts", "modeling_deco.cli", "main"),
        ("lmms_eval.models", "modeling_deco._registration", "lmms_eval_manifest"),
        ("vllm.general_plugins", "modeling_deco.integrations.vllm", "register"),
    ],
)
def test_an_entry_point_names_a_function(group, module, name):
    (entry_point,) = entry_points(group=group, name="deco")
    assert entry_point.value == f"{module}:{name}"
    functions = ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8")).body
    assert name in {function.name for function in functions if isinstance(function, ast.FunctionDef)}


def test_the_manifest_of_lmms_eval_names_the_model_class():
    source = Path(find_spec("modeling_deco._registration").origin).read_text(encoding="utf-8")
    assert "integrations.lmms_eval.Deco" in source
    module = find_spec("modeling_deco.integrations.lmms_eval")
    assert "\nclass Deco(lmms):\n" in Path(module.origin).read_text(encoding="utf-8")


def test_importing_the_package_imports_no_lmms_eval_and_no_torch():
    code = "import sys, modeling_deco; sys.exit('lmms_eval' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
