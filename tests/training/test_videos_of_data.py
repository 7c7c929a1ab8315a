# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Video's JSON, and data sets with a column of videos."""

import pytest
import tiny
import tiny_training
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from llava_records import TAG, ids_of, record, report_of, talk, text

pytest.importorskip("av")

from tiny_videos import sound, video

from modeling_deco.training import DecoCollator, load_data
from modeling_deco.training.data import DataError
from modeling_deco.training.data.columns import FEATURES_WITH_VIDEOS
from modeling_deco.training.data.videos import most_frames

pytestmark = pytest.mark.usefixtures("own_cache")

VIDEO, IMAGE = {"type": "video", "text": None}, {"type": "image", "text": None}


@pytest.fixture(scope="module")
def clips(photos):
    """The clips that lie beside the photos."""
    (photos / "academic").mkdir(exist_ok=True)
    for seconds in (2, 3):
        (photos / "academic" / f"{seconds}.mp4").write_bytes(video(10 * seconds, rate=10))
    (photos / "noise.mp4").write_bytes(b"noise" * 1000)
    (photos / "cut.mp4").write_bytes(video(20)[:300])
    (photos / "song.wav").write_bytes(sound())
    (photos / "nothing.mp4").touch()
    return photos


def clip(sample_id="good", name="academic/2.mp4", question=f"{TAG}What?", **more):
    return record(sample_id, None, talk(question, "A cat."), video=name, data_source="0_30_s_academic_v0_1", **more)


def test_rows_have_their_videos_in_place(clips, make):
    records = [
        clip(),
        clip("2", "academic/3.mp4", "What is <video> ?"),
        record("3", "a.jpg", talk("<image> <video>\nWhich?", "!"), videos=["academic/2.mp4"]),
        record("4"),
        record("5", None, talk("A tag of HTML is <video>.", "Yes.")),
    ]
    folder = make(records)
    rows = load_data(str(folder))
    assert rows.features == FEATURES_WITH_VIDEOS
    assert [row["messages"][0]["content"] for row in rows] == [
        [VIDEO, text("What?")],
        [text("What is "), VIDEO, text(" ?")],
        [IMAGE, VIDEO, text("Which?")],
        [IMAGE, text("What is this?")],
        [text("A tag of HTML is <video>.")],
    ]
    paths = [[entry["path"] for entry in row["videos"]] for row in rows]
    assert paths == [[str(clips / f"academic/{name}.mp4")] for name in (2, 3, 2)] + [[], []]
    report = report_of(folder)
    assert (report["videos"], report["images"], report["text_only_rows"]) == (3, 2, 1)
    assert "2 images, 3 videos" in (folder / "README.md").read_text()


def test_videos_may_lie_elsewhere_and_in_the_rows(clips, make, tmp_path):
    folder = make([clip(name="2.mp4"), record("2")], videos=clips / "academic", embed_images=True)
    (first, _) = load_data(str(folder))
    assert first["videos"] == [{"bytes": (clips / "academic/2.mp4").read_bytes(), "path": "2.mp4"}]
    with pytest.raises(DataError, match="--videos .* is not a folder"):
        make([clip()], name="other", videos=tmp_path / "absent")


FAULTS = {
    "missing": ("video missing", clip("sick", "academic/4.mp4")),
    "outside": ("video outside DIR", clip("sick", "../a.mp4")),
    "zero bytes": ("video of zero bytes", clip("sick", "nothing.mp4")),
    "a folder": ("video is not a file", clip("sick", "academic")),
    "noise": ("unreadable video", clip("sick", "noise.mp4")),
    "cut": ("unreadable video", clip("sick", "cut.mp4")),
    "sound": ("unreadable video", clip("sick", "song.wav")),
    "no tag": ("video without <image> or <video>", clip("sick", question="What?")),
    "two tags": ("<image> or <video> and videos differ in number", clip("sick", question="<image>\n<image>\nWhat?")),
    "one of each tag": (
        "<image> or <video> and videos differ in number",
        clip("sick", question="<image><video> What?"),
    ),
    "tag of an image": ("video without <video>", record("sick", video="academic/2.mp4")),
    "a number": ("malformed record", clip("sick", 5)),
    "two lists": ("malformed record", clip("sick", videos=["academic/3.mp4"])),
}


