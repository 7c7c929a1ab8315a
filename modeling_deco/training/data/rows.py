# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""One row of a data set, in any common layout: it is read completely, or refused with an error of one line.

`read_row` brings every row into one form: `images`, in the order in which the model sees them, and `messages` (for
preferences `prompt`, `chosen` and `rejected`), whose contents are lists of parts. A part has the type `"text"` and a
`text`, or the type `"image"`.

A row may have these layouts:

- Images are a list in the column `images`, or one image in the column `image`, or parts of the messages, or absent.
  Each is a PIL image, an array, a path, a URL, bytes, or `{"bytes": ..., "path": ...}`, as datasets returns an image
  that is not decoded.
- The content of a message is a text or a list of parts. Images stand where the user's texts have `<image>`. If no text
  has one and all contents are texts, images stand before the first question, as in TRL.
"""

from collections.abc import Mapping
from typing import Any

from .columns import CONVERSATIONS, IMAGE_TAG
from .images import bytes_of_url, check_reference, images_of_columns
from .media import is_media, unread_media

REFERENCES = ("image", "image_url", "url", "path", "bytes", "base64")  # the keys of a part that may hold its image


def read_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a row into the form above. Columns that are neither conversations nor images stay as they are.

    Raises:
        ValueError: an image, a message or a part of a message cannot be read, the number of images is not the number
            of their places, or another column has media. The message is one line, without the name of the row.
    """
    images = images_of_columns(row)
    for name in unread_media(row, has_images=bool(images)):
        raise ValueError(f"column {name!r} has media that training does not read; put images into 'images'")
    if row.get("messages") is None and (row.get("chosen") is None or row.get("rejected") is None):
        raise ValueError(f"there are no 'messages', only {', '.join(name for name in row if row[name] is not None)}")
    given = {name: row[name] for name in CONVERSATIONS if row.get(name) is not None}
    read = {name: [_read_message(message) for message in _as_list(given[name], name)] for name in given}
    prompt = read.get("messages", []) + read.get("prompt", [])
    seen = prompt + read.get("chosen", [])
    if images and not _places(seen) and _are_texts(given):
        question = next((message for message in seen if message["role"] == "user"), None)
        if question is not None:
            question["content"] = [{"type": "image"} for _ in images] + question["content"]
    places = _places(seen)
    if "rejected" in read and _places(prompt + read["rejected"]) != places:
        raise ValueError("'chosen' and 'rejected' do not have the same images")
    if places.count(None) != len(images):
        raise ValueError(
            f"{len(images)} images in the row for {places.count(None)} places in its messages ({IMAGE_TAG} in a "
            f"question, or a part of type 'image')"
        )
    waiting = iter(images)
    placed = [next(waiting) if image is None else image for image in places]
    for message in (message for messages in read.values() for message in messages):
        message["content"] = [
            {"type": "image"} if part["type"] == "image" else part for part in message["content"]
        ]  # in new parts, because two conversations may share one
    rest = {name: value for name, value in row.items() if name not in (*CONVERSATIONS, "image", "images")}
    return {**rest, **read, "images": placed}


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


def _read_message(message: Any) -> dict[str, Any]:
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
        read = [piece for part in read for piece in (to_parts(part["text"]) if part["type"] == "text" else [part])]
    return {**rest, "content": read}


def _read_part(part: Any) -> dict[str, Any]:
    """The part in the form above, with its own image, if it has one, under `image`."""
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of a message is of type {type(part).__name__}, but must be a dict with a 'type'")
    part = {name: value for name, value in part.items() if value is not None and value != []}
    kind = part.get("type", "text" if "text" in part else None)
    references = [name for name in REFERENCES if name in part]
    if kind in ("image", "image_url"):
        if len(references) > 1:
            raise ValueError(f"a part of type {kind!r} has images in {' and '.join(references)}")
        if part.get("text"):
            raise ValueError(f"a part of type {kind!r} has a text")
        return {"type": "image"} | ({"image": _own_image(part[references[0]], references[0])} if references else {})
    if kind != "text":
        raise ValueError(f"a part of a message is of type {kind!r}, but only 'text' and 'image' are read")
    for name in references or unread_media({**part, "text": None}, has_images=False):
        raise ValueError(f"a part of type 'text' has an image in {name!r}")
    if not isinstance(part.get("text"), str):
        raise ValueError("a part of type 'text' has no 'text'")
    return {"type": "text", "text": part["text"]}


def _own_image(image: Any, name: str) -> Any:
    if isinstance(image, Mapping) and isinstance(image.get("url"), str):  # OpenAI's layout
        image = image["url"]
    if name == "base64" and isinstance(image, str):
        image = bytes_of_url(image if image.startswith("data:") else f"data:image/png;base64,{image}")
    check_reference(image)
    return image


def to_parts(text: str) -> list[dict[str, str | None]]:
    """Split a turn into its parts, in order; each `<image>` becomes an image part.

    White space at both ends of a turn with images is removed, since LLaVA writes `"<image>\\n"`. White space between
    words is kept, because chat templates that move images to the front join the texts. A turn without images is kept
    as it is.
    """
    if IMAGE_TAG not in text:
        return [{"type": "text", "text": text}]
    pieces = text.split(IMAGE_TAG)
    worded = [index for index, piece in enumerate(pieces) if piece.strip()] or [0]
    pieces[worded[0]] = pieces[worded[0]].lstrip()
    pieces[worded[-1]] = pieces[worded[-1]].rstrip()
    parts: list[dict[str, str | None]] = []
    for piece in pieces:
        parts.append({"type": "image", "text": None})
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts[1:]  # there is one image between each two pieces


def _places(messages: list[dict[str, Any]]) -> list[Any]:
    """For every image part its own image, or None if it shows the next image of the row."""
    return [part.get("image") for message in messages for part in message["content"] if part["type"] == "image"]
