# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""One row of a data set, in any common layout: it is read completely, or refused with an error of one line.

`read_row` brings every row into one form: `images` and `videos`, in the order in which the model sees them, and
`messages` (for preferences `prompt`, `chosen` and `rejected`), whose contents are lists of parts. A part has the type
`"text"` and a `text`, or the type `"image"` or `"video"`.

A row may have these layouts:

- Images are a list in the column `images`, or one image in the column `image`, or parts of the messages, or absent.
  Each is a PIL image, an array, a path, a URL, bytes, or `{"bytes": ..., "path": ...}`, as datasets returns an image
  that is not decoded.
- Videos are in the columns `videos` or `video`, or parts of the messages, in the same ways. A video may also be a list
  of its frames, or an array of four dimensions.
- The content of a message is a text or a list of parts. Images stand where the user's texts have `<image>`, and the
  videos of a column where they have `<video>`. In a row that has videos and no images, `<image>` stands for a video.
  If no text has a tag and all contents are texts, images and videos stand before the first question, as in TRL.
"""

import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from .columns import CONVERSATIONS, IMAGE_TAG, VIDEO_TAG
from .images import bytes_of_url, check_reference, images_of_columns
from .media import is_media, unread_media
from .videos import check_video, videos_of_columns

# the keys of a part that may hold its image or video
REFERENCES = {
    "image": ("image", "image_url", "url", "path", "bytes", "base64"),
    "video": ("video", "video_url", "url", "path", "bytes"),
}
IMAGE_TAGS = {IMAGE_TAG: "image"}


def tags_of(images: list, videos: list) -> dict[str, str]:
    """What the tags in the questions of a row stand for, by the images and videos of its columns."""
    if not videos:  # then `<video>` is a word, such as one of HTML
        return IMAGE_TAGS
    return {IMAGE_TAG: "image" if images else "video", VIDEO_TAG: "video"}


def read_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a row into the form above. Columns that are neither conversations nor media stay as they are.

    Raises:
        ValueError: an image, a video, a message or a part of a message cannot be read, the number of images or videos
            is not the number of their places, or another column has media. The message is one line, without the name
            of the row.
    """
    media = {"image": images_of_columns(row), "video": videos_of_columns(row)}
    for name in unread_media(row, has_images=bool(media["image"]), has_videos=bool(media["video"])):
        raise ValueError(
            f"column {name!r} has media that training does not read; put images into 'images', videos into 'videos'"
        )
    tags = tags_of(media["image"], media["video"])
    if row.get("messages") is None and (row.get("chosen") is None or row.get("rejected") is None):
        raise ValueError(f"there are no 'messages', only {', '.join(name for name in row if row[name] is not None)}")
    given = {name: row[name] for name in CONVERSATIONS if row.get(name) is not None}
    read = {name: [_read_message(message, tags) for message in _as_list(given[name], name)] for name in given}
    prompt = read.get("messages", []) + read.get("prompt", [])
    seen = prompt + read.get("chosen", [])
    if not any(_places(seen, kind) for kind in media) and _are_texts(given):
        question = next((message for message in seen if message["role"] == "user"), None)
        if question is not None:
            shown = [{"type": kind} for kind, files in media.items() for _ in files]
            question["content"] = shown + question["content"]
    placed = {}
    for kind, files in media.items():
        places = _places(seen, kind)
        if "rejected" in read and _places(prompt + read["rejected"], kind) != places:
            raise ValueError(f"'chosen' and 'rejected' do not have the same {kind}s")
        if places.count(None) != len(files):
            raise ValueError(
                f"{len(files)} {kind}s in the row for {places.count(None)} places in its messages "
                f"({VIDEO_TAG if kind == 'video' else IMAGE_TAG} in a question, or a part of type {kind!r})"
            )
        waiting = iter(files)
        placed[f"{kind}s"] = [next(waiting) if own is None else own for own in places]
    for message in (message for messages in read.values() for message in messages):
        message["content"] = [
            {"type": part["type"]} if part["type"] in media else part for part in message["content"]
        ]  # in new parts, because two conversations may share one
    rest = {name: value for name, value in row.items() if name not in (*CONVERSATIONS, *media, *placed)}
    return {**rest, **read, **placed}


def row_name(row: Mapping[str, Any], index: int | None = None) -> str:
    """What error messages call a row: its id, or its number."""
    sample_id = row.get("id")
    if sample_id is None:
        return "a row without an id" if index is None else f"row {index}"
    return repr(str(sample_id))


