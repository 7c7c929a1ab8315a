# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Data in the layouts that people have: every picture is read where it belongs, or the row is named."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

pytest.importorskip("trl")

import datasets
import tiny_training
import torch
from datasets import Dataset, List
from PIL import ExifTags, Image
from transformers import Siglip2ImageProcessorPil

from modeling_deco.training import DecoCollator, DecoSFTConfig, DecoSFTTrainer, load_data
from modeling_deco.training.data.images import image_size, open_image
from modeling_deco.training.data.media import unread_media
from modeling_deco.training.data.rows import read_row, to_parts

IMAGE = {"type": "image", "text": None}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
ANSWER = {"role": "assistant", "content": "a red cat ."}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in COLOURS:
        (folder / f"{name}.png").write_bytes(png(name))
    (folder / "note.txt").write_text("no image")
    (folder / "broken.png").write_bytes(png("red")[:40])
    (folder / "a.mp4").write_bytes(b"not opened")
    return folder


@pytest.fixture(autouse=True)
def _among_photos(photos, monkeypatch):
    monkeypatch.chdir(photos)


def user(*content):
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def text(words="what ?"):
    return {"type": "text", "text": words}


def url_of(colour):
    return f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"


def seen(row) -> str:
    """What a model sees of a row: its words, and the colour of each image in its place."""
    read = read_row(row)
    images, words = iter(read["images"]), []
    for message in read["messages"]:
        for part in message["content"]:
            if part["type"] == "text":
                words.append(part["text"].strip())
                continue
            pixel = tuple(np.asarray(open_image(next(images)))[0, 0].tolist())
            words.append(next(name for name, colour in COLOURS.items() if colour == pixel))
    assert not list(images)
    return " ".join(words)


ASKED = {"messages": [user("what ?"), ANSWER]}


def asked(*parts):
    """A question of parts, and its answer."""
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


ONE = "red what ?"
PIXELS = np.asarray(Image.new("RGB", (8, 8), "red"))
LAYOUTS = {  # what is seen of them before the answer
    "no images": (ASKED, "what ?"),
    "null": ({**ASKED, "images": None, "image": None}, "what ?"),
    "an empty list": ({**ASKED, "images": []}, "what ?"),
    "a list": ({**ASKED, "images": ["red.png"]}, ONE),
    "a tuple": ({**ASKED, "images": ("red.png", "green.png")}, "red green what ?"),
    "an array of objects": ({**ASKED, "images": np.array(["red.png", "green.png"], object)}, "red green what ?"),
    "one path": ({**ASKED, "images": "red.png"}, ONE),
    "TRL's single column": ({**ASKED, "image": Image.new("RGB", (8, 8), "red")}, ONE),
    "a list in image": ({**ASKED, "image": ["red.png"]}, ONE),
    "the same in both": ({**ASKED, "image": "red.png", "images": ["red.png"]}, ONE),
    "a Path": ({**ASKED, "images": [Path("red.png")]}, ONE),
    "bytes": ({**ASKED, "images": [png("red")]}, ONE),
    "undecoded bytes": ({**ASKED, "images": [{"bytes": png("red"), "path": None}]}, ONE),
    "undecoded, one": ({**ASKED, "image": {"bytes": None, "path": "red.png"}}, ONE),
    "a data URL": ({**ASKED, "image": url_of("red")}, ONE),
    "an array": ({**ASKED, "image": PIXELS}, ONE),
    "a tensor": ({**ASKED, "image": torch.tensor(PIXELS)}, ONE),
    "tags in texts": ({"messages": [user("what <image> ?"), ANSWER], "images": ["red.png"]}, "what red ?"),
    "tags in two turns": (
        {
            "messages": [user("<image>\nwhat ?"), ANSWER, user("and <image> ?"), ANSWER],
            "images": ["red.png", "green.png"],
        },
        "red what ? a red cat . and green ?",
    ),
    "no tags in two turns": (
        {"messages": [user("what ?"), ANSWER, user("and ?"), ANSWER], "images": ["red.png"]},
        "red what ? a red cat . and ?",
    ),
    "a tag in an answer": (
        {"messages": [user("<image> what ?"), {"role": "assistant", "content": "<image>"}, user("?"), ANSWER]}
        | {"images": ["red.png"]},
        "red what ? <image> ?",
    ),
    "tags in parts": ({**asked(text("<image> what ?"), text("?")), "images": ["red.png"]}, "red what ? ?"),
    "parts": ({**asked({"type": "image", "text": None}, text()), "images": ["red.png"]}, ONE),
    "an image in a part": (asked({"type": "image", "image": "red.png"}, text()), ONE),
    "a path in a part": (asked({"type": "image", "path": "red.png"}, text()), ONE),
    "a url in a part": (asked(text(), {"type": "image", "url": url_of("red")}), "what ? red"),
    "base64 in a part": (asked({"type": "image", "base64": url_of("red").split(",")[1]}, text()), ONE),
    "OpenAI's parts": (asked({"type": "image_url", "image_url": {"url": url_of("red")}}, text()), ONE),
    "parts of Arrow": (
        asked({"type": "image", "text": None, "image": "red.png"}, {**text(), "image": None, "video": None}),
        ONE,
    ),
    "in a part and in the column, in their order": (
        {**asked({"type": "image", "image": "green.png"}, {"type": "image"}, text()), "images": ["red.png"]},
        "green red what ?",
    ),
    "a system message first": (
        {"messages": [{"role": "system", "content": "is"}, user("what ?"), ANSWER], "images": ["red.png"]},
        "is red what ?",
    ),
    "the name of its image": (
        {**ASKED, "image": "red.png", "image_url": "https://x.org/1", "file": "red.png"},
        ONE,
    ),
    "numbers of no image": ({**ASKED, "image_id": 7, "num_images": 0, "video_seconds": 3.0}, "what ?"),
}


