# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA-format JSON to a folder: what is good comes out as it went in, and the folder is complete or not there."""

import contextlib
import json
import os
import shutil
import sys
import time

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from datasets import load_dataset
from llava_records import IMAGE, make_by_command, record, report_of, talk, text, write
from PIL import Image
from transformers import AutoProcessor

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.training.data import DataError, build, build_data, image_checks, load_data
from modeling_deco.training.data.columns import FEATURES

pytestmark = pytest.mark.usefixtures("own_cache")


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
        monkeypatch.setattr(build, "write_card", lambda *_: os.stat("/absent"))
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
    """Begin to build data, with a worker that takes hours for an image; returns the ids of both processes."""
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
        with pytest.raises(DataError, match=r"Another process is writing .*out; wait until it has finished"):
            make([record()])
    finally:
        os.kill(builder, 9)


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(source, images, out):
    """The peak memory of a run and its one worker, in bytes."""
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
