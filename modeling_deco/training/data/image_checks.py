# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The image files of a data set, decoded once in worker processes to find those that training could not read."""

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
from .llava import Sample, quote

BATCH = 1000  # samples whose images are submitted together


def check_image(folder: str, name: str) -> str:
    """Decode an image under `folder`; returns the kind of its fault, or `""`.

    A link may point out of the folder, because the owner of the folder made it. A name in the data may not.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        return "image outside DIR"
    path = os.path.join(folder, name)
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the system refuses some names
        return "image missing"
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for its writer
        return "image is not a file"
    if status.st_size == 0:
        return "image of zero bytes"
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


def start_worker() -> None:
    """Let the parent handle Ctrl-C, and end when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker process has one

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def check_images(samples: Iterator[Sample], folder: Path, executor: ProcessPoolExecutor) -> Iterator[Sample]:
    """Add the faults of their images to the samples, in order. Each image is decoded once."""
    checked: dict[str, str | None] = {}  # None until the result is there
    pending: deque[tuple[list[Sample], list[str], Iterator[str]]] = deque()

    def finish_oldest():
        batch, names, results = pending.popleft()
        checked.update(zip(names, results, strict=True))
        for sample in batch:
            sample.faults |= {kind: quote(name) for name in sample.images if (kind := checked[name])}
            yield sample

    while batch := list(islice(samples, BATCH)):
        names = list(dict.fromkeys(name for sample in batch for name in sample.images if name not in checked))
        checked.update(dict.fromkeys(names))
        pending.append((batch, names, executor.map(partial(check_image, str(folder)), names, chunksize=8)))
        if len(pending) > 4:  # enough to keep the workers busy while a shard is written
            yield from finish_oldest()
    while pending:
        yield from finish_oldest()
