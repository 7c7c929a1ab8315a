# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A destination is complete or not there: kill -9, SIGINT, full disks, two conversions at once; and peak memory.

Conversions that are to be ended run in processes forked from one that has imported everything. `contents` of a whole
conversion tells a complete destination from a part of one.
"""

import errno
import os
import random
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import hostile
import pytest
from filelock import FileLock
from hostile import contents, snapshot
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from modeling_deco.cli import app
from modeling_deco.conversion import InputError, convert, export
from modeling_deco.utils.staging import staged_folder


def write_source(folder, layout, seed, megabytes):
    """A checkpoint whose weights are about that large, nearly all of it in matrices of at most 17 MB."""
    width = 2**17 if megabytes >= 50 else max(48, megabytes * 2**20 // (3 * 4 * 32))
    num_layers = max(1, round(megabytes * 2**20 / (width * 3 * 4 * 32)))
    write = hostile.write_llava_hf if layout == "llava-hf" else hostile.write_original
    write(folder, seed, intermediate_size=width, num_hidden_layers=num_layers)


class Sources:
    """Two checkpoints of one layout with different weights, and the files that a whole conversion makes of each."""

    def __init__(self, folder, layout, megabytes):
        self.vision_tower = ""
        if layout == "original":
            self.vision_tower = str(shutil.copytree(hostile.template("tower"), folder / "tower"))
        self.first, self.second = folder / "first", folder / "second"
        self.whole = {}
        for seed, source in enumerate((self.first, self.second)):
            write_source(source, layout, seed, megabytes)
            convert(source, folder / "whole", **self.options)
            assert loads(folder / "whole")
            self.whole[source] = contents(folder / "whole")
            shutil.rmtree(folder / "whole")
        assert self.whole[self.first] != self.whole[self.second]

    @property
    def options(self):
        return {"vision_tower": self.vision_tower or None}


def loads(folder):
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    return not any(info.values())


@pytest.fixture(scope="module")
def tiny_sources(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("tiny"), "llava-hf", megabytes=0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("sources"), "llava-hf", megabytes=50)


@pytest.fixture
def destination(tmp_path):
    """Does not exist; the folder in which it is to be is empty."""
    (tmp_path / "target").mkdir()
    return tmp_path / "target" / "out"


def beside(destination):
    """All that is in the folder of a destination, itself included."""
    return sorted(path.name for path in destination.parent.iterdir())


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def convert_and_kill(source, destination, vision_tower, overwrite, delay, number):
    """Convert in a child, and send it a signal after `delay` seconds.

    Returns the signal that ended it (0 if it was done before), its exit status and the time it took.
    """
    import os
    import signal
    import time
    import traceback

    from modeling_deco.conversion import convert

    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        status = 1
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # ignored where a shell runs the tests in the background
        try:
            convert(source, destination, vision_tower=vision_tower or None, overwrite=overwrite == "True")
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if float(delay) >= 0:
        time.sleep(float(delay))
        os.kill(child, getattr(signal, number))
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status), os.WEXITSTATUS(status), time.perf_counter() - begin


def duration(fresh, sources, destination, source, overwrite):
    """Of one whole conversion."""
    ended_by, status, seconds = fresh.run(
        convert_and_kill, source, destination, sources.vision_tower, overwrite, -1, "SIGKILL"
    )
    assert (ended_by, status) == (0, 0)
    return seconds


def delays(number, seconds):
    """Random points, one in each of `number` equal parts of a whole run."""
    generator = random.Random(0)
    return [(i + generator.random()) * seconds / number for i in range(number)]


def check_kills_of_a_fresh_conversion(num_kills, fresh, sources, destination):
    whole, source = sources.whole[sources.first], sources.first
    seconds = duration(fresh, sources, destination, source, overwrite=False)
    shutil.rmtree(destination)
    num_halfway = 0
    for delay in delays(num_kills, seconds):
        ended_by, _, _ = fresh.run(
            convert_and_kill, source, destination, sources.vision_tower, False, delay, "SIGKILL"
        )
        if destination.exists():
            assert contents(destination) == whole, f"half a destination after {delay} s"
        else:
            num_halfway += ended_by == 9
        convert(source, destination, **sources.options, overwrite=destination.exists())
        assert contents(destination) == whole, f"not repaired after {delay} s"
        assert beside(destination) == ["out"], f"left over after {delay} s and a rerun"
        shutil.rmtree(destination)
    assert num_halfway > 0, "every kill came too late to show anything"


def check_kills_of_an_overwriting_conversion(num_kills, fresh, sources, destination):
    old, new = sources.whole[sources.first], sources.whole[sources.second]
    convert(sources.first, destination, **sources.options)
    seconds = duration(fresh, sources, destination, sources.second, overwrite=True)
    num_halfway = 0
    for delay in delays(num_kills, seconds):
        if contents(destination) != old:
            convert(sources.first, destination, **sources.options, overwrite=True)
        ended_by, _, _ = fresh.run(
            convert_and_kill, sources.second, destination, sources.vision_tower, True, delay, "SIGKILL"
        )
        assert_old_or_new_can_be_had(destination, old, new)
        num_halfway += ended_by == 9
        convert(sources.second, destination, **sources.options, overwrite=True)
        assert contents(destination) == new
        assert beside(destination) == ["out"]
    assert num_halfway > 0


def assert_old_or_new_can_be_had(destination, old, new):
    if destination.exists():
        assert contents(destination) in (old, new)
    else:  # between two renames: under another name, but whole
        folders = [path for path in destination.parent.rglob("*") if path.is_dir()]
        assert [folder for folder in folders if contents(folder) in (old, new)], "neither of them is anywhere"


def test_a_killed_conversion_leaves_nothing_or_all_and_a_rerun_succeeds(fresh, sources, destination):
    check_kills_of_a_fresh_conversion(2, fresh, sources, destination)


@pytest.mark.slow
def test_a_killed_overwriting_conversion_leaves_the_old_or_the_new_one(fresh, sources, destination):
    check_kills_of_an_overwriting_conversion(2, fresh, sources, destination)


@pytest.fixture(scope="module", params=["llava-hf", "original"])
def large_sources(request, tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("large"), request.param, megabytes=200)


@pytest.mark.slow
def test_kill_at_20_points_of_a_conversion(fresh, large_sources, destination):
    check_kills_of_a_fresh_conversion(20, fresh, large_sources, destination)


@pytest.mark.slow
def test_kill_at_20_points_of_an_overwriting_conversion(fresh, large_sources, destination):
    check_kills_of_an_overwriting_conversion(20, fresh, large_sources, destination)


# --- ended at every change of the file system ------------------------------------------------------------------------


def convert_until_change(source, destination, overwrite, events, number, how):
    """Convert in a child that ends just before its `number`-th change of the file system, where delays seldom hit.

    Returns its exit status (99: killed, 130: interrupted) and how many changes there were.
    """
    import os
    import sys
    import traceback

    from modeling_deco.conversion import convert

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count, status = 0, 1

        def watch(event, arguments):
            nonlocal count
            if event not in events.split():
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            count += 1
            if count == int(number):
                if how == "kill":
                    os._exit(99)
                raise KeyboardInterrupt

        sys.addaudithook(watch)
        try:
            convert(source, destination, overwrite=overwrite == "True")
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
    return os.WEXITSTATUS(status), int(os.read(reading, 100) or -1)


RENAMES = "os.rename os.mkdir os.remove os.rmdir os.link os.symlink"


def count_changes(fresh, source, destination, overwrite, events):
    status, count = fresh.run(convert_until_change, source, destination, overwrite, events, 0, "kill")
    assert status == 0
    assert count > 0
    return count


def check_kill_before_each_change(fresh, sources, destination, events):
    whole = sources.whole[sources.first]
    count = count_changes(fresh, sources.first, destination, False, events)
    shutil.rmtree(destination)
    for number in range(1, count + 1):
        status, _ = fresh.run(convert_until_change, sources.first, destination, False, events, number, "kill")
        assert status == 99
        if destination.exists():
            assert contents(destination) == whole, f"half a destination before change {number} of {count}"
        convert(sources.first, destination, overwrite=destination.exists())
        assert contents(destination) == whole
        assert beside(destination) == ["out"], f"left over before change {number} of {count}"
        shutil.rmtree(destination)


def check_kill_before_each_change_of_overwriting(fresh, sources, destination, events):
    old, new = sources.whole[sources.first], sources.whole[sources.second]
    convert(sources.first, destination)
    count = count_changes(fresh, sources.second, destination, True, events)
    for number in range(1, count + 1):
        if contents(destination) != old:
            convert(sources.first, destination, overwrite=True)
        status, _ = fresh.run(convert_until_change, sources.second, destination, True, events, number, "kill")
        assert status == 99
        assert_old_or_new_can_be_had(destination, old, new)
        convert(sources.second, destination, overwrite=True)
        assert contents(destination) == new
        assert beside(destination) == ["out"], f"left over before change {number} of {count}"


def test_killed_before_any_rename(fresh, tiny_sources, destination):
    check_kill_before_each_change(fresh, tiny_sources, destination, "os.rename")


def test_killed_before_any_rename_of_overwriting(fresh, tiny_sources, destination):
    check_kill_before_each_change_of_overwriting(fresh, tiny_sources, destination, "os.rename")


@pytest.mark.slow
def test_killed_before_any_change_of_overwriting(fresh, tiny_sources, destination):
    check_kill_before_each_change_of_overwriting(fresh, tiny_sources, destination, f"{RENAMES} open")


@pytest.mark.slow
def test_killed_before_any_change(fresh, tiny_sources, destination):
    check_kill_before_each_change(fresh, tiny_sources, destination, f"{RENAMES} open")


@pytest.mark.slow
def test_after_a_kill_in_the_swap_a_rerun_without_overwrite_finds_no_half(fresh, tiny_sources, destination):
    """The user may not remember what was asked for: a plain rerun converts, or says that something is there."""
    convert(tiny_sources.first, destination)
    old, new = tiny_sources.whole[tiny_sources.first], tiny_sources.whole[tiny_sources.second]
    count = count_changes(fresh, tiny_sources.second, destination, True, "os.rename")
    for number in range(1, count + 1):
        convert(tiny_sources.first, destination, overwrite=True)
        fresh.run(convert_until_change, tiny_sources.second, destination, True, "os.rename", number, "kill")
        try:
            convert(tiny_sources.second, destination)
        except InputError:
            assert contents(destination) in (old, new)
        else:
            assert contents(destination) == new


# --- SIGINT ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigint_leaves_nothing_behind(fresh, sources, destination):
    seconds = duration(fresh, sources, destination, sources.first, overwrite=False)
    shutil.rmtree(destination)
    num_interrupted = 0
    for delay in delays(2, seconds):
        _, status, _ = fresh.run(
            convert_and_kill, sources.first, destination, sources.vision_tower, False, delay, "SIGINT"
        )
        assert status in (0, 130)
        num_interrupted += status == 130
        if destination.exists():
            assert contents(destination) == sources.whole[sources.first]
            shutil.rmtree(destination)
        assert beside(destination) == []
    assert num_interrupted > 0


@pytest.mark.slow
def test_sigint_leaves_an_old_destination_as_it_was(fresh, sources, destination):
    status, delay = 0, duration(fresh, sources, destination, sources.first, overwrite=False)
    while status == 0:  # until it comes in time
        delay /= 2
        convert(sources.first, destination, overwrite=True)
        before = snapshot(destination)
        _, status, _ = fresh.run(
            convert_and_kill, sources.second, destination, sources.vision_tower, True, delay, "SIGINT"
        )
    assert status == 130
    assert snapshot(destination) == before
    assert beside(destination) == ["out"]


@pytest.mark.parametrize("events", ["os.rename", pytest.param("open", marks=pytest.mark.slow)])
def test_an_interrupt_at_any_rename_or_open_leaves_nothing_behind(events, fresh, tiny_sources, destination):
    count = count_changes(fresh, tiny_sources.first, destination, False, events)
    shutil.rmtree(destination)
    for number in range(1, count + 1):
        status, _ = fresh.run(
            convert_until_change, tiny_sources.first, destination, False, events, number, "interrupt"
        )
        assert status == 130
        if destination.exists():
            assert contents(destination) == tiny_sources.whole[tiny_sources.first]
            shutil.rmtree(destination)
        assert beside(destination) == [], f"left over by an interrupt at change {number} of {count}"


@pytest.mark.slow
def test_an_interrupt_at_any_rename_of_overwriting_leaves_the_old_or_the_new_one(fresh, tiny_sources, destination):
    old, new = tiny_sources.whole[tiny_sources.first], tiny_sources.whole[tiny_sources.second]
    convert(tiny_sources.first, destination)
    count = count_changes(fresh, tiny_sources.second, destination, True, "os.rename")
    for number in range(1, count + 1):
        convert(tiny_sources.first, destination, overwrite=True)
        status, _ = fresh.run(
            convert_until_change, tiny_sources.second, destination, True, "os.rename", number, "interrupt"
        )
        assert status == 130
        assert contents(destination) in (old, new)
        assert beside(destination) == ["out"], f"left over by an interrupt at rename {number} of {count}"


# --- two at once -----------------------------------------------------------------------------------------------------


def convert_both(source, destination, other_source, other_destination, overwrite, delay):
    """Two conversions in two children, the second `delay` seconds after the first.

    Returns what each ended with: "done", the message of its refusal, or a traceback.
    """
    import os
    import time
    import traceback

    from modeling_deco.conversion import InputError, convert

    runs = []
    for arguments in ((source, destination), (other_source, other_destination)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                convert(*arguments, overwrite=overwrite == "True")
                message = "done"
            except InputError as error:
                message = f"refused: {error}"
            except BaseException:
                message = traceback.format_exc()
            os.write(writing, message.encode())
            os._exit(0)
        os.close(writing)
        runs.append((child, reading))
        time.sleep(float(delay))
    messages = []
    for child, reading in runs:
        os.waitpid(child, 0)
        messages.append(os.read(reading, 65536).decode())
    return messages


@pytest.mark.parametrize("delay", [0.05, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0, 0.2))])
def test_two_conversions_to_one_destination_do_not_mix(delay, fresh, sources, destination):
    messages = fresh.run(convert_both, sources.first, destination, sources.second, destination, False, delay)
    assert "done" in messages
    assert all(message == "done" or message.startswith("refused: ") for message in messages), messages
    assert all(len(message.splitlines()) == 1 for message in messages)
    winners = [
        sources.whole[source]
        for source, message in zip((sources.first, sources.second), messages, strict=True)
        if message == "done"
    ]
    assert contents(destination) in winners
    assert beside(destination) == ["out"]


@pytest.mark.slow
def test_two_overwriting_conversions_to_one_destination_do_not_mix(fresh, sources, destination):
    convert(sources.first, destination)
    messages = fresh.run(convert_both, sources.first, destination, sources.second, destination, True, 0.05)
    assert "done" in messages
    assert all(message == "done" or message.startswith("refused: ") for message in messages), messages
    assert contents(destination) in sources.whole.values()
    assert beside(destination) == ["out"]


@pytest.mark.slow
def test_many_short_conversions_to_one_destination_do_not_mix(fresh, tiny_sources, destination):
    """Here one often begins in the moment in which the other clears up."""
    seconds = duration(fresh, tiny_sources, destination, tiny_sources.first, overwrite=False)
    for delay in delays(12, 1.3 * seconds):
        messages = fresh.run(
            convert_both, tiny_sources.first, destination, tiny_sources.second, destination, True, delay
        )
        assert "done" in messages
        assert all(message == "done" or message.startswith("refused: ") for message in messages), messages
        assert contents(destination) in tiny_sources.whole.values()
        assert beside(destination) == ["out"]


def test_a_room_that_vanishes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """A run that ends removes its room while the next one is between making it and locking it."""
    acquire, vanished = FileLock.acquire, []

    def acquire_late(lock, *args, **kwargs):
        if not vanished:
            vanished.append(Path(lock.lock_file).parent)
            vanished[0].rmdir()
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", acquire_late)
    with staged_folder(tmp_path / "out", num_bytes=1, check=lambda: None) as folder:
        (folder / "file").write_text("whole")
    assert vanished == [tmp_path / ".out.incomplete"]
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other", "out-2", "out.tmp", ".out"])
def test_conversions_to_neighbours_do_not_disturb_each_other(name, fresh, tiny_sources, sources, destination):
    """Whatever one clears away from a run before it is not what the other is writing."""
    neighbour = destination.with_name(name)
    messages = fresh.run(convert_both, sources.first, destination, tiny_sources.second, neighbour, False, 0.05)
    assert messages == ["done", "done"]
    assert contents(destination) == sources.whole[sources.first]
    assert contents(neighbour) == tiny_sources.whole[tiny_sources.second]
    assert beside(destination) == sorted(["out", name])


# --- full disks ------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", ["total", "used", "free"])


def command(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_a_disk_that_is_too_full_is_refused_with_both_numbers_before_writing(sources, destination, monkeypatch):
    disk_usage = shutil.disk_usage

    def almost_full(path):
        disk_usage(path)  # raises where a path does not exist
        return Usage(10**12, 10**12 - 54_321, 54_321)

    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    before = snapshot(destination.parents[1], with_times=True)
    with pytest.raises(InputError) as raised:
        convert(sources.first, destination.parent / "new" / "deeper" / "out")
    message = hostile.without_paths(str(raised.value), destination.parents[1])
    numbers = [int(re.sub(r"\D", "", number)) for number in re.findall(r"\d[\d,_ \u202f]*\d", message)]
    size = (sources.first / "model.safetensors").stat().st_size
    assert len(message.splitlines()) == 1
    assert 54_321 in numbers, message
    assert [number for number in numbers if 0.9 * size < number < 1.5 * size + 10**8], message
    assert snapshot(destination.parents[1], with_times=True) == before


def test_a_disk_that_is_just_large_enough_is_used(tiny_sources, destination, monkeypatch):
    size = sum(path.stat().st_size for path in tiny_sources.first.iterdir())
    free = 2 * size + 10**8
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))
    convert(tiny_sources.first, destination)
    assert contents(destination) == tiny_sources.whole[tiny_sources.first]


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("names", "overwrite"), [(("fsync",), False), (("rename", "replace"), True)])
def test_a_disk_that_is_full_at_the_end_gets_one_line_and_nothing_is_left(
    names, overwrite, tiny_sources, destination, monkeypatch
):
    """Some file systems say so only when data is flushed. A rename that fails is as good an end as any."""
    if overwrite:
        convert(tiny_sources.first, destination)
    before = snapshot(destination.parent)
    called = []
    for name in names:
        monkeypatch.setattr(os, name, lambda *arguments, **options: called.append(arguments) or no_space())
    result = command(tiny_sources.second, destination, *["--overwrite"] * overwrite)
    monkeypatch.undo()
    assert called
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("deco convert: ")
    assert "Traceback" not in result.stderr
    assert snapshot(destination.parent) == before


def convert_with_small_files(size, *arguments):
    """No file may grow beyond `size` bytes, which fails as a full disk does, in whatever call writes."""
    import resource

    from modeling_deco.cli import app

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    try:
        app(["convert", *arguments])
    except SystemExit as ended:
        return ended.code


def test_a_write_that_fails_halfway_leaves_nothing(fresh, sources, destination):
    for size in (100, 100_000, 20_000_000):
        assert fresh.run(convert_with_small_files, size, sources.first, destination) == 2
        assert beside(destination) == []


def test_a_write_of_lora_that_fails_halfway_leaves_nothing(fresh, tmp_path):
    place = hostile.Place(tmp_path, "LoRA")
    before = snapshot(tmp_path)
    assert fresh.run(convert_with_small_files, 50_000, *place.arguments()) == 2
    assert snapshot(tmp_path) == before


# --- durability and permissions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_every_file_is_on_the_disk_before_the_destination_appears(overwrite, tiny_sources, destination, monkeypatch):
    if overwrite:
        convert(tiny_sources.first, destination)
    flushed, at_rename = set(), []
    fsync, renames = os.fsync, {name: getattr(os, name) for name in ("rename", "replace")}

    def record(file):
        fsync(file)
        flushed.add(os.fstat(file if isinstance(file, int) else file.fileno()).st_ino)

    def check(rename, source, target, **options):
        if os.path.abspath(target) == str(destination):
            at_rename.append({entry.name for entry in os.scandir(source) if entry.inode() not in flushed})
            flushed.clear()
        return rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", record)
    for name, rename in renames.items():
        monkeypatch.setattr(os, name, lambda *a, rename=rename, **o: check(rename, *a, **o))
    convert(tiny_sources.second, destination, overwrite=overwrite)
    assert at_rename
    assert at_rename == [set()], "renamed before these were flushed"
    assert destination.parent.stat().st_ino in flushed, "the rename itself is not flushed"


def test_permissions_are_those_of_files_that_the_user_makes(tiny_sources, destination):
    before = os.umask(0o022)
    try:
        convert(tiny_sources.first, destination)
    finally:
        os.umask(before)
    assert oct(destination.stat().st_mode & 0o777) == oct(0o755)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in destination.iterdir()} == {
        path.name: oct(0o644) for path in destination.iterdir()
    }


# --- destinations of all kinds ---------------------------------------------------------------------------------------


def test_an_empty_folder_is_a_destination(tiny_sources, destination):
    destination.mkdir()
    convert(tiny_sources.first, destination)
    assert contents(destination) == tiny_sources.whole[tiny_sources.first]
    assert beside(destination) == ["out"]


def test_relative_sources_and_destinations_work_and_parents_are_made(tiny_sources, destination, monkeypatch):
    names = ["out", "new/deeper/out", "../target/other/", "a b/ü.$x"]
    shutil.copytree(tiny_sources.first, destination.parent / "first")
    monkeypatch.chdir(destination.parent)
    for name in names:
        convert("first", name)
        assert contents(destination.parent / name) == tiny_sources.whole[tiny_sources.first]
    assert beside(destination) == ["a b", "first", "new", "other", "out"]


def test_the_working_folder_is_a_destination_or_is_refused(tiny_sources, destination, monkeypatch):
    destination.mkdir()
    monkeypatch.chdir(destination)
    try:
        convert(tiny_sources.first, ".")
    except InputError:
        assert list(destination.iterdir()) == []
    else:
        assert contents(destination) == tiny_sources.whole[tiny_sources.first]
    assert beside(destination) == ["out"]


def test_overwriting_leaves_no_file_of_the_old_checkpoint(tiny_sources, destination):
    convert(tiny_sources.first, destination)
    (destination / "model-00002-of-00002.safetensors").write_bytes(b"of an older conversion")
    convert(tiny_sources.second, destination, overwrite=True)
    assert contents(destination) == tiny_sources.whole[tiny_sources.second]
    assert beside(destination) == ["out"]


def test_export_overwrites_likewise(tiny_sources, destination):
    deco = destination.with_name("deco")
    convert(tiny_sources.first, deco)
    export(deco, destination)
    exported = contents(destination)
    (destination / "stale.bin").write_bytes(b"")
    export(deco, destination, overwrite=True)
    assert contents(destination) == exported
    assert beside(destination) == ["deco", "out"]


def test_what_the_user_keeps_beside_the_destination_stays(tiny_sources, destination):
    names = ["out.tmp", "out.bak", "out.old", "out.partial", ".out.tmp", "out-old", "tmp"]
    for name in names:
        destination.with_name(name).mkdir()
        (destination.with_name(name) / "thesis.txt").write_text("years of work")
    convert(tiny_sources.first, destination)
    convert(tiny_sources.first, destination, overwrite=True)
    assert beside(destination) == sorted(["out", *names])
    assert {(destination.with_name(name) / "thesis.txt").read_text() for name in names} == {"years of work"}


# --- the source is only read -----------------------------------------------------------------------------------------


def writes_while_converting(source, destination):
    """What is opened for writing, renamed, removed or made, by paths."""
    import os
    import sys

    from modeling_deco.conversion import convert

    changed = []

    def watch(event, arguments):
        if event == "open":
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                changed.append(str(arguments[0]))
        elif event in (
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.mkdir",
            "os.link",
            "os.chmod",
            "os.utime",
            "os.truncate",
        ):
            changed.extend(str(argument) for argument in arguments[:2])

    sys.addaudithook(watch)
    convert(source, destination)
    return changed


def test_source_files_are_opened_for_reading_only(fresh, tiny_sources, destination):
    changed = fresh.run(writes_while_converting, tiny_sources.first, destination)
    assert changed
    assert [path for path in changed if str(tiny_sources.first) in path] == []


def test_a_source_that_may_not_be_written_converts(tmp_path):
    place = hostile.Place(tmp_path, "LoRA")
    folders = [place.source, *[value for value in place.options.values() if isinstance(value, type(tmp_path))]]
    for folder in folders:
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
    before = snapshot(place.source)
    try:
        convert(place.source, place.destination, **place.options)
        assert snapshot(place.source) == before
        shutil.rmtree(place.destination)  # a user must be able to
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_links_to_blobs_as_in_the_hubs_cache_convert(tiny_sources, destination):
    """The destination holds files, not links that break when the cache is cleared."""
    snapshots = destination.parents[1] / "snapshots"
    snapshots.mkdir()
    for path in tiny_sources.first.iterdir():
        (snapshots / path.name).symlink_to(path)
    convert(snapshots, destination)
    assert contents(destination) == tiny_sources.whole[tiny_sources.first]
    assert not [path for path in destination.iterdir() if path.is_symlink()]


def test_the_destination_shares_no_file_with_the_source(tiny_sources, destination):
    convert(tiny_sources.first, destination)
    of_source = {path.stat().st_ino for path in tiny_sources.first.iterdir()}
    assert not [path for path in destination.iterdir() if path.stat().st_ino in of_source]


# --- memory ----------------------------------------------------------------------------------------------------------


def growth_of_peak_memory(source, destination, vision_tower, dtype):
    """In bytes, over what the imports took."""
    import resource

    from modeling_deco.conversion import convert

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    convert(source, destination, vision_tower=vision_tower or None, dtype=dtype or None)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(("layout", "dtype"), [("llava-hf", ""), ("llava-hf", "bfloat16"), ("original", "")])
def test_peak_memory_is_that_of_the_largest_tensor(layout, dtype, fresh, tmp_path):
    source, vision_tower = tmp_path / "source", ""
    write_source(source, layout, seed=0, megabytes=1500)
    if layout == "original":
        vision_tower = hostile.template("tower")
    name = "pytorch_model.bin" if layout == "original" else "model.safetensors"
    assert (source / name).stat().st_size > 1.4e9
    largest = max(tensor.nbytes for tensor in hostile.read_tensors(source / name).values())
    growth = fresh.run(growth_of_peak_memory, source, tmp_path / "out", vision_tower, dtype)
    assert growth < 300e6 + largest, f"{growth / 1e6:.0f} MB with a largest tensor of {largest / 1e6:.0f} MB"
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "out")
