# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The body of a chat request, checked field by field.

A field that would change the answer and that this server does not support is refused, not ignored.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import RequestError, quoted

# A value takes two bytes in a body and a hundred in memory. An image is one value, and no context holds a text with so
# many commas.
_MAX_JSON_VALUES = 1_000_000


@dataclass
class ChatRequest:
    """A checked request. The messages have transformers' format, and their images and videos are the URLs that were
    sent."""

    messages: list[dict]
    model: str | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    stream_options: dict = field(default_factory=dict)
    processor_kwargs: dict = field(default_factory=dict)  # not OpenAI's: `BUDGETS`
    mm_processor_kwargs: dict = field(default_factory=dict)  # vLLM's form of the same

    @property
    def images(self) -> list[dict]:
        """The image parts of all messages."""
        return [part for message in self.messages for part in message["content"] if part["type"] == "image"]

    @property
    def videos(self) -> list[dict]:
        """The video parts of all messages."""
        return [part for message in self.messages for part in message["content"] if part["type"] == "video"]

    @property
    def texts(self) -> list[str]:
        """The texts of all messages."""
        return [part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"]

    @property
    def budgets(self) -> dict[str, Any]:
        """The token budgets of images and videos, as arguments of the processor."""
        for name, other in self.mm_processor_kwargs.items():
            if self.processor_kwargs.get(name, other) != other:
                message = f"{name} and mm_processor_kwargs.{name} differ; send one of them."
                raise RequestError(400, message, name, "invalid_value")
        return {**self.processor_kwargs, **self.mm_processor_kwargs}


def parse_request(body: bytes) -> ChatRequest:
    """Check the body of a request. Raises a `RequestError` that names the field, its value and what to do."""
    request = _read_json(body)
    if not isinstance(request, dict):
        raise RequestError(400, f'The body is {quoted(request)}; it must be an object like {{"messages": [...]}}.')
    chat: dict[str, Any] = {"messages": _messages(request.pop("messages", None), "messages")}
    for name, value in request.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        elif name in BUDGETS:
            chat.setdefault("processor_kwargs", {})[name] = BUDGETS[name](value, name)
        elif name in _CHECKS:
            chat[name] = _CHECKS[name](value, name)
        elif name in _UNSUPPORTED:
            _UNSUPPORTED[name](value, name)
        else:
            near = difflib.get_close_matches(name[:100], [*_CHECKS, *BUDGETS], n=1)
            advice = f"did you mean {near[0]}?" if near else "leave it out."
            message = f"This server does not know the field {quoted(name)}; {advice}"
            raise RequestError(400, message, name, "unknown_parameter")
    return ChatRequest(**chat)


def _read_json(body: bytes):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
            message = f"The body has more than {_MAX_JSON_VALUES:,} values; send a shorter conversation."
            raise RequestError(400, message)
        return json.loads(body.decode(), parse_constant=refuse)
    except json.JSONDecodeError as error:
        reason = f"it ends early or is malformed at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError:
        reason = "it has a number that is not valid in JSON, or one that is too long"
    message = f'The body is not JSON: {reason}. Send an object like {{"messages": [...]}}.'
    raise RequestError(400, message, code="invalid_json")


def wrong_value(path: str, value, expected: str) -> RequestError:
    """The error of a field's value. `expected` completes the sentence "it must be ..."."""
    if value is None:
        return RequestError(400, f"{path} is missing; it must be {expected}.", path, "missing_required_parameter")
    return RequestError(400, f"{path} is {quoted(value)}; it must be {expected}.", path, "invalid_value")


def _unsupported(path: str, value, reason: str) -> RequestError:
    message = f"{path} is {quoted(value)}, but {reason}; leave it out."
    return RequestError(400, message, path, "unsupported_parameter")


# --- kinds of values -------------------------------------------------------------------------------------------------
# A check takes a value and its path, returns the value for `ChatRequest`, and raises a `RequestError`.


def _number(kind: type, expected: str, is_allowed: Callable[[float], bool]) -> Callable:
    def check(value, path: str):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not is_allowed(value) or value != kind(value):
            raise wrong_value(path, value, expected)
        return kind(value)

    return check


def _boolean(value, path: str) -> bool:
    if not isinstance(value, bool):
        raise wrong_value(path, value, "true or false")
    return value


def _string(value, path: str) -> str:
    if not isinstance(value, str):
        raise wrong_value(path, value, "a string")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        message = f"{path} has half of a surrogate pair (\\ud800 to \\udfff), which is not a character; leave it out."
        raise RequestError(400, message, path, "invalid_value") from None
    return value


def _stop(value, path: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if len(texts) > 4 or not all(isinstance(text, str) and 1 <= len(text) <= 1000 for text in texts):
        raise wrong_value(path, value, "a string of 1 to 1000 characters, or a list of up to 4 of them")
    return [_string(text, path) for text in texts]


def _object(checks: dict[str, Callable]) -> Callable:
    def check(value, path: str) -> dict:
        if not isinstance(value, dict):
            raise wrong_value(path, value, f"an object with {', '.join(checks)}")
        for name in value:
            if name not in checks:
                message = f"{path} has the field {quoted(name)}, which this server does not know; leave it out."
                raise RequestError(400, message, f"{path}.{name}", "unknown_parameter")
        return {name: checks[name](item, f"{path}.{name}") for name, item in value.items() if item is not None}

    return check


def _unchecked(value, path: str):
    return value


# --- messages --------------------------------------------------------------------------------------------------------


def _messages(value, path: str) -> list[dict]:
    if not isinstance(value, list) or not 1 <= len(value) <= 1024:
        raise wrong_value(path, value, 'a list of 1 to 1024 messages like {"role": "user", "content": "..."}')
    return [_message(message, f"{path}[{index}]") for index, message in enumerate(value)]


def _message(value, path: str) -> dict:
    if not isinstance(value, dict):
        raise wrong_value(path, value, 'an object like {"role": "user", "content": "..."}')
    role, content = value.get("role"), value.get("content")
    if role in ("tool", "function"):
        raise _unsupported(f"{path}.role", role, _NO_TOOLS)
    if role not in ("system", "developer", "user", "assistant"):
        raise wrong_value(f"{path}.role", role, "system, developer, user or assistant")
    for name in ("tool_calls", "function_call"):
        if value.get(name):
            raise _unsupported(f"{path}.{name}", value[name], _NO_TOOLS)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or len(content) > 1024:
        raise wrong_value(f"{path}.content", content, "a string, or a list of up to 1024 parts")
    content = [_part(part, f"{path}.content[{index}]") for index, part in enumerate(content)]
    return {"role": role.replace("developer", "system"), "content": content}  # chat templates know no developer


def _part(value, path: str) -> dict:
    if not isinstance(value, dict):
        raise wrong_value(path, value, 'an object like {"type": "text", "text": "..."}')
    kind = value.get("type")
    if kind == "text":
        return {"type": "text", "text": _string(value.get("text"), f"{path}.text")}
    if kind == "image_url":
        image = value.get("image_url")
        if not isinstance(image, dict):
            raise wrong_value(f"{path}.image_url", image, 'an object like {"url": "https://..."}')
        return {"type": "image", "image": _string(image.get("url"), f"{path}.image_url.url")}
    if kind == "video_url":  # `check_video` is called if the model takes videos
        return {"type": "video", "video": value.get("video_url")}
    raise wrong_kind(f"{path}.type", kind)


def check_video(video, path: str) -> str:
    """The URL of a part of kind `video_url`."""
    if not isinstance(video, dict):
        raise wrong_value(f"{path}.video_url", video, 'an object like {"url": "https://..."}')
    return _string(video.get("url"), f"{path}.video_url.url")


def wrong_kind(path: str, kind) -> RequestError:
    """The error of a part that the model does not read."""
    return wrong_value(path, kind, '"text" or "image_url", because this model reads nothing else')


# --- fields that are not supported -----------------------------------------------------------------------------------


def _only(neutral: list, reason: str) -> Callable:
    """The check of a field that is not supported. Clients send it with a `neutral` value, which changes nothing."""

    def check(value, path: str) -> None:
        if value not in neutral:
            raise _unsupported(path, value, reason)

    return check


def _response_format(value, path: str) -> None:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind != "text":
        raise _unsupported(path if kind is value else f"{path}.type", kind, "answers are plain text")


# budgets of images and videos, which the processor checks further
BUDGETS: dict[str, Callable] = {
    "pooled_grid_size": _unchecked,
    "max_image_tokens": _number(int, "a positive integer", lambda number: 1 <= number < 2**31),
    "tiles": _unchecked,
    "fps": _number(float, "a number above 0 and up to 1000", lambda number: 0 < number <= 1000),
    "max_frames": _number(int, "a positive integer", lambda number: 1 <= number < 2**31),
    "pooled_video_grid_size": _unchecked,
    "frames_per_token_grid": _number(int, "a positive integer", lambda number: 1 <= number < 2**31),
    "add_timestamps": _boolean,
}
_NO_TOOLS = "tools are not supported by this model"
_NO_PENALTIES = "penalties and biases are not supported by this server"
_CHECKS = {
    "model": _string,
    "max_completion_tokens": _number(int, "a positive integer", lambda number: 1 <= number < 2**63),
    "max_tokens": _number(int, "a positive integer", lambda number: 1 <= number < 2**63),
    "temperature": _number(float, "a number from 0 to 2", lambda number: 0 <= number <= 2),
    "top_p": _number(float, "a number above 0 and up to 1", lambda number: 0 < number <= 1),
    "seed": _number(int, "an integer of 64 bits", lambda number: -(2**63) <= number < 2**63),
    "stop": _stop,
    "stream": _boolean,
    "stream_options": _object({"include_usage": _boolean, "include_obfuscation": _boolean}),
    "mm_processor_kwargs": _object(BUDGETS),
}
_UNSUPPORTED = {
    "n": _only([1], "a request gets one answer"),
    "response_format": _response_format,
    "tools": _only([[]], _NO_TOOLS),
    "tool_choice": _only(["none", "auto"], _NO_TOOLS),
    "functions": _only([[]], _NO_TOOLS),
    "function_call": _only(["none", "auto"], _NO_TOOLS),
    "logprobs": _only([False], "probabilities are not returned by this server"),
    "top_logprobs": _only([0], "probabilities are not returned by this server"),
    "presence_penalty": _only([0], _NO_PENALTIES),
    "frequency_penalty": _only([0], _NO_PENALTIES),
    "logit_bias": _only([{}], _NO_PENALTIES),
    "modalities": _only([["text"]], "this model answers only in text"),
    "audio": _only([], "this model answers only in text"),
    "reasoning_effort": _only(["none"], "this model does not reason before it answers"),
    "web_search_options": _only([], "this server does not search the web"),
}
_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
