# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco convert` on hostile and broken checkpoints: one line that names the culprit, no code run, nothing written.

Each test spoils one thing of a checkpoint that converts, which the first test shows.
"""

import builtins
import json
import os
import pickle
import re
import shutil
import tempfile

import hostile
import pytest
import torch
from fresh_process import FreshProcesses
from hostile import assert_refused, edit_json, edit_tensors, snapshot
from typer.testing import CliRunner

from modeling_deco.cli import app
from modeling_deco.conversion import ConversionError, convert, export

NORM = "language_model.model.norm.weight"  # (32,)
QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"  # (32, 32)
FIRST_INDEX = {
    "llava-hf sharded": "model.safetensors.index.json",
    "original sharded": "pytorch_model.bin.index.json",
}
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 13476839424\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Makes the place of a layout; temporary files of the conversion would be found in it."""

    def build(layout="llava-hf"):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        return hostile.Place(tmp_path, layout)

    return build


@pytest.fixture(scope="module")
def fresh():
    processes = FreshProcesses(modules=["modeling_deco", "modeling_deco.cli", "modeling_deco.conversion", "torch"])
    yield processes
    processes.close()


def command(name, *arguments):
    return CliRunner().invoke(app, [name, *map(str, arguments)])


@pytest.mark.parametrize("layout", hostile.NEEDS)
def test_what_these_tests_spoil_converts_as_it_is(layout, place):
    place = place(layout)
    source, others = snapshot(place.source), sorted(path.name for path in place.root.iterdir())
    convert(place.source, place.destination, **place.options)
    assert (place.destination / "config.json").exists()
    assert snapshot(place.source) == source
    assert sorted(path.name for path in place.root.iterdir()) == others
    assert [path.name for path in place.destination.parent.iterdir()] == ["out"]


# --- the command -----------------------------------------------------------------------------------------------------


def with_unknown_key(place):
    edit_tensors(place.source / "model.safetensors", stray=torch.zeros(2))


def without_config(place):
    (place.source / "config.json").unlink()