def test_every_fault_of_a_video_is_found_and_named(clips, make):
    records, expected = [clip("good 0")], {}
    for name, (kind, bad) in FAULTS.items():
        expected.setdefault(kind, []).append(name)
        records += [{**bad, "id": name}, clip(f"good {len(records)}")]
    folder = make(records, max_bad="100%")
    assert {kind: fault["ids"] for kind, fault in report_of(folder)["faults"].items()} == expected
    assert ids_of(folder) == [row["id"] for row in records[::2]]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_data_with_and_without_videos_are_joined(streaming, clips, make):
    sources = [str(make([record()], name="images")), str(make([clip()], name="clips"))]
    rows = list(load_data(sources, streaming=streaming))
    assert [row["videos"] or [] for row in rows] == [[], [{"bytes": None, "path": str(clips / "academic/2.mp4")}]]
    assert [len(row["images"]) for row in rows] == [1, 0]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_videos_of_others_are_read_from_parts_and_columns(streaming, clips, tmp_path):
    path = str(clips / "academic/2.mp4")
    question, answer = {"role": "user", "content": "what ?"}, {"role": "assistant", "content": "a cat ."}
    shown = [{"type": "video", "video": path, "text": None}]
    in_parts = [{**question, "content": shown}, {**answer, "content": [{"type": "text", "text": "a cat ."}]}]
    part = {name: Value("string") for name in ("type", "text", "video")}
    features_of_parts = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    layouts = {
        "column": ({"messages": [question, answer], "video": path, "data_source": "web"}, None),
        "part": ({"messages": in_parts}, features_of_parts),
    }
    for name, (row, features) in layouts.items():
        (tmp_path / name).mkdir()
        Dataset.from_list([row], features=features).to_parquet(tmp_path / name / "train.parquet")
        (read,) = load_data(str(tmp_path / name), streaming=streaming)
        assert [entry["path"] for entry in read["videos"]] == [path], name
        assert read["messages"][0]["content"][0]["type"] == "video", name


def test_a_collator_reads_files_bytes_and_frames(clips):
    model = tiny.build_family("llava_next_video")
    processor = tiny.build_family_processor(model.config)
    processor.chat_template = tiny_training.CHAT_TEMPLATE
    collator = DecoCollator(processor)
    path = clips / "academic/3.mp4"
    asked = {
        "id": "1",
        "messages": [{"role": "user", "content": "<video> what ?"}, {"role": "assistant", "content": "a"}],
    }
    batches = [
        collator([{**asked, "video": video}])
        for video in (str(path), path.read_bytes(), {"bytes": None, "path": str(path)})
    ]
    assert all(batch["pixel_values_videos"].shape == (1, 3, 3, 24, 24) for batch in batches)
    assert all(batch["pixel_values_videos"].equal(batches[0]["pixel_values_videos"]) for batch in batches)
    frames = Dataset.from_list([{**asked, "videos": [[tiny.picture(0), tiny.picture(1)]]}]).cast_column(
        "videos", List(List(ImageFeature()))
    )
    assert collator(list(frames))["num_frames"] == [2]
    with pytest.raises(ValueError, match=r"Sample '1': the video '.*noise.mp4' cannot be read: its content is not a"):
        collator([{**asked, "video": str(clips / "noise.mp4")}])
    with pytest.raises(ValueError, match="Sample '1': it has a video, but the model takes none"):
        DecoCollator(tiny_training.build_processor())([{**asked, "video": str(path)}])


def test_the_most_frames_of_a_video_are_known_from_its_header(clips):
    path = clips / "academic/3.mp4"
    for source in (str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}):
        assert 3 <= most_frames(source, 1.0, 64) <= 4
        assert most_frames(source, 10.0, 8) == 8
    assert most_frames([tiny.picture(0)] * 3, 1.0, 64) == 3
    assert most_frames(str(clips / "noise.mp4"), 1.0, 64) == 64
