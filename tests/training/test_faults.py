# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Every fault of a record or of its images is found and named."""

import re
import sys

import pytest
import tiny
from llava_records import (
    IMAGE,
    TAG,
    InThisProcess,
    encoded,
    gpt,
    human,
    ids_of,
    make_by_command,
    record,
    report_of,
    talk,
    write,
)
from PIL import Image, ImageOps

from modeling_deco.training.data import DataError, build, image_checks, load_data
from modeling_deco.training.data.__main__ import main
from modeling_deco.training.data.image_checks import check_image

pytestmark = pytest.mark.usefixtures("own_cache")


QUESTION, ANSWER = human(f"{TAG}What?"), gpt("A cat.")
FAULTS = {
    "no object": ("malformed record", ["a list"]),
    "null": ("malformed record", None),
    "no conversations": ("malformed record", {"id": "sick", "image": "a.jpg"}),
    "conversations no list": ("malformed record", record("sick", conversations="hello")),
    "turn no object": ("malformed record", record("sick", conversations=[QUESTION, "A cat."])),
    "value no text": ("malformed record", record("sick", conversations=[QUESTION, gpt(5)])),
    "no value": ("malformed record", record("sick", conversations=[QUESTION, {"from": "gpt"}])),
    "unknown role": ("malformed record", record("sick", conversations=[QUESTION, {"from": "tool", "value": "!"}])),
    "role no text": ("malformed record", record("sick", conversations=[{"from": [], "value": "!"}, ANSWER])),
    "image no text": ("malformed record", record("sick", 5)),
    "images no texts": ("malformed record", record("sick", ["a.jpg", None])),
    "two lists of images": ("malformed record", record("sick", images=["b.png"])),
    "sound": ("media that are not read", record("sick", None, talk("What?", "A cat."), sound="a.mp3")),
    "path of a video": ("media that are not read", record("sick", None, talk("What?", "A cat."), clip="a.mp4")),
    "path of an image": ("media that are not read", record("sick", None, talk("What?", "A cat."), image_path="a.jpg")),
    "file of an image": ("media that are not read", record("sick", None, talk("What?", "A cat."), source="b/a.jpg")),
    "second image": ("media that are not read", record("sick", image2="b.png")),
    "image of a turn": (
        "media that are not read",
        record("sick", None, [{**talk("What?", "A cat.")[0], "image": "a.jpg"}, *talk("What?", "A cat.")[1:]]),
    ),
    "id no text": ("malformed record", record(["sick"])),
    "id true": ("malformed record", record(True)),
    "lone surrogate": ("invalid Unicode", record("sick", conversations=[QUESTION, gpt("A \ud83d cat.")])),
    "lone surrogate in an id": ("invalid Unicode", record("sick\udc00")),
    "empty": ("empty conversation", record("sick", None, [])),
    "system only": ("empty conversation", record("sick", None, [{"from": "system", "value": "Be brief."}])),
    "assistant first": ("starts with the assistant", record("sick", conversations=[ANSWER, QUESTION, ANSWER])),
    "two questions": ("roles do not alternate", record("sick", conversations=[QUESTION, human("?"), ANSWER])),
    "two answers": ("roles do not alternate", record("sick", conversations=[QUESTION, ANSWER, ANSWER])),
    "late system": (
        "roles do not alternate",
        record("sick", conversations=[QUESTION, {"from": "system", "value": "Be brief."}, ANSWER]),
    ),
    "no answer": ("ends without an answer", record("sick", conversations=[QUESTION, ANSWER, human("And?")])),
    "empty question": ("empty question", record("sick", conversations=talk(f"{TAG}What?", "A cat.", " \n", "Yes."))),
    "empty answer": ("empty answer", record("sick", conversations=[QUESTION, gpt(" \n")])),
    "empty system": (
        "empty system message",
        record("sick", conversations=[{"from": "system", "value": ""}, QUESTION, ANSWER]),
    ),
    "no image": ("<image> without an image", record("sick", None)),
    "no tag": ("image without <image>", record("sick", conversations=talk("What?", "A cat."))),
    "tag twice": (
        "<image> and images differ in number",
        record("sick", conversations=talk("<image>\n<image>\nWhat?", "A cat.")),
    ),
    "tag missing": ("<image> and images differ in number", record("sick", ["a.jpg", "b.png"])),
    "tag in an answer": ("<image> outside a question", record("sick", conversations=[QUESTION, gpt("An <image>.")])),
    "missing": ("image missing", record("sick", "absent.jpg")),
    "below a file": ("image missing", record("sick", "a.jpg/b.jpg")),
    "with a NUL": ("image missing", record("sick", "a\0.jpg")),
    "endless name": ("image missing", record("sick", "a" * 5000 + ".jpg")),
    "link in a circle": ("image missing", record("sick", "loop.jpg")),
    "up": ("image outside DIR", record("sick", "../outside.jpg")),
    "up and down": ("image outside DIR", record("sick", "deep/../a.jpg")),
    "absolute": ("image outside DIR", record("sick", "/etc/passwd")),
    "back through a link": ("image outside DIR", record("sick", "way/images/../outside.jpg")),
    "link to no picture": ("unreadable image", record("sick", "passwd.jpg")),
    "link to nothing": ("image missing", record("sick", "gone.jpg")),
    "folder": ("image is not a file", record("sick", "folder.jpg")),
    "FIFO": ("image is not a file", record("sick", "fifo.jpg")),
    "empty name": ("image is not a file", record("sick", "")),
    "zero bytes": ("image of zero bytes", record("sick", "nothing.jpg")),
    "zero pixels": ("unreadable image", record("sick", "empty.png")),
    "no picture": ("unreadable image", record("sick", "letter.jpg")),
    "program": ("unreadable image", record("sick", "drawing.jpg")),
    "cut JPEG": ("truncated image", record("sick", "cut.jpg")),
    "cut PNG": ("truncated image", record("sick", "cut.png")),
    "bomb": ("decompression bomb", record("sick", "bomb.png")),
    "bomb of a warning": ("decompression bomb", record("sick", "small bomb.png")),
}