@pytest.mark.parametrize(
    ("layout", "spoil", "more", "match"),
    [
        ("llava-hf", with_unknown_key, [], r"stray"),
        ("llava-hf", without_config, [], r"config\.json"),
        ("llava-hf", None, ["--pooled-grid-size", "7"], r"7.*\b6\b"),
        ("llava-hf", None, ["--pooled-grid-size", "0"], r"pooled.grid.size.*\b0\b"),
        ("llava-hf", None, ["--pooled-grid-size", "-3"], r"pooled.grid.size.*-3"),
        ("llava-hf", None, ["--pooled-grid-size", "abc"], r"pooled.grid.size.*abc"),
        ("llava-hf", None, ["--pooled-grid-size", "3x"], r"pooled.grid.size.*3x"),
        ("llava-hf", None, ["--dtype", "int8"], r"dtype.*int8"),
        ("llava-hf", None, ["--dtype", ""], r"dtype"),
        ("original", None, ["--vision-tower", "no/such-tower"], r"no/such-tower"),
        ("stage 1", None, ["--base-model", "no/such-model"], r"no/such-model"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_refusal_of_the_command_is_one_line_on_stderr_and_exit_code_2(layout, spoil, more, match, place):
    place = place(layout)
    if spoil:
        spoil(place)
    before = snapshot(place.root)
    result = command("convert", *place.arguments(), *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("deco convert: ")
    assert result.stderr.count("\n") == 1
    assert re.search(match, hostile.without_paths(result.stderr, place.root))
    assert snapshot(place.root) == before


def run_command(out, err, *arguments):
    import os

    for number, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from modeling_deco.cli import app

    try:
        app(list(arguments))
    except SystemExit as ended:
        return ended.code


def with_text_for(file):
    return lambda place: (place.source / file).write_text("spoilt")


@pytest.mark.parametrize(
    ("layout", "spoil", "match"),
    [
        ("llava-hf", with_text_for("config.json"), r"config\.json"),
        ("llava-hf", with_unknown_key, r"stray"),
        ("original", with_text_for("pytorch_model.bin"), r"pytorch_model\.bin"),
        ("original", with_text_for("tokenizer.model"), r"tokenizer\.model"),
    ],
    ids=["config", "unknown key", "weights", "tokenizer"],
)
def test_nothing_else_reaches_the_terminal(layout, spoil, match, place, fresh, tmp_path_factory):
    """Neither progress, a warning of a library nor a traceback, whose handlers do not see a test's stderr."""
    place, outside = place(layout), tmp_path_factory.mktemp("streams")
    spoil(place)
    code = fresh.run(run_command, outside / "out", outside / "err", "convert", *place.arguments())
    lines = (outside / "err").read_text().splitlines()
    assert (code, (outside / "out").read_text(), len(lines)) == (2, "", 1), lines
    assert lines[0].startswith("deco convert: ")
    assert re.search(match, hostile.without_paths(lines[0], place.root))


def test_export_is_refused_in_one_line_too(place):
    place = place()
    before = snapshot(place.root)
    result = command("export", place.source, place.destination)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("deco export: ")
    assert result.stderr.count("\n") == 1
    assert snapshot(place.root) == before


# --- code in the checkpoint ------------------------------------------------------------------------------------------


class Call:
    """Unpickled, it is a call."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def calls(canary):
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "builtins.eval": Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "builtins.exec": Call(builtins.exec, f"open({str(canary)!r}, 'w')"),
    }


FILES_OF_PICKLES = [
    ("original", "pytorch_model.bin"),
    ("original sharded", "pytorch_model-00002-of-00002.bin"),
    ("snippet", "pytorch_model.bin"),
    ("stage 1", "mm_projector.bin"),
    ("LoRA", "non_lora_trainables.bin"),
    ("LoRA", "adapter_model.bin"),
    ("LoRA", "../base_m/pytorch_model.bin"),
]


@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "builtins.exec"])
@pytest.mark.parametrize(("layout", "file"), FILES_OF_PICKLES)
def test_code_among_good_tensors_is_not_run(layout, file, function, place, tmp_path_factory):
    place, canary = place(layout), tmp_path_factory.mktemp("canary") / "it_ran"
    path = place.source / file
    torch.save({**hostile.read_tensors(path), "extra": {"nested": [calls(canary)[function]]}}, path)
    assert_refused(place, re.escape(path.name))
    assert not canary.exists()


@pytest.mark.parametrize("write", [torch.save, pickle.dump], ids=["zip", "bare pickle"])
def test_a_file_that_is_all_code_is_not_run(write, place, tmp_path_factory):
    place, canary = place("original"), tmp_path_factory.mktemp("canary") / "it_ran"
    with open(place.source / "pytorch_model.bin", "wb") as file:
        write(calls(canary)["os.system"], file)
    assert_refused(place, r"pytorch_model\.bin")
    assert not canary.exists()


def test_code_in_the_vision_towers_weights_is_not_run(place, tmp_path_factory):
    place, canary = place("original"), tmp_path_factory.mktemp("canary") / "it_ran"
    tower = place.options["vision_tower"]
    tensors = hostile.read_tensors(tower / "model.safetensors")
    (tower / "model.safetensors").unlink()
    torch.save({**tensors, "extra": calls(canary)["os.system"]}, tower / "pytorch_model.bin")
    assert_refused(place, r"pytorch_model\.bin")
    assert not canary.exists()


@pytest.mark.parametrize("file", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_files_that_are_not_the_model_is_neither_run_nor_copied(file, place, tmp_path_factory):
    place, canary = place("original"), tmp_path_factory.mktemp("canary") / "it_ran"
    torch.save(calls(canary)["os.system"], place.source / file)
    convert(place.source, place.destination, **place.options)
    assert not canary.exists()
    assert not (place.destination / file).exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_remote_code_of_the_source_is_not_run(file, place, tmp_path_factory):
    place, canary = place(), tmp_path_factory.mktemp("canary") / "it_ran"
    (place.source / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    edit_json(place.source / file, auto_map={**dict.fromkeys(names, "evil.It"), "AutoTokenizer": ["evil.It"] * 2})
    try:
        convert(place.source, place.destination, **place.options)
    except ConversionError:
        assert not place.destination.exists()
    else:
        assert not (place.destination / "evil.py").exists()
        assert "evil" not in (place.destination / file).read_text()
    assert not canary.exists()


# --- the index of the shards -----------------------------------------------------------------------------------------


def outside(place, index, shards):
    shutil.copy(place.source / shards[0], place.root / shards[0])
    index["weight_map"] = {
        key: f"../{shards[0]}" if shard == shards[0] else shard for key, shard in index["weight_map"].items()
    }


def absolute(place, index, shards):
    shutil.copy(place.source / shards[0], place.root / shards[0])
    index["weight_map"] = {
        key: str(place.root / shards[0]) if shard == shards[0] else shard for key, shard in index["weight_map"].items()
    }


def in_sub_folder(place, index, shards):
    (place.source / "more").mkdir()
    shutil.move(place.source / shards[0], place.source / "more" / shards[0])
    index["weight_map"] = {
        key: f"more/{shards[0]}" if shard == shards[0] else shard for key, shard in index["weight_map"].items()
    }


def there_and_back(place, index, shards):
    index["weight_map"] = {
        key: f"../source/{shards[0]}" if shard == shards[0] else shard for key, shard in index["weight_map"].items()
    }


@pytest.mark.parametrize("spoil", [outside, absolute, in_sub_folder, there_and_back])
@pytest.mark.parametrize("layout", FIRST_INDEX)
def test_an_index_reaches_only_files_beside_it(layout, spoil, place):
    place = place(layout)
    path = place.source / FIRST_INDEX[layout]
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    spoil(place, index, shards)
    hostile.write_json(path, index)
    assert_refused(place, rf"{re.escape(path.name)}|{re.escape(shards[0])}")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["model-00001-of-00002.safetensors"]}',
        '{"weight_map": "model-00001-of-00002.safetensors"}',
        f'{{"weight_map": {{"{NORM}": 1}}}}',
        f'{{"weight_map": {{"{NORM}": null}}}}',
        f'{{"weight_map": {{"{NORM}": ""}}}}',
        f'{{"weight_map": {{"{NORM}": "."}}}}',
        f'{{"weight_map": {{"{NORM}": ["model-00001-of-00002.safetensors"]}}}}',
        f'{{"weight_map": {{"{NORM}": "a\\u0000b"}}}}',
        '{"weight_map":' * 100_000,
        "[" * 100_000,
    ],
    ids=lambda content: content[:60].replace("\\u0000", "NUL") or "empty",
)
@pytest.mark.parametrize("layout", FIRST_INDEX)
def test_an_index_that_is_none_is_named(layout, content, place):
    place = place(layout)
    (place.source / FIRST_INDEX[layout]).write_text(content)
    assert_refused(place, re.escape(FIRST_INDEX[layout]))


@pytest.fixture(params=FIRST_INDEX)
def sharded(request, place):
    """A place with shards, the path of its index, and the shards' paths."""
    place = place(request.param)
    index = place.source / FIRST_INDEX[request.param]
    return (
        place,
        index,
        [place.source / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))],
    )


def test_a_missing_shard_is_named(sharded):
    place, _, shards = sharded
    shards[1].unlink()
    assert_refused(place, re.escape(shards[1].name))


def test_a_key_that_is_not_in_its_shard_is_named(sharded):
    place, _, shards = sharded
    key = next(iter(hostile.read_tensors(shards[1])))
    edit_tensors(shards[1], removed=[key])
    assert_refused(place, re.escape(key))


def test_a_key_that_the_index_gives_to_the_wrong_shard_is_named(sharded):
    place, index, shards = sharded
    weight_map = json.loads(index.read_text())["weight_map"]
    key = next(key for key, name in weight_map.items() if name == shards[0].name)
    edit_json(index, weight_map={**weight_map, key: shards[1].name})
    assert_refused(place, re.escape(key))


def test_a_key_that_the_index_does_not_list_is_named(sharded):
    place, index, _ = sharded
    weight_map = json.loads(index.read_text())["weight_map"]
    key = next(iter(weight_map))
    edit_json(index, weight_map={other: name for other, name in weight_map.items() if other != key})
    assert_refused(place, re.escape(key))


def test_a_key_in_two_shards_is_named(sharded):
    place, _, shards = sharded
    key, tensor = next(iter(hostile.read_tensors(shards[0]).items()))
    hostile.write_tensors(shards[1], {**hostile.read_tensors(shards[1]), key: tensor})
    assert_refused(place, re.escape(key))


def test_a_truncated_shard_is_named(sharded):
    place, _, shards = sharded
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    assert_refused(place, re.escape(shards[1].name))


# --- safetensors -----------------------------------------------------------------------------------------------------


def entry(key=NORM, **changes):
    """A change of one entry of a header."""
    return lambda header: header.update({key: {**header[key], **changes}})


def offsets(make):
    """A change of the offsets of one entry."""
    return lambda header: entry(data_offsets=make(*header[NORM]["data_offsets"]))(header)


def in_file_order(header):
    tensors = [value for key, value in header.items() if key != "__metadata__"]
    return sorted(tensors, key=lambda value: value["data_offsets"])


def with_hole(header):
    for value in in_file_order(header)[1:]:
        value["data_offsets"] = [offset + 16 for offset in value["data_offsets"]]


def with_overlap(header):
    for value in in_file_order(header)[1:]:
        value["data_offsets"] = [offset - 16 for offset in value["data_offsets"]]


LIES_OF_HEADERS = {
    "offsets beyond the file": offsets(lambda begin, end: [begin + 2**20, end + 2**20]),
    "offsets beyond any file": offsets(lambda begin, end: [begin + 2**63, end + 2**63]),
    "negative offsets": offsets(lambda begin, end: [-(end - begin), 0]),
    "end before begin": offsets(lambda begin, end: [end, begin]),
    "one offset": offsets(lambda begin, end: [begin]),
    "three offsets": offsets(lambda begin, end: [begin, end, end]),
    "offsets in words": offsets(lambda begin, end: [str(begin), str(end)]),
    "fractions for offsets": offsets(lambda begin, end: [begin + 0.0, end + 0.0]),
    "null for offsets": offsets(lambda begin, end: None),
    "no offsets": lambda header: header[NORM].pop("data_offsets"),
    "another tensor's offsets": lambda header: header[NORM].update(
        data_offsets=header[NORM.replace("norm", "layers.0.input_layernorm")]["data_offsets"]
    ),
    "shape too large": entry(shape=[33]),
    "shape too small": entry(shape=[31]),
    "negative shape": entry(shape=[-8, -4]),
    "shape in words": entry(shape=["32"]),
    "fraction for a shape": entry(shape=[32.0]),
    "null for a shape": entry(shape=None),
    "no shape": lambda header: header[NORM].pop("shape"),
    "shape that overflows": entry(shape=[2**62, 2**62]),
    "dtype of another width": entry(dtype="F16"),
    "unknown dtype": entry(dtype="F99"),
    "null for a dtype": entry(dtype=None),
    "no dtype": lambda header: header[NORM].pop("dtype"),
    "list for an entry": lambda header: header.update({NORM: []}),
    "null for an entry": lambda header: header.update({NORM: None}),
}


@pytest.mark.parametrize("lie", LIES_OF_HEADERS.values(), ids=LIES_OF_HEADERS)
def test_a_header_that_lies_about_a_tensor_is_refused_with_its_file(lie, place):
    place = place()
    path = place.source / "model.safetensors"
    header, data = hostile.read_safetensors(path)
    lie(header)
    hostile.write_safetensors(path, header, data)
    assert_refused(place, r"model\.safetensors")


def test_tensors_that_share_bytes_are_refused(place):
    place = place()
    path = place.source / "model.safetensors"
    header, data = hostile.read_safetensors(path)
    with_overlap(header)
    hostile.write_safetensors(path, header, data[:-16])
    assert_refused(place, r"model\.safetensors")


def test_bytes_between_tensors_are_refused(place):
    place = place()
    path = place.source / "model.safetensors"
    header, data = hostile.read_safetensors(path)
    with_hole(header)
    hostile.write_safetensors(path, header, data + bytes(16))
    assert_refused(place, r"model\.safetensors")


def header_as_text(change):
    def spoil(path):
        header, data = hostile.read_safetensors(path)
        hostile.write_safetensors(path, change(json.dumps(header).encode()), data)

    return spoil


def with_length(length):
    def spoil(path):
        header, data = hostile.read_safetensors(path)
        hostile.write_safetensors(path, header, data, length)

    return spoil


DUPLICATE = b'"%s": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}, ' % NORM.encode()
BROKEN_FILES = {
    "truncated payload": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "truncated header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "bytes after the payload": lambda path: path.write_bytes(path.read_bytes() + bytes(64)),
    "empty": lambda path: path.write_bytes(b""),
    "shorter than a length": lambda path: path.write_bytes(b"\x10\0\0"),
    "nothing but a length": lambda path: path.write_bytes(bytes(8)),
    "Git LFS pointer": lambda path: path.write_text(LFS_POINTER),
    "web page": lambda path: path.write_text("<!DOCTYPE html>\n<html>\n<body>Sign in</body></html>"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "header longer than the file": with_length(10**7),
    "header of 2**60 bytes": with_length(2**60),
    "header of 2**64 - 1 bytes": with_length(2**64 - 1),
    "header of 0 bytes": with_length(0),
    "header that ends early": with_length(50),
    "header that is not JSON": header_as_text(lambda text: b"?" * len(text)),
    "header that is not UTF-8": header_as_text(lambda text: text.replace(b"norm", b"n\xffrm", 1)),
    "header that is a list": header_as_text(lambda text: b"[]"),
    "header that is null": header_as_text(lambda text: b"null"),
    "header nested too deep": header_as_text(lambda text: b'{"a":' * 200_000),
    "header with a number of 5000 digits": header_as_text(
        lambda text: text.replace(b"[32]", b"[%s]" % (b"9" * 5000), 1)
    ),
    "header with a key twice": header_as_text(lambda text: b"{" + DUPLICATE + text[1:]),
    "header with a field twice": header_as_text(lambda text: text.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1)),
}


@pytest.mark.parametrize("spoil", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_safetensors_file_is_named(spoil, place):
    place = place()
    spoil(place.source / "model.safetensors")
    assert_refused(place, r"model\.safetensors")


def test_a_key_that_is_twice_in_a_header_is_named(place):
    place = place()
    BROKEN_FILES["header with a key twice"](place.source / "model.safetensors")
    assert_refused(place, re.escape(NORM))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_floats_are_named(dtype, place):
    place = place()
    hostile.write_tensors(
        place.source / "model.safetensors",
        {**hostile.llava_hf_tensors()[1], QUERY: torch.zeros(32, 32, dtype=dtype)},
    )
    assert_refused(place, re.escape(QUERY))


@pytest.mark.parametrize(
    "key",
    ["two\nlines", "two\r\nlines", "\x1b[2J\x1b[31mred", "line\u2028separator", "x" * 100_000, "", "${HOME}", "{0}%s"],
    ids=lambda key: repr(key[:20]),
)
def test_no_key_breaks_the_line(key, place):
    place = place()
    edit_tensors(place.source / "model.safetensors", **{key: torch.zeros(2)})
    assert_refused(place, r"model\.safetensors|unknown|unexpected|key")


def test_a_key_that_cannot_be_printed_does_no_harm(place):
    place = place()
    path = place.source / "model.safetensors"
    header_as_text(lambda text: text.replace(b"norm", b"\\ud800", 1))(path)
    before = snapshot(place.root)
    result = command("convert", *place.arguments())
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert snapshot(place.root) == before


# --- .bin ------------------------------------------------------------------------------------------------------------

FILES_OF_TENSORS = [*FILES_OF_PICKLES[:1], *FILES_OF_PICKLES[3:6]]


@pytest.mark.parametrize(("layout", "file"), FILES_OF_TENSORS)
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.01, 0])
def test_a_truncated_bin_file_is_named(layout, file, kept, place):
    place = place(layout)
    content = (place.source / file).read_bytes()
    (place.source / file).write_bytes(content[: int(len(content) * kept)])
    assert_refused(place, re.escape(file))


@pytest.mark.parametrize(("layout", "file"), [("llava-hf", "model.safetensors"), *FILES_OF_TENSORS])
def test_a_git_lfs_pointer_is_called_by_its_name(layout, file, place):
    place = place(layout)
    (place.source / file).write_text(LFS_POINTER)
    assert_refused(place, rf"{re.escape(file)}.*lfs|lfs.*{re.escape(file)}")


@pytest.mark.parametrize(
    "content",
    [
        ["a list"],
        torch.zeros(3),
        {"model.norm.weight": [1.0] * 32},
        {"model.norm.weight": None},
        {"state_dict": {"model.norm.weight": torch.zeros(32)}},
        {3: torch.zeros(3)},
    ],
    ids=["list", "tensor", "list for a tensor", "null for a tensor", "nested", "number for a key"],
)
def test_a_bin_file_that_is_no_dict_of_tensors_is_named(content, place):
    place = place("original")
    torch.save(content, place.source / "pytorch_model.bin")
    assert_refused(place, r"pytorch_model\.bin")


def test_a_number_among_the_tensors_of_a_bin_file_is_refused(place):
    place = place("original")
    path = place.source / "pytorch_model.bin"
    torch.save({**hostile.read_tensors(path), "epoch": 3}, path)
    assert_refused(place, r"epoch|pytorch_model\.bin")


@pytest.mark.parametrize("layout", ["llava-hf", "original", "stage 1"])
def test_a_file_without_tensors_is_refused(layout, place):
    place = place(layout)
    (path,) = [*place.source.glob("*.bin"), *place.source.glob("*.safetensors")]
    hostile.write_tensors(path, {})
    assert_refused(place, rf"{re.escape(path.name)}|missing|projector")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(32).to_sparse(), torch.zeros(32, dtype=torch.int64), torch.zeros(32, device="meta")],
    ids=["sparse", "int64", "meta"],
)
def test_a_tensor_of_a_bin_file_that_is_no_array_of_floats_is_refused(tensor, place):
    place = place("original")
    edit_tensors(place.source / "pytorch_model.bin", model__norm__weight=tensor)
    assert_refused(place, r"model\.norm\.weight|pytorch_model\.bin")


