# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server of one DeCo model.

`transformers serve` looks up classes and modalities in static name tables, and so fails for every registered or
remote-code model; it decodes pictures in the event loop, follows any image URL, drops what it does not know, and goes
on when a client has left.

A request goes through these steps, each of which stops when its client leaves: a connection (`_Connection`) sends its
headers and its body in time (`_LimitMiddleware`); the body is checked field by field (`_parse`); its pictures are read
beside the requests that have none; it waits for the model, which answers one request at a time (`_Answer`).
"""

import asyncio
import difflib
import hmac
import ipaddress
import json
import logging
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, ProcessorMixin
from transformers.generation import BaseStreamer

from ..inference.generation import NaNError, RefuseNaN, check_length, encode, load, sampling, with_system
from ..inference.images import UNTRUSTED_LIMITS, ImageError, ImageLimits, PictureReader
from ..inference.loading import check_is_deco
from ..inference.prompt_cache import PromptCache
from ..utils.errors import one_line
from .sockets import bind, max_open_files

try:
    import anyio
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol  # private, seen in uvicorn 0.31 to 0.54
except ImportError as error:
    raise ImportError("The server needs starlette and uvicorn: pip install 'modeling-deco[serve]'") from error

# uvicorn's own, so that all lines look alike and go to one place
logger = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class ServerOptions:
    """What a server allows, and what it does where a request does not say.

    Attributes:
        api_key: what clients must send as `Authorization: Bearer KEY`; `/health` is open.
        allow_files: whether an image URL may name a file of this machine.
        allow_private: whether an image URL may lead to an address that is not public.
        pooled_grid_size: budget of each image: an int (square) or `[rows, cols]`. Default: the checkpoint's.
        temperature: 0 is greedy. Default: the checkpoint's.
        seed: of what is sampled. Default: another one for each request.
        system: the system message of conversations that have none.
        max_new_tokens: longest answer, and the one where a request does not say.
        max_queue: requests that may wait while one is answered, and as many whose pictures are being read; more are
            told to come back.
        max_images: in a request.
        image_limits: of each image; its pixels are also the most that all images of a request may have together.
        max_body_bytes: of a request.
        max_connections: open at once; more than these push out the one that has kept the server waiting for longest.
            Default: half of the files that this process may open, at most 1000.
        header_timeout: seconds that a connection may wait before the headers of its next request are there.
        body_timeout: seconds that the rest of a request may take to arrive, and that a client may take to read what
            has been sent.
        prompt_cache_bytes: of keys and values kept of earlier prompts and answers, for the requests that begin with
            them; see `PromptCache`.
    """

    api_key: str | None = None
    allow_files: bool = False
    allow_private: bool = False
    pooled_grid_size: int | list[int] | None = None
    temperature: float | None = None
    seed: int | None = None
    system: str | None = None
    max_new_tokens: int = 1024
    max_queue: int = 32
    max_images: int = 8
    image_limits: ImageLimits = UNTRUSTED_LIMITS
    max_body_bytes: int = 32 * 2**20
    max_connections: int | None = None
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    prompt_cache_bytes: int = 2**30


# --- errors ----------------------------------------------------------------------------------------------------------


class _Refused(HTTPException):
    """A request that is not answered. `param` is the field that is to blame, `code` OpenAI's word for the reason."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def _error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's form, which does not repeat what a client sent at length, or what cannot be sent back."""
    message = message if len(message) <= 400 else message[:397] + "..."
    param = None if param is None else param[:100].encode(errors="replace").decode()
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _refuse(request: Request, error: HTTPException) -> JSONResponse:
    if not isinstance(error, _Refused):  # Starlette's, of its routes
        method, path = request.method, request.url.path
        if error.status_code == 405:
            message = f"{path} takes {error.headers['Allow']}, not {method}."
        else:
            message = f"There is nothing at {path}; there are /v1/chat/completions, /v1/models and /health."
        error = _Refused(error.status_code, message, headers=error.headers)
    body = _error_body(error.status_code, error.detail, error.param, error.code)
    return JSONResponse(body, error.status_code, error.headers)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(_error_body(500, "The server failed; its log says why."), 500)  # the log is uvicorn's


# --- requests --------------------------------------------------------------------------------------------------------

# A value of two bytes in a body takes a hundred in memory. A picture is one value, and no context holds a text with
# so many commas.
_MAX_JSON_VALUES = 1_000_000


@dataclass
class _ChatRequest:
    """A request, checked. Messages are transformers' but for their images, which are what a client sent."""

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
    pooled_grid_size: Any = None  # ours, and the same in vLLM's form; the processor judges it
    mm_processor_kwargs: dict = field(default_factory=dict)

    @property
    def images(self) -> list[dict]:
        """The parts of the messages that are images."""
        return [part for message in self.messages for part in message["content"] if part["type"] == "image"]

    @property
    def texts(self) -> list[str]:
        return [part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"]

    @property
    def grid(self):
        grid, other = self.pooled_grid_size, self.mm_processor_kwargs.get("pooled_grid_size")
        if grid is not None and other is not None and grid != other:
            raise _Refused(
                400,
                "pooled_grid_size and mm_processor_kwargs.pooled_grid_size are not the same; send one of them.",
                "pooled_grid_size",
                "invalid_value",
            )
        return other if grid is None else grid


def _parse(body: bytes) -> _ChatRequest:
    """OpenAI's fields. What would change the answer and is not done here is refused, not passed over."""
    request = _read_json(body)
    if not isinstance(request, dict):
        raise _Refused(400, f'The body is {_shown(request)}; it must be an object like {{"messages": [...]}}.')
    chat = {"messages": _messages(request.pop("messages", None), "messages")}
    for name, value in request.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        elif name in _CHECKS:
            chat[name] = _CHECKS[name](value, name)
        elif name in _UNSUPPORTED:
            _UNSUPPORTED[name](value, name)
        else:
            near = difflib.get_close_matches(name[:100], _CHECKS, n=1)
            advice = f"did you mean {near[0]}?" if near else "leave it out."
            message = f"This server does not know the field {_shown(name)}; {advice}"
            raise _Refused(400, message, name, "unknown_parameter")
    return _ChatRequest(**chat)


def _read_json(body: bytes):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
            raise _Refused(400, f"The body has more than {_MAX_JSON_VALUES:,} values; send a shorter conversation.")
        return json.loads(body.decode(), parse_constant=refuse)
    except json.JSONDecodeError as error:
        reason = f"it breaks off or goes wrong at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError:
        reason = "it has a number that JSON does not have, or one that is too long"
    raise _Refused(
        400, f'The body is not JSON: {reason}. Send an object like {{"messages": [...]}}.', code="invalid_json"
    )


def _shown(value) -> str:
    """A value of a request, in short."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"
    return json.dumps(value if not isinstance(value, str) or len(value) <= 60 else value[:57] + "...")


def _wrong(path: str, value, expected: str) -> _Refused:
    """`expected` completes "it must be"."""
    if value is None:
        return _Refused(400, f"{path} is missing; it must be {expected}.", path, "missing_required_parameter")
    return _Refused(400, f"{path} is {_shown(value)}; it must be {expected}.", path, "invalid_value")


def _unsupported(path: str, value, reason: str) -> _Refused:
    return _Refused(400, f"{path} is {_shown(value)}, but {reason}; leave it out.", path, "unsupported_parameter")


def _number(kind: type, expected: str, is_allowed: Callable[[float], bool]) -> Callable:
    def check(value, path: str):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not is_allowed(value) or value != kind(value):
            raise _wrong(path, value, expected)
        return kind(value)

    return check


def _boolean(value, path: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(path, value, "true or false")
    return value


def _string(value, path: str) -> str:
    if not isinstance(value, str):
        raise _wrong(path, value, "a string")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        message = f"{path} has half of a surrogate pair (\\ud800 to \\udfff), which is no character; leave it out."
        raise _Refused(400, message, path, "invalid_value") from None
    return value


def _stop(value, path: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if len(texts) > 4 or not all(isinstance(text, str) and 1 <= len(text) <= 1000 for text in texts):
        raise _wrong(path, value, "a text of 1 to 1000 characters, or a list of up to 4 of them")
    return [_string(text, path) for text in texts]


def _object(checks: dict[str, Callable]) -> Callable:
    def check(value, path: str) -> dict:
        if not isinstance(value, dict):
            raise _wrong(path, value, f"an object with {', '.join(checks)}")
        for name in value:
            if name not in checks:
                message = f"{path} has the field {_shown(name)}, which this server does not know; leave it out."
                raise _Refused(400, message, f"{path}.{name}", "unknown_parameter")
        return {name: checks[name](item, f"{path}.{name}") for name, item in value.items() if item is not None}

    return check


def _messages(value, path: str) -> list[dict]:
    if not isinstance(value, list) or not 1 <= len(value) <= 1024:
        raise _wrong(path, value, 'a list of 1 to 1024 messages like {"role": "user", "content": "..."}')
    return [_message(message, f"{path}[{index}]") for index, message in enumerate(value)]


def _message(value, path: str) -> dict:
    if not isinstance(value, dict):
        raise _wrong(path, value, 'an object like {"role": "user", "content": "..."}')
    role, content = value.get("role"), value.get("content")
    if role in ("tool", "function"):
        raise _unsupported(f"{path}.role", role, _NO_TOOLS)
    if role not in ("system", "developer", "user", "assistant"):
        raise _wrong(f"{path}.role", role, "system, developer, user or assistant")
    for name in ("tool_calls", "function_call"):
        if value.get(name):
            raise _unsupported(f"{path}.{name}", value[name], _NO_TOOLS)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or len(content) > 1024:
        raise _wrong(f"{path}.content", content, "a string, or a list of up to 1024 parts")
    content = [_part(part, f"{path}.content[{index}]") for index, part in enumerate(content)]
    return {"role": role.replace("developer", "system"), "content": content}  # which templates know


def _part(value, path: str) -> dict:
    if not isinstance(value, dict):
        raise _wrong(path, value, 'an object like {"type": "text", "text": "..."}')
    kind = value.get("type")
    if kind == "text":
        return {"type": "text", "text": _string(value.get("text"), f"{path}.text")}
    if kind == "image_url":
        image = value.get("image_url")
        if not isinstance(image, dict):
            raise _wrong(f"{path}.image_url", image, 'an object like {"url": "https://..."}')
        return {"type": "image", "image": _string(image.get("url"), f"{path}.image_url.url")}
    raise _wrong(f"{path}.type", kind, '"text" or "image_url", for this model reads nothing else')


def _response_format(value, path: str) -> None:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind != "text":
        raise _unsupported(path if kind is value else f"{path}.type", kind, "answers are plain text")


def _only(neutral: list, reason: str) -> Callable:
    """Of a field that is not supported, and that clients send with a value that changes nothing."""

    def check(value, path: str) -> None:
        if value not in neutral:
            raise _unsupported(path, value, reason)

    return check


_NO_TOOLS = "tools are not supported by this model"
_NO_PENALTIES = "penalties and biases are not supported by this server"
_CHECKS = {
    "model": _string,
    "max_completion_tokens": _number(int, "an integer from 1 on", lambda number: 1 <= number < 2**63),
    "max_tokens": _number(int, "an integer from 1 on", lambda number: 1 <= number < 2**63),
    "temperature": _number(float, "a number from 0 to 2", lambda number: 0 <= number <= 2),
    "top_p": _number(float, "a number above 0 and up to 1", lambda number: 0 < number <= 1),
    "seed": _number(int, "an integer of 64 bits", lambda number: -(2**63) <= number < 2**63),
    "stop": _stop,
    "stream": _boolean,
    "stream_options": _object({"include_usage": _boolean, "include_obfuscation": _boolean}),
    "pooled_grid_size": lambda value, path: value,
    "mm_processor_kwargs": _object({"pooled_grid_size": lambda value, path: value}),
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
    "modalities": _only([["text"]], "this model answers in text alone"),
    "audio": _only([], "this model answers in text alone"),
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


# --- answers ---------------------------------------------------------------------------------------------------------


class _Ended(Exception):
    """Ends `generate` where the streamer raises it: stopping criteria are asked before the streamer has the token."""


class _Answer(BaseStreamer):
    """An answer on its way from the inference thread to the event loop, as pieces of text in `pieces`; after the last
    comes None, in place of it the exception that ended it. Made in the event loop.

    transformers' `TextStreamer` before 5.24 loses the space after a line break and keeps text without spaces back.
    """

    def __init__(self, tokenizer, stop: list[str]):
        self.pieces = asyncio.Queue()
        self.tokenizer = tokenizer
        self.stop = stop
        self.finish_reason = "length"
        self.num_tokens = 0
        self._loop = asyncio.get_running_loop()
        self._is_cancelled = False
        self._is_prompt = True
        self._token_ids: list[int] = []  # the last ones, of which the first `_num_shown` are in the text
        self._num_shown = 0
        self._held = ""  # the end of the text so far, where it may be the beginning of a stop text

    def cancel(self) -> None:
        self._is_cancelled = True

    def generate(self, prompts: PromptCache, inputs: dict, config: GenerationConfig, seed: int | None) -> None:
        """Runs in the inference thread."""
        try:
            if self._is_cancelled:  # while it waited; `generate` runs the vision tower before it asks the streamer
                raise _Ended
            # A request with a seed must not decide what the ones after it draw.
            torch.manual_seed(torch.seed() if seed is None else seed)
            (sequence,) = prompts.generate(
                **inputs,
                generation_config=config,
                streamer=self,
                logits_processor=LogitsProcessorList([RefuseNaN()]),
                tokenizer=self.tokenizer,  # for the `stop_strings` of a checkpoint's generation config
            )
            eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            if self.num_tokens < config.max_new_tokens or sequence[-1].item() in eos:
                self.finish_reason = "stop"
            self._add(self._decode_on(at_end=True))
            self._push(self._held)
        except _Ended:
            pass
        except Exception as error:
            self._push(error)
            return
        self._push(None)

    def put(self, value: torch.Tensor) -> None:
        if self._is_cancelled:
            raise _Ended
        if self._is_prompt:  # which comes first
            self._is_prompt = False
            return
        for token_id in value.tolist():
            self.num_tokens += 1
            self._token_ids.append(token_id)
            self._add(self._decode_on())

    def end(self) -> None:
        """`generate` ends the answer, which knows why it ended."""

    def _decode_on(self, at_end: bool = False) -> str:
        """The text of the tokens that are not shown yet, or none where a character's last bytes are still to come. It
        is decoded with the tokens before, on which spaces depend."""
        text = self.tokenizer.decode(self._token_ids, skip_special_tokens=True)
        shown = self.tokenizer.decode(self._token_ids[: self._num_shown], skip_special_tokens=True)
        if len(text) <= len(shown) or (text.endswith("\ufffd") and not at_end):
            return ""
        self._token_ids = self._token_ids[self._num_shown :]
        self._num_shown = len(self._token_ids)
        return text[len(shown) :]

    def _add(self, text: str) -> None:
        text = self._held + text
        ends = [text.index(stop) for stop in self.stop if stop in text]
        if ends:
            self.finish_reason = "stop"
            self._push(text[: min(ends)])
            raise _Ended
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        self._push(text[: len(text) - held])

    def _push(self, item: str | Exception | None) -> None:
        if item != "":
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, item)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)


class _Chat:
    """`/v1/chat/completions`, an ASGI application: what it started it stops, however it is left."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, name: str, options: ServerOptions, room: "_Room"
    ):
        self.model = model
        self.processor = processor
        self.name = name
        self.options = options
        self.room = room
        # some language models have no limit; then it is ours, for a prompt must have one
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 131_072
        self.prompts = PromptCache(model, options.prompt_cache_bytes)
        self.inference = ThreadPoolExecutor(1, "inference")  # torch.compile's CUDA graphs belong to one thread
        self.texts = ThreadPoolExecutor(2, "texts")
        self.images = ThreadPoolExecutor(2, "images")
        self.reader = PictureReader(
            options.image_limits,
            allow_files=options.allow_files,
            allow_private=options.allow_private,
            max_downloads=options.max_queue + 1,
        )

    def close(self) -> None:
        self.reader.close()
        for workers in (self.inference, self.texts, self.images):
            workers.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        # A browser sends a page's JSON elsewhere only after asking, which is not answered: no page of another site
        # can use a server on its reader's machine.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "The Content-Type header must be application/json.")
        in_thread = asyncio.get_running_loop().run_in_executor
        message = await receive()
        with self.room.memory(len(message["body"])):
            with self.room.place("answers"):
                # nothing here keeps the body: a request that waits is a few tensors
                chat = await in_thread(self.texts, self._check, message.pop("body"))
            if chat.images:
                with self.room.place("pictures"):
                    inputs = await self._read(chat)
        with self.room.place("answers"):
            if not chat.images:
                inputs = await in_thread(self.texts, self._encode, chat)
            task = self._task(chat, inputs)
            del chat, inputs
            answer = _Answer(self.processor.tokenizer, task.stop)
            self.inference.submit(answer.generate, self.prompts, task.inputs, task.config, task.seed)
            try:
                response = await self._respond(answer, task)
                await response(scope, receive, send)
            finally:
                answer.cancel()

    def _check(self, body: bytes) -> _ChatRequest:
        """A request that the model can answer. Neither a prompt nor a grid without bound is made into tokens."""
        chat = _parse(body)
        if chat.model not in (None, self.name):
            message = f"The model {_shown(chat.model)} is not served here; {_shown(self.name)} is."
            raise _Refused(404, message, "model", "model_not_found")
        if chat.grid is None:
            chat.pooled_grid_size = self.options.pooled_grid_size
        num_images, limit = len(chat.images), self.options.max_images
        if num_images > limit:
            raise _Refused(400, f"{num_images} images are more than the {limit} allowed in a request.", "messages")
        kwargs = {} if chat.grid is None else {"pooled_grid_size": chat.grid}
        with _refused_values():
            budget = self.processor._get_num_multimodal_tokens(image_sizes=[(1, 1)] * num_images, **kwargs)
        num_tokens, num_characters = sum(budget["num_image_tokens"] or ()), sum(map(len, chat.texts))
        if num_tokens > self.context or num_characters > 64 * self.context:
            raise self._too_long(f"{num_tokens} tokens of images and {num_characters} characters of text")
        return chat

    def _too_long(self, what: str) -> _Refused:
        message = f"{what} do not fit the model's context of {self.context} tokens."
        return _Refused(400, message, "messages", "context_length_exceeded")

    async def _read(self, chat: _ChatRequest) -> dict:
        parts = chat.images
        try:
            async with self.reader.read_all([part["image"] for part in parts]) as images:
                for part, image in zip(parts, images, strict=True):
                    part["image"] = image
                return await asyncio.get_running_loop().run_in_executor(self.images, self._encode, chat)
        except ImageError as error:
            raise _Refused(400, one_line(error), "messages", "invalid_image") from error

    def _encode(self, chat: _ChatRequest) -> dict:
        system = self.options.system
        if system is not None and all(message["role"] != "system" for message in chat.messages):
            content = [{"type": "text", "text": system}]
            chat.messages.insert(0, {"role": "system", "content": content})
        with _refused_values():
            return encode(self.processor, chat.messages, chat.grid).to(self.model.device)

    def _task(self, chat: _ChatRequest, inputs: dict) -> "_Task":
        return _Task(
            inputs=inputs,
            config=self._generation_config(chat, inputs["input_ids"].shape[-1]),
            seed=self.options.seed if chat.seed is None else chat.seed,
            stop=chat.stop,
            stream=chat.stream,
            include_usage=chat.stream_options.get("include_usage", False),
        )

    def _generation_config(self, chat: _ChatRequest, num_prompt_tokens: int) -> GenerationConfig:
        name = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        asked, room = getattr(chat, name), self.context - num_prompt_tokens
        if asked is not None and asked > self.options.max_new_tokens:
            raise _wrong(name, asked, f"an integer from 1 to {self.options.max_new_tokens}, this server's longest")
        if room < (asked or 1):
            raise self._too_long(f"{num_prompt_tokens} tokens of the prompt and {asked or 1} of the answer")
        config = deepcopy(self.model.generation_config)
        config.update(num_beams=1, num_return_sequences=1, return_dict_in_generate=False)  # one answer, streamed
        config.max_new_tokens = asked or min(room, self.options.max_new_tokens)
        temperature = self.options.temperature if chat.temperature is None else chat.temperature
        config.update(**sampling(temperature))
        if chat.top_p is not None and temperature is None:
            config.do_sample = config.do_sample or chat.top_p < 1  # greedy decoding would pass over it
        if chat.top_p is not None and config.do_sample:
            config.top_p = chat.top_p
        return config

    async def _respond(self, answer: _Answer, task: "_Task"):
        first = await answer.pieces.get()  # what fails before the first word has a status
        if isinstance(first, NaNError):
            raise _Refused(500, one_line(first), code="damaged_model")
        if isinstance(first, ValueError):  # the model's: of a grid larger than the patch grid
            raise _Refused(400, one_line(first), code="invalid_value")
        if isinstance(first, Exception):
            raise first
        form = _ResponseForm(self.name)
        if task.stream:
            return StreamingResponse(self._events(answer, first, form, task), media_type="text/event-stream")
        text = ""
        piece = first
        while piece is not None:
            text += piece
            piece = await answer.pieces.get()
            if isinstance(piece, Exception):
                raise piece
        return JSONResponse(form.whole(text, answer.finish_reason, task.usage(answer)))

    async def _events(self, answer: _Answer, piece: str | None, form: "_ResponseForm", task: "_Task") -> AsyncIterator:
        yield _event(form.chunk({"role": "assistant", "content": ""}))
        while piece is not None:
            yield _event(form.chunk({"content": piece}))
            piece = await answer.pieces.get()
            if isinstance(piece, Exception):  # too late for a status
                logger.error("An answer was cut short", exc_info=piece)
                yield _event(_error_body(500, "The answer was cut short by an error; the server's log says why."))
                return
        yield _event(form.chunk({}, answer.finish_reason))
        if task.include_usage:
            yield _event(form.usage(task.usage(answer)))
        yield "data: [DONE]\n\n"


