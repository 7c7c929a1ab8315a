# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""No network: the Hub's client is told so before anything imports it, and each test's sockets are blocked.

The fixtures are shared by the tests of a session and must not be changed; `tiny` builds fresh ones.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny
from pytest_socket import disable_socket, enable_socket, socket_allow_hosts


def pytest_runtest_setup():
    disable_socket(allow_unix_socket=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(autouse=True)
def digits_by_default(monkeypatch):
    """Commands that name no model use the digits, whether or not a language model is installed."""
    monkeypatch.setattr("modeling_deco.inference.everyday.find_smollm2", lambda: None)


@pytest.fixture
def loopback():
    """Servers of this machine may be connected to; nothing else. The next test's setup blocks them again."""
    enable_socket()
    socket_allow_hosts(["127.0.0.1", "::1", "localhost"], allow_unix_socket=True)


@pytest.fixture(scope="session")
def model():
    """CLIP and Llama, 6 x 6 patches pooled to 3 x 3."""
    return tiny.build_model()


@pytest.fixture(scope="session")
def processor():
    """The model's."""
    return tiny.build_processor()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with the model, which answers in words of its tokenizer, and a processor with a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny.build_model()
    words = range(len(tiny.SPECIAL_TOKENS), tiny.IMAGE_TOKEN_ID)
    model.generation_config.suppress_tokens = [token for token in range(tiny.VOCAB_SIZE) if token not in words]
    model.generation_config.max_new_tokens = 6
    model.save_pretrained(folder)
    tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE).save_pretrained(folder)
    return folder
