# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA-format JSON to training data: every fault is found and named, what is good comes out as it went in."""

import contextlib
import io
import itertools
import json
import os
import random
import re
import shutil
import struct
import sys
import time
import zlib
from concurrent.futures import Future

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import xxhash
from datasets import load_dataset
from fresh_process import FreshProcesses
from PIL import Image, ImageOps
from transformers import AutoProcessor

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.training.data import DataError, build, build_data, image_checks, llava, load_data
from modeling_deco.training.data.__main__ import main
from modeling_deco.training.data.columns import FEATURES, MESSAGES
from modeling_deco.training.data.image_checks import check_image
from modeling_deco.training.data.llava import read_records
from modeling_deco.training.data.rows import to_parts

IMAGE, TAG = {"type": "image", "text": None}, "<image>\n"


def text(value):
    return {"type": "text", "text": value}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def talk(*values):
    """Human and assistant in turns."""
    return [(gpt if index % 2 else human)(value) for index, value in enumerate(values)]


def record(sample_id="good", image="a.jpg", conversations=None, **more):
    conversations = talk(f"{TAG}What is this?", "A cat.") if conversations is None else conversations
    fields = {"id": sample_id, "image": image, "conversations": conversations, **more}
    return {name: value for name, value in fields.items() if value is not None}


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(width, height):
    """The file of a picture of so many pixels, none of which it has."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def fresh():
    processes = FreshProcesses(modules=["modeling_deco.training.data"])
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of pictures, and of what is none."""
    place = tmp_path_factory.mktemp("photos")
    folder = place / "images"
    (folder / "deep").mkdir(parents=True)
    for seed, name in enumerate(("a.jpg", "b.png", "deep/c.webp")):
        tiny.picture(seed).save(folder / name)
    jpeg, png = (encoded(tiny.picture(9, 200, 300), kind) for kind in ("JPEG", "PNG"))
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) * 2 // 3])
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "letter.jpg").write_text("Dear Sir or Madam")
    (folder / "drawing.jpg").write_bytes(encoded(tiny.picture(9), "EPS"))
    (folder / "nothing.jpg").touch()
    (folder / "empty.png").write_bytes(png_of(0, 0))
    (folder / "bomb.png").write_bytes(png_of(50_000, 50_000))
    (folder / "small bomb.png").write_bytes(png_of(10_000, 10_000))  # of which Pillow only warns
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    tiny.picture(5).save(place / "outside.jpg")
    (folder / "link.jpg").symlink_to("deep/c.webp")
    (folder / "way out.jpg").symlink_to(place / "outside.jpg")
    (folder / "way").symlink_to(place)
    (folder / "passwd.jpg").symlink_to("/etc/passwd")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    return folder


def write(path, records):
    path.write_text(json.dumps(records))
    return path


