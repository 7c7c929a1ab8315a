# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The images and videos of a data set, decoded once in worker processes to find those that training could not read."""

import multiprocessing
import os
import signal
import stat
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image, ImageOps

from ...utils.decoding import UNTRUSTED_FORMATS
from ...videos import read_video
from .llava import Sample, quote

BATCH = 1000  # samples whose images are submitted together


def check_file(folders: dict[str, str], reference: tuple[str, str]) -> str:
    """Decode a file, `(kind, name)`, under the folder of its kind; returns the kind of its fault, or `""`."""
    kind, name = reference
    return (check_image if kind == "image" else check_video)(folders[kind], name)


def _check_place(kind: str, folder: str, name: str) -> str:
    """The fault of a file that is known without reading it, or `""`.

    A link may point out of the folder, because the owner of the folder made it. A name in the data may not.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"{kind} outside DIR"
    try:
        status = os.stat(os.path.join(folder, name))
    except (OSError, ValueError):  # the system refuses some names
        return f"{kind} missing"
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for its writer
        return f"{kind} is not a file"
    return f"{kind} of zero bytes" if status.st_size == 0 else ""


def check_image(folder: str, name: str) -> str:
    """Decode an image under `folder`; returns the kind of its fault, or `""`."""
    if fault := _check_place("image", folder, name):
        return fault
    path = os.path.join(folder, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=UNTRUSTED_FORMATS) as image:
                image.draft(None, (1, 1))  # a JPEG at an eighth of its size; all of the file is still read
                image.load()
                ImageOps.exif_transpose(image)  # as datasets does when it decodes
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "decompression bomb"
    except Exception as error:  # broken bytes make Pillow raise errors of any kind
        return "truncated image" if "truncated" in str(error).lower() else "unreadable image"
    return ""


def check_video(folder: str, name: str) -> str:
    """Decode a video under `folder` as training does; returns the kind of its fault, or `""`."""
    if fault := _check_place("video", folder, name):
        return fault
    try:
        for _ in read_video(os.path.join(folder, name)):
            pass
    except Exception:  # decoders raise errors of many kinds
        return "unreadable video"
    return ""


def start_worker() -> None:
    """Let the parent handle Ctrl-C, and end when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker process has one

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def check_files(
    samples: Iterator[Sample], images: Path, videos: Path, executor: ProcessPoolExecutor
) -> Iterator[Sample]:
    """Add the faults of their files to the samples, in order. Each file is decoded once.

    Args:
        samples: of `read_sample`.
        images: the folder of the images.
        videos: the folder of the videos.
        executor: its workers decode.
    """
    check = partial(check_file, {"image": str(images), "video": str(videos)})
    checked: dict[tuple[str, str], str | None] = {}  # None until the result is there
    pending: deque[tuple[list[Sample], list[tuple[str, str]], Iterator[str]]] = deque()

    def finish_oldest():
        batch, files, results = pending.popleft()
        checked.update(zip(files, results, strict=True))
        for sample in batch:
            sample.faults |= {fault: quote(file[1]) for file in sample.files if (fault := checked[file])}
            yield sample

    while batch := list(islice(samples, BATCH)):
        files = list(dict.fromkeys(file for sample in batch for file in sample.files if file not in checked))
        checked.update(dict.fromkeys(files))
        pending.append((batch, files, executor.map(check, files, chunksize=8)))
        if len(pending) > 4:  # enough to keep the workers busy while a shard is written
            yield from finish_oldest()
    while pending:
        yield from finish_oldest()
