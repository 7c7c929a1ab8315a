# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The ASGI application of a server."""

import time
from contextlib import asynccontextmanager
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import PreTrainedModel, ProcessorMixin

from ..inference.generation import check_length, encode, with_system
from ..inference.loading import check_is_deco
from .chat import ChatEndpoint
from .errors import respond_to_defect, respond_to_http_error, wrong_model
from .limits import Capacity, LimitMiddleware
from .options import ServerOptions


def build_app(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    name: str,
    options: ServerOptions = ServerOptions(),  # noqa: B008  frozen
    hosts: list[str] | None = None,
) -> Starlette:
    """The ASGI application: `POST /v1/chat/completions`, `GET /v1/models`, `GET /health`.

    It limits requests; `Server` limits connections.

    Args:
        name: the model's name for clients.
        hosts: allowed values of a request's `Host` header. A server that listens on the local machine only must set
            it. Otherwise a web page whose name resolves to that machine can read the answers (DNS rebinding).
            Default: any host.

    Raises:
        ValueError: the model is not DeCo, it has no chat template, or the options' grid or system message does not fit
            it.
    """
    _check(model, processor, name, options)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "modeling-deco"}

    async def health(request):
        return JSONResponse({"status": "ok"})

    async def list_models(request):
        return JSONResponse({"object": "list", "data": [card]})

    async def show_model(request):
        if request.path_params["name"] != name:
            raise wrong_model(request.path_params["name"], name)
        return JSONResponse(card)

    capacity = Capacity(options)
    chat = ChatEndpoint(model, processor, name, options, capacity)

    @asynccontextmanager
    async def lifespan(app):
        yield
        chat.close()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", show_model),
            Route("/health", health),
        ],
        middleware=[Middleware(LimitMiddleware, options=options, capacity=capacity, hosts=hosts)],
        exception_handlers={HTTPException: respond_to_http_error, Exception: respond_to_defect},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _check(model: PreTrainedModel, processor: ProcessorMixin, name: str, options: ServerOptions) -> None:
    """Raise a ValueError if the model cannot answer a question with these options."""
    check_is_deco(model.config.model_type, name)
    if processor.chat_template is None:
        raise ValueError(f"{name!r} has no chat template.")
    question: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    with_system(processor, question, options.system)
    if options.budgets:
        question[0]["content"].insert(0, {"type": "image", "image": Image.new("RGB", (512, 512))})
        check_length(model, encode(processor, question, **options.budgets))