def test_every_layout_shows_its_images_where_they_belong():
    for layout, (row, expected) in LAYOUTS.items():
        assert seen(row) == f"{expected} a red cat .", layout


FAULTS = {
    "clip": ({**ASKED, "clip": "a.mp4"}, "column 'clip' has media that training does not read"),
    "a missing video": ({**ASKED, "video": "absent.mp4"}, "there is no video 'absent.mp4'"),
    "an image as a video": ({**ASKED, "videos": ["a.mp4", "red.png"]}, "'red.png' is not a video, but image/png"),
    "a sound as a video": ({**ASKED, "videos": ["a.wav"]}, "'a.wav' is not a video, but audio/x-wav"),
    "both columns of videos": ({**ASKED, "videos": ["a.mp4"], "video": "a.mp4"}, "'video' and 'videos' both have"),
    "no frames": ({**ASKED, "videos": [[]]}, "a video is a list of no frames"),
    "a picture as an array": ({**ASKED, "video": np.zeros(3)}, "a video is an array of 1 dimensions"),
    "two tags of a video": (
        {"messages": [user("<image><video> ?"), ANSWER], "video": "a.mp4"},
        "1 videos .* 2 places",
    ),
    "no tag of a second video": (
        {"messages": [user("<video> ?"), ANSWER], "videos": ["a.mp4"] * 2},
        "2 videos .* 1 p",
    ),
    "no place of a video": ({**asked(text()), "videos": ["a.mp4"]}, "1 videos .* 0 places .* .<video> in"),
    "audio beside an image": ({**ASKED, "images": ["red.png"], "audio": {"path": "a.wav"}}, "column 'audio' has"),
    "image_path": ({**ASKED, "image_path": "red.png"}, "column 'image_path' has media"),
    "image_url": ({**ASKED, "image_url": "https://x.org/1"}, "column 'image_url' has media"),
    "img": ({**ASKED, "img": "red.png"}, "column 'img' has media"),
    "a second image": ({**ASKED, "image": "red.png", "image_2": "red.png"}, "column 'image_2' has media"),
    "a picture under any name": ({**ASKED, "scan": Image.new("RGB", (8, 8))}, "column 'scan' has media"),
    "a file's name under any name": ({**ASKED, "source": "coco/1.jpg"}, "column 'source' has media"),
    "bytes under any name": ({**ASKED, "blob": b"png"}, "column 'blob' has media"),
    "two different images": ({**ASKED, "image": "a.png", "images": ["b.png"]}, "'image' and 'images' have different"),
    "null in a list": ({**ASKED, "images": ["red.png", None]}, "an image is null"),
    "an empty path": ({**ASKED, "images": [""]}, "an image is an empty path"),
    "neither bytes nor path": ({**ASKED, "images": [{"bytes": None, "path": None}]}, "neither bytes nor a path"),
    "a nested list": ({**ASKED, "images": [["red.png"]]}, "an image is of type list"),
    "a number": ({**ASKED, "images": [3]}, "an image is of type int"),
    "true": ({**ASKED, "image": True}, "an image is of type bool"),
    "a flat array": ({**ASKED, "images": [np.zeros(3)]}, "an array of 1 dimensions"),
    "a missing file": ({**ASKED, "images": ["absent/a.png"]}, "there is no image 'absent/a.png'"),
    "a text file": ({**ASKED, "images": ["note.txt"]}, "'note.txt' is not an image, but text/plain"),
    "a video as an image": ({**ASKED, "images": ["a.mp4"]}, "'a.mp4' is not an image, but video/mp4"),
    "a broken data URL": (
        {**ASKED, "image": "data:image/png;base64,???"},
        "a data URL that is not the base64",
    ),
    "more places": ({"messages": [user("<image> <image>"), ANSWER], "images": ["red.png"]}, "1 images .* 2 places"),
    "more images": ({"messages": [user("<image> a"), ANSWER], "images": ["red.png"] * 2}, "2 images .* 1 places"),
    "a tag without an image": ({"messages": [user("<image> what ?"), ANSWER]}, "0 images .* 1 places"),
    "parts without a place": ({**asked(text()), "images": ["red.png"]}, "1 images .* 0 places"),
    "no question": ({"messages": [ANSWER], "images": ["red.png"]}, "1 images .* 0 places"),
    "a missing video in a part": (asked({"type": "video", "video": "absent.mp4"}), "there is no video 'absent.mp4'"),
    "an audio in a part": (asked({"type": "input_audio", "input_audio": {}}), "a part .* of type 'input_audio'"),
    "an image in a text": (asked({**text(), "image": "red.png"}), "'text' has an image or a video in 'image'"),
    "a video in a text": (asked({**text(), "video": "a.mp4"}), "'text' has an image or a video in 'video'"),
    "a text in an image": (asked({"type": "image", "image": "red.png", "text": "a"}), "'image' has a text"),
    "two in a part": (asked({"type": "image", "image": "red.png", "url": "x"}), "has images in image and url"),
    "a part without a text": (asked({"type": "text"}), "'text' has no 'text'"),
    "a part that is a text": (asked("what"), "a part of a message is of type str"),
    "null in a part": (asked({"type": "image", "image": None}), "0 images .* 1 places"),
    "an image beside a content": ({"messages": [{**user("?"), "image": "red.png"}, ANSWER]}, "has media in 'image'"),
    "images beside a content": ({"messages": [{**user("?"), "images": ["red.png"]}, ANSWER]}, "has media in 'images'"),
    "a video beside a content": ({"messages": [{**user("?"), "video": "a.mp4"}, ANSWER]}, "has media in 'video'"),
    "a dict of any key": ({**ASKED, "attachments": [{"url": "red.png"}]}, "column 'attachments' has media"),
    "pixels as lists": ({**ASKED, "pixel_values": [[0.0, 1.0]]}, "column 'pixel_values' has media"),
    "no content": ({"messages": [{"role": "user"}, ANSWER]}, "a message of role 'user' has no 'content'"),
    "a content of one part": ({"messages": [{"role": "user", "content": text()}]}, "a content is of type dict"),
    "LLaVA's turns": ({"messages": [{"from": "human", "value": "?"}]}, "a message has no 'role'"),
    "a text for messages": ({"messages": "what ?"}, "'messages' is of type str"),
    "TRL's prompts": ({"prompt": [user("a")], "completion": [ANSWER]}, "no 'messages', only prompt, completion"),
    "null messages": ({"messages": None, "images": ["red.png"]}, "there are no 'messages', only images"),
}


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


