# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of data sets in their common layouts: a row is read completely, or refused in one line.

`read_row` gives every row one form: `images` in the order in which they are seen, and `messages` (for preferences
`prompt`, `chosen`, `rejected`) whose contents are lists of parts, of type `"text"` with a `text`, or `"image"`.

- Images: a list in `images`, or one in `image`, or none; or inside the parts of a message. Each is a PIL image, an
  array, a path, a URL, bytes, or what datasets has for an image that is not decoded, `{"bytes": ..., "path": ...}`.
- Contents: a text or a list of parts. Images stand where `<image>` stands in the user's texts; where it stands nowhere
  and contents are texts, before the first question, as in TRL.
"""

import base64
import binascii
import io
import os
import re
from collections.abc import Mapping
from mimetypes import MimeTypes
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, IterableDataset, LargeList, List, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from .. import pixels
from ..pixels import read_image
from ..utils.errors import one_line

IMAGE_TAG = "<image>"
CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")
COLUMNS = ("id", *CONVERSATIONS, "image", "images")  # what is read of a row
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features({"id": Value("string"), "images": List(ImageFeature()), "messages": MESSAGES})

REFERENCES = ("image", "image_url", "url", "path", "bytes", "base64")  # where a part of a message has its image
_MEDIUM = r"(?:image|img|picture|photo|pic|video|audio|frame|screenshot|media|pixel_value)s?"
_HOLDER = r"(?:[_-]?(?:path|file|filename|file_name|name|url|uri|link|data|byte|base64|b64|list)s?)"
_MEDIA_COLUMN = re.compile(rf"(?:.*[_-])?{_MEDIUM}(?:[_-]?\d+)?{_HOLDER}?", re.IGNORECASE)
_ABOUT_AN_IMAGE = re.compile(rf"(?:image|img|picture|photo|pic)s?{_HOLDER}", re.IGNORECASE)
_MIME_TYPES = MimeTypes()  # Python's own, whatever this machine's are


def read_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in the form above; columns that are neither conversations nor images stay as they are.

    Raises:
        ValueError: an image, a message or a part of one cannot be read, images and their places are not as many, or
            another column has media. The message is one line, without the row's name.
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
        ]  # in new parts, as one may stand in two conversations
    rest = {name: value for name, value in row.items() if name not in (*CONVERSATIONS, "image", "images")}
    return {**rest, **read, "images": placed}


def row_name(row: Mapping[str, Any], index: int | None = None) -> str:
    """What a row is called in messages: its id, or its number."""
    sample_id = row.get("id")
    if sample_id is None:
        return "a row without an id" if index is None else f"row {index}"
    return repr(str(sample_id))


# --- images ----------------------------------------------------------------------------------------------------------


def images_of_columns(row: Mapping[str, Any]) -> list[Any]:
    """The images in `images` or `image`, not opened. Raises a ValueError where one is no image."""
    found = {name: _image_list(row[name]) for name in ("images", "image") if row.get(name) is not None}
    found = {name: images for name, images in found.items() if images}
    if len(found) == 2 and not _are_same(*found.values()):
        raise ValueError("'image' and 'images' have different images")
    images = next(iter(found.values()), [])
    for image in images:
        check_reference(image)
    return images


def _image_list(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _are_same(some: list, others: list) -> bool:
    """Whether both name the same files; pictures and bytes are not compared."""
    return all(isinstance(image, (str, PurePath)) for image in some) and some == others


def check_reference(image: Any) -> None:
    """Raise a ValueError where something is not an image, as far as that shows before it is opened."""
    if isinstance(image, (Image.Image, bytes, bytearray)):
        return
    if isinstance(image, (np.ndarray, torch.Tensor)):
        if image.ndim not in (2, 3):
            raise ValueError(f"an image is an array of {image.ndim} dimensions")
        return
    if isinstance(image, Mapping):
        if image.get("bytes") is None and image.get("path") is None:
            raise ValueError("an image has neither bytes nor a path")
        if image.get("bytes") is not None:
            return
        image = image["path"]
    if not isinstance(image, (str, PurePath)):
        raise ValueError(f"an image is {'null' if image is None else 'of type ' + type(image).__name__}")
    name = str(image)
    if not name.strip():
        raise ValueError("an image is an empty path")
    if name.startswith("data:"):
        _bytes_of_url(name)
    elif not _is_remote(name):
        mime_type = _MIME_TYPES.guess_type(name, strict=False)[0]
        if mime_type is not None and not mime_type.startswith("image/"):
            raise ValueError(f"{name!r} is no image, but {mime_type}")
        if not os.path.isfile(name):
            raise ValueError(f"there is no image {name!r}")


def _is_remote(name: str) -> bool:
    return "://" in name


def open_image(image: Any) -> Any:
    """An image that a row refers to: decoded where it is not yet. Raises a ValueError where that fails."""
    if isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
        return image
    check_reference(image)
    try:
        if isinstance(image, str) and _is_remote(image):  # datasets knows more places: hf://, zip://
            return ImageFeature().decode_example({"bytes": None, "path": image})
        return read_image(image)
    except Exception as error:  # of many kinds, by decoders and by downloads
        shown = image.get("path") if isinstance(image, Mapping) else image
        name = repr(str(shown)) if isinstance(shown, (str, PurePath)) else "in the data"
        raise ValueError(f"the image {name} cannot be read: {one_line(error)}") from error


def _bytes_of_url(url: str) -> bytes:
    header, _, encoded = url.partition(",")
    try:
        if not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ValueError
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"an image is a data URL, and not base64 of an image: {url[:40]!r}") from None


def image_size(image: Any) -> tuple[int, int]:
    """`(height, width)` of an image as it is shown. Of what is not decoded, only the beginning is read.

    Raises:
        ValueError: it cannot be read.
    """
    if not isinstance(image, Image.Image):
        is_dict = isinstance(image, Mapping)
        source = image["path"] if is_dict and image.get("bytes") is None else image["bytes"] if is_dict else image
        if isinstance(source, str) and (source.startswith("data:") or _is_remote(source)):
            source = open_image(source)
        try:
            if isinstance(source, (bytes, bytearray)):
                source = io.BytesIO(source)
            image = source if not isinstance(source, (str, PurePath, io.BytesIO)) else pixels.open_image(source)
        except Exception as error:  # of many kinds
            raise ValueError(f"an image cannot be read: {one_line(error)}") from error
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    size = image.height, image.width
    return size[::-1] if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else size


def unread_media(row: Mapping[str, Any], has_images: bool) -> list[str]:
    """Columns, of those that are not read, that seem to have images, videos or sounds.

    Args:
        has_images: whether the row has images that are read. A column with the path or URL of an image is theirs then.
    """
    return [
        name
        for name, value in row.items()
        if name not in COLUMNS and is_media(name, value) and not (has_images and _is_about(name, value))
    ]


def _is_about(name: str, value: Any) -> bool:
    return bool(_ABOUT_AN_IMAGE.fullmatch(name)) or not _MEDIA_COLUMN.fullmatch(name) and _type_of(value) == "image"


def is_media(name: str, value: Any) -> bool:
    """Whether a field seems to have images, videos or sounds."""
    if isinstance(value, (list, tuple)):
        is_array = bool(value) and isinstance(value[0], (list, tuple)) and _MEDIA_COLUMN.fullmatch(name)
        return bool(is_array) or any(is_media(name, entry) for entry in value)
    if isinstance(value, Mapping):
        is_file = value.get("bytes") is not None or value.get("path") is not None
        return is_file or _type_of(value) in ("image", "video", "audio")
    if isinstance(value, (Image.Image, bytes)) or type(value).__name__.endswith("Decoder"):  # datasets' of videos
        return True
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return bool(_MEDIA_COLUMN.fullmatch(name))
    if not isinstance(value, (str, PurePath)) or not str(value).strip():
        return False
    return bool(_MEDIA_COLUMN.fullmatch(name)) or _type_of(value) in ("image", "video", "audio")


def _type_of(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        return next((kind for kind in map(_type_of, value) if kind), None)
    if isinstance(value, Mapping):
        return next((kind for kind in map(_type_of, value.values()) if kind), None)
    if isinstance(value, Image.Image):
        return "image"
    if not isinstance(value, (str, PurePath)) or len(str(value)) > 500 or re.search(r"\s", str(value)):
        return None  # a text that ends like a file's name
    return (_MIME_TYPES.guess_type(str(value), strict=False)[0] or "").partition("/")[0] or None


# --- messages --------------------------------------------------------------------------------------------------------


def _as_list(messages: Any, name: str) -> list[Any]:
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"{name!r} is of type {type(messages).__name__}, and must be a list of messages")
    return list(messages)


def _are_texts(conversations: Mapping[str, list]) -> bool:
    return all(isinstance(message["content"], str) for messages in conversations.values() for message in messages)


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("a message has no 'role'")
    rest = {name: value for name, value in message.items() if value is not None}
    for name, value in rest.items():
        if name not in ("role", "content", "tool_calls") and is_media(name, value):
            raise ValueError(f"a message has media in {name!r}, which is not read; make it a part of its 'content'")
    content = message.get("content")
    if content is None and not rest.get("tool_calls"):
        raise ValueError(f"a message of role {message['role']!r} has no 'content'")
    if isinstance(content, Mapping) or not isinstance(content, (str, list, tuple, type(None))):
        raise ValueError(f"a content is of type {type(content).__name__}, and must be a text or a list of parts")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    read = [_read_part(part) for part in parts]
    if message["role"] == "user":
        read = [piece for part in read for piece in (to_parts(part["text"]) if part["type"] == "text" else [part])]
    return {**rest, "content": read}


def _read_part(part: Any) -> dict[str, Any]:
    """A part with `image` where it has its own image."""
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of a message is of type {type(part).__name__}, and must have a 'type'")
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
        raise ValueError(f"a part of a message is of type {kind!r}, and only 'text' and 'image' are read")
    for name in references or unread_media({**part, "text": None}, has_images=False):
        raise ValueError(f"a part of type 'text' has an image in {name!r}")
    if not isinstance(part.get("text"), str):
        raise ValueError("a part of type 'text' has no 'text'")
    return {"type": "text", "text": part["text"]}


def _own_image(image: Any, name: str) -> Any:
    if isinstance(image, Mapping) and isinstance(image.get("url"), str):  # as OpenAI has it
        image = image["url"]
    if name == "base64" and isinstance(image, str):
        image = _bytes_of_url(image if image.startswith("data:") else f"data:image/png;base64,{image}")
    check_reference(image)
    return image


def to_parts(text: str) -> list[dict[str, str | None]]:
    """The parts of a turn in their order, each `<image>` an image part.

    White space at both ends of a turn with images goes, as LLaVA's `"<image>\\n"` has it. Between words it stays: chat
    templates that move images to the front join the texts. A turn without images stays as it is.
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
    return parts[1:]  # images stand between pieces


