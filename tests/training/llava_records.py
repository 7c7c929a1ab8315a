# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA-format records, and data sets that are built from them."""

import io
import json
import struct
import zlib
from concurrent.futures import Future

import pyarrow.parquet as pq

IMAGE, TAG = {"type": "image", "text": None}, "<image>\n"


def text(value):
    return {"type": "text", "text": value}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def talk(*values):
    """Turns of the human and the assistant, alternating."""
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
    """A file that claims so many pixels, and has none."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write(path, records):
    path.write_text(json.dumps(records))
    return path


class InThisProcess:
    """Replaces the pool of processes, which takes longer to start than most tests to run."""

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


def run_command(*arguments):
    """Run the command in its own process: its exit code, standard output and standard error."""
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