FRAMES = [Image.new("RGB", (8, 8), colour) for colour in COLOURS]
VIDEO_LAYOUTS = {  # the types of the parts, and the videos
    "a path": ({**ASKED, "video": "a.mp4"}, "video text", ["a.mp4"]),
    "a list": ({**ASKED, "videos": ["a.mp4", "https://x.org/b.mp4"]}, "video video text", None),
    "undecoded": ({**ASKED, "videos": [{"bytes": None, "path": "a.mp4"}]}, "video text", None),
    "frames": ({**ASKED, "videos": [FRAMES, FRAMES[:1]]}, "video video text", [FRAMES, FRAMES[:1]]),
    "frames, one video": (
        {**ASKED, "video": ["red.png", "green.png"]},
        "video text",
        [["red.png", "green.png"]],
    ),
    "an array": ({**ASKED, "video": np.zeros((2, 8, 8, 3), np.uint8)}, "video text", None),
    "<image> for a video": (
        {"messages": [user("<image>\nwhat ?"), ANSWER], "video": "a.mp4", "video_path": "a.mp4"},
        "video text",
        ["a.mp4"],
    ),
    "its tag": (
        {"messages": [user("what <video> ?"), ANSWER], "video": "a.mp4"},
        "text video text",
        None,
    ),
    "each its tag": (
        {"messages": [user("<video> <image>\nwhat ?"), ANSWER], "video": "a.mp4", "image": "red.png"},
        "video image text",
        ["a.mp4"],
    ),
    "images first, without tags": ({**ASKED, "videos": ["a.mp4"], "images": ["red.png"]}, "image video text", None),
    "a part": (asked({"type": "video", "video": "a.mp4"}, text()), "video text", ["a.mp4"]),
    "frames in a part": (asked(text(), {"type": "video", "video": FRAMES}), "text video", [FRAMES]),
    "OpenAI's part": (
        asked({"type": "video_url", "video_url": {"url": "https://x.org/a.mp4"}}),
        "video",
        ["https://x.org/a.mp4"],
    ),
    "a word of HTML": ({"messages": [user("what is <video> ?"), ANSWER]}, "text", []),
    "no videos": ({**ASKED, "videos": []}, "text", []),
}