def _places(messages: list[dict[str, Any]]) -> list[Any]:
    """Of every image part its own image, or None where it waits for one of the row's."""
    return [part.get("image") for message in messages for part in message["content"] if part["type"] == "image"]


# --- data sets -------------------------------------------------------------------------------------------------------


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data set with images as `{"bytes": ..., "path": ...}`, which `open_image` opens: its errors name the row."""
    if dataset.features is None:
        return dataset
    features = Features({name: _undecoded(kind) for name, kind in dataset.features.items()})
    if isinstance(dataset, IterableDataset):
        return dataset.cast(features)
    dataset = dataset.select_columns(dataset.column_names)  # a copy, whose features may be set: a cast copies all rows
    dataset.info.features = features
    return dataset


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, ImageFeature):
        return ImageFeature(mode=feature.mode, decode=False)
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return {name: _undecoded(kind) for name, kind in feature.items()} if isinstance(feature, dict) else feature


def check_rows(dataset: Dataset, name: str) -> None:
    """Raise a ValueError where rows cannot be read, with their number and the first of them. No image is opened."""
    dataset, faults, index = undecoded(dataset), [], 0
    for table in dataset.with_format("arrow").iter(1000):
        for row in rows_without_bytes(table, dataset.features):
            try:
                read_row(row)
            except ValueError as error:
                faults.append(f"{row_name(row, index)}: {error}")
            index += 1
    report_faults(faults, len(dataset), f" of {name}")


def report_faults(faults: list[str], num_rows: int, name: str = "") -> None:
    """Raise a ValueError with the number of faults and the first of them, where there are any."""
    if faults:
        shown = "; ".join(fault.rstrip(".") for fault in faults[:5]) + ("; ..." if len(faults) > 5 else "")
        raise ValueError(f"{len(faults):,} of {num_rows:,} rows{name} cannot be read: {shown}.")


def is_read_as_it_is(dataset: Dataset | IterableDataset) -> bool:
    """Whether a data set has its images in a column of images, and none elsewhere, so that no copy is needed."""
    features = dataset.features
    if features is None or "image" in features or features.get("images") != List(ImageFeature()):
        return False
    return not any(_may_hold_images(features[name]) for name in CONVERSATIONS if name in features)


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(name in REFERENCES or _may_hold_images(kind) for name, kind in feature.items())
    if isinstance(feature, (List, LargeList)):
        return _may_hold_images(feature.feature)
    return not isinstance(feature, Value) or feature.dtype == "null"


def converted(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """The data set with the columns of `FEATURES`, or those of preferences. A streamed one has undecoded images.

    Raises:
        ValueError: rows cannot be read; of a streamed data set, when such a row is reached.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    features = {"id": Value("string"), **dict.fromkeys(CONVERSATIONS, MESSAGES)}
    features = Features(
        {name: kind for name, kind in features.items() if name in columns} | {"images": FEATURES["images"]}
    )
    if dataset.features == features:
        return dataset
    if isinstance(dataset, Dataset):
        check_rows(dataset, name)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            read = read_row(row)
            for message in (message for column in CONVERSATIONS for message in read.get(column, ())):
                for more in message.keys() - {"role", "content"}:
                    raise ValueError(f"a message has {more!r}, which is not trained on")
                message["content"] = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
        except ValueError as error:
            raise ValueError(f"{name}: {row_name(row, index)}: {error}.") from error
        sample_id = {"id": None if row.get("id") is None else str(row["id"])} if "id" in features else {}
        return {column: read[column] for column in features if column != "id"} | sample_id

    return undecoded(dataset).map(convert, with_indices=True, remove_columns=columns, features=features)