def test_images_of_a_record_may_be_called_images(make):
    rows = load_data(str(make([{**record("one", None), "images": ["a.jpg"], "image_id": 17, "width": 40}])))
    assert [image.size for image in rows[0]["images"]] == [(40, 30)]
    assert rows[0]["messages"][0]["content"][0] == IMAGE


def test_every_fault_is_found_and_named(make):
    """Each bad record between two good ones; a record without a usable id is named by its number."""
    records, expected = [record("good 0")], {}
    for name, (kind, bad) in FAULTS.items():
        if isinstance(bad, dict) and isinstance(bad["id"], (str, int)):
            bad = {**bad, "id": bad["id"].replace("sick", name)} if isinstance(bad["id"], str) else bad
            expected.setdefault(kind, []).append(str(bad["id"]))
        else:
            expected.setdefault(kind, []).append(f"index {len(records)}")
        records += [bad, record(f"good {len(records)}")]
    folder = make(records, max_bad="100%")
    report = report_of(folder)
    assert {kind: fault["ids"] for kind, fault in report["faults"].items()} == expected
    good = [row["id"] for row in records[::2]]
    assert (report["samples"], report["bad_samples"], report["rows"]) == (len(records), len(FAULTS), len(good))
    assert ids_of(folder) == good


def test_a_fault_stops_the_command(photos, monkeypatch, caplog, capsys, tmp_path):
    caplog.set_level("INFO")
    monkeypatch.setattr(build, "ProcessPoolExecutor", InThisProcess)
    source, out = write(tmp_path / "source.json", [record(), record("sick", "cut.jpg")]), tmp_path / "out"
    words = ["data", str(source), "--images", str(photos), "--out", str(out)]
    for more, code in (([], 2), (["--max-bad", "1"], 0)):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == code
        output, errors = capsys.readouterr()
        assert output == ""
        assert caplog.messages[:2] == [
            "2 samples, 1 bad, 0 with the id of another",
            "        1 truncated image: 'sick' ('cut.jpg')",
        ]
        caplog.clear()
        if code == 2:
            assert re.fullmatch(
                "data: 1 of 2 samples are bad, more than --max-bad 0. Nothing is written. Fix them.*\n", errors
            )
            assert [path.name for path in tmp_path.iterdir()] == ["source.json"]
    assert ids_of(out) == ["good"]


def test_a_sample_with_several_faults_is_counted_once_and_named_under_each(make):
    sick = record("sick", ["absent.jpg", "cut.jpg", "gone.jpg"], [ANSWER, gpt("")])
    report = report_of(make([sick, record()], max_bad=1))
    assert report["bad_samples"] == 1
    assert report["faults"] == {
        kind: {"count": 1, "ids": ["sick"]}
        for kind in (
            "starts with the assistant",
            "roles do not alternate",
            "empty answer",
            "image without <image>",
            "image missing",
            "truncated image",
        )
    }


