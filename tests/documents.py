# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The documents of the repository: their text, and the commands and the Python that they show."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *("README.md", "MODEL_CARD.md", "CONTRIBUTING.md", "conversion/README.md", "examples/space/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
FOLDERS = ("benchmarks", "conversion", "examples", "modeling_deco", "recipes")
PROGRAMS = ("accelerate", "cat", "deco", "hf", "make", "pip", "printf", "python", "ray", "source", "vllm")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def prose(name: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"```.*?```", "", text(name), flags=re.DOTALL)


def blocks(language: str, name: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(name), re.DOTALL)


def docstrings() -> list[str]:
    """Of the files that a person runs."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [ast.get_docstring(ast.parse(path.read_text())) or "" for path in paths]


@cache
def commands() -> list[str]:
    """The commands that documents show, without comments, each once.

    These are the lines of bash blocks, code in the prose that begins like a command, and indented lines of docstrings.
    """
    found = []
    for name in DOCUMENTS:
        for block in blocks("bash", name):
            found += block.replace("\\\n", " ").splitlines()
        found += [code for code in re.findall(r"`([^`]+)`", prose(name)) if code.startswith(PROGRAMS) and " " in code]
    for docstring in docstrings():
        found += re.findall(rf"^ {{4,}}((?:{'|'.join(PROGRAMS)}) .*)$", docstring.replace("\\\n", " "), re.MULTILINE)
    lines = (re.sub(r"\s+#\s.*", "", " ".join(line.split())) for line in found)
    return sorted({line for line in lines if line and not line.startswith(("#", "for ")) and line != "done"})
