# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Servers of the shipped checkpoint, and what its model does."""

import socket
import time
from contextlib import ExitStack, suppress
from threading import Thread
from types import SimpleNamespace

import pytest
import pytest_socket
from asking import NAME, running

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.inference.loading import load
from modeling_deco.serving import ServerOptions, build_app


@pytest.fixture(scope="session")
def shipped():
    return load(str(SHIPPED_CHECKPOINT))


def allow_loopback():
    pytest_socket.enable_socket()
    pytest_socket.socket_allow_hosts(["127.0.0.1", "127.0.0.2"], allow_unix_socket=True)


@pytest.fixture(autouse=True)
def loopback():
    allow_loopback()
    yield
    pytest_socket._remove_restrictions()


@pytest.fixture
def start(shipped):
    """`start(option=...)` starts a server with that option and returns its port."""
    with ExitStack() as stack:
        yield lambda hosts=None, **options: stack.enter_context(
            running(build_app(*shipped, NAME, ServerOptions(**options), hosts), ServerOptions(**options))
        )


@pytest.fixture(scope="module")
def port(shipped):
    """The port of a server with the default options."""
    allow_loopback()
    with running(build_app(*shipped, NAME)) as number:
        yield number


@pytest.fixture
def steps(shipped, monkeypatch):
    """A model that generates slowly until its answer is as long as allowed. The list gets the number of tokens that go
    into the model at each step."""
    lengths = []

    def note(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        time.sleep(0.02)

    model = shipped[0]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [model.generation_config.eos_token_id])
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield lengths
    hook.remove()


@pytest.fixture
def looks(shipped):
    """A list that grows each time that the vision tower runs."""
    calls = []
    hook = shipped[0].model.vision_tower.register_forward_pre_hook(lambda module, args: calls.append(1))
    yield calls
    hook.remove()


@pytest.fixture
def silent_host():
    """A host that accepts connections and sends nothing: its address, and the connections."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:

        def accept():
            with suppress(OSError):
                while True:
                    accepted.append(stack.enter_context(listener.accept()[0]))

        Thread(target=accept, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}/a.png", accepted=accepted)
        listener.shutdown(socket.SHUT_RDWR)
