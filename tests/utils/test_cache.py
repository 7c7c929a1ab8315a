# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders in the user's cache: complete or not there, and made again when they must be."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest

from modeling_deco.utils.cache import cached_folder


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "source.txt").write_text("first")
    return tmp_path / "source.txt"


@pytest.fixture
def ask(source):
    made = []

    def ask():
        def make(folder):
            time.sleep(0.05)
            made.append(source.read_text())
            (folder / "config.json").write_text(made[-1])
            (folder / "weights").write_bytes(b"\0" * 1000)

        return cached_folder("deco", [source], 1000, make)

    ask.made = made
    return ask


def test_a_folder_is_made_once(ask, tmp_path):
    folder = ask()
    assert folder == tmp_path / "cache" / "modeling_deco" / "deco" == ask()
    assert (folder / "config.json").read_text() == "first"
    assert ask.made == ["first"]


def test_many_that_ask_at_once_wait_for_the_one_that_makes_it(ask):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: ask(), range(8)))) == 1
    assert ask.made == ["first"]


def test_it_is_made_again_when_its_source_changes(ask, source):
    ask()
    source.write_text("other")
    assert (ask() / "config.json").read_text() == "other"


def _cut(folder):
    os.truncate(folder / "weights", 999)


def _flip(folder):
    (folder / "weights").write_bytes(b"\0" * 500 + b"\1" + b"\0" * 499)


def _lose(folder):
    (folder / "config.json").unlink()


def _clear_the_stamp(folder):
    (folder / "made_from.json").write_text("")


@pytest.mark.parametrize("damage", [_cut, _flip, _lose, _clear_the_stamp])
def test_it_is_made_again_when_it_is_damaged(ask, damage):
    damage(ask())
    folder = ask()
    assert (folder / "config.json").read_text() == "first"
    assert (folder / "weights").read_bytes() == b"\0" * 1000
    assert len(ask.made) == 2


def test_an_error_leaves_nothing(source, tmp_path):
    def fail(folder):
        (folder / "config.json").write_text("half")
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        cached_folder("deco", [source], 1000, fail)
    assert [path.name for path in (tmp_path / "cache" / "modeling_deco").iterdir()] == [".deco.lock"]
