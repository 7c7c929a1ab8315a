# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco convert` on hostile and broken checkpoints: one line that names the culprit, no code run, nothing written.

Each case spoils one thing of a checkpoint that converts, which the first test shows.
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
from hostile import assert_all_refused, edit_json, edit_tensors, snapshot
from typer.testing import CliRunner

from modeling_deco.cli import app
from modeling_deco.conversion import InputError, convert, export
from modeling_deco.conversion.sources import Source

LLAMA = "language_model.model."
NORM = "language_model.model.norm.weight"  # (32,)
QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"  # (32, 32)
PROJECTOR = "model.mm_projector."


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder for places; temporary files of a conversion would be found in it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path
    left = [path.name for path in (tmp_path / "tmp").iterdir()]
    assert not [name for name in left if not name.startswith("hostile-")]  # the templates of places


@pytest.fixture
def place(root):
    """Makes the place of a layout."""
    return lambda layout="llava-hf": hostile.Place(root, layout)


def command(name, *arguments):
    return CliRunner().invoke(app, [name, *map(str, arguments)])


# --- ways to spoil a place; a path is relative to the source ---------------------------------------------------------


def config(removed=(), **changes):
    return in_json("config.json", removed, **changes)


def in_json(file, removed=(), **changes):
    return lambda place: edit_json(place.source / file, removed, **changes)


def in_tensors(file, removed=(), **changes):
    return lambda place: edit_tensors(place.source / file, removed, **changes)


def hf_tensors(removed=(), **changes):
    return in_tensors("model.safetensors", removed, **changes)


def bin_tensors(removed=(), **changes):
    return in_tensors("pytorch_model.bin", removed, **changes)


def content(file, data):
    data = data if isinstance(data, bytes) else data.encode()
    return lambda place: (place.source / file).write_bytes(data)


def without(*patterns):
    return lambda place: [path.unlink() for pattern in patterns for path in place.source.glob(pattern)]


def zeros(shapes, prefix=""):
    return {prefix + key: torch.zeros(shape) for key, shape in shapes.items()}


def both(*numbers):
    """All of the numbers, in any order."""
    return "".join(rf"(?=.*\b{number}\b)" for number in numbers)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", hostile.NEEDS)
def test_what_these_tests_spoil_converts_as_it_is(layout, place):
    place = place(layout)
    source, others = snapshot(place.source), sorted(path.name for path in place.root.iterdir())
    convert(place.source, place.destination, **place.options)
    assert (place.destination / "config.json").exists()
    assert snapshot(place.source) == source
    assert sorted(path.name for path in place.root.iterdir()) == others
    assert [path.name for path in place.destination.parent.iterdir()] == ["out"]


def test_a_refusal_of_the_command_is_one_line_on_stderr_and_exit_code_2(root):
    cases = [
        ("llava-hf", hf_tensors(stray=torch.zeros(2)), [], r"stray"),
        ("llava-hf", without("config.json"), [], r"config\.json"),
        ("llava-hf", None, ["--pooled-grid-size", "7"], r"7.*\b6\b"),
        ("llava-hf", None, ["--pooled-grid-size", "-3"], r"pooled.grid.size.*-3"),
        ("llava-hf", None, ["--pooled-grid-size", "3x"], r"pooled.grid.size.*3x"),
        ("llava-hf", None, ["--dtype", "int8"], r"dtype.*int8"),
        ("llava-hf", None, ["--dtype", ""], r"dtype"),
        ("original", None, ["--vision-tower", "no/such-tower"], r"no/such-tower"),
        ("stage 1", None, ["--base-model", "no/such-model"], r"no/such-model"),
    ]
    for number, (layout, spoil, more, match) in enumerate(cases):
        (root / str(number)).mkdir()
        place = hostile.Place(root / str(number), layout)
        if spoil:
            spoil(place)
        before = snapshot(place.root)
        result = command("convert", *place.arguments(), *more)
        assert (result.exit_code, result.stdout) == (2, ""), more
        assert result.stderr.startswith("deco convert: ")
        assert result.stderr.count("\n") == 1
        assert re.search(match, hostile.without_paths(result.stderr, place.root)), result.stderr
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


def test_nothing_else_reaches_the_terminal(root, fresh, tmp_path_factory):
    """Neither progress, a warning of a library nor a traceback, whose handlers do not see a test's stderr."""
    cases = [
        ("llava-hf", content("config.json", "spoilt"), r"config\.json"),
        ("original", content("pytorch_model.bin", "spoilt"), r"pytorch_model\.bin"),
        ("original", content("tokenizer.model", "spoilt"), r"tokenizer\.model"),
    ]
    for number, (layout, spoil, match) in enumerate(cases):
        (root / str(number)).mkdir()
        place, streams = hostile.Place(root / str(number), layout), tmp_path_factory.mktemp("streams")
        spoil(place)
        code = fresh.run(run_command, streams / "out", streams / "err", "convert", *place.arguments())
        lines = (streams / "err").read_text().splitlines()
        assert (code, (streams / "out").read_text(), len(lines)) == (2, "", 1), lines
        assert lines[0].startswith("deco convert: ")
        assert re.search(match, hostile.without_paths(lines[0], place.root)), lines


