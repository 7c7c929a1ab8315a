# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`make test-newest` fails if the fault is ours, and warns in one line if it may be that of a newer release."""

import pytest
from newest import failed_tests, seen_versions, summarize

SEEN = {"torch": ["2.13.0", "2.14.1"], "trl": ["1.16.0"]}


@pytest.mark.parametrize("torch", ["2.13.0", "2.14.1"])
def test_a_failure_on_known_releases_is_ours(torch):
    line, code = summarize(1, ["test_a", "test_b"], {"torch": torch, "trl": "1.16.0", "other": "9"}, SEEN)
    assert (line, code) == ("On releases that passed before, 2 tests fail: test_a, test_b.", 1)


def test_a_failure_on_a_newer_release_is_one_line_of_warning_that_names_it():
    line, code = summarize(1, ["test_a"], {"torch": "2.15.0", "trl": "1.16.0"}, SEEN)
    assert code == 0
    assert line.startswith("WARNING: on the newest releases 1 tests fail: test_a.")
    assert "torch 2.15.0 (seen: 2.13.0 and 2.14.1)" in line
    assert "trl" not in line
    assert "\n" not in line


def test_a_run_that_never_started_is_a_failure_too():
    assert summarize(4, [], {"torch": "2.13.0"}, SEEN) == (
        "On releases that passed before, pytest ended with exit code 4.",
        1,
    )


def test_a_newer_release_that_passes_is_named_to_be_added():
    line, code = summarize(0, [], {"torch": "2.15.0"}, SEEN)
    assert code == 0
    assert "torch 2.15.0" in line


def test_failures_and_errors_are_read_from_the_results(tmp_path):
    results = tmp_path / "results.xml"
    cases = '<testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><error/></testcase>'
    results.write_text(
        f"<testsuites><testsuite>{cases}<testcase name='d'><skipped/></testcase></testsuite></testsuites>"
    )
    assert failed_tests(results) == ["b", "c"]
    assert failed_tests(tmp_path / "none.xml") == []


def test_pins_are_read_from_the_files_of_constraints():
    seen = seen_versions()
    assert "5.24.0" in seen["transformers"]
    assert "huggingface-hub" in seen
