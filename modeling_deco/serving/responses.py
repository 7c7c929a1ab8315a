# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""An answer in OpenAI's formats: one JSON object, or server-sent events."""

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.responses import JSONResponse, StreamingResponse

from ..inference.generation import NaNError
from ..utils.errors import one_line
from .answer import Answer
from .errors import RequestError, error_body

logger = logging.getLogger("uvicorn.error")  # uvicorn's own, so that all lines have one format and one destination


@dataclass
class ResponseOptions:
    """How an answer is sent."""

    model: str
    num_prompt_tokens: int
    stream: bool
    include_usage: bool


async def respond(answer: Answer, options: ResponseOptions) -> JSONResponse | StreamingResponse:
    """The response, once its status is known: after the first piece of the answer."""
    first = await answer.pieces.get()
    if isinstance(first, NaNError):
        raise RequestError(500, one_line(first), code="damaged_model")
    if isinstance(first, ValueError):  # the model's, for example of a grid that is larger than the patch grid
        raise RequestError(400, one_line(first), code="invalid_value")
    if isinstance(first, Exception):
        raise first
    format_ = _Format(options.model)
    if options.stream:
        return StreamingResponse(_events(answer, first, format_, options), media_type="text/event-stream")
    text = ""
    piece = first
    while piece is not None:
        text += piece
        piece = await answer.pieces.get()
        if isinstance(piece, Exception):
            raise piece
    return JSONResponse(format_.whole(text, answer.finish_reason, _usage(answer, options)))


async def _events(answer: Answer, piece: str | None, format_: "_Format", options: ResponseOptions) -> AsyncIterator:
    yield _event(format_.chunk({"role": "assistant", "content": ""}))
    while piece is not None:
        yield _event(format_.chunk({"content": piece}))
        piece = await answer.pieces.get()
        if isinstance(piece, Exception):  # the status has been sent
            logger.error("An error ended an answer early", exc_info=piece)
            yield _event(error_body(500, "An error ended the answer early; the server's log says why."))
            return
    yield _event(format_.chunk({}, answer.finish_reason))
    if options.include_usage:
        yield _event(format_.usage(_usage(answer, options)))
    yield "data: [DONE]\n\n"


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(answer: Answer, options: ResponseOptions) -> dict:
    prompt, completion = options.num_prompt_tokens, answer.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Format:
    """The objects of one answer, which share an id."""

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
