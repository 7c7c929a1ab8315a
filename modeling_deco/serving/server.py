# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Run an application under uvicorn, and `serve` a model."""

import asyncio
import ipaddress
import logging
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path

import uvicorn

from ..inference.loading import load
from .app import build_app
from .connections import Connection, Connections
from .options import ServerOptions
from .sockets import bind

logger = logging.getLogger("uvicorn.error")


class Server(uvicorn.Server):
    """uvicorn with limits on connections.

    Args:
        app: any ASGI application. It finds its `Connection` in a request's `state`, and enters `Connection.request()`
            while it handles the request, as the applications of `build_app` do.
        announcement: a line for the log, once the server listens.
    """

    def __init__(self, app, options: ServerOptions = ServerOptions(), announcement: str = ""):  # noqa: B008  frozen
        self.connections = Connections(options)
        self.announcement = announcement
        config = uvicorn.Config(
            app,
            http=partial(Connection, self.connections),
            loop="asyncio",
            ws="none",
            backlog=self.connections.num_accepted_at_once,
            log_config=_log_config(),
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    async def startup(self, sockets=None):
        """Start to listen, and announce it."""
        asyncio.get_running_loop().set_exception_handler(self.connections.on_loop_error)
        await super().startup(sockets)
        for listener in sockets:  # uvicorn has set the system's queue to `backlog` too, which is short
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
    """Load a checkpoint and serve it until SIGINT or SIGTERM.

    The server listens once the model is loaded. Logs go to stderr, and do not contain what clients ask.

    Args:
        model: folder or Hub id.
        host: address to listen on.
        port: 0 selects a free port; the log names it.
        served_model_name: the model's name for clients. Default: the Hub id, or the folder's name.
        load_arguments: arguments of `modeling_deco.inference.load`, whose errors are raised too.

    Raises:
        ValueError: the server cannot listen on host and port, the API key is empty, or `build_app` refuses the model.
    """
    if options.api_key == "":
        raise ValueError("The API key is empty; set one, or leave it out.")
    name = served_model_name or (Path(model).resolve().name if Path(model).is_dir() else model)
    with bind(host, port) as listener:
        address = listener.getsockname()
        is_local = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        hosts = [host.lower(), "localhost", "127.0.0.1", "::1"] if is_local else None
        app = build_app(*load(model, **load_arguments), name, options, hosts)
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        server = Server(app, options, f"{name} is served at http://{host}:{address[1]}/v1")
        if not is_local and options.api_key is None:
            logger.warning("There is no API key: everyone who can reach this machine can use the server.")
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
            server.run([listener])


def _log_config() -> dict:
    config = deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config
