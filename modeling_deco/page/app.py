# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The ASGI application of a page."""

import hmac

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..inference.limits import UNTRUSTED_LIMITS
from .gate import Gate
from .layout import CSS
from .uploads import upload_folder


def build_app(page: gr.Blocks, password: str | None = None, hosts: list[str] | None = None) -> FastAPI:
    """The ASGI application of a page, with limits on requests.

    Args:
        password: the password that users must enter, with any user name.
        hosts: allowed values of a request's `Host` header. A page that listens on the local machine only must set it.
            Otherwise a web page whose name resolves to that machine can use it (DNS rebinding). Default: any host.
    """

    def is_right(user_name, given):
        return password is not None and hmac.compare_digest(given.encode(errors="replace"), password.encode())

    # private, seen in gradio 6.31
    page.state_session_capacity = 1000  # a new session beyond these evicts the oldest
    page.has_launched = True  # otherwise requests may name files of this machine
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page.queue(max_size=64, api_open=False),
        "/",
        auth=None if password is None else is_right,
        auth_message="Enter any user name and this page's password.",
        show_error=False,
        max_file_size=UNTRUSTED_LIMITS.max_bytes,
        theme=_theme(),
        css=CSS,
        footer_links=["gradio", "settings"],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
    )
    app.add_middleware(Gate, uploads=upload_folder())
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    return app


def _theme() -> gr.themes.Base:
    # This font is served by this server. gradio 6.31's other local fonts lack the letters of the semibold weight.
    font = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))
    return gr.themes.Default(primary_hue="indigo", font=[font, "sans-serif"])
