# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What a request can reach: the page's application, asked without a browser by what no browser sends."""

import asyncio
import io
import os
import secrets

import pytest
from starlette.testclient import TestClient

from modeling_deco.page import build_app, build_page, gate
from modeling_deco.worlds.digits.scenes import render

QUESTION = "What colour is the 2?"


@pytest.fixture(scope="module")
def build_client(shipped, uploads):
    """`build_client(password=..., hosts=...)` is a client of a page's application."""

    def build(**arguments):
        page = build_page(*shipped)
        client = TestClient(build_app(page, **arguments), base_url="http://127.0.0.1")
        client.events = {entry.name: number for number, entry in page.fns.items()}
        return client

    return build


@pytest.fixture(scope="module")
def client(build_client):
    with build_client() as client:
        yield client


def send(client, *names_and_bytes):
    files = [("files", (name, content, "image/png")) for name, content in names_and_bytes]
    return client.post("/gradio_api/upload", files=files)


def join(client, name, *data, **fields):
    """What the page answers to an event, all of it as one text."""
    session = secrets.token_hex(8)
    request = {"data": data, "fn_index": client.events[name], "session_hash": session, **fields}
    joined = client.post("/gradio_api/queue/join", json=request)
    return client.get(f"/gradio_api/queue/data?session_hash={session}").text if joined.is_success else joined.text


def picture_bytes(index=46):
    file = io.BytesIO()
    render("test", index=index, seed=2026, min_digits=3).image.save(file, format="PNG")
    return file.getvalue()


def test_an_upload_is_asked_about(client):
    (path,) = send(client, ("digits.png", picture_bytes())).json()
    said = join(client, "ask", {"path": path, "meta": {"_type": "gradio.FileData"}}, QUESTION, 6, None)
    assert ">purple.</button>" in said.replace("\\u003c", "<").replace('\\"', '"')


FILE_DATA = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("name", "meta"), [("ask", {}), ("compare", FILE_DATA), ("check", {**FILE_DATA, "url": "file:///etc/passwd"})]
)
def test_a_request_cannot_name_files_of_the_server(client, tmp_path, uploads, name, meta):
    secret = tmp_path / "secret.svg"  # gradio treats SVG files specially
    secret.write_bytes(picture_bytes())
    data = [{"path": str(secret), **meta}, QUESTION, 6, None]
    said = join(client, name, *data[: {"ask": 4, "compare": 3, "check": 1}[name]])
    assert "tokens for the image" not in said
    assert str(tmp_path) not in said
    assert not list(uploads.rglob("secret*"))
    assert client.get(f"/gradio_api/file={secret}").status_code in (403, 404)


@pytest.mark.parametrize(
    ("name", "data", "fields"),
    [
        ("ask", [], {}),
        ("ask", ["x"] * 9, {}),
        ("ask", [{"path": {"path": 1}}, [], {}, {"path": "x"}], {}),
        ("show_word", [{"answer": {"path": "/etc/passwd"}}], {"event_data": {"word": 0}}),
        ("show_word", [None], {"event_data": {"word": [0]}}),
        ("show_word", [None], {}),
        ("compare", [None, None, None], {}),
    ],
)
def test_what_no_browser_sends_is_refused_without_a_traceback(client, name, data, fields):
    said = join(client, name, *data, **fields)
    assert '"success":false' in said.replace(" ", "") or "detail" in said
    assert "Traceback" not in said
    assert "site-packages" not in said


def test_a_password_is_needed_for_everything(build_client):
    client = build_client(password="geheim ü")
    image = picture_bytes()
    assert send(client, ("x.png", image)).status_code == 401
    assert "Not authenticated" in join(client, "ask", None, QUESTION, 6, None)
    for path in ("config", "gradio_api/queue/data?session_hash=me", "gradio_api/upload_progress?upload_id=1"):
        assert client.get(f"/{path}").status_code == 401
    assert client.get("/gradio_api/file=/etc/passwd").status_code == 401
    assert "Compare budgets" not in client.get("/").text
    for password in ("", "geheim u", "geheim ü ", "\ud800".encode(errors="surrogatepass")):
        assert client.post("/login", data={"username": "x", "password": password}).status_code in (400, 422)
    assert client.post("/login", data={"username": "any", "password": "geheim ü"}).status_code == 200
    assert send(client, ("x.png", image)).status_code == 200
    assert "Compare budgets" in client.get("/").text


def test_gradios_other_routes_are_closed(client):
    assert client.get("/gradio_api/info").status_code == 200
    for path in ("config", "openapi.json", "proxy=https://x.hf.space/", "stream/a/1/2/playlist.m3u8"):
        assert client.get(f"/gradio_api/{path}").status_code == 404
    for path in ("/monitoring", "/docs", "/redoc", "/openapi.json", "/gradio_api/deep_link", "/gradio_api/dev/reload"):
        assert client.get(path).status_code == 404
    for path in ("call/ask", "api/ask", "run/ask", "component_server", "process_recording", "vibe-edit", "stream/1"):
        assert client.post(f"/gradio_api/{path}", json={"data": []}).status_code == 404
    for method in ("put", "delete", "patch", "options"):
        assert getattr(client, method)("/gradio_api/upload").status_code == 404
    for name in ("ask", "compare", "show_word", "check"):  # the model runs only by way of the queue
        request = {"data": [None] * 4, "fn_index": client.events[name]}
        assert client.post("/gradio_api/run/predict", json=request).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1"}, 200),
        ({"Origin": "https://x.live", "X-Forwarded-Host": "x.live"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Origin": "http://evil.example@127.0.0.1"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_use_the_page(client, headers, status):
    request = {"session_hash": "me", "fn_index": 1, "event_id": "x"}
    assert client.post("/gradio_api/cancel", json=request, headers=headers).status_code == status


def test_another_name_of_this_machine_is_refused(build_client):
    client = build_client(hosts=["127.0.0.1", "localhost"])
    assert client.get("/config").status_code == 200
    assert client.get("/config", headers={"Host": "rebound.example"}).status_code == 400


def test_the_length_of_requests_is_limited(client):
    def chunks():
        yield b"{}"

    assert client.post("/gradio_api/queue/join", content=chunks()).status_code == 411
    assert client.post("/gradio_api/queue/join", content=b" " * (2**20 + 1)).status_code == 413
    too_large = send(client, ("a.png", bytes(20 * 2**20)), ("b.png", bytes(13 * 2**20)))
    assert (too_large.status_code, "the maximum of 33,619,968" in too_large.text) == (413, True)


def test_the_oldest_uploads_are_deleted_to_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "_MAX_UPLOADS", 5 * 2**16)
    (tmp_path / "example.png").write_bytes(bytes(10))
    guard = gate.Gate(None, tmp_path)
    for number in range(8):
        path = tmp_path / f"{number}.png"
        path.write_bytes(bytes(number + 1))
        os.utime(path, (1000 + number, 1000 + number))
    guard._make_room(9)
    assert {path.name for path in tmp_path.iterdir()} == {"example.png", "4.png", "5.png", "6.png", "7.png"}


def test_a_request_that_does_not_arrive_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "_BODY_TIMEOUT", 0.05)
    ended, parts = [], [{"type": "http.request", "body": b"a", "more_body": True}]

    async def app(scope, receive, send):
        ended.extend([await receive(), await receive()])

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    headers = [(b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": headers, "state": {}}
    asyncio.run(gate.Gate(app, tmp_path)(scope, receive, None))
    assert [message["type"] for message in ended] == ["http.request", "http.disconnect"]
