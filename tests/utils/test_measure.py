# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Timing in rounds, medians, and the environment of a measurement."""

import json
import platform
import time

import pytest
import torch

from modeling_deco.utils.measure import command, environment, spread, time_interleaved, write_report


def test_functions_are_timed_in_rounds_and_another_one_is_first_each_time():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    time_interleaved(runs, repeats=2)
    assert "".join(order) == "abc" + "bca" + "cab"


def test_the_warm_up_does_not_count():
    delays = iter([0.2, 0.01, 0.01, 0.01])
    times = time_interleaved({"slow at first": lambda: time.sleep(next(delays))}, repeats=3)
    assert len(times["slow at first"]) == 3
    assert max(times["slow at first"]) < 0.1


def test_the_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([0.123456]) == {"median": 0.1235, "low": 0.1235, "high": 0.1235}


def test_the_environment_names_versions_and_threads():
    found = environment("cpu", "pillow")
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["pillow"].count(".") == 2
    assert found["threads"] == torch.get_num_threads()


def test_the_environment_does_not_name_a_library_that_is_not_there():
    with pytest.raises(ModuleNotFoundError, match="no-such-library"):
        environment("cpu", "no-such-library")


def test_a_report_is_written_into_a_folder_that_is_not_there_yet(tmp_path):
    write_report({"ratio": 0.5}, tmp_path / "results" / "report.json")
    assert json.loads((tmp_path / "results" / "report.json").read_text()) == {"ratio": 0.5}


def test_the_command_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/deco/benchmarks/chat.py", "--out", "my results"])
    assert command() == "python benchmarks/chat.py --out 'my results'"