@dataclass
class _Task:
    """What is left of a request when it waits for the model."""

    inputs: dict
    config: GenerationConfig
    seed: int | None
    stop: list[str]
    stream: bool
    include_usage: bool

    def usage(self, answer: _Answer) -> dict:
        prompt, completion = self.inputs["input_ids"].shape[-1], answer.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _ResponseForm:
    """OpenAI's forms of one answer."""

    def __init__(self, model: str):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: dict) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict, finish_reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage(self, usage: dict) -> dict:
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


@contextmanager
def _refused_values():
    """The processor's errors, of a grid or of messages, as refusals."""
    try:
        yield
    except ValueError as error:
        grid = "pooled_grid_size" if "grid" in str(error) else None
        raise _Refused(400, one_line(error), grid, "invalid_value") from error


# --- limits ----------------------------------------------------------------------------------------------------------


class _Room:
    """What the server has taken on, over all connections."""

    def __init__(self, options: ServerOptions):
        self.options = options
        # Requests that wait for the model or are answered ("answers"), and those whose pictures are being read
        # ("pictures"), which so keep no other request from the model.
        self.taken = Counter()
        # Of requests that are on their way, or whose pictures are being read: one that only trickles in takes nobody's
        # place.
        self.num_bytes = 0

    def check(self, place: str = "answers") -> None:
        most_bytes = (self.options.max_queue + 1) * self.options.max_body_bytes
        if self.taken[place] > self.options.max_queue or self.num_bytes > most_bytes:
            message = "Too many requests are waiting; try again in a second."
            raise _Refused(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})

    @contextmanager
    def place(self, name: str):
        self.check(name)
        self.taken[name] += 1
        try:
            yield
        finally:
            self.taken[name] -= 1

    @contextmanager
    def memory(self, num_bytes: int):
        self.num_bytes += num_bytes
        try:
            yield
        finally:
            self.num_bytes -= num_bytes