# --- keys and shapes -------------------------------------------------------------------------------------------------


def test_unknown_keys_are_named(place):
    place = place()
    edit_tensors(place.source / "model.safetensors", language_model__model__layers__0__stray__weight=torch.zeros(2))
    assert_refused(place, r"language_model\.model\.layers\.0\.stray\.weight")


def test_unknown_keys_of_the_original_layout_are_named(place):
    place = place("original")
    edit_tensors(place.source / "pytorch_model.bin", model__layers__0__self_attn__stray__weight=torch.zeros(2))
    assert_refused(place, r"model\.layers\.0\.self_attn\.stray\.weight")


@pytest.mark.parametrize(
    "removed",
    [
        NORM,
        "language_model.model.embed_tokens",
        "language_model.lm_head",
        "multi_modal_projector.linear_2.bias",
        "multi_modal_projector.",
    ],
)
def test_missing_keys_are_named(removed, place):
    place = place()
    edit_tensors(place.source / "model.safetensors", removed=[removed])
    assert_refused(place, re.escape(removed.removeprefix("language_model.").removeprefix("model.").strip(".")))


def test_a_missing_layer_is_refused_with_both_numbers(place):
    place = place()
    edit_tensors(place.source / "model.safetensors", removed=["language_model.model.layers.1."])
    assert_refused(place, r"2 layers of the language_model.*\b1\b.*missing")


