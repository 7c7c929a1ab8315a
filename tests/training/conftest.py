# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures, good and bad, and data sets that are built from them."""

import os
import shutil

import datasets
import pytest
import tiny
from fresh_process import FreshProcesses
from llava_records import InThisProcess, encoded, png_of, write

from modeling_deco.training.data import build, build_data


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def fresh():
    processes = FreshProcesses(modules=["modeling_deco.training.data"])
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of pictures, of broken ones, and of files that are not pictures."""
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
    (folder / "small bomb.png").write_bytes(png_of(10_000, 10_000))  # Pillow only warns of it
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


@pytest.fixture
def make(tmp_path, photos, monkeypatch, own_cache):
    """A function that builds data from records, in this process, and returns their folder."""
    monkeypatch.setattr(build, "ProcessPoolExecutor", InThisProcess)

    def make(records, name="out", **options):
        source = write(tmp_path / f"{name}.json", records)
        build_data(source, photos, tmp_path / name, num_proc=1, **options)
        return tmp_path / name

    return make


@pytest.fixture
def own_photos(photos, tmp_path):
    """Pictures that a test may delete."""
    (tmp_path / "own").mkdir()
    for name in ("a.jpg", "b.png"):
        shutil.copy(photos / name, tmp_path / "own" / name)
    return tmp_path / "own"