def test_every_layout_shows_its_videos_where_they_belong():
    for layout, (row, types, videos) in VIDEO_LAYOUTS.items():
        read = read_row(row)
        assert " ".join(part["type"] for part in read["messages"][0]["content"]) == types, layout
        assert len(read["videos"]) == types.count("video"), layout
        assert videos is None or read["videos"] == videos, layout


def test_what_cannot_be_read_is_an_error():
    for fault, (row, message) in FAULTS.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read_row(row)
        assert re.search(message, str(error.value)), fault
        assert "\n" not in str(error.value), fault


def test_preferences_share_the_images_of_their_prompt(photos):
    red = str(photos / "red.png")
    rejected = {"role": "assistant", "content": "two ."}
    row = read_row({"prompt": [user("<image> what ?")], "chosen": [ANSWER], "rejected": [rejected], "image": red})
    assert row["images"] == [red]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    asked = user({"type": "image", "image": red}, text())
    row = read_row({"chosen": [asked, ANSWER], "rejected": [asked, rejected]})
    assert row["images"] == [red]
    assert row["chosen"][0] == row["rejected"][0] == user({"type": "image"}, text())
    with pytest.raises(ValueError, match="'chosen' and 'rejected' do not have the same images"):
        read_row({"chosen": [asked, ANSWER], "rejected": [user("what ?"), rejected]})


def test_media_are_recognized_by_names_and_by_values():
    for name in ("clip_video", "Videos", "audio_path", "left_image", "image1", "img_url", "frames", "pixel_values"):
        assert unread_media({name: "x"}, has_images=False) == [name]
    for name in ("image_id", "caption", "imagination", "source", "video_id", "images", "videos"):
        assert unread_media({name: "x"}, has_images=False) == []


# --- data sets -------------------------------------------------------------------------------------------------------