def _as_list(messages: Any, name: str) -> list[Any]:
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"{name!r} is of type {type(messages).__name__}, but must be a list of messages")
    return list(messages)


def _are_texts(conversations: Mapping[str, list]) -> bool:
    return all(isinstance(message["content"], str) for messages in conversations.values() for message in messages)


def _read_message(message: Any, tags: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("a message has no 'role'")
    rest = {name: value for name, value in message.items() if value is not None}
    for name, value in rest.items():
        if name not in ("role", "content", "tool_calls") and is_media(name, value):
            raise ValueError(f"a message has media in {name!r}, which is not read; put it into a part of 'content'")
    content = message.get("content")
    if content is None and not rest.get("tool_calls"):
        raise ValueError(f"a message of role {message['role']!r} has no 'content'")
    if isinstance(content, Mapping) or not isinstance(content, (str, list, tuple, type(None))):
        raise ValueError(f"a content is of type {type(content).__name__}, but must be a text or a list of parts")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    read = [_read_part(part) for part in parts]
    if message["role"] == "user":
        read = [
            piece for part in read for piece in (to_parts(part["text"], tags) if part["type"] == "text" else [part])
        ]
    return {**rest, "content": read}


def _read_part(part: Any) -> dict[str, Any]:
    """The part in the form above, with its own image or video, if it has one, under `own`."""
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of a message is of type {type(part).__name__}, but must be a dict with a 'type'")
    part = {name: value for name, value in part.items() if value is not None and value != []}
    given_kind = part.get("type", "text" if "text" in part else None)
    kind = str(given_kind).removesuffix("_url")
    if kind in REFERENCES:
        references = [name for name in REFERENCES[kind] if name in part]
        if len(references) > 1:
            raise ValueError(f"a part of type {given_kind!r} has {kind}s in {' and '.join(references)}")
        if part.get("text"):
            raise ValueError(f"a part of type {given_kind!r} has a text")
        return {"type": kind} | ({"own": _own_file(kind, part[references[0]], references[0])} if references else {})
    if kind != "text":
        raise ValueError(
            f"a part of a message is of type {given_kind!r}, but only 'text', 'image' and 'video' are read"
        )
    names = {name for names in REFERENCES.values() for name in names}
    for name in [name for name in part if name in names] or unread_media({**part, "text": None}, has_images=False):
        raise ValueError(f"a part of type 'text' has an image or a video in {name!r}")
    if not isinstance(part.get("text"), str):
        raise ValueError("a part of type 'text' has no 'text'")
    return {"type": "text", "text": part["text"]}


def _own_file(kind: str, file: Any, name: str) -> Any:
    if isinstance(file, Mapping) and isinstance(file.get("url"), str):  # OpenAI's layout
        file = file["url"]
    if name == "base64" and isinstance(file, str):
        file = bytes_of_url(file if file.startswith("data:") else f"data:image/png;base64,{file}")
    if kind == "video":
        check_video(file)
    else:
        check_reference(file)
    return file


def to_parts(text: str, tags: Mapping[str, str] = IMAGE_TAGS) -> list[dict[str, str | None]]:
    """Split a turn into its parts, in order; each tag, such as `<image>`, becomes a part of the type that `tags` has.

    White space at both ends of a turn with tags is removed, since LLaVA writes `"<image>\\n"`. White space between
    words is kept, because chat templates that move images to the front join the texts. A turn without tags is kept as
    it is.
    """
    pieces = re.split("|".join(map(re.escape, tags)), text)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    shown = re.findall("|".join(map(re.escape, tags)), text)
    worded = [index for index, piece in enumerate(pieces) if piece.strip()] or [0]
    pieces[worded[0]] = pieces[worded[0]].lstrip()
    pieces[worded[-1]] = pieces[worded[-1]].rstrip()
    parts: list[dict[str, str | None]] = []
    for piece, tag in zip_longest(pieces, shown):  # there is one tag between each two pieces
        if piece.strip():
            parts.append({"type": "text", "text": piece})
        if tag is not None:
            parts.append({"type": tags[tag], "text": None})
    return parts


def _places(messages: list[dict[str, Any]], kind: str) -> list[Any]:
    """For every part of this type its own file, or None if it shows the next one of the row."""
    return [part.get("own") for message in messages for part in message["content"] if part["type"] == kind]
