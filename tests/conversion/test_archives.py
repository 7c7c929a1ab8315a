# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`.bin` files that say other than they hold: a zip's directory, its records, the pickle in it. None is loaded."""

import io
import json
import os
import pickle
import re
import struct
import zipfile

import hostile
import pytest
import torch
from safetensors.torch import save_file

from modeling_deco.conversion import InputError, convert, export, pickles, sources, weights


def archive(values=None) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.arange(100.0), "b": torch.ones(7)} if values is None else values, file)
    return file.getvalue()


def rewrite(change, compression=zipfile.ZIP_STORED, comment=b"") -> bytes:
    """The archive written by zipfile, with `change(name, data)` of each record. Without the two records of torch since
    2.7 by which it computes where the others are."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive())) as old, zipfile.ZipFile(file, "w", compression) as new:
        names = [name for name in old.namelist() if not name.endswith((".format_version", ".storage_alignment"))]
        for info in map(old.getinfo, names):
            new.writestr(info.filename, change(info.filename, old.read(info)))
        new.comment = comment
    return file.getvalue()


def compressed(suffix):
    """One record deflated, the others stored: 100 kB that become 100 MB."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive())) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            data, method = old.read(info), zipfile.ZIP_STORED
            if info.filename.endswith(suffix):
                data, method = data + bytes(100_000_000), zipfile.ZIP_DEFLATED
            new.writestr(info.filename, data, method)
    assert len(file.getvalue()) < 200_000
    return file.getvalue()


def entry(content: bytes, name: bytes) -> int:
    """Where the directory's entry of a record begins."""
    return content.rindex(name) - 46


def changed(content: bytes, offset: int, layout: str, value) -> bytes:
    data, offset = struct.pack(layout, value), offset % len(content)
    return content[:offset] + data + content[offset + len(data) :]


def plain():
    return rewrite(lambda name, data: data)


def pickled(*calls) -> bytes:
    """A state dict with what calls return: `(module, name, number)`."""
    body = b"".join(b"c%s\n%s\nJ%s\x85R" % (m.encode(), n.encode(), struct.pack("<i", k)) for m, n, k in calls)
    return b"\x80\x02}X\x01\x00\x00\x00a" + body + b"s."


