# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA-format JSON: its records are read one by one, and every fault of a record is found.

A record is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
{"from": "gpt", "value": "A cat."}]}`; `image`, or `images`, may be a list, or absent.

A record of LLaVA-Video has `video`, or `videos`, in place of it. In its questions `<image>` or `<video>` stands for
the video. If a record has both, `<image>` stands for an image and `<video>` for a video.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .columns import IMAGE_TAG
from .media import is_media, unread_media
from .rows import tags_of, to_parts

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

_SURROGATE = re.compile("[\ud800-\udfff]")
_WINDOW, _MAX_RECORD = 1 << 20, 64 << 20  # characters


class DataError(ValueError):
    """A data set cannot be built. The message is one line: what is wrong, its value, and what to do."""


@dataclass
class Sample:
    """A record that was read.

    Args:
        id: of the record.
        name: the id, or the record's number; for reports.
        images: paths, as the record has them.
        videos: paths, as the record has them.
        messages: in the form of `FEATURES`.
        faults: a detail, maybe empty, for each kind of fault.
    """

    id: str | None
    name: str
    images: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[tuple[str, str]]:
        """`("image" or "video", path)` of each file."""
        return [("image", name) for name in self.images] + [("video", name) for name in self.videos]


def read_records(path: Path) -> Iterator[Any]:
    """Read the elements of a JSON array, or the values of JSON Lines, a few at a time.

    Lone surrogates are kept, and bytes that are not UTF-8 become lone surrogates: they are a fault of one sample, not
    of the file. (ijson is no alternative: yajl silently replaces them by "?" and fails on an integer of 5,000 digits.)

    Raises:
        DataError: the file is not JSON, or a record has more than 64 Mi characters. The message says where.
    """
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    with (
        path.open("rb") as binary,
        TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar,
    ):
        window, at_end = file.read(_WINDOW), False
        opening = re.match(r"[ \t\r\n]*\[([ \t\r\n]*\])?", window)
        separator = re.compile(r"[ \t\r\n]*([,\]])" if opening else r"[ \t\r]*(\n|\Z)")
        position, is_closed = (opening.end(), bool(opening[1])) if opening else (0, False)
        num_lines = num_characters = 0  # before the window
        while True:
            position = blank.match(window, position).end()  # type: ignore[union-attr]  # at least empty text matches
            if at_end and position == len(window) and (is_closed or not opening):
                return
            try:
                if is_closed:
                    raise json.JSONDecodeError("Extra data", window, position)
                record, end = decode(window, position)
                separated = separator.match(window, end)
                if separated is None or (separated.end() == len(window) and not at_end):
                    raise json.JSONDecodeError("Expecting a separator", window, end)
            except (ValueError, RecursionError) as error:
                # More text cannot help where a number has too many digits or the nesting is too deep.
                is_final = at_end or not isinstance(error, json.JSONDecodeError)
                if is_final or len(window) - position > _MAX_RECORD:
                    at, problem = getattr(error, "pos", position), getattr(error, "msg", error)
                    line, character = num_lines + window.count("\n", 0, at) + 1, num_characters + at + 1
                    raise DataError(f"{path}: bad JSON in line {line}, character {character}: {problem}") from None
            else:
                yield record
                position, is_closed = separated.end(), bool(opening) and separated[1] == "]"
                continue
            num_lines, num_characters = num_lines + window.count("\n", 0, position), num_characters + position
            more = file.read(max(_WINDOW, len(window) - position))  # the record may go beyond the window
            window, position, at_end = window[position:] + more, 0, not more
            bar.update(binary.tell() - bar.n)


def read_sample(index: int, record: Any) -> Sample:
    """The sample of a record, with all its faults except those of files."""
    raw_id = record.get("id") if isinstance(record, dict) else None
    name = str(raw_id) if isinstance(raw_id, (str, int)) else f"index {index}"
    try:
        sample_id, images, videos, turns = _take_apart(record)
    except TypeError as error:
        return Sample(None, name, faults={"malformed record": str(error)})
    others = {key: value for key, value in record.items() if key != "conversations"}
    media = unread_media(others, bool(images), bool(videos))
    for turn in record["conversations"]:
        media += [key for key, value in turn.items() if key not in ("from", "value") and is_media(key, value)]
    all_text = "".join([name, *images, *videos, *(text for _, text in turns)])
    roles = [role for role, _ in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    empty = {role for role, text in turns if not text.strip()}
    tags = tags_of(images, videos)
    asked, said = ("\n".join(text for role, text in turns if (role == "user") is of_user) for of_user in (True, False))
    faults = {
        "invalid Unicode": _SURROGATE.search(all_text) is not None,
        "empty conversation": not dialogue,
        "starts with the assistant": dialogue[:1] == ["assistant"],
        "roles do not alternate": "system" in dialogue or any(role == after for role, after in pairwise(dialogue)),
        "ends without an answer": bool(dialogue) and dialogue[-1] != "assistant",
        "empty question": "user" in empty,
        "empty answer": "assistant" in empty,
        "empty system message": "system" in empty,
        "<image> without an image": IMAGE_TAG in asked and not images and not videos,
    } | {f"{tag} outside a question": tag in said for tag in tags}
    for kind, files in (("image", images), ("video", videos)):
        own_tags = [tag for tag, shown in tags.items() if shown == kind]
        num_tags = sum(map(asked.count, own_tags))
        faults[f"{kind} without {' or '.join(own_tags)}"] = num_tags == 0 and bool(files)
        faults[f"{' or '.join(own_tags)} and {kind}s differ in number"] = 0 < num_tags != len(files) > 0
    messages = [{"role": role, "content": to_parts(text, tags)} for role, text in turns]
    found = {kind: "" for kind, is_there in faults.items() if is_there}
    if media:
        found["media that are not read"] = ", ".join(map(quote, media))
    return Sample(sample_id, name, images, videos, messages, found)


def _take_apart(record: Any) -> tuple[str | None, list[str], list[str], list[tuple[str, str]]]:
    """The id, the paths of images and videos, and the turns as role and text. A TypeError says which type is wrong."""

    def check(value, kinds, what):
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{what} is {type(value).__name__}")
        return value

    check(record, dict, "the record")
    sample_id = check(record.get("id"), (str, int, type(None)), "id")

    def paths(name):
        value = check(record.get(name), (str, list, type(None)), name)
        value = [value] if isinstance(value, str) else value or []
        return [check(path, str, f"an entry of {name}") for path in value]

    def paths_of(kind):
        one, several = paths(kind), paths(f"{kind}s")
        if one and several and one != several:
            raise TypeError(f"{kind} and {kind}s differ")
        return one or several

    images, videos = paths_of("image"), paths_of("video")
    turns = []
    for turn in check(record.get("conversations"), list, "conversations"):
        speaker = check(check(turn, dict, "a turn").get("from"), str, "from")
        if speaker not in ROLES:
            raise TypeError(f"from is {quote(speaker)}")
        turns.append((ROLES[speaker], check(turn.get("value"), str, "value")))
    return None if sample_id is None else str(sample_id), images, videos, turns


def quote(text: str) -> str:
    """A text from the data, safe to print: short, in one line, without control characters."""
    return repr(text if len(text) <= 60 else text[:60] + "...")