def test_a_missing_vision_tower_is_named(place):
    place = place()
    edit_tensors(place.source / "model.safetensors", removed=["vision_tower."])
    assert_refused(place, r"vision.tower")


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_keys_of_the_original_layout_are_named(key, place):
    place = place("original")
    edit_tensors(place.source / "pytorch_model.bin", removed=[key])
    assert_refused(place, re.escape(key.removeprefix("model.")))


@pytest.mark.parametrize("key", ["0.bias", "2.weight", "2.bias"])
@pytest.mark.parametrize("layout", ["original", "snippet"])
def test_half_a_projector_is_refused(layout, key, place):
    place = place(layout)
    prefix = "model.mm_projector." + ("mlp_projector." if layout == "snippet" else "")
    edit_tensors(place.source / "pytorch_model.bin", removed=[prefix + key])
    assert_refused(place, r"projector")


def test_a_layer_more_than_the_config_says_is_named(place):
    place = place()
    path = place.source / "model.safetensors"
    tensors = hostile.read_tensors(path)
    more = {
        key.replace("layers.1", "layers.2"): tensor.clone()
        for key, tensor in tensors.items()
        if "language_model.model.layers.1" in key
    }
    hostile.write_tensors(path, {**tensors, **more})
    assert_refused(place, r"layers\.2\.")


