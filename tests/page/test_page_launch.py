# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`launch`: where the page listens and what it announces; imports, and the files of the Hub Space."""

import inspect
import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import gradio
import pytest
from huggingface_hub import SpaceCard

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.page import launch as launch_page
from modeling_deco.page import server as server_module

ROOT = Path(__file__).parents[2]


def test_a_wrong_address_is_refused_before_the_model_is_loaded(socket_enabled):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken_port = taken.getsockname()[1]
        for host, port, message in [
            ("127.0.0.1", 99999, "Cannot listen on 127.0.0.1 port 99999: a port is a number from 0 to 65535."),
            ("192.0.2.7", None, "Cannot listen on 192.0.2.7 port 0: Cannot assign requested address."),
            ("127.0.0.1", taken_port, f"Cannot listen on 127.0.0.1 port {taken_port}: Address already in use."),
        ]:
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                launch_page("no/such/model", host=host, port=port)
    with pytest.raises(ValueError, match=r"^The password is empty; set one, or leave it out\.$"):
        launch_page(password="")


@pytest.fixture
def launch(socket_enabled, shipped, uploads, monkeypatch):
    """`launch`, which returns where and what it would serve instead of serving it."""
    launched, shared = [], []

    def run(server, sockets):
        launched.append((sockets[0].getsockname(), server))

    monkeypatch.setattr(server_module, "load", lambda model, **arguments: shipped)
    monkeypatch.setattr(server_module._PageServer, "run", run)
    monkeypatch.setattr(server_module, "setup_tunnel", lambda *arguments: shared.append(arguments) or "https://x.live")

    def launch(**arguments):
        launch_page(**arguments)
        ((address, server),) = launched
        return SimpleNamespace(address=address, server=server, app=server.config.app, shared=shared)

    return launch


def test_the_default_port_is_the_first_free_port_from_7860_on(socket_enabled):
    taken = []
    for port in (7860, 7861):
        with suppress(OSError):  # another process has it
            taken.append(socket.create_server(("127.0.0.1", port)))
    try:
        with server_module._bind("127.0.0.1", None) as bound:
            assert 7862 <= bound.getsockname()[1] < 7960
    finally:
        for one in taken:
            one.close()


WARNING = "There is no password: everyone who can reach the page can use it. Set one with DECO_PASSWORD.\n"


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        ({"host": "::1"}, ""),
        ({"host": "0.0.0.0"}, WARNING),
        ({"host": "0.0.0.0", "password": "secret"}, ""),
        ({"share": True}, WARNING),
    ],
)
def test_a_page_that_others_can_reach_warns_without_a_password(launch, capsys, arguments, warning):
    launched = launch(port=0, **arguments)
    assert capsys.readouterr() == ("", warning)
    assert launched.app.routes[-1].app.auth is None or "password" in arguments


def test_a_shared_page_announces_both_addresses(launch):
    launched = launch(port=0, share=True, password="secret")
    port = launched.address[1]
    ((host, local_port, token, *others),) = launched.shared
    assert (host, local_port, others) == ("127.0.0.1", port, [None, None])
    assert len(token) > 30
    inspect.signature(gradio.networking.setup_tunnel).bind(host, local_port, token, *others)
    expected = f"Running on local URL:  http://127.0.0.1:{port}\nRunning on public URL: https://x.live"
    assert launched.server.announcement == expected


def test_without_gradio_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("modeling_deco.page")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'^The page needs gradio: pip install "\.\[page\]" in a clone'):
        import modeling_deco.page  # noqa: F401


def test_the_space_pins_its_versions():
    card = SpaceCard.load(ROOT / "examples" / "space" / "README.md").data
    assert (card.sdk, card.sdk_version, card.app_file, card.license) == ("gradio", "6.31.0", "app.py", "apache-2.0")
    lines = (ROOT / "examples" / "space" / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\d.]+", line) for line in lines)


@pytest.mark.slow
def test_the_space_starts(tmp_path):
    app = ROOT / "examples" / "space" / "app.py"
    process = subprocess.Popen(
        [sys.executable, "-u", str(app)],
        cwd=tmp_path,
        env={**os.environ, "MODEL_ID": str(SHIPPED_CHECKPOINT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("Running on local URL:  http://0.0.0.0:" in line for line in process.stderr)
    finally:
        process.terminate()
        process.wait()
