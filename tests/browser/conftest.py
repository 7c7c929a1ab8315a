# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page of the shipped checkpoint in a process of its own, and Debian's Chromium to look at it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("serve.py")
# as root Chromium has no sandbox; the others keep it from calling its makers
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


class Server:
    """A page; `url` is where, `log` is a file with all that its process has written."""

    def __init__(self, log: Path, *arguments: str):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(SERVER), *arguments], stdout=file, stderr=subprocess.STDOUT
            )
        self.url = None
        while self.url is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"The page did not start:\n{log.read_text()}")
            match = re.search(r"Running on local URL:\s+(\S+)", log.read_text())
            self.url = match and match[1]

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("page") / "log.txt")
    yield server
    server.close()


@pytest.fixture(scope="session")
def chromium():
    path = shutil.which("chromium") or pytest.fail("There is no chromium; make test-page installs it.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, server):
    """Opens the page as a new user, with `context` options of Playwright's; at the end, no page may have complained,
    and none may have asked another host."""
    contexts, complaints = [], []

    def listen(page):
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: _is_foreign(request.url) and complaints.append(request.url))

    def _is_foreign(url):
        return not url.startswith((server.url, "data:", "blob:"))

    def open_one(url=server.url, **context):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}))
        page = contexts[-1].new_page()
        listen(page)
        page.goto(url)
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def screenshots(tmp_path):
    """Where screenshots go: SCREENSHOTS, to renew those in docs."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(exist_ok=True)
    return folder