@pytest.mark.parametrize(
    ("key", "shape", "match"),
    [
        (QUERY, (32, 31), r"\b32, 32\b.*\b32, 31\b|\b32, 31\b.*\b32, 32\b"),
        (QUERY, (1024,), r"\b32, 32\b.*\b1024\b|\b1024\b.*\b32, 32\b"),
        (NORM, (33,), r"\b32\b.*\b33\b|\b33\b.*\b32\b"),
        ("language_model.model.embed_tokens.weight", (65, 32), r"\b64, 32\b.*\b65, 32\b|\b65, 32\b.*\b64, 32\b"),
        ("multi_modal_projector.linear_1.weight", (32, 40), r"\b32, 32\b.*\b32, 40\b|\b32, 40\b.*\b32, 32\b"),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(key, shape, match, place):
    place = place()
    edit_tensors(place.source / "model.safetensors", **{key: torch.zeros(shape)})
    suffix = re.escape(key.removeprefix("language_model.").removeprefix("model."))
    assert_refused(place, rf"(?=.*{suffix})(?=.*({match}))")


def test_two_names_of_one_weight_are_both_named(place):
    place = place()
    edit_tensors(place.source / "model.safetensors", **{"model.language_model.norm.weight": torch.zeros(32)})
    assert_refused(place, rf"(?=.*{re.escape(NORM)})(?=.*\bmodel\.language_model\.norm\.weight)")


def test_original_and_snippet_projector_together_are_refused(place):
    place = place("snippet")
    path = place.source / "pytorch_model.bin"
    tensors = hostile.read_tensors(path)
    doubles = {key.replace("mlp_projector.", ""): value for key, value in tensors.items() if "mlp_projector" in key}
    hostile.write_tensors(path, {**tensors, **doubles})
    assert_refused(place, r"mm_projector\.(mlp_projector\.)?[02]\.")


def test_stage_1_files_with_other_weights_are_refused(place):
    place = place("stage 1")
    edit_tensors(place.source / "mm_projector.bin", model__vision_resampler__weight=torch.zeros(2))
    assert_refused(place, r"model\.vision_resampler\.weight")


# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", hostile.NEEDS)
def test_a_missing_config_is_named(layout, place):
    place = place(layout)
    without_config(place)
    assert_refused(place, r"config\.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"not JSON", b'{"model_type": "llava"', b"[]", b"null", b'"llava"', b"\xff\xfe\x00", b"[" * 100_000, b"{}"],
    ids=lambda content: repr(content[:24]),
)
@pytest.mark.parametrize("layout", ["llava-hf", "original"])
def test_a_config_that_is_none_is_named(layout, content, place):
    place = place(layout)
    (place.source / "config.json").write_bytes(content)
    assert_refused(place, r"config\.json|model_type")


@pytest.mark.parametrize(
    "model_type",
    [
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "vipllava",
        "video_llava",
        "qwen2",
        "mpt",
        "blip-2",
        "no_such",
    ],
)
def test_models_of_other_kinds_are_named(model_type, place):
    place = place()
    edit_json(place.source / "config.json", model_type=model_type)
    assert_refused(place, rf"\b{re.escape(model_type)}\b")


def test_llava_on_mpt_is_named(place):
    place = place("original")
    edit_json(place.source / "config.json", model_type="llava_mpt", architectures=["LlavaMptForCausalLM"])
    assert_refused(place, r"mpt")


@pytest.mark.parametrize("value", [None, 3, ["llava"], {"llava": 1}], ids=str)
def test_a_model_type_that_is_no_word_is_named(value, place):
    place = place()
    edit_json(place.source / "config.json", model_type=value)
    assert_refused(place, r"model_type|config\.json")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer.*-2, -5"),
        ({"vision_feature_layer": 9}, r"vision_feature_layer.*9"),
        ({"vision_feature_layer": "last"}, r"vision_feature_layer.*last"),
        ({"vision_feature_select_strategy": "full"}, r"vision_feature_select_strategy.*full"),
        ({"vision_feature_select_strategy": "cls"}, r"vision_feature_select_strategy.*cls"),
        ({"image_token_index": 64}, r"image_token.*64"),
        ({"image_token_index": "<image>"}, r"image_token"),
        ({"text_config": {"model_type": "no_such"}}, r"no_such"),
        ({"text_config": "llama"}, r"text_config"),
        ({"text_config": []}, r"text_config"),
        ({"vision_config": {"model_type": "vit"}}, r"\bvit\b"),
        ({"vision_config": {"model_type": "pixtral"}}, r"\bpixtral\b"),
        ({"vision_config": 3}, r"vision_config"),
        ({"projector_hidden_act": "no_such"}, r"no_such"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, r"quantiz"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantiz"),
    ],
    ids=str,
)
def test_choices_that_deco_does_not_have_are_named(changes, match, place):
    place = place()
    edit_json(place.source / "config.json", **changes)
    assert_refused(place, match)


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("text_config", {"hidden_size": "abc"}, r"hidden_size|text_config"),
        ("text_config", {"hidden_size": -32}, r"hidden_size|text_config|shape|-32"),
        ("text_config", {"num_hidden_layers": -1}, r"num_hidden_layers|text_config|layers"),
        ("text_config", {"hidden_size": 10**9}, r"1000000000"),
        ("text_config", {"num_hidden_layers": 10**6}, r"num_hidden_layers .* 1000000.* at most"),
        ("text_config", {"num_attention_heads": 0}, r"num_attention_heads|text_config|zero"),
        ("vision_config", {"patch_size": 0}, r"patch_size|vision_config|zero"),
        ("vision_config", {"num_hidden_layers": 1.5}, r"num_hidden_layers|vision_config"),
    ],
    ids=str,
)
def test_numbers_that_make_no_model_are_named(part, changes, match, place):
    place = place()
    config = json.loads((place.source / "config.json").read_text())
    edit_json(place.source / "config.json", **{part: {**config[part], **changes}})
    assert_refused(place, match)


# --- projectors and features of other LLaVAs -------------------------------------------------------------------------

OTHER_PROJECTORS = {
    "linear": {"weight": (32, 32), "bias": (32,)},
    "identity": {},
    "mlp2x_res2x_gelu": {"0.weight": (32, 32), "0.bias": (32,), "2.proj.0.weight": (32, 32)},
    "qformer": {"query_tokens": (1, 9, 32), "Qformer.bert.encoder.layer.0.attention.self.query.weight": (32, 32)},
    "ldpnetv2": {"mlp.mlp.0.weight": (32, 32), "mlp.mlp.2.weight": (32, 32), "peg.peg.0.weight": (32, 1, 3, 3)},
}


