# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server of one DeCo model.

`transformers serve` looks up classes and modalities in static name tables, and so fails for every registered or
remote-code model. It also decodes images in the event loop, follows any image URL, ignores fields that it does not
know, and continues to generate when a client has disconnected.

A request passes these steps, each of which stops when the client disconnects:

1. `connections`: the client sends its headers in time.
2. `limits`: the host, the API key, the size of the body, and the time that it takes to arrive.
3. `schema`: the body is checked field by field.
4. `chat`: images are read and encoded while other requests are answered; then the request waits for the model.
5. `answer`: the model generates one answer at a time, in a thread.
6. `responses`: the answer is sent in OpenAI's formats.
"""

try:
    import anyio  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        'The server needs starlette and uvicorn: pip install ".[serve]" in a clone of modeling-deco'
    ) from error

from .app import build_app
from .options import ServerOptions
from .server import Server, serve

__all__ = ["Server", "ServerOptions", "build_app", "serve"]
