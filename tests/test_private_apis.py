# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The list of private APIs in CONTRIBUTING.md is that of the comments in the code, and of the supported versions."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("modeling_deco", "conversion", "recipes", "benchmarks")
COMMENT = re.compile(r"# private, seen in (\w+ [\d.]+(?: to [\d.]+)?)")


def seen_in_code() -> dict[str, set[str]]:
    """By file, what its comments say was seen."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    comments = {
        path.relative_to(ROOT).as_posix(): set(COMMENT.findall(path.read_text()))
        for path in paths
        if "checkpoints" not in path.parts
    }
    return {file: seen for file, seen in comments.items() if seen}


def seen_in_table() -> dict[str, set[str]]:
    """By file, the last column of its rows."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Private APIs\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    table = {}
    for _, files, _, seen in rows:
        for file in files.split(", "):
            table.setdefault(file.strip("`"), set()).add(seen)
    return table


def supported_transformers() -> str:
    lowest = re.search(r'"transformers>=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text())[1]
    newest = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"transformers=={lowest}.0" in (ROOT / ".ci" / "run").read_text()
    return f"transformers {lowest} to {newest}"


def test_each_private_api_in_the_code_is_in_the_table_with_its_versions():
    assert seen_in_code() == seen_in_table()


@pytest.mark.parametrize("read", [seen_in_code, seen_in_table])
def test_private_apis_of_transformers_were_seen_in_the_supported_versions(read):
    seen = {words for words in set().union(*read().values()) if words.startswith("transformers ")}
    assert seen == {supported_transformers()}


def test_every_comment_of_a_private_api_has_the_same_form():
    for file in seen_in_code():
        lines = [line for line in (ROOT / file).read_text().splitlines() if "# private" in line]
        assert [line for line in lines if not re.search(COMMENT.pattern + "$", line)] == []


@pytest.mark.parametrize("name", ["README.md", "docs/versions.md"])
def test_documents_name_the_supported_versions_of_transformers(name):
    assert supported_transformers() in (ROOT / name).read_text()