@pytest.mark.parametrize("layout", ["original", "stage 1"])
@pytest.mark.parametrize("projector_type", OTHER_PROJECTORS)
def test_other_projectors_are_named(projector_type, layout, place):
    place = place(layout)
    prefix = "model.mm_projector."
    weights = {prefix + key: torch.zeros(shape) for key, shape in OTHER_PROJECTORS[projector_type].items()}
    path = place.source / ("pytorch_model.bin" if layout == "original" else "mm_projector.bin")
    edit_tensors(path, removed=[prefix], **weights)
    edit_json(place.source / "config.json", mm_projector_type=projector_type)
    assert_refused(place, re.escape(projector_type))


@pytest.mark.parametrize("value", ["mlp99x_gelu", "mlp0x_gelu", "mlpx_gelu", "", None, 2, "linear"], ids=repr)
def test_a_projector_type_that_the_weights_are_not_is_refused(value, place):
    place = place("original")
    edit_json(place.source / "config.json", mm_projector_type=value)
    assert_refused(place, r"projector")


@pytest.mark.parametrize(
    "weights",
    [
        {"weight": (32, 32), "bias": (32,)},
        {"0.weight": (32, 32), "0.bias": (32,)},
        {"0.weight": (32, 32), "0.bias": (32,), "1.weight": (32, 32), "1.bias": (32,)},
        {"0.weight": (32,), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)},
        {"0.weight": (32, 32, 1, 1), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)},
        {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,), "5.weight": (32, 32)},
        {"0.weight": (48, 32), "0.bias": (48,), "2.weight": (32, 40), "2.bias": (32,)},
        {"a.0.weight": (32, 32), "a.0.bias": (32,), "a.2.weight": (32, 32), "a.2.bias": (32,)},
        {},
    ],
    ids=[
        "one linear",
        "only the first",
        "no activation",
        "norm",
        "convolution",
        "one more",
        "do not fit",
        "elsewhere",
        "none",
    ],
)
def test_a_projector_that_is_not_linear_gelu_linear_is_refused(weights, place):
    place = place("original")
    prefix = "model.mm_projector."
    tensors = {prefix + key: torch.zeros(shape) for key, shape in weights.items()}
    edit_tensors(place.source / "pytorch_model.bin", removed=[prefix], **tensors)
    assert_refused(place, r"projector")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"s2": True, "s2_scales": "336,672,1008"}, r"\bs2\b"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[336, 672]]}, r"anyres"),
        ({"image_aspect_ratio": "anyres_max_9"}, r"anyres_max_9"),
        ({"image_aspect_ratio": "highres"}, r"highres"),
        ({"mm_patch_merge_type": "spatial_unpad"}, r"spatial_unpad"),
        ({"mm_vision_select_feature": "cls_patch"}, r"cls_patch|full"),
        ({"mm_vision_select_feature": "cls"}, r"\bcls\b"),
        ({"mm_vision_select_layer": 9}, r"select_layer.*9|vision_feature_layer.*9"),
        ({"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer|vision_feature_layer"),
        ({"mm_resampler_type": "perceiver"}, r"perceiver"),
        ({"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average"}, r"spatial_pool"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantiz"),
    ],
    ids=str,
)
def test_features_of_other_llavas_are_named(changes, match, place):
    place = place("original")
    edit_json(place.source / "config.json", **changes)
    assert_refused(place, match)


def test_the_newline_of_llava_next_is_named(place):
    place = place("original")
    edit_tensors(place.source / "pytorch_model.bin", model__image_newline=torch.zeros(32))
    assert_refused(place, r"image_newline")


# --- base models, LoRA, towers ---------------------------------------------------------------------------------------


def test_a_base_model_of_another_size_is_refused_with_both_shapes(place):
    place = place("stage 1")
    shutil.rmtree(place.options["base_model"])
    hostile.write_llm(place.options["base_model"], hidden_size=48)
    assert_refused(place, r"\b32\b.*\b48\b|\b48\b.*\b32\b")


def test_a_base_model_whose_weights_are_not_its_configs_is_refused_with_both_shapes(place):
    place = place("stage 1")
    edit_tensors(place.options["base_model"] / "pytorch_model.bin", model__norm__weight=torch.zeros(48))
    assert_refused(place, r"\b32\b.*\b48\b|\b48\b.*\b32\b")


def test_a_vision_tower_of_another_size_is_refused_with_both_sizes(place):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    place = place("original")
    tower = place.options["vision_tower"]
    config = json.loads((tower / "config.json").read_text())
    (tower / "model.safetensors").unlink()
    CLIPVisionModel(CLIPVisionConfig(**{**config, "hidden_size": 48})).save_pretrained(tower)
    assert_refused(place, r"\b32\b.*\b48\b|\b48\b.*\b32\b")


@pytest.mark.parametrize("layout", ["original", "stage 1"])
def test_a_vision_tower_of_another_kind_is_named(layout, place):
    place = place(layout)
    edit_json(place.options["vision_tower"] / "config.json", model_type="no_such")
    assert_refused(place, r"no_such")


@pytest.mark.parametrize("option", ["base_model", "vision_tower"])
def test_an_option_that_names_a_file_or_an_empty_folder_is_named(option, place):
    place = place("stage 1")
    (place.root / "empty").mkdir()
    assert_refused(place, r"empty", **{option: place.root / "empty"})
    assert_refused(place, r"config\.json", **{option: place.source / "config.json"})


def test_a_vision_tower_with_a_layer_missing_is_refused(place):
    place = place("original")
    path = place.options["vision_tower"] / "model.safetensors"
    prefix = next(key for key in hostile.read_tensors(path) if ".layers.1." in key).partition(".layers.1.")[0]
    edit_tensors(path, removed=[f"{prefix}.layers.1."])
    assert_refused(place, r"layers\.1\.")


@pytest.mark.parametrize("layout", ["stage 1", "LoRA"])
@pytest.mark.parametrize("named", [True, False])
def test_without_a_base_model_the_option_is_named(named, layout, place):
    place = place(layout)
    if not named:
        edit_json(place.source / "config.json", removed=["_name_or_path"])
        if layout == "LoRA":
            edit_json(place.source / "adapter_config.json", base_model_name_or_path=None)
    assert_refused(place, r"(?=.*--base-model)" + (r"(?=.*someone/llm-tiny)" if named else ""), base_model=None)