class _LimitMiddleware:
    """ASGI middleware: whom the server answers, how large a request may be and how long it may take to arrive; one
    whose client hangs up is cancelled, wherever it is."""

    def __init__(self, app, options: ServerOptions, room: _Room, hosts: list[str] | None):
        self.app = app
        self.options = options
        self.room = room
        self.hosts = hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        connection = scope.get("state", {}).get("connection")  # None under another server
        with nullcontext() if connection is None else connection.request():
            try:
                self._check_host(request)
                self._check_key(request)
                if request.method != "POST":
                    await self.app(scope, receive, send)
                    return
                body = [await self._read(request)]  # a list, so that nothing here keeps it
                if connection is not None:
                    connection.keep()
                await self._answer(body.pop(), scope, receive, send)
            except _Refused as error:
                await (await _refuse(request, error))(scope, receive, send)
            except (ClientDisconnect, asyncio.CancelledError):  # the client has left, or the server is going down
                return

    def _check_host(self, request: Request) -> None:
        given = request.headers.get("host", "")
        try:
            host = urllib.parse.urlsplit(f"//{given}").hostname
        except ValueError:
            host = None
        if self.hosts is not None and host not in self.hosts:
            hosts = ", ".join(self.hosts)
            raise _Refused(
                400, f"The Host header is {_shown(given)}; this server is one of {hosts}.", code="wrong_host"
            )

    def _check_key(self, request: Request) -> None:
        key = self.options.api_key
        if key is None or request.scope["path"] == "/health":
            return
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        if not hmac.compare_digest(f"Bearer {key}".encode(), given):
            message = "The API key is missing or wrong; send it in the header Authorization: Bearer KEY."
            raise _Refused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request) -> bytes:
        limit = self.options.max_body_bytes
        too_large = _Refused(413, f"The request has more than {limit:,} bytes; send fewer or smaller pictures.")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            try:
                async for piece in request.stream():
                    body += piece
                    self.room.num_bytes += len(piece)
                    if len(body) > limit:
                        raise too_large
                    self.room.check()
                return bytes(body)
            finally:
                self.room.num_bytes -= len(body)

        try:
            return await asyncio.wait_for(read(), self.options.body_timeout)
        except asyncio.TimeoutError:
            message = f"The request took more than {self.options.body_timeout:g} s to arrive."
            raise _Refused(408, message, headers={"Connection": "close"}) from None

    async def _answer(self, body: bytes, scope, receive, send) -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        del body  # megabytes, which the handler lets go before it waits

        async def replay():
            if not messages:
                await asyncio.Event().wait()  # until cancelled
            return messages.pop()

        with anyio.CancelScope() as answering:

            async def watch():
                while (await receive())["type"] != "http.disconnect":
                    pass
                answering.cancel()

            watching = asyncio.create_task(watch())
            try:
                await self.app(scope, replay, send)
            finally:
                watching.cancel()