def repacked(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return file.getvalue()


def with_pickle(data: bytes) -> bytes:
    return rewrite(lambda name, old: data if name.endswith("data.pkl") else old)


def legacy(data: bytes) -> bytes:
    head = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + data + pickle.dumps([], protocol=2)


def longer_storage() -> bytes:
    """The tensor `a` of 100 numbers on a storage that says it has 10,000."""
    return rewrite(lambda name, data: data.replace(b"cpuq\x06Kdt", b"cpuq\x06M\x10't"))


def two_directories() -> bytes:
    """zip64 says another number of records than the end of the file."""
    content = archive()
    return changed(changed(content, len(content) - 22 + 8, "<H", 3), len(content) - 22 + 10, "<H", 3)


def grown(name: bytes, num_bytes: int) -> bytes:
    """Of a record both the directory and its own header say that it has so many bytes more."""
    content = plain()
    at, own = entry(content, name), content.index(name) - 30
    (size,) = struct.unpack("<L", content[at + 24 : at + 28])
    for offset in (at + 20, at + 24, own + 18, own + 22):
        content = changed(content, offset, "<L", size + num_bytes)
    return content


def behind_a_file() -> bytes:
    """An archive whose places count from the beginning of what lies before it."""
    file = io.BytesIO(b"PK\x03\x04" + bytes(96))
    with zipfile.ZipFile(io.BytesIO(plain())) as old, zipfile.ZipFile(file, "a") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return file.getvalue()


HOSTILE = {
    "compressed data": (lambda: compressed("data/0"), "the record archive/data/0 is compressed"),
    "compressed pickle": (lambda: compressed("data.pkl"), r"the record archive/data\.pkl is compressed"),
    "all compressed": (lambda: rewrite(lambda _, data: data, zipfile.ZIP_DEFLATED), "is compressed"),
    "larger in the directory": (
        lambda: changed(plain(), entry(plain(), b"archive/data/1") + 24, "<L", 2**31),
        "the record archive/data/1 is compressed",
    ),
    "larger than the file": (
        lambda: (
            content := plain(),
            at := entry(content, b"archive/.data/serialization_id"),
            changed(changed(content, at + 20, "<L", 2**31), at + 24, "<L", 2**31),
        )[-1],
        "serialization_id has another size than the directory says",
    ),
    "larger than the file in both headers": (
        lambda: grown(b"archive/.data/serialization_id", 1),
        "serialization_id is larger than the file",
    ),
    "into the next one": (lambda: grown(b"archive/data/0", 8), "lies over another one or is hidden"),
    "over another": (
        lambda: changed(plain(), entry(plain(), b"archive/data/1") + 42, "<L", 0),
        "lies over another one",
    ),
    "hidden behind a file": (lambda: b"PK\x03\x04" + bytes(96) + plain(), "its directory is not where it should be"),
    "hidden behind what its places count": (behind_a_file, "is hidden behind other data"),
    "a comment": (
        lambda: rewrite(lambda _, data: data, comment=b"PK\x05\x06" + bytes(18)),
        "its directory is not where it should be",
    ),
    "more behind it": (lambda: plain() + b"more", "something follows"),
    "packed again": (
        lambda: repacked(archive()),
        "was packed by another program; load it with torch.load and save it again",
    ),
    "fewer records than it has": (
        lambda: changed(changed(plain(), -14, "<H", 3), -12, "<H", 3),
        "its directory has 6 records and should have 3",
    ),
    "two directories": (two_directories, "its two directories differ"),
    "a zip64 directory elsewhere": (
        lambda: changed(archive(), -34, "<Q", 0),
        "its zip64 directory is not before its end",
    ),
    "a name of other letters": (
        lambda: plain().replace(b"archive/data/1", b"archive/data/\xe9"),
        "a record is called 'archive/data/",
    ),
    "a name that ends before its end": (
        lambda: plain().replace(b"archive/data/1", b"archive/data\x001"),
        r"a record is called 'archive/data\\x001'",
    ),
    "numbers of a big-endian machine": (
        lambda: rewrite(lambda name, data: b"big" if name.endswith("byteorder") else data),
        "was written on a big-endian machine",
    ),
    "another name in front of the data": (
        lambda: plain().replace(b"archive/data/1", b"archive/data/2", 1),
        "the record archive/data/1 is another one than the directory says",
    ),
    "another method in front of the data": (
        lambda: changed(plain(), plain().index(b"archive/data/1") - 22, "<H", 8),
        "the record archive/data/1 is another one than the directory says",
    ),
    "encrypted": (
        lambda: changed(plain(), entry(plain(), b"archive/data/1") + 8, "<H", 1),
        "the record archive/data/1 is compressed or encrypted",
    ),
    "strongly encrypted": (
        lambda: changed(plain(), entry(plain(), b"archive/data/1") + 8, "<H", 0x40),
        "the record archive/data/1 is compressed or encrypted",
    ),
    "headers encrypted": (
        lambda: changed(plain(), entry(plain(), b"archive/data/1") + 8, "<H", 0x2000),
        "the record archive/data/1 is compressed or encrypted",
    ),
    "one name twice": (lambda: plain().replace(b"archive/data/1", b"archive/DATA/0"), "two records have one name"),
    "a storage beyond its record": (longer_storage, "'a' in .* reaches past the end of its data"),
    "one number for a billion": (
        lambda: archive({"a": torch.ones(1).expand(10**9)}),
        "'a' in .* reaches past the end of its data",
    ),
    "a byte array": (lambda: with_pickle(pickled(("builtins", "bytearray", 2**31 - 1))), r"calls builtins\.bytearray"),
    "a byte array of old": (
        lambda: with_pickle(pickled(("__builtin__", "bytearray", 2**31 - 1))),
        r"calls __builtin__\.bytearray",
    ),
    "a tensor of a size": (
        lambda: with_pickle(pickled(("torch", "FloatTensor", 2**31 - 1))),
        r"calls torch\.FloatTensor",
    ),
    "a byte array, legacy": (
        lambda: legacy(pickled(("builtins", "bytearray", 2**31 - 1))),
        r"calls builtins\.bytearray",
    ),
    "code": (
        lambda: with_pickle(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
        r"would run code when it is unpickled \(os",
    ),
}


def test_an_archive_that_lies_is_not_loaded(tmp_path):
    path = tmp_path / "weights.bin"
    for kind, (make, match) in HOSTILE.items():
        path.write_bytes(make())
        with pytest.raises(InputError) as raised:
            weights.read_weight_file(path)
        message = str(raised.value)
        assert re.search(match, message), f"{kind}: {message}"
        assert len(message.splitlines()) == 1, kind


@pytest.mark.parametrize(
    ("limit", "match"), [(100, "its directory is not where"), (5000, r"data\.pkl has 10,\d+ bytes")]
)
def test_what_is_parsed_of_an_archive_is_bounded(limit, match, tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_HEADER_BYTES", limit)
    torch.save({"a" * 10_000: torch.ones(1)}, tmp_path / "weights.bin")
    with pytest.raises(InputError, match=match):
        weights.read_weight_file(tmp_path / "weights.bin")


def test_a_header_of_safetensors_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_HEADER_BYTES", 1000)
    save_file({"a" * 1000: torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"its header has 1,\d+ bytes, of at most 1,000"):
        weights.read_weight_file(tmp_path / "weights.safetensors")


def test_a_key_in_two_shards_is_refused_though_the_index_names_the_last(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "2.safetensors")
    weight_map = {"a": "2.safetensors", "b": "1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"'a' is a duplicate: it is in 1\.safetensors and in 2\.safetensors"):
        weights.read_weights(tmp_path)


def test_a_shard_lies_in_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../1.safetensors", "/1.bin", "below/1.bin", r"..\1.bin", "c:1.bin", "1.bin\0", "1.pt"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match="shards must be files in the same folder"):
            weights.read_weight_map(index)


@pytest.mark.parametrize("make", [archive, plain])
def test_an_honest_archive_is_read(make, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(make())
    tensors = weights.read_weight_file(path)
    assert tensors["a"].read().tolist() == [float(number) for number in range(100)]
    assert tensors["b"].read().tolist() == [1.0] * 7


# --- metadata of a source --------------------------------------------------------------------------------------------


def test_a_source_with_a_pipe_or_an_exploding_template_is_refused(tmp_path):
    place = hostile.Place(tmp_path, "llava-hf")
    (place.source / "chat_template.jinja").write_text("<image>{{ 'a' * 8000000000 }}")
    hostile.assert_refused(place, r"^The chat template of .* takes more than 10 seconds or 2 GB")
    (place.source / "chat_template.jinja").unlink()
    os.mkfifo(place.source / "chat_template.jinja")
    with pytest.raises(InputError, match=r"chat_template\.jinja is a pipe or a device, not a regular file"):
        convert(place.source, place.destination)


def test_a_source_whose_image_size_explodes_is_refused(tmp_path):
    place = hostile.Place(tmp_path, "original")
    hostile.edit_json(
        place.options["vision_tower"] / "preprocessor_config.json", size={"height": 10**6, "width": 10**6}
    )
    hostile.assert_refused(
        place, r"its chat template, tokenizer or image processor takes more than 10 seconds or 2 GB"
    )


def test_a_mistyped_folder_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "snapshot_download", lambda *args, **kwargs: pytest.fail("the Hub was asked"))
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").touch()
    names = {
        "llva-7b": r"There is no folder llva-7b; a Hub id would be owner/name",
        "models/llva-7b": r"There is no folder models/llva-7b\. The Hub is not asked, since models is a folder here",
        "link": r"There is no folder link",
        "file": r"file is a file; a model is a folder or a Hub id",
    }
    for name, match in names.items():
        for direction in (convert, export):
            with pytest.raises(InputError, match=match):
                direction(name, tmp_path / "out")


def test_a_link_to_a_source_is_a_source(tmp_path):
    place = hostile.Place(tmp_path, "llava-hf")
    (tmp_path / "link").symlink_to(place.source)
    convert(tmp_path / "link", place.destination)
    assert json.loads((place.destination / "config.json").read_text())["model_type"] == "deco"
