# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`read_image`: every mode, every source, upright; sizes, times and addresses are bounded."""

import base64
import io
import os
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_deco.inference import ImageError, ImageLimits, PictureReader, downloads, read_image
from modeling_deco.pixels import to_rgb

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in image.getcolors()}


@pytest.fixture(scope="module")
def red() -> bytes:
    return encode(Image.new("RGB", (4, 3), RED))


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "colour", "expected", "file_format"),
    [
        ("1", 1, WHITE, "PNG"),
        ("L", 100, (100, 100, 100), "PNG"),
        ("LA", (100, 0), WHITE, "PNG"),
        ("LA", (100, 255), (100, 100, 100), "PNG"),
        ("RGB", RED, RED, "PNG"),
        ("RGBA", (*RED, 0), WHITE, "PNG"),
        ("RGBA", (*RED, 51), (255, 204, 204), "PNG"),
        ("CMYK", (0, 255, 255, 0), RED, "TIFF"),
        ("LAB", (255, 128, 128), (254, 255, 254), "TIFF"),
        ("I;16", 65535, WHITE, "PNG"),
        ("I;16", 100 * 257, (100, 100, 100), "PNG"),
        ("I;16B", 100 * 257, (100, 100, 100), "TIFF"),
        ("I", 100, (100, 100, 100), "TIFF"),
        ("F", 0.5, (128, 128, 128), "TIFF"),
        ("F", 100.0, (100, 100, 100), "TIFF"),
        ("F", float("nan"), (0, 0, 0), "TIFF"),
    ],
)
def test_a_mode_of_files_is_read(mode, colour, expected, file_format):
    image = read_image(encode(Image.new(mode, (4, 3), colour), file_format))
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert colours(image) == {expected}


@pytest.mark.parametrize("mode", ["YCbCr", "La", "PA", "RGBX", "RGBa", "HSV", "I;16L", "I;16N"])
def test_a_mode_that_files_do_not_come_in_is_converted(mode):
    assert to_rgb(Image.new(mode, (4, 3))).mode == "RGB"


def test_all_modes_of_pillow_are_tried_here():
    tried = "1 L P LA RGB RGBA CMYK YCbCr LAB I I;16 I;16B F La PA RGBX RGBa HSV I;16L I;16N".split()
    assert set(Image.MODES) <= set(tried)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_a_palette_with_a_transparent_colour_is_put_on_white(transparency):
    image = Image.new("P", (4, 3), 0)
    image.putpalette([*RED, 0, 0, 255])
    assert colours(read_image(encode(image))) == {RED}
    assert colours(read_image(encode(image, transparency=transparency))) == {WHITE}


def test_of_an_animation_the_first_frame_is_read(red):
    frames = [Image.new("RGB", (4, 3), colour) for colour in (RED, WHITE)]
    assert colours(read_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))) == {RED}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_turned_upright(orientation):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    flips = {2: np.fliplr, 3: lambda grid: np.rot90(grid, 2), 4: np.flipud, 5: np.transpose}
    flips |= {6: lambda grid: np.rot90(grid, 3), 7: lambda grid: np.rot90(grid.T, 2), 8: np.rot90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(encode(Image.fromarray(pixels), exif=exif))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], flips.get(orientation, np.asarray)(pixels))


