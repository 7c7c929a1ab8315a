# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The `help` of a dataclass field, which a recipe prints for `--help`, as the field's text in the API reference."""

import ast

import griffe


class FieldHelp(griffe.Extension):
    def on_attribute_instance(self, *, node, attr, **kwargs):
        call = getattr(node, "value", None)
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "field"):
            return
        arguments = {keyword.arg: keyword.value for keyword in call.keywords}
        default = arguments.get("default", arguments.get("default_factory"))
        attr.value = default and ast.unparse(default)
        if isinstance(metadata := arguments.get("metadata"), ast.Dict):
            attr.docstring = griffe.Docstring(_text(metadata.values[0]), parent=attr)


def _text(help: ast.expr) -> str:
    """The text of a help string. In a formatted string, each expression is shown as code."""
    if isinstance(help, ast.JoinedStr):
        return "".join(_text(part) for part in help.values)
    return str(help.value) if isinstance(help, ast.Constant) else f"`{ast.unparse(help.value)}`"