def test_export_is_refused_in_one_line_and_takes_nothing_but_deco(place):
    place = place()
    before = snapshot(place.root)
    result = command("export", place.source, place.destination)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"deco export: .*(deco|model_type).*\n", result.stderr)
    assert snapshot(place.root) == before


# --- code in the checkpoint ------------------------------------------------------------------------------------------


class Call:
    """Unpickled, it is a call."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def calls(canary):
    return [
        Call(os.system, f"touch {canary}"),
        Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
        Call(builtins.exec, f"open({str(canary)!r}, 'w')"),
    ]


def test_code_in_a_pickle_is_not_run(root, tmp_path_factory):
    canary = tmp_path_factory.mktemp("canary") / "it_ran"
    evil = calls(canary)

    def among_tensors(file, call):
        def spoil(place):
            path = place.source / file
            torch.save({**hostile.read_tensors(path), "extra": {"nested": [call]}}, path)

        return spoil

    def all_code(write):
        def spoil(place):
            with open(place.source / "pytorch_model.bin", "wb") as file:
                write(evil[0], file)

        return spoil

    def in_the_tower(place):
        tower = place.options["vision_tower"]
        tensors = hostile.read_tensors(tower / "model.safetensors")
        (tower / "model.safetensors").unlink()
        torch.save({**tensors, "extra": evil[0]}, tower / "pytorch_model.bin")

    in_original = {f"call {i}": (among_tensors("pytorch_model.bin", evil[i]), "pytorch_model.bin") for i in range(3)}
    in_original["all code, zip"] = all_code(torch.save), "pytorch_model.bin"
    in_original["all code, bare pickle"] = all_code(pickle.dump), "pytorch_model.bin"
    in_original["tower"] = in_the_tower, "pytorch_model.bin"
    assert_all_refused(root, "original", in_original)
    others = [
        ("original sharded", "pytorch_model-00002-of-00002.bin"),
        ("stage 1", "mm_projector.bin"),
        ("LoRA", "non_lora_trainables.bin"),
        ("LoRA", "adapter_model.bin"),
        ("LoRA", "../base_m/pytorch_model.bin"),
    ]
    for layout, file in others:
        assert_all_refused(root, layout, {file: (among_tensors(file, evil[0]), re.escape(file.split("/")[-1]))})
    assert not canary.exists()


def test_code_in_files_that_are_not_the_model_is_neither_run_nor_copied(place, tmp_path_factory):
    place, canary = place("original"), tmp_path_factory.mktemp("canary") / "it_ran"
    files = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    for file in files:
        torch.save(calls(canary)[0], place.source / file)
    convert(place.source, place.destination, **place.options)
    assert not canary.exists()
    assert not [file for file in files if (place.destination / file).exists()]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_remote_code_of_the_source_is_not_run(file, place, tmp_path_factory):
    place, canary = place(), tmp_path_factory.mktemp("canary") / "it_ran"
    (place.source / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    edit_json(place.source / file, auto_map={**dict.fromkeys(names, "evil.It"), "AutoTokenizer": ["evil.It"] * 2})
    try:
        convert(place.source, place.destination, **place.options)
    except InputError:
        assert not place.destination.exists()
    else:
        assert not (place.destination / "evil.py").exists()
        assert "evil" not in (place.destination / file).read_text()
    assert not canary.exists()


# --- weight files, which are read before anything else of a checkpoint -----------------------------------------------


def assert_not_read(place, match):
    """The weights of the place are refused in one line. `convert` reads them by the same call."""
    with pytest.raises(InputError) as raised:
        Source("SRC", place.source, "SRC").read_weights()
    message = str(raised.value)
    assert len(message.splitlines()) == 1, message
    assert "\x1b" not in message
    assert re.search(match, hostile.without_paths(message, place.root), re.IGNORECASE), message


def assert_none_read(root, layout, cases):
    """Spoils a fresh place for each case, `(spoil, match)` by name."""
    hostile.for_each_case(root, layout, cases, assert_not_read)


FIRST_INDEX = {
    "llava-hf sharded": "model.safetensors.index.json",
    "original sharded": "pytorch_model.bin.index.json",
}


def with_index(change):
    """`change(place, weight_map, shards)` changes the index of the place in place, or its files."""

    def spoil(place):
        (path,) = place.source.glob("*.index.json")
        index = json.loads(path.read_text())
        change(place, index["weight_map"], sorted(set(index["weight_map"].values())))
        hostile.write_json(path, index)

    return spoil


def renamed_to(template):
    """The index names the first shard elsewhere, where a copy of it lies."""

    def change(place, weight_map, shards):
        name = template.format(root=place.root, shard=shards[0])
        (place.source / name).parent.mkdir(exist_ok=True)
        if not (place.source / name).exists():
            shutil.copy(place.source / shards[0], place.source / name)
        weight_map.update({key: name for key, shard in weight_map.items() if shard == shards[0]})

    return with_index(change)


def listed_in_the_wrong_shard(place, weight_map, shards):
    weight_map[min(key for key, shard in weight_map.items() if shard == shards[0])] = shards[1]


def not_listed(place, weight_map, shards):
    del weight_map[min(weight_map)]


def not_in_its_shard(place, weight_map, shards):
    edit_tensors(place.source / shards[1], removed=[min(hostile.read_tensors(place.source / shards[1]))])


def in_two_shards(place, weight_map, shards):
    first, second = (hostile.read_tensors(place.source / shard) for shard in shards)
    hostile.write_tensors(place.source / shards[1], {**second, min(first): first[min(first)]})


@pytest.mark.parametrize("layout", FIRST_INDEX)
def test_an_index_that_does_not_say_where_the_shards_are_is_refused(layout, root):
    index = FIRST_INDEX[layout]
    named = re.escape(index)
    texts = [
        "",
        "not JSON",
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["model-00001-of-00002.safetensors"]}',
        '{"weight_map": "model-00001-of-00002.safetensors"}',
        f'{{"weight_map": {{"{NORM}": 1}}}}',
        f'{{"weight_map": {{"{NORM}": ""}}}}',
        f'{{"weight_map": {{"{NORM}": "."}}}}',
        f'{{"weight_map": {{"{NORM}": "a\\u0000b"}}}}',
        '{"weight_map":' * 100_000,
        "[" * 100_000,
    ]
    cases = {f"text {text[:60]}": (content(index, text), named) for text in texts}
    places = ["../{shard}", "{root}/{shard}", "more/{shard}", "../source/{shard}"]
    cases |= {f"shard at {place}": (renamed_to(place), named) for place in places}
    shard = r"(model|pytorch_model)-00002-of-00002"
    cases |= {
        "missing shard": (without("*-00002-of-00002.*"), shard),
        "truncated shard": (
            with_index(
                lambda place, _, shards: (place.source / shards[1]).write_bytes(
                    (place.source / shards[1]).read_bytes()[:-100]
                )
            ),
            shard,
        ),
        "key listed in the wrong shard": (with_index(listed_in_the_wrong_shard), r"disagree about '.*\.weight'"),
        "key not listed": (with_index(not_listed), r"disagree about '.*'"),
        "key not in its shard": (with_index(not_in_its_shard), r"disagree about '.*'"),
        "key in two shards": (with_index(in_two_shards), r"'.*' is a duplicate"),
    }
    assert_none_read(root, layout, cases)


def entry(key=NORM, **changes):
    """A change of one entry of a header."""
    return lambda header: header.update({key: {**header[key], **changes}})


def offsets(make):
    """A change of the offsets of one entry."""
    return lambda header: entry(data_offsets=make(*header[NORM]["data_offsets"]))(header)


def moved(num_bytes):
    """All tensors but the first, by so many bytes."""

    def lie(header):
        tensors = [value for key, value in header.items() if key != "__metadata__"]
        for value in sorted(tensors, key=lambda value: value["data_offsets"])[1:]:
            value["data_offsets"] = [offset + num_bytes for offset in value["data_offsets"]]

    return lie


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
    "tensors that share bytes": moved(-16),
    "bytes between tensors": moved(16),
}


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


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 13476839424\n"
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


def test_a_safetensors_file_that_lies_or_is_broken_is_named(root):
    def with_lie(name, lie):
        def spoil(place):
            path = place.source / "model.safetensors"
            header, data = hostile.read_safetensors(path)
            lie(header)
            data = {"tensors that share bytes": data[:-16], "bytes between tensors": data + bytes(16)}.get(name, data)
            hostile.write_safetensors(path, header, data)

        return spoil

    def broken(spoil):
        return lambda place: spoil(place.source / "model.safetensors")

    cases = {name: (with_lie(name, lie), r"model\.safetensors") for name, lie in LIES_OF_HEADERS.items()}
    cases |= {name: (broken(spoil), r"model\.safetensors") for name, spoil in BROKEN_FILES.items()}
    cases["header with a key twice"] = broken(BROKEN_FILES["header with a key twice"]), re.escape(NORM)
    cases["Git LFS pointer"] = broken(BROKEN_FILES["Git LFS pointer"]), r"model\.safetensors is a Git LFS pointer"
    assert_none_read(root, "llava-hf", cases)


def test_a_bin_file_that_is_broken_or_no_dict_of_tensors_is_named(root):
    def saved(value):
        return lambda place: torch.save(value, place.source / "pytorch_model.bin")

    def kept(part):
        def spoil(place):
            path = place.source / "pytorch_model.bin"
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])

        return spoil

    cases = {f"{part} of the file": kept(part) for part in (0.99, 0.5, 0.01, 0)}
    cases |= {
        "list": saved(["a list"]),
        "tensor": saved(torch.zeros(3)),
        "list for a tensor": saved({"model.norm.weight": [1.0] * 32}),
        "null for a tensor": saved({"model.norm.weight": None}),
        "nested": saved({"state_dict": {"model.norm.weight": torch.zeros(32)}}),
        "number for a key": saved({3: torch.zeros(3)}),
        "number for a tensor": bin_tensors(epoch=3),
        "sparse tensor": bin_tensors(model__norm__weight=torch.zeros(32).to_sparse()),
        "tensor without values": bin_tensors(model__norm__weight=torch.zeros(32, device="meta")),
    }
    cases = {name: (spoil, r"pytorch_model\.bin") for name, spoil in cases.items()}
    cases["Git LFS pointer"] = content("pytorch_model.bin", LFS_POINTER), r"pytorch_model\.bin is a Git LFS pointer"
    assert_none_read(root, "original", cases)


def test_a_broken_weight_file_of_any_layout_leaves_no_trace_of_a_conversion(root):
    def half(file):
        return lambda place: (place.source / file).write_bytes(
            (place.source / file).read_bytes()[: (place.source / file).stat().st_size // 2]
        )

    files = [
        ("llava-hf", "model.safetensors"),
        ("original", "pytorch_model.bin"),
        ("stage 1", "mm_projector.bin"),
        ("LoRA", "non_lora_trainables.bin"),
        ("LoRA", "adapter_model.bin"),
    ]
    for layout, file in files:
        name = re.escape(file)
        cases = {"half": (half(file), name), "pointer": (content(file, LFS_POINTER), rf"{name} is a Git LFS pointer")}
        assert_all_refused(root, layout, cases)
    everything = "*.safetensors", "*.bin"
    for layout in ("llava-hf", "original", "stage 1", "LoRA"):
        assert_all_refused(root, layout, {"none": (without(*everything), r"\.safetensors|\.bin|weights")})


# --- keys, types and shapes ------------------------------------------------------------------------------------------


def test_keys_types_and_shapes_that_are_not_the_models_are_named(root):
    def one_layer_more(place):
        path = place.source / "model.safetensors"
        tensors = hostile.read_tensors(path)
        last = {key: value for key, value in tensors.items() if key.startswith(f"{LLAMA}layers.1.")}
        more = {key.replace("layers.1", "layers.2"): value.clone() for key, value in last.items()}
        hostile.write_tensors(path, {**tensors, **more})

    cases = {
        "unknown key": (
            hf_tensors(language_model__model__layers__0__stray=torch.zeros(2)),
            r"model\.layers\.0\.stray",
        ),
        "one layer more": (one_layer_more, r"layers\.2\."),
        "one layer less": (
            hf_tensors([f"{LLAMA}layers.1."]),
            r"2 layers of the language_model.*\b1\b.*missing",
        ),
        "no tower": (hf_tensors(["vision_tower."]), r"vision.tower"),
        "no tensor": (lambda place: hostile.write_tensors(place.source / "model.safetensors", {}), r"missing"),
        "a name twice": (
            hf_tensors(**{"model.language_model.norm.weight": torch.zeros(32)}),
            rf"(?=.*{re.escape(NORM)})(?=.*\bmodel\.language_model\.norm\.weight)",
        ),
    }
    for key in ("model.norm", "model.embed_tokens", "lm_head"):
        cases[f"missing {key}"] = hf_tensors([f"language_model.{key}"]), re.escape(key.removeprefix("model."))
    for key in ("linear_2.bias", ""):
        cases[f"missing projector {key}"] = hf_tensors([f"multi_modal_projector.{key}"]), "multi_modal_projector"
    for dtype in (torch.int64, torch.int8, torch.bool, torch.complex64):
        cases[str(dtype)] = hf_tensors(**{QUERY: torch.zeros(32, 32, dtype=dtype)}), re.escape(QUERY)
    shapes = [
        (QUERY, (32, 31), r"\(32, 31\).*\(32, 32\)"),
        (QUERY, (1024,), r"\(1024,\).*\(32, 32\)"),
        (NORM, (33,), r"\(33,\).*\(32,\)"),
        (f"{LLAMA}embed_tokens.weight", (65, 32), r"\(65, 32\).*\(64, 32\)"),
        ("multi_modal_projector.linear_1.weight", (32, 40), r"\(32, 40\).*\(32, 32\)"),
    ]
    for key, shape, match in shapes:
        cases[f"{key} {shape}"] = hf_tensors(**{key: torch.zeros(shape)}), rf"{re.escape(key)}.*{match}"
    hazards = ["two\nlines", "two\r\nlines", "\x1b[2J\x1b[31mred", "line\u2028separator", "x" * 100_000, "", "{0}%s"]
    for key in hazards:
        cases[f"key {key[:20]!r}"] = hf_tensors(**{key: torch.zeros(2)}), r"unknown key"
    assert_all_refused(root, "llava-hf", cases)


def test_missing_keys_and_others_of_the_original_layout_are_named(root):
    cases = {
        "unknown key": (bin_tensors(model__layers__0__stray=torch.zeros(2)), r"model\.layers\.0\.stray"),
        "numbers for weights": (bin_tensors(model__norm__weight=torch.zeros(32, dtype=torch.int64)), r"model\.norm"),
        "newline of LLaVA-NeXT": (bin_tensors(model__image_newline=torch.zeros(32)), r"image_newline"),
    }
    for key in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        cases[f"missing {key}"] = bin_tensors([key]), re.escape(key.removeprefix("model."))
    halves = {f"projector without {key}": key for key in ("0.bias", "2.weight", "2.bias")}
    cases |= {name: (bin_tensors([PROJECTOR + key]), r"projector") for name, key in halves.items()}
    assert_all_refused(root, "original", cases)

    def both_projectors(place):
        path = place.source / "pytorch_model.bin"
        tensors = hostile.read_tensors(path)
        doubles = {key.replace("mlp_projector.", ""): value for key, value in tensors.items()}
        hostile.write_tensors(path, {**tensors, **doubles})

    snippet = {name: (bin_tensors([f"{PROJECTOR}mlp_projector.{key}"]), r"projector") for name, key in halves.items()}
    snippet["both projectors"] = both_projectors, r"mm_projector\.(mlp_projector\.)?[02]\."
    snippet["no grid"] = None, r"--pooled-grid-size", {"pooled_grid_size": None}
    assert_all_refused(root, "snippet", snippet)
    stray = in_tensors("mm_projector.bin", model__vision_resampler__weight=torch.zeros(2))
    assert_all_refused(root, "stage 1", {"other weights": (stray, r"model\.vision_resampler\.weight")})


def test_a_key_that_cannot_be_printed_does_no_harm(place):
    place = place()
    header_as_text(lambda text: text.replace(b"norm", b"\\ud800", 1))(place.source / "model.safetensors")
    before = snapshot(place.root)
    result = command("convert", *place.arguments())
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert snapshot(place.root) == before


# --- config.json -----------------------------------------------------------------------------------------------------


def test_a_config_that_is_none_is_named(root):
    for layout in hostile.NEEDS:
        assert_all_refused(root, layout, {"missing": (without("config.json"), r"config\.json")})
    texts = [b"", b"not JSON", b'{"model_type": "llava"', b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b"{}"]
    cases = {repr(text[:24]): (content("config.json", text), r"config\.json|model_type") for text in texts}
    assert_all_refused(root, "llava-hf", cases)
    assert_all_refused(root, "original", {"not JSON": cases[repr(b"not JSON")]})


def test_models_of_other_kinds_are_named(root):
    kinds = ["qwen2_vl", "internvl", "vipllava", "video_llava", "qwen2", "blip-2", "no_such", "llava_mpt"]
    cases = {kind: (config(model_type=kind), rf"\b{re.escape(kind)}\b") for kind in kinds}
    cases |= {str(kind): (config(model_type=kind), r"model_type") for kind in (None, 3, ["llava"], {"llava": 1})}
    assert_all_refused(root, "llava-hf", cases)


def test_choices_that_deco_does_not_have_are_named(root):
    choices = [
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer.*-2, -5"),
        ({"vision_feature_layer": 9}, r"vision_feature_layer.*9"),
        ({"vision_feature_layer": "last"}, r"vision_feature_layer.*last"),
        ({"vision_feature_select_strategy": "full"}, r"vision_feature_select_strategy.*full"),
        ({"vision_feature_select_strategy": "cls"}, r"vision_feature_select_strategy.*cls"),
        ({"image_token_index": 64}, r"image_token.*64"),
        ({"image_token_index": "<image>"}, r"image_token"),
        ({"text_config": {"model_type": "no_such"}}, r"no_such"),
        ({"text_config": "llama"}, r"text_config"),
        ({"vision_config": {"model_type": "vit"}}, r"\bvit\b"),
        ({"vision_config": {"model_type": "pixtral"}}, r"\bpixtral\b"),
        ({"vision_config": 3}, r"vision_config"),
        ({"projector_hidden_act": "no_such"}, r"no_such"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, r"quantiz"),
    ]
    cases = {str(changes): (config(**changes), match) for changes, match in choices}
    numbers = [
        ("text_config", {"hidden_size": "abc"}, r"hidden_size|text_config"),
        ("text_config", {"hidden_size": -32}, r"hidden_size|text_config|shape|-32"),
        ("text_config", {"num_hidden_layers": -1}, r"num_hidden_layers|text_config|layers"),
        ("text_config", {"hidden_size": 10**9}, r"1000000000"),
        ("text_config", {"num_hidden_layers": 10**6}, r"num_hidden_layers .* 1000000.* at most"),
        ("text_config", {"num_attention_heads": 0}, r"num_attention_heads|text_config|zero"),
        ("vision_config", {"patch_size": 0}, r"patch_size|vision_config|zero"),
        ("vision_config", {"num_hidden_layers": 1.5}, r"num_hidden_layers|vision_config"),
    ]

    def in_part(part, changes):
        def spoil(place):
            path = place.source / "config.json"
            edit_json(path, **{part: {**json.loads(path.read_text())[part], **changes}})

        return spoil

    cases |= {f"{part} {changes}": (in_part(part, changes), match) for part, changes, match in numbers}
    assert_all_refused(root, "llava-hf", cases)


# --- projectors and features of other LLaVAs -------------------------------------------------------------------------


def test_other_projectors_are_named(root):
    kinds = {
        "linear": {"weight": (32, 32), "bias": (32,)},
        "identity": {},
        "mlp2x_res2x_gelu": {"0.weight": (32, 32), "0.bias": (32,), "2.proj.0.weight": (32, 32)},
        "qformer": {"query_tokens": (1, 9, 32), "Qformer.bert.encoder.layer.0.attention.self.query.weight": (32, 32)},
        "ldpnetv2": {"mlp.mlp.0.weight": (32, 32), "mlp.mlp.2.weight": (32, 32), "peg.peg.0.weight": (32, 1, 3, 3)},
    }

    def with_projector(file, weights, **changes):
        def spoil(place):
            edit_tensors(place.source / file, [PROJECTOR], **zeros(weights, PROJECTOR))
            edit_json(place.source / "config.json", **changes)

        return spoil

    def of_kinds(file):
        return {
            kind: (with_projector(file, weights, mm_projector_type=kind), re.escape(kind))
            for kind, weights in kinds.items()
        }

    assert_all_refused(root, "stage 1", of_kinds("mm_projector.bin"))
    cases = of_kinds("pytorch_model.bin")
    for value in ("mlp99x_gelu", "mlp0x_gelu", "mlpx_gelu", "", None, 2, "linear"):
        cases[f"called {value!r}"] = config(mm_projector_type=value), r"projector"
    layer = {"0.weight": (32, 32), "0.bias": (32,)}
    layers = {**layer, "2.weight": (32, 32), "2.bias": (32,)}
    not_mlps = {
        "only the first": layer,
        "no activation": {**layer, "1.weight": (32, 32), "1.bias": (32,)},
        "norm": {**layers, "0.weight": (32,)},
        "convolution": {**layers, "0.weight": (32, 32, 1, 1)},
        "one more": {**layers, "5.weight": (32, 32)},
        "do not fit": {**layers, "0.weight": (48, 32), "0.bias": (48,), "2.weight": (32, 40)},
        "elsewhere": {f"a.{key}": shape for key, shape in layers.items()},
        "none": {},
    }
    cases |= {name: (with_projector("pytorch_model.bin", not_mlps[name]), r"projector") for name in not_mlps}
    assert_all_refused(root, "original", cases)


def test_features_of_other_llavas_are_named(root):
    features = [
        ({"s2": True, "s2_scales": "336,672,1008"}, r"\bs2\b"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[336, 672]]}, r"anyres"),
        ({"image_aspect_ratio": "highres"}, r"highres"),
        ({"mm_patch_merge_type": "spatial_unpad"}, r"spatial_unpad"),
        ({"mm_vision_select_feature": "cls_patch"}, r"cls_patch|full"),
        ({"mm_vision_select_feature": "cls"}, r"\bcls\b"),
        ({"mm_vision_select_layer": 9}, r"select_layer.*9|vision_feature_layer.*9"),
        ({"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer|vision_feature_layer"),
        ({"mm_resampler_type": "perceiver"}, r"perceiver"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantiz"),
    ]
    assert_all_refused(root, "original", {str(changes): (config(**changes), match) for changes, match in features})


# --- base models, LoRA, towers ---------------------------------------------------------------------------------------


def test_a_base_model_or_a_vision_tower_that_does_not_fit_is_named(root):
    def other_base(place):
        shutil.rmtree(place.options["base_model"])
        hostile.write_llm(place.options["base_model"], hidden_size=48)

    def spoilt_base(place):
        edit_tensors(place.options["base_model"] / "pytorch_model.bin", model__norm__weight=torch.zeros(48))

    def other_tower(place):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        tower = place.options["vision_tower"]
        size = {**json.loads((tower / "config.json").read_text()), "hidden_size": 48}
        CLIPVisionModel(CLIPVisionConfig(**size)).save_pretrained(tower)

    def unknown_tower(place):
        edit_json(place.options["vision_tower"] / "config.json", model_type="no_such")

    def short_tower(place):
        path = place.options["vision_tower"] / "model.safetensors"
        prefix = next(key for key in hostile.read_tensors(path) if ".layers.1." in key).partition(".layers.1.")[0]
        edit_tensors(path, removed=[f"{prefix}.layers.1."])

    (root / "empty").mkdir()
    (root / "file").touch()
    cases = {
        "other base": (other_base, both(32, 48)),
        "spoilt base": (spoilt_base, both(32, 48)),
        "other tower": (other_tower, both(32, 48)),
        "unknown tower": (unknown_tower, r"no_such"),
        "short tower": (short_tower, r"layers\.1\."),
        "no base": (None, r"(?=.*--base-model)(?=.*someone/llm-tiny)", {"base_model": None}),
        "no tower": (None, r"(?=.*--vision-tower)(?=.*someone/clip-tiny)", {"vision_tower": None}),
        "base not named": (config(["_name_or_path"]), r"--base-model", {"base_model": None}),
        "tower not named": (config(["mm_vision_tower"]), r"--vision-tower", {"vision_tower": None}),
    }
    for option in ("base_model", "vision_tower"):
        cases[f"empty {option}"] = None, r"empty", {option: root / "empty"}
        cases[f"file for {option}"] = None, r"file", {option: root / "file"}
    assert_all_refused(root, "stage 1", cases)


def test_a_lora_that_is_not_plain_or_does_not_fit_is_named(root):
    def unnamed_base(place):
        config(["_name_or_path"])(place)
        in_json("adapter_config.json", base_model_name_or_path=None)(place)

    settings = [
        ({"use_dora": True}, r"use_dora"),
        ({"use_rslora": True}, r"use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights"),
        ({"peft_type": "IA3"}, r"IA3"),
        ({"r": 8}, both(8, 4)),
        ({"r": 0}, r"\br\b"),
        ({"r": "4"}, r"\br\b"),
        ({"r": None}, r"\br\b"),
        ({"lora_alpha": None}, r"lora_alpha"),
        ({"lora_alpha": "8"}, r"lora_alpha"),
        ({"lora_alpha": True}, r"lora_alpha"),
        ({"lora_alpha": float("nan")}, r"lora_alpha"),
    ]
    cases = {str(changes): (in_json("adapter_config.json", **changes), match) for changes, match in settings}
    for text in ("", "not JSON", "[]", "{}"):
        cases[f"config {text}"] = content("adapter_config.json", text), r"adapter_config\.json"
    for file in ("adapter_config.json", "non_lora_trainables.bin"):
        cases[f"missing {file}"] = without(file), re.escape(file)
    cases["no base"] = None, r"(?=.*--base-model)(?=.*someone/llm-tiny)", {"base_model": None}
    cases["base not named"] = unnamed_base, r"--base-model", {"base_model": None}
    stray = {"base_model.model.model.stray.weight": torch.zeros(2)}
    cases["other trained weights"] = in_tensors("non_lora_trainables.bin", **stray), r"model\.stray\.weight"
    layer, last = "base_model.model.model.layers.1.self_attn.", "base_model.model.model.layers.7.self_attn."
    query = r"layers\.1\.self_attn\.q_proj"
    pair = {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4)}
    weights = {
        "A without B": ([f"{layer}q_proj.lora_B"], {}, query),
        "B without A": ([f"{layer}q_proj.lora_A"], {}, query),
        "empty": (["base_model"], {}, r"adapter_model\.bin"),
        "other columns": ([], {f"{layer}q_proj.lora_A.weight": (4, 31)}, both(31, 32)),
        "other rows": ([], {f"{layer}q_proj.lora_B.weight": (33, 4)}, both(33, 32)),
        "other rank": ([], {f"{layer}q_proj.lora_A.weight": (3, 32)}, both(3, 4)),
        "three dimensions": ([], {f"{layer}q_proj.lora_A.weight": (4, 32, 1)}, query),
        "unknown module": ([], {f"{layer}stray.{key}": shape for key, shape in pair.items()}, r"self_attn\.stray"),
        "DoRA": ([], {f"{layer}q_proj.lora_magnitude_vector": (32,)}, r"lora_magnitude_vector"),
        "bias": ([], {f"{layer}q_proj.bias": (32,)}, r"q_proj\.bias"),
        "unknown layer": ([], {f"{last}q_proj.{key}": shape for key, shape in pair.items()}, r"layers\.7\."),
    }
    for name, (removed, shapes, match) in weights.items():
        cases[name] = in_tensors("adapter_model.bin", removed, **zeros(shapes)), match
    assert_all_refused(root, "LoRA", cases)


# --- arguments -------------------------------------------------------------------------------------------------------


def test_a_grid_or_a_dtype_that_is_none_is_named(root):
    grids = [0, -1, True, 2.5, "3", [3], [3, 3, 3], [0, 3], []]
    cases = {f"grid {grid!r}": (None, r"pooled.grid.size", {"pooled_grid_size": grid}) for grid in grids}
    cases |= {f"dtype {dtype}": (None, rf"dtype.*{dtype}", {"dtype": dtype}) for dtype in ("int8", "auto ", "FLOAT")}
    cases["grid 7"] = None, both(7, 6), {"pooled_grid_size": 7}
    cases["grid 6 x 9"] = None, both(9, 6), {"pooled_grid_size": [6, 9]}
    assert_all_refused(root, "llava-hf", cases)
    for layout in ("original", "snippet"):
        assert_all_refused(root, layout, {"grid 7": cases["grid 7"]})


def test_a_source_that_cannot_be_had_is_named(root, checkpoint):
    (root / "empty").mkdir()
    ids = ["no-such/model", "no-such-model", "no/such/model", "", "a b/c d", "../up", "x" * 200]
    cases = {name[:40]: (None, re.escape(name[:90]), {"source": name}) for name in ids}
    cases["missing"] = None, r"missing", {"source": root / "missing"}
    cases["a file"] = None, r"conftest\.py is a file", {"source": hostile.__file__.replace("hostile", "conftest")}
    cases["empty"] = None, r"empty|config\.json", {"source": root / "empty"}
    cases["DeCo"] = None, r"is a deco checkpoint already", {"source": checkpoint}
    assert_all_refused(root, "llava-hf", cases)


# --- the destination -------------------------------------------------------------------------------------------------


def test_a_destination_that_holds_something_is_kept(place, checkpoint):
    place = place()
    shutil.copytree(checkpoint, place.destination)
    (place.root / "link").symlink_to(place.destination)
    hostile.assert_refused(place, r"overwrite")
    hostile.assert_refused(place, r"overwrite", destination=place.root / "link")
    before = snapshot(place.root)
    with pytest.raises(InputError, match=r"overwrite"):
        export(checkpoint, place.destination)
    assert snapshot(place.root) == before
    folder, file = place.root / "folder", place.root / "a file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("a file")
    for overwrite in (False, True):
        hostile.assert_refused(place, r"overwrite|no config\.json", destination=folder, overwrite=overwrite)
        hostile.assert_refused(place, r"is a file", destination=file, overwrite=overwrite)
    for name in ("a file/out", "a file/deeper/out"):
        result = command("convert", place.source, place.root / name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.match(r"deco convert: .*a file", hostile.without_paths(result.stderr.splitlines()[-1], place.root))


def test_a_destination_that_the_conversion_reads_is_kept(place):
    place = place("stage 1")
    (place.root / "link").symlink_to(place.source)
    shutil.copy(place.source / "config.json", place.root / "config.json")
    names = ["source", "source/", "source/../source", "target/../source", "link", "source/inner", "source/deep/inner"]
    for overwrite in (False, True):
        for name in names:
            hostile.assert_refused(place, r"source", destination=f"{place.root}/{name}", overwrite=overwrite)
    for folder in (place.root, place.options["vision_tower"], place.options["base_model"]):
        hostile.assert_refused(place, r"one inside the other", destination=folder, overwrite=True)


def test_a_refusal_makes_no_parent_folders(place):
    place = place()
    hf_tensors(stray=torch.zeros(2))(place)
    hostile.assert_refused(place, r"stray", destination=place.root / "new" / "deeper" / "out")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_cannot_be_read_is_named(root):
    files = [b"", b"not a model", LFS_POINTER.encode(), bytes(range(256)) * 40]
    cases = {repr(file[:20]): (content("tokenizer.model", file), r"tokenizer\.model") for file in files}
    cases["missing"] = without("tokenizer.model"), r"tokenizer"
    assert_all_refused(root, "original", cases)
    texts = ["", "{}", "[]", '{"version": "1.0", "model": {"type": "no_such"}}', LFS_POINTER]
    assert_all_refused(root, "llava-hf", {text[:20]: (content("tokenizer.json", text), "tokenizer") for text in texts})


def convert_without_sentencepiece(source, destination, vision_tower, fast_source, fast_destination):
    """The messages of two refusals (None: converted), where the package is not installed and nothing has asked yet."""
    from importlib.machinery import PathFinder

    find_spec = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *rest: None if name == "sentencepiece" else find_spec(name, *rest)
    from modeling_deco.conversion import InputError, convert

    messages = []
    for arguments in ((source, destination, None, vision_tower), (fast_source, fast_destination)):
        try:
            convert(*arguments)
            messages.append(None)
        except InputError as error:
            messages.append(str(error))
    return messages


@pytest.mark.slow
def test_only_a_sentencepiece_model_needs_sentencepiece(tmp_path_factory):
    slow, fast = [hostile.Place(tmp_path_factory.mktemp("place"), layout) for layout in ("original", "llava-hf")]
    edit_json(fast.source / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    paths = [path for place in (slow, fast) for path in (place.source, place.destination, *place.options.values())]
    processes = FreshProcesses(modules=["torch"])
    messages = processes.run(convert_without_sentencepiece, *paths)
    processes.close()
    assert re.search("pip install sentencepiece$", messages[0])
    assert len(messages[0].splitlines()) == 1
    assert list(slow.destination.parent.iterdir()) == []
    assert messages[1] is None
    assert (fast.destination / "tokenizer.json").exists()