def folder_of(path, *rows):
    path.mkdir()
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def train(data, output_dir, **settings):
    """Train one step; returns the pixels of each call of the vision tower, `(images, 3, height, width)`."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 2} | settings
    args = DecoSFTConfig(
        output_dir=str(output_dir), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **settings
    )
    model, shown = tiny.build_model(), []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: shown.append((args or list(kwargs.values()))[0]), with_kwargs=True
    )
    DecoSFTTrainer(model, args, data, tiny_training.build_processor()).train()
    return shown


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_data_sets_of_all_layouts_are_read_and_joined(streaming, photos, tmp_path):
    red = str(photos / "red.png")
    asked = {"messages": [user("what ?"), ANSWER]}
    sources = [
        folder_of(tmp_path / "strings", {**asked, "images": [red]}, {**asked, "images": None}),
        folder_of(tmp_path / "single", {**asked, "image": red}, {**asked, "image": None}),
        folder_of(tmp_path / "odd", {**asked, "images": red, "id": 7}, {**asked, "images": [red, red], "id": "x"}),
        folder_of(
            tmp_path / "inside",
            {"messages": [user({"type": "image", "image": red}, text()), ANSWER]},
            {"messages": [user("what ?"), ANSWER]},
        ),
        str(tiny_training.save_dataset(tmp_path / "ours", [tiny_training.conversation(0, num_images=2)])),
    ]
    counts = [[1, 0], [1, 0], [1, 2], [1, 0], [2]]
    for source, expected in zip(sources, counts, strict=True):
        rows = list(load_data(source, streaming=streaming))
        assert [len(row["images"]) for row in rows] == expected
        assert all(isinstance(image, Image.Image) for row in rows for image in row["images"])
    joined = load_data(sources, streaming=streaming)
    parts = [
        sum(part["type"] == "image" for message in row["messages"] for part in message["content"]) for row in joined
    ]
    assert parts == [len(row["images"]) for row in joined] == sum(counts, [])
    shown = train(joined, tmp_path / "out", max_steps=5)
    assert sum(map(len, shown)) >= sum(parts)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_rows_that_cannot_be_read_are_named_and_counted_by_load_data(streaming, photos, tmp_path):
    good = {"id": "good", "messages": [user("what ?"), ANSWER], "image": str(photos / "red.png"), "sound": None}
    rows = [good, {**good, "id": "bad", "image": None, "sound": "a.mp3"}, {**good, "id": "worse", "image": "no.png"}]
    source = folder_of(tmp_path / "data", *rows)
    if streaming:
        message = "'bad': column 'sound' has media"
    else:
        message = (
            "2 of 3 rows of .*data cannot be read: 'bad': column 'sound' has media.*'worse': there is no image 'no"
        )
    with pytest.raises(ValueError, match=message):
        list(load_data(source, streaming=streaming))


def test_rows_without_ids_are_named_by_their_number(tmp_path):
    asked = {"messages": [user("what ?"), ANSWER]}
    source = folder_of(tmp_path / "data", asked, {**asked, "images": ["absent.png"]})
    with pytest.raises(ValueError, match="1 of 2 rows .* cannot be read: row 1: there is no image 'absent.png'"):
        load_data(source)


@pytest.mark.parametrize("column", ["image"])
def test_a_trainer_reads_what_is_not_decoded(column, photos, tmp_path):
    images = [str(photos / "red.png"), None if column == "image" else str(photos / "green.png")]
    feature = datasets.Image(decode=False)
    rows = Dataset.from_dict(
        {"messages": [[user("what ?"), ANSWER]] * 2, column: images if column == "image" else [images[:1], images[1:]]}
    ).cast_column(column, feature if column == "image" else List(feature))
    (shown,) = train(rows, tmp_path / "out")
    assert len(shown) == (1 if column == "image" else 2)
    colours = {tuple(picture.mean((1, 2)).gt(0).tolist()) for picture in shown}
    assert (True, False, False) in colours


def test_a_trainer_names_and_counts_rows_before_it_trains(photos, tmp_path):
    rows = [{"id": f"row-{index}", "messages": [user("what ?"), ANSWER], "images": None} for index in range(4)]
    rows[1]["images"], rows[3]["images"] = ["absent.png"], ["gone.png"]
    with pytest.raises(
        ValueError, match="2 of 4 rows cannot be read: .*'row-1': there is no image 'absent.png'; .*'row-3'"
    ):
        train(Dataset.from_list(rows), tmp_path / "out")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_an_image_that_cannot_be_decoded_is_named_with_its_row(streaming, tmp_path):
    row = {"id": "sick", "messages": [user("what ?"), ANSWER], "images": ["broken.png"]}
    source = folder_of(tmp_path / "data", row)
    with pytest.raises(ValueError, match="'sick': the image '.*broken.png' cannot be read"):
        train(load_data(source, streaming, decode=False), tmp_path / "out", per_device_train_batch_size=1)
    if streaming:
        with pytest.raises(ValueError, match="'sick': the image '.*broken.png' cannot be read"):
            list(load_data(source, streaming))


@pytest.mark.parametrize("reference", ["url", "path"])
def test_a_trainer_reads_images_of_parts_where_no_column_has_any(reference, photos, tmp_path):
    row = asked({"type": "image", reference: str(photos / "red.png")}, text())
    row["messages"][1] = {"role": "assistant", "content": [text("a red cat .")]}
    (shown,) = train(Dataset.from_list([row] * 2), tmp_path / "out")
    assert len(shown) == 2


def test_heic_is_read_in_training(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    file = tmp_path / "a.heic"
    pillow_heif.from_pillow(Image.new("RGB", (16, 8), (200, 60, 20))).save(file, quality=100)
    for image in (str(file), file.read_bytes(), {"bytes": None, "path": str(file)}):
        assert open_image(image).size == (16, 8)
        np.testing.assert_allclose(open_image(image).getpixel((2, 2)), (200, 60, 20), atol=6)
        assert image_size(image) == (8, 16)


def test_images_in_the_data_are_not_read_to_count_them(monkeypatch, photos, tmp_path):
    row = {"messages": [user("what ?"), ANSWER], "images": [{"bytes": b"no image", "path": None}]}
    rows = Dataset.from_list([row] * 2).cast_column("images", List(datasets.Image()))
    trainer = DecoSFTTrainer(
        tiny.build_model(),
        DecoSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        rows,
        tiny_training.build_processor(),
    )
    assert trainer.train_dataset["has_images"][:] == [True, True]
    assert trainer.train_dataset[0]["images"][0]["bytes"] == b"no image"


def test_a_collator_reads_rows_as_they_come(photos):
    collator = DecoCollator(tiny_training.build_processor())
    red, asked = str(photos / "red.png"), [user("what ?"), ANSWER]
    batch = collator([{"messages": asked, "image": red}, {"messages": asked, "images": None}, {"messages": asked}])
    assert len(batch["pixel_values"]) == 1
    assert (batch["input_ids"] == collator.processor.image_token_id).sum(1).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="Sample None: column 'clips' has media"):
        collator([{"messages": asked, "clips": ["a.mp4"]}])


def test_the_size_of_an_image_is_that_of_the_upright_one(tmp_path):
    path, exif = tmp_path / "wide.png", Image.Exif()
    for orientation in range(1, 9):
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (6, 4)).save(path, exif=exif)
        encoded = path.read_bytes()
        sources = [encoded, {"bytes": encoded, "path": None}, str(path), Image.open(path)]
        height_and_width = (4, 6) if orientation < 5 else (6, 4)
        assert {image_size(source) for source in sources} == {height_and_width}


# --- grids of images in their own shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_grid_larger_than_a_pictures_own_patches_is_found_with_its_row(streaming, tmp_path):
    """SigLIP 2's processor gives a picture of 1 : 4 at most 36 patches as 3 x 12."""
    rows = []
    for name, size in (("square", (24, 24)), ("wide", (96, 24)), ("tall", (24, 96))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        rows.append({"id": name, "messages": [user("what ?"), ANSWER], "images": [str(tmp_path / f"{name}.png")]})
    data = load_data(folder_of(tmp_path / "data", *rows), streaming, decode=False)
    processor = tiny_training.build_processor()
    processor.image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=36)

    def trainer(*grids):
        args = DecoSFTConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            max_steps=3, per_device_train_batch_size=1, pooled_grid_sizes=list(grids),
        )  # fmt: skip
        return DecoSFTTrainer(tiny.build_model("siglip2"), args, data, processor)

    assert np.isfinite(trainer(2, 3).train().training_loss)
    if streaming:
        with pytest.raises(ValueError, match="Sample 'wide': pooled_grid_sizes=5: 5 x 5 is larger than the 3 x 12"):
            trainer(2, 5).train()
    else:
        with pytest.raises(ValueError, match="2 of 3 rows .* 'wide': .*5 x 5 is larger than .*; 'tall': "):
            trainer(2, 5)