def decoded(dataset: IterableDataset) -> IterableDataset:
    """A streamed data set with its images opened; datasets does not decode what a streamed `map` gives."""

    def open_all(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"images": [open_image(image) for image in row["images"]]}
        except ValueError as error:
            raise ValueError(f"{row_name(row)}: {error}.") from error

    return dataset.map(open_all, features=dataset.features)


def rows_without_bytes(table: pa.Table, features: Features) -> list[dict[str, Any]]:
    """Rows of an Arrow table of an `undecoded` data set with `b""` in the place of all bytes, which are not read."""
    columns = {
        name: [value for chunk in table[name].chunks for value in _without_bytes(chunk)] for name in table.column_names
    }
    columns = Features({name: features[name] for name in columns}).decode_batch(columns)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _without_bytes(array: pa.Array) -> list[Any]:
    kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [b"" if is_there else None for is_there in array.is_valid().to_pylist()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = iter(_without_bytes(array.flatten()))
        lengths = pc.list_value_length(array).to_pylist()
        return [None if length is None else [next(values) for _ in range(length)] for length in lengths]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        rows = zip(*(_without_bytes(field) for field in array.flatten()), strict=True)
        valid = array.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if ok else None for ok, row in zip(valid, rows, strict=True)]
    return array.to_pylist()