class InThisProcess:
    """In place of the pool of processes, which takes longer to start than all that most tests do."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function):
        future = Future()
        future.set_result(function())
        return future

    def map(self, function, names, chunksize):
        return map(function, names)

    def shutdown(self, **_):
        pass


@pytest.fixture
def make(tmp_path, photos, monkeypatch):
    """Makes data of records in this process, and returns its folder."""
    monkeypatch.setattr(build, "ProcessPoolExecutor", InThisProcess)

    def make(records, name="out", **options):
        source = write(tmp_path / f"{name}.json", records)
        build_data(source, photos, tmp_path / name, num_proc=1, **options)
        return tmp_path / name

    return make


def run_command(*arguments):
    """The command, in a process of its own: its exit code, standard output and standard error."""
    import contextlib
    import io
    import runpy
    import sys

    sys.modules.pop("modeling_deco.training.data.__main__", None)
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            runpy.run_module("modeling_deco.training.data", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as error:
            code = error.code
    return code, output.getvalue(), errors.getvalue()


def make_by_command(fresh, source, photos, out, *more):
    return fresh.run(run_command, source, "--images", photos, "--out", out, "--num-proc", 1, *more)


def ids_of(folder):
    return [value for path in sorted((folder / "data").iterdir()) for value in pq.read_table(path)["id"].to_pylist()]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


# --- what is good ----------------------------------------------------------------------------------------------------


def test_images_stand_where_their_tags_stood():
    cases = [
        ("<image>\nWhat is this?", [IMAGE, text("What is this?")]),
        ("What is this?\n<image>", [text("What is this?"), IMAGE]),
        ("<image>", [IMAGE]),
        (" \n<image> \n", [IMAGE]),
        ("<image>\n<image>\nWhich?", [IMAGE, IMAGE, text("Which?")]),
        ("Is <image> like <image> ?", [text("Is "), IMAGE, text(" like "), IMAGE, text(" ?")]),
        ("A:\n<image>\nB:\n<image>\nWhich?", [text("A:\n"), IMAGE, text("\nB:\n"), IMAGE, text("\nWhich?")]),
        ("A<image>\n<image>B\n", [text("A"), IMAGE, IMAGE, text("B")]),
        ("  def f():\n    pass\n", [text("  def f():\n    pass\n")]),
        ("", [text("")]),
    ]
    for value, parts in cases:
        assert to_parts(value) == parts, value


def test_links_of_the_folder_may_lead_out_of_it(make, photos):
    records = [record(name, [name]) for name in ("link.jpg", "way out.jpg", "way/outside.jpg")]
    rows = load_dataset(str(make(records)), split="train").with_format(None)
    inside, outside = photos / "deep" / "c.webp", photos.parent / "outside.jpg"
    for row, target in zip(rows, (inside, outside, outside), strict=True):
        (image,) = row["images"]
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(Image.open(target).convert("RGB")))


def test_rows_are_the_records_in_their_order(make, photos):
    records = [
        record("one"),
        record("several", ["b.png", "a.jpg", "b.png"], talk("<image> <image>\nAnd <image>?", "Yes.", "Sure?", "No.")),
        record("text", None, [{"from": "system", "value": "Be brief."}, *talk("Hello", " Hi.\n")]),
        record(17, "deep/c.webp", talk("What is\n<image>", "A 猫.")),
        record(None, ["link.jpg"]),
        record("no images", []) | {"conversations": talk("Hello", "Hi")},
        {**record("one"), "image": None, "conversations": talk("Again", "Yes"), "model": "of no interest"},
    ]
    rows = load_dataset(str(make(records)), split="train")
    assert rows.features == FEATURES
    assert rows["id"] == ["one", "several", "text", "17", None, "no images", "one"]
    assert rows["messages"][1] == [
        {"role": "user", "content": [IMAGE, IMAGE, text("And "), IMAGE, text("?")]},
        {"role": "assistant", "content": [text("Yes.")]},
        {"role": "user", "content": [text("Sure?")]},
        {"role": "assistant", "content": [text("No.")]},
    ]
    assert rows["messages"][2] == [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [text("Hello")]},
        {"role": "assistant", "content": [text(" Hi.\n")]},
    ]
    assert rows["messages"][3][1] == {"role": "assistant", "content": [text("A 猫.")]}
    names = [["a.jpg"], ["b.png", "a.jpg", "b.png"], [], ["deep/c.webp"], ["link.jpg"], [], []]
    for row, row_names in zip(rows, names, strict=True):
        assert len(row["images"]) == len(row_names)
        for image, name in zip(row["images"], row_names, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(photos / name)))


def test_report_and_card_count_what_is_there(make):
    folder = make(
        [record(), record("two", ["a.jpg", "b.png"], talk("<image><image>", "!")), record("t", None, talk("a", "b"))]
    )
    counts = {"samples": 3, "bad_samples": 0, "rows": 3, "text_only_rows": 1, "images": 3, "repeated_ids": 0}
    facts = {"source": "out.json", "max_bad": "0", "images_embedded": False, "faults": {}}
    digest = xxhash.xxh3_128_hexdigest((folder / "data" / "train-00000-of-00001.parquet").read_bytes())
    assert report_of(folder) == {**counts, **facts, "xxh3_128": digest}
    card = (folder / "README.md").read_text()
    assert "'out.json'" in card
    assert "3 rows, 1 of them of text only" in card
    info = datasets.load_dataset_builder(str(folder)).info
    assert info.features == FEATURES


def test_repeated_ids_are_a_note_and_no_fault(make, caplog):
    caplog.set_level("INFO")
    report = report_of(make([record("same"), record("same"), record("same"), record("other")]))
    assert (report["repeated_ids"], report["rows"], report["faults"]) == (2, 4, {})
    assert "4 samples, 0 bad, 2 with the id of another" in caplog.text


def test_digits_become_data_that_a_processor_takes(fresh, tmp_path):
    world = pytest.importorskip("modeling_deco.worlds.digits.world")
    world.main(["--split", "test", "--num-pictures", "5", "--out", str(tmp_path / "digits")])
    source, images, out = tmp_path / "digits" / "test.json", tmp_path / "digits" / "images", tmp_path / "out"
    code, output, errors = make_by_command(fresh, source, images, out)
    assert (code, output) == (0, "")
    records = json.loads(source.read_text())
    assert f"{len(records)} samples, 0 bad" in errors
    rows = load_data(str(out))
    assert len(rows) == len(records)
    for row, old in zip(rows, records, strict=True):
        (question, answer) = row["messages"]
        assert question["content"] == [IMAGE, text(old["conversations"][0]["value"].removeprefix("<image>\n"))]
        assert answer["content"] == [text(old["conversations"][1]["value"])]
    asked = AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT).apply_chat_template(rows[0]["messages"][:1])
    question = records[0]["conversations"][0]["value"].removeprefix("<image>\n")
    assert asked.endswith(f"<user><image>{question}")


def test_many_rows_are_spread_over_shards_in_order(make, monkeypatch):
    monkeypatch.setattr(build, "ROW_GROUP_ROWS", 7)
    monkeypatch.setattr(build, "SHARD_ROWS", 20)
    folder = make([record(str(index), "ab"[index % 2] + (".jpg", ".png")[index % 2]) for index in range(100)])
    names = sorted(path.name for path in (folder / "data").iterdir())
    assert names == [f"train-0000{index}-of-00005.parquet" for index in range(5)]
    assert load_dataset(str(folder), split="train")["id"] == [str(index) for index in range(100)]
    streamed = load_dataset(str(folder), split="train", streaming=True)
    assert [row["id"] for row in streamed] == [str(index) for index in range(100)]
    assert streamed.num_shards == 5


def test_embedded_images_bound_row_groups_and_shards(make, monkeypatch):
    monkeypatch.setattr(build, "ROW_GROUP_BYTES", 3000)
    monkeypatch.setattr(build, "SHARD_BYTES", 6000)
    folder = make([record(str(index)) for index in range(40)], embed_images=True)
    shards = sorted((folder / "data").iterdir())
    assert len(shards) > 2
    assert max(pq.read_metadata(shard).num_rows for shard in shards) < 40
    assert load_dataset(str(folder), split="train")["id"] == [str(index) for index in range(40)]


# --- references and embedded images ----------------------------------------------------------------------------------


@pytest.fixture
def own_photos(photos, tmp_path):
    """That a test may delete."""
    (tmp_path / "own").mkdir()
    for name in ("a.jpg", "b.png"):
        shutil.copy(photos / name, tmp_path / "own" / name)
    return tmp_path / "own"


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_references_are_read_when_a_row_is(own_photos, tmp_path, streaming):
    source = write(tmp_path / "source.json", [record("1", "a.jpg"), record("2", "b.png")])
    build_data(source, own_photos, tmp_path / "out", num_proc=1)
    (own_photos / "b.png").unlink()
    rows = iter(load_data(str(tmp_path / "out"), streaming=streaming))
    assert next(rows)["images"][0].size == (40, 30)
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        next(rows)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_embedded_images_need_no_other_folder(own_photos, tmp_path, streaming):
    source = write(tmp_path / "source.json", [record("1", "a.jpg"), record("2", "b.png")])
    build_data(source, own_photos, tmp_path / "out", embed_images=True, num_proc=1)
    expected = [np.asarray(Image.open(own_photos / name)) for name in ("a.jpg", "b.png")]
    shutil.rmtree(own_photos)
    source.unlink()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    rows = list(load_data(str(tmp_path / "elsewhere"), streaming=streaming))
    assert all(np.array_equal(row["images"][0], image) for row, image in zip(rows, expected, strict=True))
    shards = b"".join(path.read_bytes() for path in (tmp_path / "elsewhere" / "data").iterdir())
    assert str(tmp_path).encode() not in shards


# --- faults ----------------------------------------------------------------------------------------------------------

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
    "video": ("media that are not read", record("sick", None, talk("What?", "A cat."), video="a.mp4")),
    "videos beside an image": ("media that are not read", record("sick", videos=["a.mp4"])),
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
    """JPEGs are decoded at an eighth of their size: that must not be able to miss what training would stumble over."""
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


# --- JSON ------------------------------------------------------------------------------------------------------------


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


# --- the folder ------------------------------------------------------------------------------------------------------


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".json" and path.name != "cache")


def test_what_is_there_is_kept_without_overwrite(make, tmp_path):
    old = contents(make([record("old")]))
    with pytest.raises(DataError, match=r"is not empty; choose another, or pass --overwrite"):
        make([record("new")])
    assert contents(tmp_path / "out") == old


def test_data_in_folders_of_one_name_are_not_mixed_up_by_the_cache(make, tmp_path):
    for place in ("one", "two"):
        make([record(place)])
        (tmp_path / place).mkdir()
        (tmp_path / "out").rename(tmp_path / place / "out")
    for place in ("one", "two"):
        assert load_dataset(str(tmp_path / place / "out"), split="train")["id"] == [place]


def test_overwriting_replaces_all_and_is_seen_through_the_cache(make, tmp_path):
    assert load_dataset(str(make([record("old")] * 3)), split="train")["id"] == ["old"] * 3
    make([record("new")], overwrite=True)
    assert load_dataset(str(tmp_path / "out"), split="train")["id"] == ["new"]
    assert beside(tmp_path / "out") == ["out"]


def test_overwrite_of_nothing_makes_the_folder(make, tmp_path):
    (tmp_path / "out").mkdir()
    make([record("new")], overwrite=True)
    make([record("new")], name="other", overwrite=True)
    assert beside(tmp_path / "out") == ["other", "out"]


@pytest.mark.parametrize("spoil", ["fault", "broken JSON", "card"])
def test_a_failing_run_leaves_the_old_folder(spoil, make, monkeypatch, tmp_path):
    old = contents(make([record("old")]))
    if spoil == "card":
        monkeypatch.setattr(build, "_write_card", lambda *_: os.stat("/absent"))
    if spoil == "broken JSON":
        (tmp_path / "bad.json").write_text('[{"id": 1}, ')
        with pytest.raises(DataError, match="bad JSON"):
            build_data(tmp_path / "bad.json", tmp_path, tmp_path / "out", overwrite=True, num_proc=1)
    else:
        with pytest.raises(DataError, match="are bad" if spoil == "fault" else "No such file"):
            make([record("new", "absent.jpg" if spoil == "fault" else "a.jpg")], overwrite=True)
    assert contents(tmp_path / "out") == old
    assert beside(tmp_path / "out") == ["out"]


def test_a_folder_of_other_things_is_not_overwritten(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    with pytest.raises(DataError, match=r"has no report\.json of earlier data, so it is not overwritten"):
        make([record()], overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("what", ["images", "source", "parent of both"])
def test_a_folder_that_holds_the_sources_is_not_overwritten(what, own_photos, tmp_path):
    (tmp_path / "json").mkdir()
    source = write(tmp_path / "json" / "source.json", [record()])
    out = {"images": own_photos, "source": source.parent, "parent of both": tmp_path}[what]
    (out / "report.json").write_text("{}")
    with pytest.raises(DataError, match="contains SRC or the images; choose another"):
        build_data(source, own_photos, out, overwrite=True, num_proc=1)
    assert (own_photos / "a.jpg").exists()


def test_a_file_is_no_folder(make, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="is a file"):
        make([record()], overwrite=True)


@pytest.mark.parametrize(
    ("source", "images", "message"), [("none", ".", "SRC .*none is not a file"), (".", ".", "is not a file")]
)
def test_sources_must_be_there(source, images, message, tmp_path):
    with pytest.raises(DataError, match=message):
        build_data(tmp_path / source, tmp_path / images, tmp_path / "out")
    write(tmp_path / "source.json", [record()])
    with pytest.raises(DataError, match="--images .* is not a folder"):
        build_data(tmp_path / "source.json", tmp_path / "source.json", tmp_path / "out")


def build_until_rename(source, images, out, number, how):
    """Overwrite `out` in a child that ends just before its `number`-th rename; its exit status and their number."""
    import os
    import sys
    import traceback

    from modeling_deco.training.data import build_data

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count, status = 0, 1

        def watch(event, arguments):
            nonlocal count
            if event == "os.rename":
                count += 1
                if count == int(number):
                    if how == "kill":
                        os.kill(os.getpid(), 9)
                    raise KeyboardInterrupt

        sys.addaudithook(watch)
        try:
            build_data(source, images, out, overwrite=True, num_proc=1)
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(writing, str(count).encode())
            os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) or os.WEXITSTATUS(status), int(os.read(reading, 100) or -1)


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_ended_at_any_rename_the_old_or_the_new_data_are_whole(how, fresh, make, photos, tmp_path):
    old, new = contents(make([record("old")])), contents(make([record("new"), record("2")], name="new"))
    source, out = tmp_path / "new.json", tmp_path / "out"
    status, count = fresh.run(build_until_rename, source, photos, tmp_path / "spare", 0, how)
    assert (status, count) == (0, 2)
    for number in range(1, 4):  # of the shard, of the old folder, and of the new one
        make([record("old")], overwrite=True)
        status, _ = fresh.run(build_until_rename, source, photos, out, number, how)
        assert status == (9 if how == "kill" else 130)
        if how == "interrupt":
            assert contents(out) in (old, new)
            assert beside(out) == ["new", "out", "spare"]
        elif out.exists():
            assert contents(out) in (old, new)
        else:
            assert old in [contents(path) for path in out.parent.rglob("*") if path.is_dir()]
        with contextlib.suppress(DataError):  # of one who does not remember what was asked for
            build_data(source, photos, out, num_proc=1)
        assert contents(out) in (old, new)
        build_data(source, photos, out, overwrite=True, num_proc=1)
        assert contents(out) == new
        assert beside(out) == ["new", "out", "spare"]


def build_slowly(source, images, out, place):
    """Begin to make data, with a process that takes hours for an image; returns the ids of both processes."""
    import os
    import time
    from pathlib import Path

    from modeling_deco.training.data import build_data, image_checks

    def check_image(folder, name):
        Path(place).write_text(str(os.getpid()))
        time.sleep(3600)

    check_image.__module__, check_image.__qualname__ = image_checks.__name__, "check_image"
    image_checks.check_image = check_image
    child = os.fork()
    if child == 0:
        import signal

        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            build_data(source, images, out, num_proc=2)
        finally:
            os._exit(1)
    while not Path(place).exists() or not Path(place).read_text():
        time.sleep(0.02)
    return child, int(Path(place).read_text())


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_killed_run_takes_its_processes_with_it_and_another_can_follow(fresh, make, photos, tmp_path):
    source = write(tmp_path / "out.json", [record()])
    builder, worker = fresh.run(build_slowly, source, photos, tmp_path / "out", tmp_path / "pid.json")
    os.kill(builder, 9)
    deadline = time.monotonic() + 10
    while is_running(worker) or is_running(builder):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.02)
    assert beside(tmp_path / "out") == [".out.incomplete"]
    make([record()])
    assert beside(tmp_path / "out") == ["out"]


def test_a_worker_that_is_killed_ends_the_run_in_one_line(fresh, photos, tmp_path, monkeypatch):
    source = write(tmp_path / "out.json", [record()])
    monkeypatch.setattr(image_checks, "check_image", _die)
    with pytest.raises(DataError, match="was killed, maybe for lack of memory; lower --num-proc"):
        build_data(source, photos, tmp_path / "out", num_proc=1)
    assert beside(tmp_path / "out") == []


def _die(folder, name):
    os.kill(os.getpid(), 9)


def test_a_full_disk_is_one_line(make, monkeypatch, tmp_path):
    def write_table(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", write_table)
    with pytest.raises(DataError, match=r"out\.json to .*out: \[Errno 28\] No space left on device"):
        make([record()])
    assert beside(tmp_path / "out") == []


def test_two_runs_to_one_folder_do_not_mix(fresh, make, photos, tmp_path):
    source = write(tmp_path / "out.json", [record()])
    builder, _ = fresh.run(build_slowly, source, photos, tmp_path / "out", tmp_path / "pid.json")
    try:
        with pytest.raises(DataError, match="is writing DST"):
            make([record()])
    finally:
        os.kill(builder, 9)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_several_folders_are_one_after_the_other(make, streaming, tmp_path):
    first = make([record("1"), record("2", None, talk("a", "b"))], name="first")
    second = make([record("3", ["a.jpg", "b.png"], talk("<image><image>", "c"))], name="second")
    rows = load_data([str(first), str(second)], streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    assert rows.column_names == ["id", "messages", "images"]
    assert [len(row["images"]) for row in rows] == [1, 0, 2]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_numbers_as_ids_of_others_become_texts_and_data_of_ours_are_not_copied(make, streaming, monkeypatch, tmp_path):
    numbered = load_dataset(str(make([record("1")])), split="train").cast_column("id", datasets.Value("int64"))
    (tmp_path / "numbered").mkdir()
    numbered.to_parquet(tmp_path / "numbered" / "train.parquet")
    rows = load_data([str(tmp_path / "numbered"), str(tmp_path / "out")], streaming=streaming)
    assert [row["id"] for row in rows] == ["1", "1"]
    assert [row["images"][0].size for row in rows] == [(40, 30)] * 2
    monkeypatch.delattr(datasets.Dataset, "cast_column")
    assert load_data(str(tmp_path / "out"), streaming=streaming).features["id"] == datasets.Value("string")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_pure_text_of_others_gets_a_column_of_no_images(make, streaming, tmp_path):
    """With contents that are texts, and with more columns."""
    (tmp_path / "texts").mkdir()
    message = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with open(tmp_path / "texts" / "train.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": message, "source": index}) + "\n" for index in range(3))
    rows = load_data([str(tmp_path / "texts"), str(make([record()]))], streaming=streaming)
    rows = list(rows)
    assert [row["images"] for row in rows[:3]] == [[]] * 3
    assert rows[0]["messages"][0] == {"role": "user", "content": [text("Hello")]}
    assert rows[3]["messages"][0]["content"][0] == IMAGE
    assert rows[3]["images"][0].size == (40, 30)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_other_data_are_refused_with_what_to_do(streaming, tmp_path):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw" / "train.json", [record()])
    with pytest.raises(ValueError, match="raw has no column 'messages', but .*conversations") as error:
        load_data(str(tmp_path / "raw"), streaming=streaming)
    assert "python -m modeling_deco.training.data SRC.json --images DIR --out OUT" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_no_folder_is_refused_and_not_taken_from_the_cache(make, monkeypatch, tmp_path):
    """Of a name without an owner that it does not find, datasets loads what it once cached of any folder called so."""
    load_data(str(make([record()], name="absent")))
    shutil.rmtree(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "llava.json", [record()])
    for path in ("llava.json", "absent", "./absent/data", "/absent/data", "a/b/c"):
        with pytest.raises(ValueError, match="is neither a folder of data nor a Hub id. Make such a folder with"):
            load_data(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_the_split_that_is_asked_for_is_read(streaming, tmp_path):
    for split in ("train", "test"):
        row = {"id": split, "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    assert [row["id"] for row in load_data(str(tmp_path), streaming=streaming, split="test")] == ["test"]


@pytest.fixture
def trained(tmp_path):
    """Options with which a trainer takes two steps on four rows."""
    return {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }


WORDS = "what is this ?"


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_sft_trainer_takes_the_data_as_they_are(make, streaming, trained):
    trl = pytest.importorskip("trl")
    records = [
        record("1", conversations=talk(f"{TAG}{WORDS}", "a red cat .")),
        record("2", None, talk("what ?", "a dog .")),
        record("3", ["a.jpg", "b.png"], talk("<image><image>" + WORDS, "two ?")),
        record("4", conversations=talk(f"{WORDS}\n<image>", "a cat .")),
    ]
    trainer = trl.SFTTrainer(
        model=tiny.build_model(),
        args=trl.SFTConfig(**trained),
        train_dataset=load_data(str(make(records)), streaming=streaming),
        processing_class=tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE),
    )
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_dpo_trainer_takes_preferences_as_they_are(checkpoint, photos, streaming, trained, tmp_path):
    trl = pytest.importorskip("trl")
    turn = MESSAGES
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "prompt": turn,
            "chosen": turn,
            "rejected": turn,
            "note": datasets.Value("string"),
        }
    )
    row = {
        "images": [str(photos / "a.jpg")],
        "prompt": [{"role": "user", "content": [IMAGE, text(WORDS)]}],
        "chosen": [{"role": "assistant", "content": [text("a cat .")]}],
        "rejected": [{"role": "assistant", "content": [text("a dog .")]}],
        "note": "of no interest",
    }
    (tmp_path / "preferences").mkdir()
    datasets.Dataset.from_list([row] * 4, features=features).to_parquet(tmp_path / "preferences" / "train.parquet")
    preferences = load_data(str(tmp_path / "preferences"), streaming=streaming)
    assert preferences.column_names == ["prompt", "chosen", "rejected", "images"]
    trainer = trl.DPOTrainer(
        model=str(checkpoint),
        args=trl.DPOConfig(**trained),
        train_dataset=preferences,
        processing_class=tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE),
    )
    assert np.isfinite(trainer.train().training_loss)


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(source, images, out):
    """Bytes that a run needs at most: its own, and those of its one worker."""
    import resource

    from modeling_deco.training.data import build_data

    build_data(source, images, out, num_proc=1)
    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@pytest.mark.slow
def test_a_million_rows_take_less_than_two_gigabytes(fresh, photos, tmp_path):
    peaks = []
    for num_rows in (50_000, 200_000):
        with open(tmp_path / "source.json", "w") as file:
            for index in range(num_rows):
                value = record(f"{index:012d}", None, talk(f"Question {index}? " * 10, f"Answer {index}. " * 20) * 2)
                file.write(("," if index else "[") + json.dumps(value))
            file.write("]")
        peaks.append(fresh.run(peak_memory, tmp_path / "source.json", photos, tmp_path / str(num_rows)))
    at_a_million = peaks[1] + (peaks[1] - peaks[0]) / 150_000 * 800_000
    assert max(at_a_million, peaks[1]) < 2e9, peaks
