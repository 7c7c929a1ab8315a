# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server of one DeCo model: transformers' own, where it can be used.

`transformers serve` looks up classes and modalities in static name tables, and so fails for every registered or
remote-code model; it decodes pictures in the event loop, follows any image URL, drops what it does not know, and goes
on when a client has left. Taken from it (seen in 5.17 to 5.23) are the inference thread, the streamer that can cancel
generation, the sampling parameters and the forms of the responses. What comes in is this module's own.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils.import_utils import is_serve_available

from .errors import one_line
from .images import UNTRUSTED_LIMITS, ImageError, ImageLimits, read_image
from .inference import encode, load
from .loading import check_is_deco
from .prompt_cache import PromptCache
from .sockets import bind

if not is_serve_available():
    raise ImportError("The server needs fastapi, openai, pydantic and uvicorn: pip install 'modeling-deco[serve]'")

import anyio
import uvicorn
from openai.types.chat import ChatCompletionChunk
from openai.types.completion_usage import CompletionUsage
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import DirectStreamer, GenerationState, InferenceThread, _GenerationCancelled

# uvicorn's own, so that all lines look alike and go to one place
logger = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class ServerOptions:
    """What a server allows.

    Attributes:
        api_key: what clients must send as `Authorization: Bearer KEY`; `/health` is open.
        allow_files: whether an image URL may name a file of this machine.
        allow_private: whether an image URL may lead to an address that is not public.
        max_queue: requests that may wait while one is answered; more are told to come back.
        max_body_bytes: of a request.
        body_timeout: seconds that a request may take to arrive.
        max_images: in a request.
        max_new_tokens: longest answer, and the one where a request does not say.
        prompt_cache_bytes: of keys and values kept of earlier prompts and answers, for the requests that begin with
            them; see `PromptCache`.
        image_limits: of each image; its pixels are also the most that all images of a request may have together.
    """

    api_key: str | None = None
    allow_files: bool = False
    allow_private: bool = False
    max_queue: int = 32
    max_body_bytes: int = 32 * 2**20
    body_timeout: float = 60.0
    max_images: int = 8
    max_new_tokens: int = 1024
    prompt_cache_bytes: int = 2**30
    image_limits: ImageLimits = UNTRUSTED_LIMITS


# --- requests --------------------------------------------------------------------------------------------------------


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _ImageURL(BaseModel):
    url: str


class _Image(BaseModel):
    type: Literal["image_url"]
    image_url: _ImageURL


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[_Text | _Image, Field(discriminator="type")]] = Field(max_length=1024)
    tool_calls: None = None
    function_call: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _to_parts(cls, content):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class _ProcessorKwargs(BaseModel):
    model_config = ConfigDict(extra="forbid")
    pooled_grid_size: Any = None


class _ChatRequest(BaseModel):
    """OpenAI's fields. What would change the answer and is not done here is refused, not passed over."""

    model_config = ConfigDict(extra="forbid")

    messages: list[_Message] = Field(min_length=1, max_length=1024)
    model: str | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(None, max_length=4)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    pooled_grid_size: Any = None  # ours, and the same in vLLM's form; the processor judges it
    mm_processor_kwargs: _ProcessorKwargs | None = None

    # clients send these with the value that changes nothing
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict | None = Field(None, max_length=0)
    modalities: list[Literal["text"]] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: list | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    # and these have no say in it
    metadata: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def _to_list(cls, stop):
        return [stop] if isinstance(stop, str) else stop

    @property
    def grid(self):
        places = (self, self.mm_processor_kwargs or self)
        first, *others = [place.pooled_grid_size for place in places if place.pooled_grid_size is not None] or [None]
        if others and others != [first]:
            raise ValueError("pooled_grid_size and mm_processor_kwargs.pooled_grid_size are not the same.")
        return first


def _parse(body: bytes) -> _ChatRequest:
    try:
        return _ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise HTTPException(400, f"{field}: {first['msg']}" if field else first["msg"]) from None


@dataclass
class _Task:
    """What is left of a request when it waits for the model."""

    inputs: dict
    config: GenerationConfig
    seed: int | None
    stop: list[str]
    stream: bool
    include_usage: bool

    @property
    def num_prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[-1]


# --- answers ---------------------------------------------------------------------------------------------------------


