# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Each benchmark at small sizes: it runs, ends with one line of JSON, and counts what it says it counts."""

import json
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(capsys):
    """`run("projectors", **options)`: the JSON on the benchmark's last line."""

    def call(name: str, **options) -> dict:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"))["main"](**options)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.mark.slow
def test_projectors_are_compared_at_llavas_sizes(run, tmp_path):
    report = run("projectors", num_images=1, repeats=1, out=tmp_path)
    assert report == json.loads((tmp_path / "projectors.json").read_text())
    rows = report["projectors"]
    assert rows["avg_pool"]["parameters"] == rows["mlp"]["parameters"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert {name: row["tokens"] for name, row in rows.items()} == dict.fromkeys(rows, 144) | {"mlp": 576}
    assert rows["avg_pool"]["forward_ratio"] == 1
    assert all(
        row["forward_and_backward_seconds"]["median"] > row["forward_seconds"]["median"] for row in rows.values()
    )


def test_processors_are_compared_on_every_kind_of_input(run, tmp_path):
    report = run("processor", num_images=2, large=(320, 240), repeats=1, out=tmp_path)
    assert report == json.loads((tmp_path / "processor.json").read_text())
    rows = report["backends"]["pil"]
    assert [row["num_images"] for row in rows.values()] == [1, 2, 2, 1, 3, 8]
    for row in rows.values():
        assert row["llava"]["ratio"]["median"] == 1
        assert all(row[name]["images_per_second"]["median"] > 0 for name in ("llava", "deco", "deco-576"))


def test_a_backend_that_is_not_installed_is_reported_as_not_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    report = run("processor", num_images=2, large=(320, 240), repeats=1, out=tmp_path)
    assert report["backends"]["torchvision"] == "not run: torchvision is not installed"
