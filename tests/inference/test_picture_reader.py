# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`PictureReader`: what others send or name costs no more time, memory and connections than its limits say."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import RED, colours, encode, send, serving

from modeling_deco.inference import ImageError, ImageLimits, PictureReader, decoders, downloads, limits, read_image
from modeling_deco.inference.limits import UNTRUSTED_LIMITS
from modeling_deco.utils.decoding import LENGTH, READY

NINE = "JPEG PNG WEBP GIF BMP TIFF PPM JPEG2000 AVIF".split()


def progressive_bomb(side: int, num_scans: int) -> bytes:
    """A grey JPEG; each scan is a few bytes and passes over all of its blocks."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    bits = "011111111111111" * (side * side // 64 // 32767 + 1)  # "the next 32767 blocks change nothing"
    bits += "1" * (-len(bits) % 8)
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0]))
    scan += int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\x00" + b"\x01" * 64)
        + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
        + segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))
        + scan * num_scans
        + b"\xff\xd9"
    )


@pytest.fixture(scope="module")
def red() -> bytes:
    return encode(Image.new("RGB", (4, 3), RED))


@pytest.fixture
def make():
    """`PictureReader`, closed at the end."""
    readers = []

    def make_reader(*arguments, **kwargs) -> PictureReader:
        readers.append(PictureReader(*arguments, **kwargs))
        return readers[-1]

    yield make_reader
    for reader in readers:
        reader.close()


@pytest.fixture
def timers(monkeypatch):
    """Timers that end at once, if `at` says so; the list of their seconds."""

    class Timer(threading.Timer):
        def start(self):
            seconds.append(self.interval)
            if self.interval == seconds.at:
                self.function()

        def cancel(self):
            pass

    class Seconds(list):
        at = None

    seconds = Seconds()
    monkeypatch.setattr(limits.threading, "Timer", Timer)
    return seconds


# --- pixels and formats ----------------------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    rgba, grey = Image.fromarray(noise, "RGBA"), Image.fromarray(noise[..., 0])
    rgb, palette = rgba.convert("RGB"), rgba.convert("RGB").quantize(8)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    found = {name: encode(rgb, name) for name in NINE}
    found |= {f"{name} with alpha": encode(rgba, name) for name in ("PNG", "WEBP", "TIFF", "AVIF", "JPEG2000")}
    found |= {f"{mode} in TIFF": encode(rgb.convert(mode), "TIFF") for mode in ("1", "L", "CMYK", "LAB", "F", "I")}
    found |= {"palette": encode(palette), "see-through palette": encode(palette, transparency=b"\x00\x80\xff")}
    found |= {"see-through GIF": encode(palette, "GIF", transparency=1), "16 bit": encode(deep)}
    found |= {"see-through grey": encode(grey, transparency=int(noise[0, 0, 0]))}
    found |= {"see-through colour": encode(rgb, transparency=tuple(map(int, noise[0, 0, :3])))}
    found |= {"turned": encode(rgb, "JPEG", exif=exif), "grey and alpha": encode(rgba.convert("LA"))}
    return found


def test_the_other_process_gives_the_pixels_that_this_one_gives(make):
    reader = make()
    for name, encoded in pictures().items():
        np.testing.assert_array_equal(reader.read_sync(encoded), read_image(encoded), err_msg=name)


@pytest.mark.parametrize("other", ["ICO", "ICNS", "PCX", "TGA", "SGI", "DDS", "IM", "PDF", "SPIDER", "MSP", "EPS"])
def test_other_formats_are_refused_of_others(other, make):
    encoded = encode(Image.new("1" if other == "MSP" else "F" if other == "SPIDER" else "RGB", (16, 16)), other)
    source = f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
    message = rf"not an image of the formats {', '.join(NINE[:-1])} and {NINE[-1]}\.$"
    with pytest.raises(ImageError, match=message):
        make().read_sync(source)
    with pytest.raises(ImageError, match=message):
        read_image(source)


def test_a_fits_of_others_is_refused_at_once(make):
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                 7000", "NAXIS2  =                 7000", "END"]
    encoded = "".join(card.ljust(80) for card in cards).ljust(2880).encode() + b"\0" * 2880
    with pytest.raises(ImageError, match="not an image of the formats"):
        make().read_sync(encoded)


def test_the_size_of_what_an_icon_holds_counts():
    inner = encode(Image.new("RGB", (90, 80)))
    directory = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    with pytest.raises(ImageError, match=r"its 90 x 80 pixels are more than the 7,000 allowed"):
        read_image(directory + inner, limits=ImageLimits(max_pixels=7000))


def test_a_frame_larger_than_its_gif_counts(make):
    frame = encode(Image.new("P", (90, 80)), "GIF")
    encoded = frame[:6] + struct.pack("<HH", 16, 16) + frame[10:]
    with pytest.raises(ImageError, match=r"7,000"):
        make(ImageLimits(max_pixels=7000)).read_sync(encoded)


# --- the process -----------------------------------------------------------------------------------------------------


def test_a_picture_that_takes_too_long_is_refused_and_the_next_one_is_read(make, timers, red):
    reader, timers.at = make(), 10.0
    with pytest.raises(ImageError, match=r"^The image cannot be read: it took longer than 10 seconds to decode\.$"):
        reader.read_sync(progressive_bomb(1000, 3000))
    timers.at = None
    assert colours(reader.read_sync(red)) == {RED}


def process(*limits) -> subprocess.Popen:
    arguments = json.dumps([sys.path, *limits])
    command = [sys.executable, "-I", "-c", decoders.Decoder.program, arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
def test_a_process_ends_by_itself_where_its_parent_no_longer_can():
    with process(50_000_000, 2**30, 0.2) as decoder:
        encoded = progressive_bomb(7000, 3600)
        assert len(encoded) < 300_000
        decoder.stdin.write(LENGTH.pack(len(encoded)) + encoded)
        decoder.stdin.flush()
        assert decoder.wait(timeout=20) == -signal.SIGALRM


def test_a_process_ends_with_its_parent_and_not_by_ctrl_c():
    with process(50_000_000, 2**30, 10) as decoder:
        assert decoder.stdout.readline() == READY
        decoder.send_signal(signal.SIGINT)
        decoder.stdin.write(LENGTH.pack(3) + b"abc")
        decoder.stdin.flush()
        assert "not an image" in json.loads(decoder.stdout.readline())["error"]
        decoder.stdin.close()
        assert decoder.wait(timeout=20) == 0


def test_a_process_is_small():
    code = "import sys, modeling_deco.utils.decoding; print(*{'torch', 'transformers'} & sys.modules.keys())"
    path = str(Path(decoders.__file__).parents[2])
    run = [sys.executable, "-c", f"import sys; sys.path[:] = {[*sys.path, path]!r}; {code}"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not limit the memory of a process")
def test_a_picture_that_takes_too_much_memory_is_refused_and_the_next_one_is_read(make, red):
    class Limits(ImageLimits):
        decode_memory = 256 * 2**20

    reader = make(Limits())
    large = io.BytesIO()
    Image.new("L", (13_000, 13_000)).save(large, "PNG", compress_level=1)
    with pytest.raises(ImageError, match=r"decoding it takes more memory than is allowed\.$"):
        reader.read_sync(large.getvalue())
    assert colours(reader.read_sync(red)) == {RED}


@pytest.mark.parametrize(
    "encoded", [encode(Image.new("L", (9, 8), 100)), encode(Image.new("L", (9, 8)), "GIF")], ids=["PNG", "GIF"]
)
def test_as_many_pixels_as_are_allowed_are_read(encoded, make):
    assert make(ImageLimits(max_pixels=72)).read_sync(encoded).size == (9, 8)
    assert read_image(encoded, limits=ImageLimits(max_pixels=72)).size == (9, 8)
    for read in (
        make(ImageLimits(max_pixels=71)).read_sync,
        lambda it: read_image(it, limits=ImageLimits(max_pixels=71)),
    ):
        with pytest.raises(ImageError, match=r"its 9 x 8 pixels are more than the 71 allowed|more than the 71 pixels"):
            read(encoded)


def test_the_defaults_are_those_of_the_documentation():
    limits = UNTRUSTED_LIMITS
    assert (limits.max_pixels, limits.max_bytes) == (50_000_000, 33_554_432)
    assert (limits.timeout, limits.connect_timeout, limits.decode_timeout) == (15, 5, 10)


def test_the_pictures_of_a_request_have_one_time_limit(make, timers, red):
    async def read():
        async with make(ImageLimits(decode_timeout=7.0)).read_all([red, red, red]) as pictures:
            return len(pictures)

    assert asyncio.run(read()) == 3
    assert timers == [7.0]


def test_memory_is_enough_for_the_largest_picture():
    limits = ImageLimits(max_bytes=2**20, max_pixels=10_000_000)
    assert limits.decode_memory == 256 * 2**20 + 3 * 2**20 + 320_000_000


@pytest.mark.parametrize(
    "answer",
    [
        "os.abort()",
        "sys.exit()",
        "print('no JSON', flush=True)",
        "print('[]', flush=True)",
        """print('{"size": [9, 9]}abc', flush=True)""",
        """print('{"size": [99999, 99999]}', flush=True)""",
        """print('{"size": [0, 0]}', flush=True)""",
        """print('{"size": ["a"]}', flush=True)""",
    ],
)
def test_a_process_that_crashes_or_lies_is_replaced(answer, make, red, monkeypatch):
    reader = make()
    with monkeypatch.context() as context:
        code = f"import os, sys; print('ready', flush=True); sys.stdin.buffer.read(8 + {len(red)}); {answer}"
        context.setattr(decoders.Decoder, "program", code)
        with pytest.raises(ImageError, match=r"^The image cannot be read: it is broken \(the decoder crashed\)\.$"):
            reader.read_sync(red)
    assert colours(reader.read_sync(red)) == {RED}


def test_a_process_that_was_killed_while_idle_is_replaced(make, red):
    reader = make(num_decoders=1)
    reader.read_sync(red)
    decoder = reader._decoders.submit(lambda: reader._of_thread.decoder).result()
    decoder.process.kill()
    decoder.process.wait()
    assert colours(reader.read_sync(red)) == {RED}


def test_a_process_that_cannot_start_is_said(make, red, monkeypatch):
    monkeypatch.setattr(decoders.Decoder, "program", "raise SystemExit(1)")
    with pytest.raises(RuntimeError, match=r"^Images cannot be decoded: '.*' could not start a process\.$"):
        make().read_sync(red)


# Takes a picture and never answers.
STUCK = "import sys; print('ready', flush=True); sys.stdin.buffer.read()"


def test_a_cancelled_task_kills_its_process(make, red, monkeypatch):
    asked = []
    ask = decoders.Decoder._ask
    monkeypatch.setattr(
        decoders.Decoder, "_ask", lambda self, encoded: (asked.append(self.process), ask(self, encoded))
    )
    monkeypatch.setattr(decoders.Decoder, "program", STUCK)

    async def cancel():
        await cancelled(make().read(red), lambda: asked)

    asyncio.run(cancel())
    assert asked[0].wait(timeout=20) != 0


async def cancelled(coroutine, is_under_way) -> None:
    task = asyncio.create_task(coroutine)
    while not is_under_way():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_closing_ends_what_is_under_way(make, red, monkeypatch):
    asked = []
    ask = decoders.Decoder._ask
    monkeypatch.setattr(
        decoders.Decoder, "_ask", lambda self, encoded: (asked.append(self.process), ask(self, encoded))
    )
    monkeypatch.setattr(decoders.Decoder, "program", STUCK)

    async def close():
        reader = make()
        reading = asyncio.create_task(reader.read(red))
        while not asked:
            await asyncio.sleep(0.01)
        reader.close()
        with pytest.raises(ImageError):
            await reading

    asyncio.run(close())


# --- requests --------------------------------------------------------------------------------------------------------


def test_the_pictures_of_a_request_come_in_their_order(make):
    colour = {name: encode(Image.new("RGB", (2, 2), name)) for name in ("red", "lime", "blue")}
    sources = [f"data:image/png;base64,{base64.b64encode(encoded).decode()}" for encoded in colour.values()]

    async def read():
        async with make().read_all(sources) as pictures:
            return [picture.getpixel((0, 0)) for picture in pictures]

    assert asyncio.run(read()) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_the_limits_are_those_of_a_request(make, red):
    async def read(limits, *sources):
        async with make(limits).read_all(sources) as pictures:
            return len(pictures)

    assert asyncio.run(read(ImageLimits(max_pixels=24, max_bytes=2 * len(red)), red, red)) == 2
    with pytest.raises(ImageError, match=r"^Images 1 to 2 have 24 pixels together, more than the 23 allowed"):
        asyncio.run(read(ImageLimits(max_pixels=23), red, red))
    with pytest.raises(ImageError, match=r"^Images 1 to 2 have more than .* MiB together\.$"):
        asyncio.run(read(ImageLimits(max_bytes=2 * len(red) - 1), red, red))
    with pytest.raises(ImageError, match=r"^Image 2: The image cannot be read: its content is not an image"):
        asyncio.run(read(ImageLimits(), red, b"not an image"))
    with pytest.raises(ImageError, match=r"^Image 2: The image cannot be read: it is empty\.$"):
        asyncio.run(read(ImageLimits(), red, b""))


def test_as_many_requests_as_decoders_have_their_pictures_in_memory(make, red):
    inside = []

    async def use(reader, number, leave):
        async with reader.read_all([red]):
            inside.append(number)
            await leave.wait()

    async def read():
        reader, leave = make(num_decoders=2), asyncio.Event()
        tasks = [asyncio.create_task(use(reader, number, leave)) for number in range(3)]
        while len(inside) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        before = len(inside)
        leave.set()
        await asyncio.gather(*tasks)
        return before

    assert asyncio.run(read()) == 2
    assert sorted(inside) == [0, 1, 2]


@pytest.mark.usefixtures("loopback")
def test_slow_hosts_of_some_requests_do_not_hold_up_another(make, red):
    asked, answer = [], threading.Event()

    def respond(handler):
        asked.append(handler.path)
        answer.wait(20)
        send(handler, red)

    async def read(address):
        reader = make(allow_private=True, num_decoders=1)
        slow = [asyncio.create_task(reader.read(f"{address}/{number}")) for number in range(8)]
        while len(asked) < 8:
            await asyncio.sleep(0.01)
        image = await reader.read(red)
        is_waiting = not any(task.done() for task in slow)
        answer.set()
        await asyncio.gather(*slow)
        return image, is_waiting

    with serving(respond) as address:
        image, is_waiting = asyncio.run(read(address))
    assert colours(image) == {RED}
    assert is_waiting


# --- downloads -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loopback")
def test_a_cancelled_download_closes_its_connection(make):
    asked, closed = [], threading.Event()

    def respond(handler):
        asked.append(handler.path)
        handler.connection.recv(1)  # until the client closes
        closed.set()

    with serving(respond) as address:
        asyncio.run(cancelled(make(allow_private=True).read(address), lambda: asked))
        assert closed.wait(10)


def test_a_look_up_that_hangs_ends_at_the_time_limit(timers, monkeypatch):
    hanging = threading.Event()
    monkeypatch.setattr(downloads.socket, "getaddrinfo", lambda *arguments, **kwargs: hanging.wait(20))
    timers.at = 15.0
    with pytest.raises(ImageError, match=r"it took longer than 15 seconds\.$"):
        read_image("http://pictures.example/a.png")
    hanging.set()
    assert timers == [15.0]


@pytest.mark.usefixtures("loopback")
def test_an_address_that_does_not_accept_is_left_for_the_next_one(red, monkeypatch):
    """The first of the two does not answer; the time limit of that is not the one of the download."""
    tried, waits = [], []
    connect, open_connection = socket.socket.connect, downloads._Connector.connect

    def connect_or_not(self, place):
        tried.append((place[0], self.gettimeout()))
        if place[0] == "127.0.0.1":
            raise TimeoutError("timed out")
        connect(self, ("127.0.0.1", place[1]))

    def open_and_note(*arguments):
        connection = open_connection(*arguments)
        waits.append(connection.gettimeout())
        return connection

    with serving(lambda handler: send(handler, red)) as address:
        port = int(address.rpartition(":")[2])
        answer = [(2, 1, 6, "", (ip, port)) for ip in ("127.0.0.1", "127.0.0.2")]
        monkeypatch.setattr(downloads.socket, "getaddrinfo", lambda *arguments, **kwargs: answer)
        monkeypatch.setattr(downloads.socket.socket, "connect", connect_or_not)
        monkeypatch.setattr(downloads._Connector, "connect", open_and_note)
        assert colours(read_image(address, limits=ImageLimits(connect_timeout=3.0, timeout=9.0))) == {RED}
    assert tried == [("127.0.0.1", 3.0), ("127.0.0.2", 3.0)]
    assert waits == [9.0]  # for each packet, once connected


@pytest.mark.usefixtures("loopback")
def test_the_body_of_a_redirect_is_not_read(red):
    sent = 0

    def respond(handler):
        nonlocal sent
        if handler.path == "/red.png":
            send(handler, red)
            return
        send(handler, code=302, Location="/red.png")
        while True:  # until the client closes
            sent += handler.wfile.write(b"\0" * 65536)

    with serving(respond) as address:
        assert colours(read_image(address)) == {RED}
    assert sent < 20 * 2**20


@pytest.mark.usefixtures("loopback")
def test_redirects_are_bounded():
    asked = []

    def respond(handler):
        asked.append(handler.path)
        send(handler, code=302, Location=f"/{len(asked)}")

    with serving(respond) as address, pytest.raises(ImageError, match=r"redirect"):
        read_image(address)
    assert len(asked) == 11


@pytest.mark.usefixtures("loopback")
def test_files_are_read_where_they_are_allowed_and_pipes_never(make, red, tmp_path):
    (tmp_path / "red.png").write_bytes(red)
    os.mkfifo(tmp_path / "pipe")
    reader = make(ImageLimits(max_bytes=len(red)), allow_files=True)
    assert colours(reader.read_sync(str(tmp_path / "red.png"))) == {RED}
    assert colours(reader.read_sync((tmp_path / "red.png").as_uri())) == {RED}
    with pytest.raises(ImageError, match=r"there is no such file\.$"):
        reader.read_sync(str(tmp_path / "pipe"))
    with pytest.raises(ImageError, match=r"it has more than .* MiB\.$"):
        make(ImageLimits(max_bytes=len(red) - 1), allow_files=True).read_sync(str(tmp_path / "red.png"))
    with pytest.raises(ImageError, match=r"only http, https and data URLs are read\.$"):
        make().read_sync(str(tmp_path / "red.png"))
    with pytest.raises(ImageError, match=r"'127\.0\.0\.1' is not a public address"):
        make().read_sync("http://127.0.0.1:9/red.png")
