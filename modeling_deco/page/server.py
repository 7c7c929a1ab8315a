# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a model and serve its page."""

import ipaddress
import logging
import os
import secrets
import sys
import tempfile
import webbrowser
from contextlib import suppress
from pathlib import Path

from gradio.networking import setup_tunnel  # private, seen in gradio 6.31
from PIL import Image

from .. import SHIPPED_CHECKPOINT
from ..inference import everyday
from ..inference.generation import stream
from ..inference.loading import load
from ..serving import Server
from ..serving.sockets import bind
from ..utils.files import read_json
from .app import build_app
from .layout import build_page

EXAMPLES = "examples/examples.json"  # in a shipped checkpoint: what it knows, pictures, and questions about them


def launch(
    model: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    share: bool = False,
    open_browser: bool = False,
    max_new_tokens: int = 128,
    **load_arguments,
) -> None:
    """Load a model and serve its page until interrupted.

    Args:
        model: folder or Hub id. Default: `default_checkpoint()`.
        host: address to listen on; `"0.0.0.0"` for all.
        port: 0 selects a free port. Default: the first free port from 7860 on.
        password: the password that users must enter, with any user name.
        share: also request a public address from gradio.live, which then relays all traffic.
        open_browser: open the page in this machine's browser.
        max_new_tokens: maximum length of an answer.
        load_arguments: arguments of `modeling_deco.inference.load`.

    Raises:
        ValueError: the server cannot listen on host and port, or the password is empty.
        OSError, ValueError, ImportError: see `load`.
    """
    if password == "":
        raise ValueError("The password is empty; set one, or leave it out.")
    model = str(everyday.default_checkpoint()) if model is None else model
    with _bind(host.strip("[]"), port) as listener, tempfile.TemporaryDirectory(prefix="deco-page-") as uploads:
        loaded, processor = load(model, **load_arguments)
        _warm_up(loaded, processor)
        os.environ["GRADIO_TEMP_DIR"] = uploads  # only for this page, and deleted with it
        page = _page(model, loaded, processor, max_new_tokens)
        address, port = listener.getsockname()[:2]
        is_local = ipaddress.ip_address(address.partition("%")[0]).is_loopback and not share
        if not is_local and password is None:
            sys.stderr.write(
                "There is no password: everyone who can reach the page can use it. Set one with DECO_PASSWORD.\n"
            )
        hosts = [host.strip("[]"), "localhost", "127.0.0.1", "::1", "[::1]"] if is_local else None
        app = build_app(page, password, hosts)
        url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        announcement = f"Running on local URL:  {url}"
        if share:
            public_url = setup_tunnel(address, port, secrets.token_urlsafe(32), None, None)
            announcement += f"\nRunning on public URL: {public_url}"
        server = _PageServer(app, announcement=announcement)
        server.opened_url = url if open_browser else None
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
            server.run([listener])


def _page(name: str, model, processor, max_new_tokens: int):
    about, examples = f"This model has {model.num_parameters() / 1e6:.1f} million parameters.", None
    for folder in (SHIPPED_CHECKPOINT, everyday.cached_path()):
        if Path(name).exists() and folder.exists() and Path(name).samefile(folder) and (folder / EXAMPLES).is_file():
            shipped = read_json(folder / EXAMPLES)
            about = f"{about} {shipped['about']}"
            examples = [(str(folder / "examples" / file), text) for file, text in shipped["questions"].items()]
    return build_page(
        model,
        processor,
        name=Path(name).resolve().name,
        about=about,
        examples=examples,
        max_new_tokens=max_new_tokens,
    )


def _warm_up(model, processor) -> None:
    """Generate one token. The first answer takes longer, and a model that cannot answer fails now."""
    content = [{"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": "?"}]
    for _ in stream(model, processor, [{"role": "user", "content": content}], max_new_tokens=1):
        pass


def _bind(host: str, port: int | None):
    """The socket of a port, or of the first free port from 7860 on."""
    if port is not None:
        return bind(host, port)
    bind(host, 0).close()  # raises an error if the address does not belong to this machine
    for port in range(7860, 7960):
        with suppress(ValueError):
            return bind(host, port)
    return bind(host, 0)


class _PageServer(Server):
    opened_url: str | None = None

    async def startup(self, sockets=None):
        logging.getLogger("uvicorn.access").disabled = True  # opening the page takes a hundred requests
        await super().startup(sockets)
        if self.opened_url is not None:
            webbrowser.open(self.opened_url)