class _Answer(DirectStreamer):
    """An answer on its way from the inference thread to the event loop, as pieces of text in `queue`; after the last
    comes None, in place of it the exception that ended it. Made in the event loop."""

    def __init__(self, tokenizer, stop: list[str]):
        self.queue = asyncio.Queue()
        super().__init__(tokenizer._tokenizer, asyncio.get_running_loop(), self.queue)
        self.stop = stop
        self.held = ""  # the end of the text so far, where it may be the beginning of a stop text
        self.finish_reason = "length"

    def generate(self, prompts: PromptCache, inputs: dict, config: GenerationConfig, seed: int | None) -> None:
        """Runs in the inference thread."""
        try:
            if self._cancelled.is_set():
                return
            # A request with a seed must not decide what the ones after it draw.
            torch.manual_seed(torch.seed() if seed is None else seed)
            (sequence,) = prompts.generate(**inputs, generation_config=config, streamer=self)
            eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            if len(sequence) - inputs["input_ids"].shape[-1] < config.max_new_tokens or sequence[-1].item() in eos:
                self.finish_reason = "stop"
            self._push(self.held, None)
        except _GenerationCancelled:
            self._push(None)
        except Exception as error:
            self._push(error)

    def end(self):
        """`generate` ends the answer, which knows why it ended."""

    def _enqueue(self, text):
        text = self.held + text
        ends = [text.index(stop) for stop in self.stop if stop in text]
        if ends:
            self.finish_reason = "stop"
            self._push(text[: min(ends)])
            raise _GenerationCancelled
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - held :]
        self._push(text[: len(text) - held])

    def _push(self, *items):
        for item in items:
            if item != "":
                self._loop.call_soon_threadsafe(self.queue.put_nowait, item)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)