@pytest.mark.parametrize("layout", ["original", "stage 1"])
@pytest.mark.parametrize("named", [True, False])
def test_without_a_vision_tower_the_option_is_named(named, layout, place):
    place = place(layout)
    if not named:
        edit_json(place.source / "config.json", removed=["mm_vision_tower"])
    assert_refused(place, r"(?=.*--vision-tower)" + (r"(?=.*someone/clip-tiny)" if named else ""), vision_tower=None)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, r"use_dora"),
        ({"use_rslora": True}, r"use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out"),
        ({"peft_type": "IA3"}, r"IA3"),
        ({"r": 8}, r"\b8\b.*\b4\b|\b4\b.*\b8\b"),
        ({"r": 0}, r"\br\b"),
        ({"r": "4"}, r"\br\b"),
        ({"r": None}, r"\br\b"),
        ({"lora_alpha": None}, r"lora_alpha"),
        ({"lora_alpha": "8"}, r"lora_alpha"),
    ],
    ids=str,
)
def test_a_lora_that_is_not_plain_is_named(changes, match, place):
    place = place("LoRA")
    edit_json(place.source / "adapter_config.json", **changes)
    assert_refused(place, match)


@pytest.mark.parametrize("content", ["", "not JSON", "[]", "{}"])
def test_a_broken_adapter_config_is_named(content, place):
    place = place("LoRA")
    (place.source / "adapter_config.json").write_text(content)
    assert_refused(place, r"adapter_config\.json")


@pytest.mark.parametrize("file", ["adapter_config.json", "non_lora_trainables.bin"])
def test_a_missing_part_of_a_lora_is_named(file, place):
    place = place("LoRA")
    (place.source / file).unlink()
    assert_refused(place, re.escape(file))


LAYER = "base_model.model.model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("removed", "added", "match"),
    [
        ([f"{LAYER}.q_proj.lora_B"], {}, r"layers\.1\.self_attn\.q_proj"),
        ([f"{LAYER}.q_proj.lora_A"], {}, r"layers\.1\.self_attn\.q_proj"),
        (["base_model"], {}, r"adapter_model\.bin"),
        ([], {f"{LAYER}.q_proj.lora_A.weight": (4, 31)}, r"(?=.*\b31\b)(?=.*\b32\b)"),
        ([], {f"{LAYER}.q_proj.lora_B.weight": (33, 4)}, r"(?=.*\b33\b)(?=.*\b32\b)"),
        ([], {f"{LAYER}.q_proj.lora_A.weight": (3, 32)}, r"\b3\b.*\b4\b|\b4\b.*\b3\b"),
        ([], {f"{LAYER}.q_proj.lora_A.weight": (4, 32, 1)}, r"layers\.1\.self_attn\.q_proj"),
        (
            [],
            {f"{LAYER}.stray.lora_A.weight": (4, 32), f"{LAYER}.stray.lora_B.weight": (32, 4)},
            r"layers\.1\.self_attn\.stray",
        ),
        ([], {f"{LAYER}.q_proj.lora_magnitude_vector": (32,)}, r"lora_magnitude_vector"),
        ([], {f"{LAYER}.q_proj.bias": (32,)}, r"q_proj\.bias"),
        (
            [],
            {
                f"{LAYER.replace('layers.1', 'layers.7')}.q_proj.lora_A.weight": (4, 32),
                f"{LAYER.replace('layers.1', 'layers.7')}.q_proj.lora_B.weight": (32, 4),
            },
            r"layers\.7\.",
        ),
    ],
    ids=[
        "A without B",
        "B without A",
        "empty",
        "other columns",
        "other rows",
        "other rank",
        "three dimensions",
        "unknown module",
        "DoRA",
        "bias",
        "unknown layer",
    ],
)
def test_lora_weights_that_do_not_fit_are_named(removed, added, match, place):
    place = place("LoRA")
    tensors = {key: torch.zeros(shape) for key, shape in added.items()}
    edit_tensors(place.source / "adapter_model.bin", removed, **tensors)
    assert_refused(place, match)


def test_unknown_non_lora_weights_are_named(place):
    place = place("LoRA")
    tensor = {"base_model.model.model.stray.weight": torch.zeros(2)}
    edit_tensors(place.source / "non_lora_trainables.bin", **tensor)
    assert_refused(place, r"model\.stray\.weight")


# --- the grid --------------------------------------------------------------------------------------------------------


def test_a_snippet_without_its_grid_asks_for_it(place):
    place = place("snippet")
    assert_refused(place, r"--pooled-grid-size", pooled_grid_size=None)


@pytest.mark.parametrize("layout", ["llava-hf", "original", "snippet"])
def test_a_grid_larger_than_the_patches_is_refused_with_both(layout, place):
    place = place(layout)
    assert_refused(place, r"(?=.*\b7\b)(?=.*\b6\b)", pooled_grid_size=7)
    assert_refused(place, r"(?=.*\b9\b)(?=.*\b6\b)", pooled_grid_size=[6, 9])


@pytest.mark.parametrize("grid", [0, -1, True, 2.5, "3", [3], [3, 3, 3], [0, 3], []], ids=repr)
def test_a_grid_that_is_none_is_named(grid, place):
    place = place()
    assert_refused(place, r"pooled.grid.size", pooled_grid_size=grid)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float99", "auto ", "FLOAT"])
def test_an_unknown_dtype_is_named(dtype, place):
    place = place()
    assert_refused(place, rf"dtype.*{dtype}", dtype=dtype)


# --- the source ------------------------------------------------------------------------------------------------------


def test_a_source_that_does_not_exist_is_named(place):
    place = place()
    assert_refused(place, r"missing", source=place.root / "missing")


def test_a_source_that_is_a_file_is_named(place):
    place = place()
    assert_refused(place, r"model\.safetensors", source=place.source / "model.safetensors")


@pytest.mark.parametrize(
    "source", ["no-such/model", "no-such-model", "no/such/model", "", "a b/c d", "../up", "x" * 200]
)
def test_a_hub_id_that_cannot_be_had_is_named(source, place):
    place = place()
    assert_refused(place, re.escape(source[:90]), source=source)


def test_an_empty_folder_is_refused(place):
    place = place()
    (place.root / "empty").mkdir()
    assert_refused(place, r"empty|config\.json", source=place.root / "empty")


