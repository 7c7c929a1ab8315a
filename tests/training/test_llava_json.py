# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""JSON of any size is read record by record, or refused with the place of the fault."""

import itertools
import json
import random

import pytest
from datasets import load_dataset
from llava_records import InThisProcess, make_by_command, record, report_of, talk, text

from modeling_deco.training.data import DataError, build, build_data, llava
from modeling_deco.training.data.llava import read_records

pytestmark = pytest.mark.usefixtures("own_cache")


def random_value(generator, depth=0):
    kinds = ["number", "text", "float", "null", "true"] + ["list", "object"] * (depth < 3)
    kind = generator.choice(kinds)
    if kind in ("list", "object"):
        values = [random_value(generator, depth + 1) for _ in range(generator.randrange(4))]
        return values if kind == "list" else {random_text(generator): value for value in values}
    return {
        "number": generator.randrange(-(10**20), 10**20),
        "float": generator.uniform(-1e9, 1e9) * 10.0 ** generator.randrange(-20, 20),
        "text": random_text(generator),
        "null": None,
        "true": True,
    }[kind]


def random_text(generator):
    return "".join(generator.choices('ab,[]{}":\\\n\t é猫😀\ud800\u2028', k=generator.randrange(12)))


@pytest.mark.parametrize("style", ["compact", "indented", "lines"])
def test_any_json_is_read_as_by_json_itself(style, monkeypatch, tmp_path):
    for window, ascii_only in itertools.product([1, 2, 3, 7, 64, 1 << 20], [True, False]):
        monkeypatch.setattr(llava, "_WINDOW", window)
        generator = random.Random(window)
        records = [random_value(generator) for _ in range(40)]
        if style == "lines":
            content = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in records)
            content = content.replace("\n", "\r\n\n", 3) + "\n" * ascii_only
        else:
            content = json.dumps(records, indent=3 if style == "indented" else None, ensure_ascii=ascii_only)
        path = tmp_path / "source.json"
        path.write_bytes(content.encode("utf-8", "surrogatepass" if ascii_only else "replace"))
        if style == "lines" and isinstance(records[0], list):
            records = [{"first": 0}, *records]
            path.write_bytes(b'{"first": 0}\n' + path.read_bytes())
        expected = records if ascii_only else json.loads(json.dumps(records).replace("\\ud800", "?"))
        assert list(read_records(path)) == expected


def test_no_records_are_no_records(tmp_path):
    for content in ("[]", " [ \n] \n", "", "\n \n", "\ufeff[]"):
        (tmp_path / "source.json").write_text(content)
        assert list(read_records(tmp_path / "source.json")) == [], content


def test_a_byte_order_mark_is_no_record(tmp_path):
    (tmp_path / "source.json").write_bytes(b'\xef\xbb\xbf[{"id": 1}]')
    assert list(read_records(tmp_path / "source.json")) == [{"id": 1}]


BROKEN_JSON = [
    ('[{"id": 1},\n {"id": }]', r"line 2, character 21: Expecting value"),
    ('[{"id": 1},\n {"id": 2}', r"line 2, character 23: Expecting a separator"),
    ('[{"id": 1}, {"id": 2', r"line 1, character 21: Expecting ',' delimiter"),
    ('[{"id": 1}, {"id": "tw', r"line 1, character 20: Unterminated string"),
    ('[{"id": 1}, ', r"character \d+: Expecting value"),
    ('[{"id": 1},]', r"line 1, character 12: Expecting value"),
    ('[{"id": 1} {"id": 2}]', r"line 1, character 11: Expecting a separator"),
    ('[{"id": 1}] {"id": 2}', r"line 1, character 13: Extra data"),
    ('[{"id": 1}],', r"line 1, character 12: Extra data"),
    ('{"id": 1}\n{"id": 2}, {"id": 3}', r"line 2, character 20: Expecting a separator"),
    ('{"id": 1}\n{"id": 2', r"line 2"),
    ("not JSON", r"line 1, character 1: Expecting value"),
    ("[", r"Expecting value"),
    ('["a\nb"]', r"line 1, character 4: Invalid control character"),
    ("[" + "[" * 100_000, r"line 1, character 2: maximum recursion"),
    ('[{"a": ' * 100_000, r"line 1, character 2: maximum recursion"),
    ('[{"id": 1},\n' + "9" * 5000 + "]", r"line 2, character 13: Exceeds the limit"),
]


@pytest.mark.parametrize("window", [1, 1 << 20])
def test_broken_json_is_one_line_that_says_where(window, photos, monkeypatch, tmp_path):
    monkeypatch.setattr(llava, "_WINDOW", window)
    monkeypatch.setattr(build, "ProcessPoolExecutor", InThisProcess)
    source = tmp_path / "source.json"
    for content, where in BROKEN_JSON:
        source.write_text(content)
        message = rf"source\.json: bad JSON in {where if 'line' in where else '.*' + where}"
        with pytest.raises(DataError, match=message) as error:
            build_data(source, photos, tmp_path / "out", num_proc=1)
        assert len(str(error.value).splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["source.json"]


def test_broken_json_of_the_command_is_exit_code_2(fresh, photos, tmp_path):
    (tmp_path / "source.json").write_text("[{]")
    code, output, errors = make_by_command(fresh, tmp_path / "source.json", photos, tmp_path / "out")
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert "bad JSON in line 1, character 3" in errors


def test_a_record_without_end_does_not_fill_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(llava, "_MAX_RECORD", 1000)
    monkeypatch.setattr(llava, "_WINDOW", 100)
    (tmp_path / "source.json").write_text('[{"id": 1}, {"id": "' + "x" * 100_000 + '"}]')
    records = read_records(tmp_path / "source.json")
    assert next(records) == {"id": 1}
    with pytest.raises(DataError, match="line 1, character 20: Unterminated string"):
        next(records)


def test_huge_texts_and_deep_records_are_read(make):
    deep = {"id": "deep", "image": None, "conversations": talk("a", "b"), "more": None}
    for _ in range(300):
        deep["more"] = [deep["more"]]
    long = record("long", None, talk("x" * 5_000_000, "y" * 5_000_000))
    rows = load_dataset(str(make([deep, long])), split="train")
    assert rows[1]["messages"][1]["content"] == [text("y" * 5_000_000)]


def test_bytes_that_are_no_utf8_are_a_fault_of_their_sample(photos, tmp_path):
    (tmp_path / "source.json").write_bytes(
        json.dumps([record(), record("sick"), record("3")]).replace("sick", "s\xefck").encode("latin-1")
    )
    report = build_data(tmp_path / "source.json", photos, tmp_path / "out", max_bad=1, num_proc=1)
    assert report["faults"] == {"invalid Unicode": {"count": 1, "ids": ["s\udcefck"]}}
    assert report_of(tmp_path / "out") == report