class _Chat(ChatCompletionHandler):
    """`/v1/chat/completions`, an ASGI application: what it started it stops, however it is left."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str, options: ServerOptions):
        super().__init__(None, GenerationState())
        self.model = model
        self.processor = processor
        self.name = name
        self.options = options
        # some language models have no limit; then it is ours, for a prompt must have one
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 131_072
        self.inference = InferenceThread()
        self.prompts = PromptCache(model, options.prompt_cache_bytes)
        # Few, for Pillow holds 4 bytes for each pixel, and a transparent picture five times while it turns to RGB.
        self.workers = ThreadPoolExecutor(2, thread_name_prefix="prepare")

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        # A browser sends a page's JSON elsewhere only after asking, which is not answered: no page of another site
        # can use a server on its reader's machine.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Content-Type must be application/json.")
        # nothing here keeps the body: a request that waits is a few tensors
        loop = asyncio.get_running_loop()
        task = await loop.run_in_executor(self.workers, self._prepare, (await receive())["body"])
        answer = _Answer(self.processor.tokenizer, task.stop)
        try:
            self.inference.submit(answer.generate, self.prompts, task.inputs, task.config, task.seed)
            response = await self._respond(answer, task)
            await response(scope, receive, send)
        finally:
            answer.cancel()

    # runs in a worker thread: decoding, downloads and tokenization take long
    def _prepare(self, body: bytes) -> _Task:
        chat = _parse(body)
        if chat.model not in (None, self.name):
            raise HTTPException(404, f"The model {chat.model!r} is not served here; {self.name!r} is.")
        try:
            inputs = self._encode(chat)
        except (ValueError, TemplateError) as error:
            raise HTTPException(400, one_line(error)) from error
        return _Task(
            inputs=inputs,
            config=self._generation_config(chat, inputs["input_ids"].shape[-1]),
            seed=chat.seed,
            stop=chat.stop or [],
            stream=bool(chat.stream),
            include_usage=chat.stream_options is not None and bool(chat.stream_options.include_usage),
        )

    def _encode(self, chat: _ChatRequest) -> dict:
        parts = [part for message in chat.messages for part in message.content]
        num_images = sum(part.type == "image_url" for part in parts)
        if num_images > self.options.max_images:
            raise ValueError(f"{num_images} images are more than the {self.options.max_images} allowed in a request.")
        # before they are read: neither a prompt nor a grid without bound is made into tokens
        kwargs = {} if chat.grid is None else {"pooled_grid_size": chat.grid}
        budget = self.processor._get_num_multimodal_tokens(image_sizes=[(1, 1)] * num_images, **kwargs)
        num_tokens = sum(budget["num_image_tokens"] or ())
        num_characters = sum(len(part.text) for part in parts if part.type == "text")
        if num_tokens > self.context or num_characters > 64 * self.context:
            raise ValueError(
                f"{num_tokens} tokens of images and {num_characters} characters of text do not fit the model's "
                f"context of {self.context} tokens."
            )
        return encode(self.processor, self._read(chat.messages), chat.grid).to(self.model.device)

    def _read(self, messages: list[_Message]) -> list[dict]:
        conversation, position, num_pixels = [], 0, 0
        for message in messages:
            content = []
            for part in message.content:
                if part.type == "text":
                    content.append({"type": "text", "text": part.text})
                    continue
                position += 1
                try:
                    image = read_image(
                        part.image_url.url,
                        limits=self.options.image_limits,
                        allow_files=self.options.allow_files,
                        allow_private=self.options.allow_private,
                    )
                except ImageError as error:
                    raise ValueError(f"Image {position}: {error}") from error
                num_pixels += image.width * image.height
                if num_pixels > self.options.image_limits.max_pixels:
                    raise ValueError(
                        f"Images 1 to {position} have {num_pixels:,} pixels together, more than the "
                        f"{self.options.image_limits.max_pixels:,} allowed in a request."
                    )
                content.append({"type": "image", "image": image})
            conversation.append({"role": message.role.replace("developer", "system"), "content": content})
        return conversation

    def _generation_config(self, chat: _ChatRequest, num_prompt_tokens: int) -> GenerationConfig:
        room = self.context - num_prompt_tokens
        asked = chat.max_completion_tokens or chat.max_tokens
        if asked is not None and asked > self.options.max_new_tokens:
            raise HTTPException(400, f"max_tokens {asked} is more than the {self.options.max_new_tokens} allowed.")
        if room < (asked or 1):
            raise HTTPException(
                400,
                f"{num_prompt_tokens} tokens of the prompt and {asked or 1} of the answer do not fit the model's "
                f"context of {self.context} tokens.",
            )
        body = {"temperature": chat.temperature, "top_p": chat.top_p}
        body["max_tokens"] = asked or min(room, self.options.max_new_tokens)
        config = self._build_generation_config(body, self.model.generation_config)
        # transformers' server leaves this to the model's default, and greedy decoding passes over a temperature
        if chat.temperature is not None:
            config.do_sample = chat.temperature > 1e-5  # below, logits overflow
        elif chat.top_p is not None and chat.top_p < 1:
            config.do_sample = True
        config.update(num_beams=1, num_return_sequences=1, return_dict_in_generate=False)  # one answer, streamed
        return config

    async def _respond(self, answer: _Answer, task: _Task):
        first = await answer.queue.get()  # what fails before the first word has a status
        if isinstance(first, ValueError):  # the model's: of a grid larger than the patch grid
            raise HTTPException(400, one_line(first))
        if isinstance(first, Exception):
            raise first
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        if task.stream:
            return StreamingResponse(self._events(answer, first, request_id, task), media_type="text/event-stream")
        text = ""
        piece = first
        while piece is not None:
            text += piece
            piece = await answer.queue.get()
            if isinstance(piece, Exception):
                raise piece
        usage = _usage(answer, task)
        return JSONResponse(self._build_completion(request_id, text, self.name, answer.finish_reason, usage))

    async def _events(self, answer: _Answer, piece: str | None, request_id: str, task: _Task) -> AsyncIterator[str]:
        yield self._build_chunk_sse(request_id, model=self.name, role="assistant", content="")
        while piece is not None:
            yield self._build_chunk_sse(request_id, model=self.name, content=piece)
            piece = await answer.queue.get()
            if isinstance(piece, Exception):  # too late for a status
                logger.error("An answer was cut short", exc_info=piece)
                yield f"data: {json.dumps(_error_body(500, 'The answer was cut short by an error.'))}\n\n"
                return
        yield self._build_chunk_sse(request_id, model=self.name, finish_reason=answer.finish_reason)
        if task.include_usage:
            chunk = ChatCompletionChunk(
                id=request_id,
                choices=[],
                created=int(time.time()),
                model=self.name,
                object="chat.completion.chunk",
                usage=_usage(answer, task),
            )
            yield self.chunk_to_sse(chunk)
        yield "data: [DONE]\n\n"


def _usage(answer: _Answer, task: _Task) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=task.num_prompt_tokens,
        completion_tokens=answer.total_tokens,
        total_tokens=task.num_prompt_tokens + answer.total_tokens,
    )


# --- errors ----------------------------------------------------------------------------------------------------------


def _error_body(status: int, message: str) -> dict:
    """OpenAI's form, which does not repeat what a client sent at length."""
    message = message if len(message) <= 400 else message[:397] + "..."
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _refuse(request, error: HTTPException) -> JSONResponse:
    return JSONResponse(_error_body(error.status_code, error.detail), error.status_code, error.headers)


async def _fail(request, error: Exception) -> JSONResponse:
    return JSONResponse(_error_body(500, "The server failed; its log says why."), 500)  # the log is uvicorn's