def test_an_image_of_many_samples_is_a_fault_of_each_and_decoded_once(make, monkeypatch):
    asked = []
    monkeypatch.setattr(
        image_checks, "check_image", lambda folder, name: asked.append(name) or "truncated image" * (name == "b.png")
    )
    monkeypatch.setattr(image_checks, "BATCH", 3)
    records = [record(str(index), "b.png" if index % 2 else "a.jpg") for index in range(40)]
    report = report_of(make(records, max_bad=20))
    assert report["faults"]["truncated image"]["ids"] == [str(index) for index in range(1, 40, 2)]
    assert sorted(asked) == ["a.jpg", "b.png"]


def test_so_many_may_be_bad_and_not_one_more(make):
    cases = [("0", 0, True), ("0", 1, False), ("2", 2, True), ("2", 3, False), ("5%", 2, True), ("5%", 3, False)]
    cases += [("7.5%", 3, True), ("7.4%", 3, False), ("0%", 1, False), ("100%", 39, True), ("39", 39, True)]
    for limit, num_bad, is_allowed in cases:
        records = [record(str(index), *(["absent.jpg"] if index < num_bad else [])) for index in range(40)]
        if is_allowed:
            report = report_of(make(records, max_bad=limit, overwrite=True))
            assert (report["rows"], report["bad_samples"], report["max_bad"]) == (40 - num_bad, num_bad, limit)
        else:
            message = f"^{num_bad} of 40 samples are bad, more than --max-bad {limit}. Nothing"
            with pytest.raises(DataError, match=message):
                make(records, max_bad=limit, overwrite=True)


def test_other_limits_are_refused(make):
    for limit in ("", "-1", "1.5", "x%", "%", "1 %", "1e3", "½%"):
        with pytest.raises(DataError, match="neither a number of samples"):
            make([record()], max_bad=limit)


@pytest.mark.parametrize("records", [[], [record("sick", "absent.jpg")]], ids=["none", "none good"])
def test_data_without_rows_is_refused(records, make, tmp_path):
    with pytest.raises(DataError, match=r"^out\.json has no good samples"):
        make(records, max_bad="100%")
    assert not (tmp_path / "out").exists()


def test_what_is_printed_is_short_and_has_no_control_characters(fresh, photos, tmp_path):
    names = ["\x1b[31mred", "two\nlines", "long" * 10_000, "\u202eback", "bell\a", "sixth", "seventh"]
    source = write(tmp_path / "source.json", [record(name, f"{name}.jpg") for name in names])
    code, _, errors = make_by_command(fresh, source, photos, tmp_path / "out")
    assert code == 2
    assert len(errors.splitlines()) == 3
    assert all(character.isprintable() for line in errors.splitlines() for character in line)
    assert max(map(len, errors.splitlines())) < 1000
    assert "7 image missing: '\\x1b[31mred' ('\\x1b[31mred.jpg'), 'two\\nlines'" in errors
    assert errors.splitlines()[1].endswith(", ...")
    assert "sixth" not in errors


def test_every_id_is_in_the_report(make):
    bad = [record(f"bad {index}\x1b", "absent.jpg") for index in range(30)]
    report = report_of(make([record(), *bad], max_bad="99%"))
    assert report["faults"]["image missing"] == {"count": 30, "ids": [f"bad {index}\x1b" for index in range(30)]}


KINDS_OF_IMAGES = {
    "baseline": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "444": ("JPEG", {"subsampling": 0}),
    "restarts": ("JPEG", {"restart_marker_rows": 1}),
    "grey": ("JPEG", {"mode": "L"}),
    "cmyk": ("JPEG", {"mode": "CMYK"}),
    "png": ("PNG", {}),
    "palette": ("PNG", {"mode": "P"}),
    "gif": ("GIF", {}),
    "webp": ("WEBP", {}),
}


@pytest.mark.parametrize("kind", KINDS_OF_IMAGES)
def test_cheap_decoding_finds_every_cut_that_a_whole_one_finds(kind, tmp_path):
    """JPEGs are decoded at an eighth of their size, which must find every file that training could not decode."""
    name, options = KINDS_OF_IMAGES[kind]
    options = dict(options)
    whole = encoded(tiny.picture(3, 120, 160).convert(options.pop("mode", "RGB")), name, **options)
    path = tmp_path / "picture"
    for length in {*range(1, len(whole), max(1, len(whole) // 30)), *range(len(whole) - 15, len(whole) + 1)}:
        path.write_bytes(whole[:length])
        try:
            with Image.open(path) as image:
                image.load()
                ImageOps.exif_transpose(image)
            is_whole = True
        except Exception:
            is_whole = False
        fault = check_image(str(tmp_path), path.name)
        assert (fault == "") == is_whole, f"{fault!r} at {length} of {len(whole)} bytes"
    assert check_image(str(tmp_path), path.name) in ("", "truncated image", "unreadable image")