# --- connections -----------------------------------------------------------------------------------------------------


class _Connections:
    """The open connections of a server.

    A connection may keep the server waiting for a while: for the headers or the body of a request, or for having read
    what was sent. Those that do are `waiting`, the longest first, and make room for new ones.
    """

    def __init__(self, options: ServerOptions):
        self.options = options
        self.limit = options.max_connections or min(1000, max_open_files() // 2)
        # asyncio accepts so many before it looks at any of them
        self.num_accepted_at_once = max(1, min(16, self.limit // 8))
        self.open: set[_Connection] = set()
        self.waiting: dict[_Connection, None] = {}
        self.last_warning = -60.0

    def add(self, connection: "_Connection") -> None:
        self.open.add(connection)
        self.waiting[connection] = None
        if len(self.open) > self.limit:
            self.make_room()

    def make_room(self) -> None:
        longest = next(iter(self.waiting), None)
        if longest is not None:
            del self.waiting[longest]
            longest.transport.abort()

    def discard(self, connection: "_Connection") -> None:
        self.open.discard(connection)
        self.waiting.pop(connection, None)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        """asyncio's errors, of which those of a lack of files come by the dozen."""
        error = context.get("exception")
        if not isinstance(error, OSError) or "socket" not in context:
            loop.default_exception_handler(context)
            return
        self.make_room()
        if time.monotonic() - self.last_warning >= 60:
            self.last_warning = time.monotonic()
            logger.warning("A connection cannot be accepted, and later ones neither for a while: %s", one_line(error))


class _Connection(H11Protocol):
    """A connection that ends when it keeps the server waiting for too long."""

    def __init__(self, connections: _Connections, *args, app_state: dict, **kwargs):
        # the requests' `state`
        super().__init__(*args, app_state={**app_state, "connection": self}, **kwargs)
        self.all = connections
        self.num_requests = 0
        self.is_unread = False  # more was sent than the client has read and the system holds
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.all.add(self)
        self._set_timer()

    def connection_lost(self, exc) -> None:
        self.timer.cancel()
        self.all.discard(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_unread = True
        self._set_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.is_unread = False
        self._set_timer()

    def _set_timer(self) -> None:
        """For what the client keeps the server waiting for now, if anything."""
        if self.timer is not None:
            self.timer.cancel()
        options, loop = self.all.options, asyncio.get_running_loop()
        if self.is_unread:
            self.timer = loop.call_later(options.body_timeout, self.transport.abort)
        elif self.num_requests == 0:
            self.timer = loop.call_later(options.header_timeout, self.transport.abort)

    @contextmanager
    def request(self):
        """While the server is busy with a request. After it, the client is to read its answer or send another."""
        self.num_requests += 1  # of which there may be two for a moment, when one follows at the other's heels
        self._set_timer()
        try:
            yield
        finally:
            self.num_requests -= 1
            if self.num_requests == 0 and self in self.all.open:
                self._set_timer()
                self.keep()
                self.all.waiting[self] = None  # as the last

    def keep(self) -> None:
        """The request has arrived: the connection waits for the server."""
        self.all.waiting.pop(self, None)

    def send_400_response(self, msg: str) -> None:  # to what is not HTTP, or has headers of more than 64 KiB
        if self.num_requests == 0:
            body = json.dumps(
                _error_body(400, "This is not an HTTP/1.1 request, or its headers are too long.")
            ).encode()
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


# --- the server ------------------------------------------------------------------------------------------------------


def build_app(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    name: str,
    options: ServerOptions = ServerOptions(),  # noqa: B008  frozen
    hosts: list[str] | None = None,
) -> Starlette:
    """The ASGI application: `POST /v1/chat/completions`, `GET /v1/models`, `GET /health`.

    It bounds requests; `Server` bounds the connections over which they come.

    Args:
        name: of the model, for clients.
        hosts: what a request's `Host` header may say. A server for one machine alone must say it, or a web page
            whose name resolves to that machine can read what is answered (DNS rebinding). Default: anything.

    Raises:
        ValueError: the model is not DeCo, or it has no chat template, or the options' grid or system message does not
            go with it.
    """
    check_is_deco(model.config.model_type, name)
    if processor.chat_template is None:
        raise ValueError(f"{name!r} has no chat template.")
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    with_system(processor, question, options.system)
    if options.pooled_grid_size is not None:
        question[0]["content"].insert(0, {"type": "image", "image": Image.new("RGB", (512, 512))})
        check_length(model, encode(processor, question, options.pooled_grid_size))
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "modeling-deco"}

    async def health(request):
        return JSONResponse({"status": "ok"})

    async def list_models(request):
        return JSONResponse({"object": "list", "data": [card]})

    async def show_model(request):
        if request.path_params["name"] != name:
            message = f"The model {_shown(request.path_params['name'])} is not served here; {_shown(name)} is."
            raise _Refused(404, message, "model", "model_not_found")
        return JSONResponse(card)

    room = _Room(options)
    chat = _Chat(model, processor, name, options, room)

    @asynccontextmanager
    async def lifespan(app):
        yield
        chat.close()

    server = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", show_model),
            Route("/health", health),
        ],
        middleware=[Middleware(_LimitMiddleware, options=options, room=room, hosts=hosts)],
        exception_handlers={HTTPException: _refuse, Exception: _fail},
        lifespan=lifespan,
    )
    server.router.redirect_slashes = False
    return server


class Server(uvicorn.Server):
    """uvicorn, with limits on connections. The application may be any; requests are told apart where it is
    `build_app`'s."""

    def __init__(self, app, options: ServerOptions = ServerOptions(), announcement: str = ""):  # noqa: B008  frozen
        self.connections = _Connections(options)
        self.announcement = announcement
        config = uvicorn.Config(
            app,
            http=partial(_Connection, self.connections),
            loop="asyncio",
            ws="none",
            backlog=self.connections.num_accepted_at_once,
            log_config=_log_config(),
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    async def startup(self, sockets=None):
        asyncio.get_running_loop().set_exception_handler(self.connections.on_loop_error)
        await super().startup(sockets)
        for listener in sockets:  # which uvicorn lets queue as few as are accepted at once
            listener.listen(1024)
        logger.info(self.announcement)


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    options: ServerOptions = ServerOptions(),  # noqa: B008  frozen
    **load_arguments,
) -> None:
    """Load a checkpoint and serve it until SIGINT or SIGTERM. The port opens when the model is there. Logs go to
    stderr, without what clients ask.

    Args:
        model: folder or Hub id.
        host: address to listen on.
        port: 0 is a free one, which the log names.
        served_model_name: the model's name for clients. Default: the Hub id, or the folder's name.
        load_arguments: of `modeling_deco.inference.load`, whose errors these are too.

    Raises:
        ValueError: host and port cannot be listened on, an empty API key, or a model that `build_app` refuses.
    """
    if options.api_key == "":
        raise ValueError("The API key is empty.")
    name = served_model_name or (Path(model).resolve().name if Path(model).is_dir() else model)
    with bind(host, port) as listener:
        address = listener.getsockname()
        is_local = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        hosts = [host.lower(), "localhost", "127.0.0.1", "::1"] if is_local else None
        app = build_app(*load(model, **load_arguments), name, options, hosts)
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        server = Server(app, options, f"{name} is served at http://{host}:{address[1]}/v1")
        if not is_local and options.api_key is None:
            logger.warning("There is no API key: whoever reaches this machine can use the server.")
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has shut down
            server.run([listener])


def _log_config() -> dict:
    config = deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config