# --- limits ----------------------------------------------------------------------------------------------------------


class _LimitMiddleware:
    """ASGI middleware: so many requests, of so many bytes, in so much time come in, and one whose client hangs up is
    cancelled, wherever it is."""

    def __init__(self, app, options: ServerOptions):
        self.app = app
        self.options = options
        self.num_in_flight = 0  # requests that have arrived, and are not answered
        self.num_bytes_arriving = 0  # of those that have not

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._check_key(request)
            if request.method != "POST":
                await self.app(scope, receive, send)
                return
            body = [await self._read(request)]  # a list, so that nothing here keeps it
            self._check_room()
            self.num_in_flight += 1
            try:
                await self._answer(body.pop(), scope, receive, send)
            finally:
                self.num_in_flight -= 1
        except HTTPException as error:
            await (await _refuse(request, error))(scope, receive, send)
        except (ClientDisconnect, asyncio.CancelledError):  # the client has left, or the server is going down
            return

    def _check_room(self) -> None:
        # A request that only trickles in must not keep the others out: until it is there, its bytes count alone.
        max_requests = self.options.max_queue + 1
        if self.num_in_flight >= max_requests or self.num_bytes_arriving > max_requests * self.options.max_body_bytes:
            raise HTTPException(429, "Too many requests are waiting; try again.", {"Retry-After": "1"})

    def _check_key(self, request: Request) -> None:
        key = self.options.api_key
        if key is None or request.scope["path"] == "/health":
            return
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        if not hmac.compare_digest(f"Bearer {key}".encode(), given):
            raise HTTPException(401, "The API key is missing or wrong.", {"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request) -> bytes:
        too_large = HTTPException(413, f"The request has more than {self.options.max_body_bytes:,} bytes.")
        if int(request.headers.get("content-length", 0)) > self.options.max_body_bytes:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            try:
                async for piece in request.stream():
                    body += piece
                    self.num_bytes_arriving += len(piece)
                    if len(body) > self.options.max_body_bytes:
                        raise too_large
                    self._check_room()
                return bytes(body)
            finally:
                self.num_bytes_arriving -= len(body)

        try:
            return await asyncio.wait_for(read(), self.options.body_timeout)
        except asyncio.TimeoutError:
            headers = {"Connection": "close"}
            raise HTTPException(408, f"It took over {self.options.body_timeout:g} s to arrive.", headers) from None

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


# --- the server ------------------------------------------------------------------------------------------------------


def build_app(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    name: str,
    options: ServerOptions = ServerOptions(),  # noqa: B008  frozen
    hosts: list[str] | None = None,
) -> Starlette:
    """The ASGI application: `POST /v1/chat/completions`, `GET /v1/models`, `GET /health`.

    Args:
        name: of the model, for clients.
        hosts: what a request's `Host` header may say. A server for one machine alone must say it, or a web page
            whose name resolves to that machine can read what is answered (DNS rebinding). Default: anything.

    Raises:
        ValueError: the model is not DeCo, or it has no chat template.
    """
    check_is_deco(model.config.model_type, name)
    if processor.chat_template is None:
        raise ValueError(f"{name!r} has no chat template.")
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "modeling-deco"}

    async def health(request):
        return JSONResponse({"status": "ok"})

    async def list_models(request):
        return JSONResponse({"object": "list", "data": [card]})

    async def show_model(request):
        if request.path_params["name"] != name:
            raise HTTPException(404, f"The model {request.path_params['name']!r} is not served here; {name!r} is.")
        return JSONResponse(card)

    server = Starlette(
        routes=[
            Route("/v1/chat/completions", _Chat(model, processor, name, options), methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", show_model),
            Route("/health", health),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
            Middleware(_LimitMiddleware, options=options),
        ],
        exception_handlers={HTTPException: _refuse, Exception: _fail},
    )
    server.router.redirect_slashes = False
    return server


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
        hosts = [host, "localhost", "127.0.0.1", "::1", "[::1]"] if is_local else None
        app = build_app(*load(model, **load_arguments), name, options, hosts)
        config = uvicorn.Config(app, ws="none", log_config=_log_config(), timeout_graceful_shutdown=5)
        if not is_local and options.api_key is None:
            logger.warning("There is no API key: whoever reaches this machine can use the server.")
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has shut down
            _Server(config, f"{name} is served at http://{host}:{address[1]}/v1").run([listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announcement: str):
        super().__init__(config)
        self.announcement = announcement

    async def startup(self, sockets=None):
        await super().startup(sockets)
        logger.info(self.announcement)


def _log_config() -> dict:
    config = deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config
