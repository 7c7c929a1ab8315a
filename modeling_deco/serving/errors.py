# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Refused requests, and errors in OpenAI's format."""

import json

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse


class RequestError(HTTPException):
    """A request that is refused. `param` is the field at fault, `code` OpenAI's name of the reason."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def quoted(value) -> str:
    """A value of a request, shortened for an error message."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"
    return json.dumps(value if not isinstance(value, str) or len(value) <= 60 else value[:57] + "...")


def wrong_model(given: str, served: str) -> RequestError:
    message = f"The model {quoted(given)} is not served here; use {quoted(served)}."
    return RequestError(404, message, "model", "model_not_found")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's format. Long messages are cut, and text that cannot be encoded is replaced."""
    message = message if len(message) <= 400 else message[:397] + "..."
    param = None if param is None else param[:100].encode(errors="replace").decode()
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def respond_to_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """The handler of `RequestError`, and of the errors that Starlette raises for unknown paths and methods."""
    if not isinstance(error, RequestError):
        method, path = request.method, request.url.path
        if error.status_code == 405:
            allowed = " or ".join(sorted(error.headers["Allow"].split(", ")))
            message = f"{path} does not accept {method}; use {allowed}."
        else:
            message = f"There is no {path}; the paths are /v1/chat/completions, /v1/models and /health."
        error = RequestError(error.status_code, message, headers=error.headers)
    body = error_body(error.status_code, error.detail, error.param, error.code)
    return JSONResponse(body, error.status_code, error.headers)


async def respond_to_defect(request: Request, error: Exception) -> JSONResponse:
    """The handler of all other errors. uvicorn logs them."""
    return JSONResponse(error_body(500, "The server failed; its log says why."), 500)
