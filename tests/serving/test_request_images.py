# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of requests: URLs, files, limits of pixels, and slow hosts and decoders."""

import base64
import os
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import openai
import pytest
from asking import COLOUR_ANSWER, COLOUR_QUESTION, PICTURE, SCENE, about, answer, ask, data_url, sent, wait_until
from PIL import Image

from modeling_deco.inference import decoders, downloads
from modeling_deco.inference.limits import ImageLimits


@pytest.fixture
def pictures():
    """A server with an image at `/picture.png`, and a redirect from `/elsewhere` to that image at another address;
    the paths that were requested."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            picture = base64.b64decode(PICTURE.partition(",")[2])
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.2:{server.server_port}/picture.png")
                self.end_headers()
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(picture)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.02,)).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
        server.shutdown()


def test_private_addresses_are_not_requested(start, port, pictures):
    for number in (port, start(allow_files=True)):
        with pytest.raises(openai.BadRequestError, match=r"Image 1: .* '127\.0\.0\.1' is not a public address"):
            ask(number, about(pictures.url + "/picture.png"))
    assert pictures.asked == []


def test_a_redirect_to_a_private_address_is_not_followed(port, pictures, monkeypatch):
    monkeypatch.setattr(downloads, "_is_public", lambda ip: ip == "127.0.0.1")
    with pytest.raises(openai.BadRequestError, match=r"Image 1: .* '127\.0\.0\.2' is not a public address"):
        ask(port, about(pictures.url + "/elsewhere"))
    assert pictures.asked == ["/elsewhere"]


def test_private_addresses_can_be_allowed(start, pictures):
    port = start(allow_private=True)
    assert answer(port, about(pictures.url + "/elsewhere", question=COLOUR_QUESTION)) == COLOUR_ANSWER


def test_files_are_refused_unless_allowed(port, start, tmp_path):
    SCENE.image.save(tmp_path / "picture.png")
    allowing = start(allow_files=True)
    for form in ("{}", "file://{}"):
        messages = about(form.format(tmp_path / "picture.png"), question=COLOUR_QUESTION)
        with pytest.raises(openai.BadRequestError, match="only http, https and data URLs are read"):
            ask(port, messages)
        assert answer(allowing, messages) == COLOUR_ANSWER


def test_the_pixels_of_a_request_are_limited(port, start):
    bomb = data_url(Image.new("1", (8000, 8000)))
    with pytest.raises(openai.BadRequestError, match="Image 1: .* more than the 50,000,000 pixels allowed"):
        ask(port, about(bomb))
    limited = start(image_limits=ImageLimits(max_pixels=3 * 96 * 96))
    assert ask(limited, about(*[PICTURE] * 3))
    with pytest.raises(
        openai.BadRequestError, match="Images 1 to 4 have 36,864 pixels together, more than the 27,648 "
    ):
        ask(limited, about(*[PICTURE] * 5))


def test_slow_hosts_do_not_delay_others_and_are_disconnected_with_the_client(start, silent_host):
    port = start(allow_private=True, max_queue=1)
    with sent(port, about(silent_host.url)), sent(port, about(silent_host.url)):
        wait_until(lambda: len(silent_host.accepted) == 2)
        for _ in range(3):
            assert ask(port, "Is there a 7?", max_tokens=1, timeout=10)
        with pytest.raises(openai.RateLimitError):  # only requests with images are refused
            ask(port, about(PICTURE))
    for connection in silent_host.accepted:
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"GET /a.png")
        assert connection.recv(1000) == b""
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER


def test_slow_images_do_not_delay_others_and_are_abandoned_with_the_client(start, monkeypatch):
    stopped, ask_decoder = [], decoders.Decoder._ask

    def stop(decoder, encoded):
        if len(stopped) < 2:
            os.kill(decoder.process.pid, signal.SIGSTOP)  # never answers
            stopped.append(decoder)
        return ask_decoder(decoder, encoded)

    monkeypatch.setattr(decoders.Decoder, "_ask", stop)
    port = start(image_limits=ImageLimits(decode_timeout=300))
    with sent(port, about(PICTURE)), sent(port, about(PICTURE)):
        wait_until(lambda: len(stopped) == 2, 60)
        assert ask(port, "Is there a 7?", max_tokens=1, timeout=30)
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION), timeout=60) == COLOUR_ANSWER