@pytest.mark.parametrize("layout", ["llava-hf", "original", "stage 1", "LoRA"])
def test_a_source_without_weights_is_refused(layout, place):
    place = place(layout)
    for path in [*place.source.glob("*.bin"), *place.source.glob("*.safetensors")]:
        path.unlink()
    assert_refused(place, r"\.safetensors|\.bin|weights")


def test_a_deco_checkpoint_is_called_one(place, checkpoint):
    place = place()
    shutil.copytree(checkpoint, place.source, dirs_exist_ok=True)
    assert_refused(place, r"already|is a deco|deco checkpoint")


@pytest.mark.parametrize("layout", ["llava-hf", "original", "LoRA"])
def test_export_takes_nothing_but_deco(layout, place):
    place = place(layout)
    before = snapshot(place.root)
    with pytest.raises(ConversionError, match=r"deco|model_type"):
        export(place.source, place.destination)
    assert snapshot(place.root) == before


# --- the destination -------------------------------------------------------------------------------------------------


@pytest.fixture
def occupied(place, checkpoint):
    """A place whose destination is a checkpoint."""
    place = place()
    shutil.copytree(checkpoint, place.destination)
    return place


def test_a_destination_with_content_is_kept_without_overwrite(occupied):
    assert_refused(occupied, r"overwrite")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_model_is_kept(overwrite, place):
    place = place()
    place.destination.mkdir()
    (place.destination / "thesis.txt").write_text("years of work")
    assert_refused(place, r"overwrite|config\.json|not a|no model", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_that_is_a_file_is_kept(overwrite, place):
    place = place()
    place.destination.write_text("a file")
    assert_refused(place, r"file|not a (folder|directory)", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("alias", ["source", "source/", "source/../source", "target/../source", "link", "./source/."])
def test_the_source_is_not_a_destination_whatever_it_is_called(alias, overwrite, place):
    place = place()
    (place.root / "link").symlink_to(place.source)
    assert_refused(place, r"source|same|overwrite", destination=f"{place.root}/{alias}", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("inner", ["inner", "deeper/inner"])
def test_a_destination_inside_the_source_is_refused(inner, overwrite, place):
    place = place()
    assert_refused(place, r"inside|within|source", destination=place.source / inner, overwrite=overwrite)


def test_a_destination_that_holds_the_source_is_kept(place):
    place = place()
    shutil.copy(place.source / "config.json", place.root / "config.json")
    assert_refused(place, r"contains|holds|inside|within|source", destination=place.root, overwrite=True)


@pytest.mark.parametrize("option", ["vision_tower", "base_model"])
def test_a_destination_that_the_conversion_reads_is_kept(option, place):
    place = place("stage 1")
    assert_refused(place, r"tower|base|same|read|source", destination=place.options[option], overwrite=True)


@pytest.mark.parametrize("name", ["file/out", "file/deeper/out"])
def test_a_destination_below_a_file_is_refused(name, place):
    place = place()
    (place.root / "file").write_text("a file")
    before = snapshot(place.root)
    result = command("convert", place.source, place.root / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("deco convert: ")
    assert "file" in hostile.without_paths(result.stderr.splitlines()[-1], place.root)
    assert snapshot(place.root) == before


def test_a_link_to_a_checkpoint_is_kept_without_overwrite(occupied):
    link = occupied.root / "link"
    link.symlink_to(occupied.destination)
    assert_refused(occupied, r"overwrite", destination=link)


def test_a_refusal_makes_no_parent_folders(place):
    place = place()
    with_unknown_key(place)
    assert_refused(place, r"stray", destination=place.root / "new" / "deeper" / "out")


def test_export_keeps_a_destination_with_content(place, checkpoint):
    place = place()
    shutil.copytree(checkpoint, place.destination)
    before = snapshot(place.root)
    with pytest.raises(ConversionError, match=r"overwrite"):
        export(checkpoint, place.destination)
    assert snapshot(place.root) == before


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_missing_is_named(place):
    place = place("original")
    (place.source / "tokenizer.model").unlink()
    assert_refused(place, r"tokenizer")


@pytest.mark.parametrize("content", [b"", b"not a model", LFS_POINTER.encode(), bytes(range(256)) * 40])
def test_a_broken_sentencepiece_model_is_named(content, place):
    place = place("original")
    (place.source / "tokenizer.model").write_bytes(content)
    assert_refused(place, r"tokenizer\.model")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": "1.0", "model": {"type": "no_such"}}', LFS_POINTER])
def test_a_broken_tokenizer_json_is_named(content, place):
    place = place()
    (place.source / "tokenizer.json").write_text(content)
    assert_refused(place, r"tokenizer")


def convert_without_sentencepiece(source, destination, vision_tower, fast_source, fast_destination):
    """The messages of two refusals (None: converted), where the package is not installed and nothing has asked yet."""
    from importlib.machinery import PathFinder

    find_spec = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *rest: None if name == "sentencepiece" else find_spec(name, *rest)
    from modeling_deco.conversion import ConversionError, convert

    messages = []
    for arguments in ((source, destination, None, vision_tower), (fast_source, fast_destination)):
        try:
            convert(*arguments)
            messages.append(None)
        except ConversionError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def without_sentencepiece(tmp_path_factory):
    """A place with a sentencepiece tokenizer and its message, one with a fast tokenizer and its message."""
    places = [hostile.Place(tmp_path_factory.mktemp("place"), layout) for layout in ("original", "llava-hf")]
    edit_json(places[1].source / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    paths = [[place.source, place.destination, *place.options.values()] for place in places]
    processes = FreshProcesses(modules=["torch"])
    messages = processes.run(convert_without_sentencepiece, *paths[0], *paths[1])
    processes.close()
    return list(zip(places, messages, strict=True))


def test_a_sentencepiece_model_without_sentencepiece_says_what_to_install(without_sentencepiece):
    place, message = without_sentencepiece[0]
    assert message
    assert "sentencepiece" in hostile.without_paths(message, place.root)
    assert len(message.splitlines()) == 1
    assert list(place.destination.parent.iterdir()) == []


def test_a_source_with_a_fast_tokenizer_needs_no_sentencepiece(without_sentencepiece):
    place, message = without_sentencepiece[1]
    assert message is None
    assert (place.destination / "tokenizer.json").exists()