def test_broken_exif_data_do_not_hide_the_picture():
    image = read_image(encode(Image.new("RGB", (4, 3), RED), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"))
    assert colours(image) == {RED}


# --- sources ---------------------------------------------------------------------------------------------------------


def test_paths_urls_bytes_and_files_are_read(red, tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(red)
    data_url = f"data:image/png;base64,{base64.b64encode(red).decode()}"
    quoted = "data:image/png," + "".join(f"%{byte:02x}" for byte in red)
    for source in (path, str(path), path.as_uri(), red, io.BytesIO(red), data_url, quoted):
        assert colours(read_image(source)) == {RED}


def test_a_data_url_of_escapes_takes_little_memory(red):
    data_url = "data:image/png," + "%00" * 10**6  # a picture of no kind; 100 MB where each is an object
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"not an image of the formats"):
            read_image(data_url)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    escaped = base64.b64encode(red).decode().replace("=", "%3d").replace("/", "%2F").replace("+", "%2B")
    assert colours(read_image(f"data:image/png;base64,{escaped}")) == {RED}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", r"^The image 'missing\.png' cannot be read: there is no such file\.$"),
        (Path("missing.png"), r"^The image 'missing\.png' cannot be read: there is no such file\.$"),
        (".", r"'\.' cannot be read: it is a folder\.$"),
        ("file://elsewhere/a.png", r"it is a file on another machine, 'elsewhere'\.$"),
        ("data:image/png", r"^The image cannot be read: it is a data URL without data"),
        ("data:image/png;base64,@@@@", r"its data are not base64\.$"),
        ("data:image/png;base64,%C3%A9A==", r"its data are not base64\.$"),
        (
            "data:image/png;base64,AAAA",
            r"not an image of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, JPEG2000 and AVIF\.$",
        ),
        (b"", r"^The image cannot be read: it is empty\.$"),
        (b"no picture", r"its content is not an image that Pillow can read\.$"),
        ("http://[::1/a.png", r"^The image 'http://\[::1/a\.png' cannot be read: Invalid IPv6 URL\.$"),
        (
            "http://me:secret@host/a.png",
            r"^The image 'http://\.\.\.@host/a\.png' .* URLs with a user name are not read\.$",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", r"not an image that Pillow can read\.$"),
        ("x" * 5000, r"^The image 'x{117}\.\.\.' cannot be read: File name too long\.$"),
        ("a\0b", r"there is no such file\.$"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(source, message):
    with pytest.raises(ImageError, match=message) as raised:
        read_image(source)
    assert "\n" not in str(raised.value)


def test_a_truncated_picture_is_broken():
    encoded = encode(Image.effect_noise((64, 64), 50), "JPEG")
    with pytest.raises(ImageError, match=r"^The image cannot be read: it is broken \(.*truncated"):
        read_image(encoded[: len(encoded) // 2])


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(11, 10), (100_000, 100_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(width, height):
    with pytest.raises(
        ImageError, match=r"pixels .*\b(more than the )?100\b.* allowed|more than the 100 pixels allowed"
    ):
        read_image(bomb(width, height), limits=ImageLimits(max_pixels=100))


def test_too_many_bytes_are_refused(red):
    limits = ImageLimits(max_bytes=len(red) - 1)
    data_url = f"data:image/png;base64,{base64.b64encode(red).decode()}"
    for source in (red, io.BytesIO(red), data_url, f"data:image/png;base64,{'A' * 10_000}"):
        with pytest.raises(ImageError, match=r"it has more than .* MiB\.$"):
            read_image(source, limits=limits)


def test_a_file_of_ones_own_may_be_large(red, tmp_path):
    (tmp_path / "red.png").write_bytes(red)
    assert read_image(tmp_path / "red.png", limits=ImageLimits(max_bytes=1)).size == (4, 3)


@pytest.mark.parametrize("source", ["{path}", "file://{path}", "FILE://{path}", "ftp://example.org/a.png"])
def test_a_picture_reader_refuses_files(source, red, tmp_path):
    (tmp_path / "red.png").write_bytes(red)
    with pytest.raises(ImageError, match=r"only http, https and data URLs are read\.$"):
        PictureReader().read_sync(source.format(path=tmp_path / "red.png"))


# --- downloads -------------------------------------------------------------------------------------------------------


@contextmanager
def serving(respond, tls=None):
    """A server on loopback whose handler is `respond(handler)`; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            respond(self)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *call: None  # a client that leaves is what many of these tests are about
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler, body: bytes = b"", code: int = 200, **headers):
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.usefixtures("loopback")
def test_a_url_is_read_also_through_a_redirect(red):
    def respond(handler):
        if handler.path == "/moved":
            send(handler, code=302, Location="/red.png")
        else:
            send(handler, red)

    with serving(respond) as address:
        assert colours(read_image(f"{address}/moved")) == {RED}


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize(
    ("headers", "code", "message"),
    [
        ({}, 404, r"the server answered 404 Not Found\.$"),
        ({"Location": "file:///etc/hostname"}, 302, r"cannot be read: .*file"),
        ({"Location": "/again"}, 302, r"cannot be read: .*redirect"),
    ],
)
def test_an_answer_without_a_picture_is_said(headers, code, message):
    with (
        serving(lambda handler: send(handler, code=code, **headers)) as address,
        pytest.raises(ImageError, match=message) as raised,
    ):
        read_image(f"{address}/red.png")
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("loopback")
def test_a_download_ends_at_its_size_limit():
    sent = 0

    def respond(handler):
        nonlocal sent
        send(handler)
        while True:  # without end
            sent += handler.wfile.write(b"\0" * 65536)

    with serving(respond) as address, pytest.raises(ImageError, match=r"it has more than 1 MiB\.$"):
        read_image(address, limits=ImageLimits(max_bytes=2**20))
    assert sent < 20 * 2**20


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("drips", ["headers", "body"])
def test_a_download_that_drips_ends_at_its_time_limit(drips):
    stopped = threading.Event()

    def respond(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n" + b"\r\n" * (drips == "body"))
        while not stopped.wait(0.05):
            handler.wfile.write(b"a")

    with serving(respond) as address:
        start = time.monotonic()
        with pytest.raises(ImageError, match=r"it took longer than 0\.5 seconds\.$"):
            read_image(address, limits=ImageLimits(timeout=0.5))
        stopped.set()
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("loopback")
def test_a_download_over_tls_that_drips_ends_at_its_time_limit(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    stopped = threading.Event()

    def respond(handler):
        send(handler)
        while not stopped.wait(0.05):
            handler.wfile.write(b"a")

    with serving(respond, context) as address:
        start = time.monotonic()
        with pytest.raises(ImageError, match=r"it took longer than 0\.5 seconds\.$"):
            read_image(address.replace("http://127.0.0.1", "https://localhost"), limits=ImageLimits(timeout=0.5))
        stopped.set()
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("loopback")
def test_a_connection_that_opens_after_the_time_limit_is_not_read(monkeypatch):
    resolve, asked = downloads.socket.getaddrinfo, []

    def slowly(*arguments, **kwargs):
        time.sleep(0.3)
        return resolve(*arguments, **kwargs)

    with serving(lambda handler: asked.append(handler.path)) as address:
        monkeypatch.setattr(downloads.socket, "getaddrinfo", slowly)
        with pytest.raises(ImageError, match=r"it took longer than 0\.2 seconds\.$"):
            read_image(address, limits=ImageLimits(timeout=0.2))
    assert asked == []


def test_a_pipe_is_read_to_its_end_and_a_device_to_the_limit(red, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=[red]).start()
    assert colours(read_image(str(pipe))) == {RED}
    with pytest.raises(ImageError, match=r"'/dev/zero' cannot be read: it has more than 1 MiB\.$"):
        read_image("/dev/zero", limits=ImageLimits(max_bytes=2**20))


@pytest.mark.usefixtures("loopback")
def test_nobody_answers():
    with serving(send) as address:
        pass
    with pytest.raises(ImageError, match=r"^The image 'http://127.*' cannot be read: Connection refused\.$"):
        read_image(address)


@pytest.mark.usefixtures("loopback")
def test_a_private_address_is_refused_and_not_connected_to(red):
    asked = []
    with serving(lambda handler: (asked.append(handler.path), send(handler, red))) as address:
        port = address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "0.0.0.0"):
            with pytest.raises(ImageError, match=r"is not a public address \(.*\)\.$"):
                PictureReader().read_sync(f"http://{host}:{port}/red.png")
        assert read_image(f"{address}/red.png").size == (4, 3)
    assert asked == ["/red.png"]


@pytest.mark.usefixtures("loopback")
def test_a_redirect_to_a_private_address_is_refused(red, monkeypatch):
    """The first server counts as public here, as a remote server would."""
    monkeypatch.setattr(downloads, "_is_public", lambda ip: ip == "127.0.0.1" and not asked)
    asked = []

    def respond(handler):
        asked.append(handler.path)
        send(handler, code=302, Location="/inner")

    with serving(respond) as address, pytest.raises(ImageError, match=r"'127\.0\.0\.1' is not a public address"):
        PictureReader().read_sync(f"{address}/outer")
    assert asked == ["/outer"]


@pytest.mark.usefixtures("loopback")
def test_a_name_is_resolved_once_so_that_it_cannot_change_after_the_check(red, monkeypatch):
    answers = iter(["127.0.0.1"])
    monkeypatch.setattr(downloads, "_is_public", lambda ip: ip == "127.0.0.1")
    resolve = downloads.socket.getaddrinfo

    def answer(host, port, *arguments, **kwargs):
        if host == "rebinding.example":
            return [(2, 1, 6, "", (next(answers), port))]
        return resolve(host, port, *arguments, **kwargs)

    with serving(lambda handler: send(handler, red)) as address:
        monkeypatch.setattr(downloads.socket, "getaddrinfo", answer)
        url = address.replace("127.0.0.1", "rebinding.example")
        assert PictureReader().read_sync(url).size == (4, 3)
    with pytest.raises(StopIteration):
        next(answers)


@pytest.mark.usefixtures("loopback")
def test_a_proxy_of_the_environment_is_used_for_trusted_images_alone(red, monkeypatch):
    asked = []
    with serving(lambda handler: (asked.append(handler.path), send(handler, red))) as address:
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.delenv("no_proxy", raising=False)
        assert read_image("http://pictures.invalid/red.png").size == (4, 3)
        monkeypatch.setattr(downloads, "_is_public", lambda ip: True)  # a proxy might be
        with pytest.raises(ImageError, match="cannot be read"):
            PictureReader().read_sync("http://pictures.invalid/red.png")
    assert asked == ["http://pictures.invalid/red.png"]


@pytest.mark.parametrize(
    "ip",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "198.18.0.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1"),
        *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe"),
        *("::7f00:1", "64:ff9b:1::808:808"),
    ],
)
def test_an_address_that_is_not_public(ip):
    assert not downloads._is_public(ip)


@pytest.mark.parametrize("ip", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_an_address_that_is_public(ip):
    assert downloads._is_public(ip)
