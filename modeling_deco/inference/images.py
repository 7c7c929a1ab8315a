# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures from wherever a user has them: paths, URLs, data URLs, standard input, uploads.

One's own are read by `read_image`, which bounds size and time. What others send or name, to the server or the page, is
read by a `PictureReader`: in a process that can be killed, from public addresses alone.
"""

import asyncio
import base64
import binascii
import http.client
import io
import ipaddress
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..utils.decoding import LENGTH, READY, ImageError, decode
from ..utils.errors import one_line


@dataclass(frozen=True)
class ImageLimits:
    """How large a picture may be, and how long it may take.

    Attributes:
        max_bytes: of a download, a data URL, an upload, a pipe; a file of one's own may be larger.
        max_pixels: width times height. Default: where Pillow sees a bomb.
        timeout: seconds that a download may take, the look-up of the name and redirects included.
        connect_timeout: seconds that an address may take to accept a connection, before the next one is tried.
        decode_timeout: seconds that a picture of others, or those of a request together, may take to be decoded.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 178_956_970
    timeout: float = 15.0
    connect_timeout: float = 5.0
    decode_timeout: float = 10.0

    @property
    def decode_memory(self) -> int:
        """Bytes of address space for a decoder; transparent and floating point pictures take the most for a pixel."""
        return 256 * 2**20 + 3 * self.max_bytes + 32 * self.max_pixels


# For what anybody may send to a server: a photograph of 50 megapixels.
UNTRUSTED_LIMITS = ImageLimits(max_pixels=50_000_000)


def read_image(
    source: str | Path | bytes | BinaryIO,
    *,
    limits: ImageLimits = ImageLimits(),  # noqa: B008  frozen
) -> Image.Image:
    """Read a trusted picture. Untrusted pictures and URLs are for a `PictureReader`.

    Args:
        source: path, `file:`, `http:`, `https:` or `data:` URL, an encoded picture as bytes, or an open binary file.
        limits: see `ImageLimits`.

    Returns:
        An upright (EXIF) RGB image. Transparent parts are white; 16-bit grey is scaled to 8 bit, and so is floating
        point, which counts from 0 to 1 or, where it exceeds 1, to 255; of an animation it is the first frame.

    Raises:
        ImageError: it cannot be read, is too large, takes too long, or is not allowed. Files may be of every format
            that Pillow decodes by itself, URLs lead to those of `UNTRUSTED_FORMATS` alone.
    """
    with _named(source):
        if isinstance(source, str) and not _is_file(source):
            encoded = _fetch(source, limits, allow_files=False, allow_private=True, stop=_Stop())
            return decode(io.BytesIO(encoded), limits.max_pixels)
        return decode(_own(source, limits), limits.max_pixels, formats=None)


@contextmanager
def _named(source) -> Iterator[None]:
    name = "The image"
    if isinstance(source, str) and source[:5].lower() != "data:":
        shown = re.sub(r"^(https?://)[^/@]*@", r"\1...@", source, flags=re.IGNORECASE)  # no passwords in logs
        name = f"The image {shown if len(shown) <= 120 else shown[:117] + '...'!r}"
    elif isinstance(source, Path):
        name = f"The image {str(source)!r}"
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name} cannot be read: {error}.") from error.__cause__
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror or error}.") from error


def _scheme(source: str) -> str:
    return source.partition(":")[0].lower()


def _is_file(source: str) -> bool:
    return _scheme(source) not in ("http", "https", "data")


def _own(source: str | Path | bytes | BinaryIO, limits: ImageLimits) -> Path | BinaryIO:
    """What Pillow opens: a file of any size, or what a pipe or device has, to the limit."""
    if isinstance(source, str):
        source = _path_of_url(source) if _scheme(source) == "file" else Path(source)
    if isinstance(source, bytes):
        return io.BytesIO(_bounded(source, limits))
    if not isinstance(source, Path):
        return io.BytesIO(_bounded(source.read(limits.max_bytes + 1), limits))
    if not source.exists():
        raise ImageError("there is no such file")
    if source.is_dir():
        raise ImageError("it is a folder")
    if source.is_file():
        return source
    with source.open("rb") as pipe:
        return io.BytesIO(_bounded(pipe.read(limits.max_bytes + 1), limits))


def _fetch(source: str | bytes, limits: ImageLimits, allow_files: bool, allow_private: bool, stop: "_Stop") -> bytes:
    """The encoded bytes of an untrusted picture or URL."""
    if isinstance(source, bytes):
        return _bounded(source, limits)
    if _scheme(source) == "data":
        return _bounded(_data_of_url(source, limits), limits)
    if not _is_file(source):
        return _download(source, limits, allow_private, stop)
    if not allow_files:
        raise ImageError("only http, https and data URLs are read")
    path = _path_of_url(source) if _scheme(source) == "file" else Path(source)
    if not path.is_file():  # a pipe would be waited for
        raise ImageError("there is no such file")
    with path.open("rb") as file:
        return _bounded(file.read(limits.max_bytes + 1), limits)


def _bounded(encoded: bytes, limits: ImageLimits) -> bytes:
    if not encoded:
        raise ImageError("it is empty")
    if len(encoded) > limits.max_bytes:
        raise ImageError(f"it has more than {limits.max_bytes / 2**20:.4g} MiB")
    return encoded


def _path_of_url(url: str) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(f"it is a file of the machine {parts.netloc!r}")
    return Path(urllib.request.url2pathname(parts.path))


def _data_of_url(url: str, limits: ImageLimits) -> bytes:
    header, comma, data = url.partition(",")
    if not comma:
        raise ImageError("it is a data URL without data (data:image/png;base64,...)")
    if not header.lower().endswith(";base64"):
        return _unquote(data)
    if len(data) > limits.max_bytes * 4 // 3 + 4:  # before it is held twice
        return _bounded(data.encode(), limits)
    try:
        return base64.b64decode(_unquote(data), validate=True)
    except binascii.Error as error:
        raise ImageError("its data are not base64") from error


def _unquote(data: str) -> bytes:
    """Decode %41 and the like, as quoted-printable text, which writes =41. urllib's `unquote_to_bytes` takes a hundred
    bytes and most of a microsecond for each: gigabytes, for one request."""
    return binascii.a2b_qp(data.encode(errors="replace").replace(b"=", b"=3D").replace(b"%", b"="))


# --- what others send ------------------------------------------------------------------------------------------------


class PictureReader:
    """Reads untrusted pictures and URLs, within limits of time, memory and number.

    Pictures are decoded by `num_decoders` processes, which are started when first needed. One that a picture crashes,
    or keeps for longer or makes larger than the limits say, is killed and replaced. (The memory of a process is
    limited on Linux; elsewhere the limits of time and pixels must do.) Downloads run in threads of their own. What a
    cancelled task has begun ends at once: connections are closed, a decoder is killed.

    Args:
        limits: of a picture, and of those of a request together; only the time of a download is one picture's.
        allow_files: whether strings may name files of this machine.
        allow_private: whether URLs may lead, at once or by redirects, to addresses that are not public: this machine,
            its network, a cloud's metadata service. Where not, proxies are not used either, since they would connect.
        num_decoders: processes, and requests whose decoded pictures are in memory at the same time.
        max_downloads: at the same time; a request has one. As many as there may be requests, so that none waits for
            the slow host of another.
    """

    def __init__(
        self,
        limits: ImageLimits = UNTRUSTED_LIMITS,
        *,
        allow_files: bool = False,
        allow_private: bool = False,
        num_decoders: int = 2,
        max_downloads: int = 64,
    ):
        self.limits = limits
        self.allow_files = allow_files
        self.allow_private = allow_private
        self._places = asyncio.Semaphore(num_decoders)
        self._fetchers = ThreadPoolExecutor(max_downloads, thread_name_prefix="fetch-picture")
        self._decoders = ThreadPoolExecutor(num_decoders, thread_name_prefix="decode-picture")
        self._of_thread = threading.local()  # each thread of `_decoders` has a process
        self._stops: set[_Stop] = set()

    @asynccontextmanager
    async def read_all(self, sources: Sequence[str | bytes]) -> AsyncIterator[list[Image.Image]]:
        """The pictures of a request, in memory while the block runs: `num_decoders` blocks run at the same time.

        Args:
            sources: `http:`, `https:` or `data:` URLs, encoded pictures as bytes, names of files where they are
                allowed.

        Returns:
            Images as `read_image` returns them, in the order of the sources.

        Raises:
            ImageError: one of them cannot be read, and which, or all together are too large.
        """
        encoded, num_bytes = [], 0
        for position, source in enumerate(sources, 1):
            with _at(position):
                encoded.append(await self._in_thread(self._fetchers, self._fetch, source))
            num_bytes += len(encoded[-1])
            if num_bytes > self.limits.max_bytes:
                mib = self.limits.max_bytes / 2**20
                raise ImageError(f"Images 1 to {position} have more than {mib:.4g} MiB together.")
        async with self._places:
            yield await self._in_thread(self._decoders, self._decode, sources, encoded)

    async def read(self, source: str | bytes) -> Image.Image:
        """One picture, as `read_image` returns it.

        Raises:
            ImageError: it cannot be read.
        """
        encoded = await self._in_thread(self._fetchers, self._fetch, source)
        return await self._in_thread(self._decoders, self._decode_one, source, encoded)

    def read_sync(self, source: str | bytes) -> Image.Image:
        """`read` for code that is not asynchronous; it waits for the same processes."""
        encoded = self._fetch(source, _Stop())
        return self._decoders.submit(self._decode_one, source, encoded, _Stop()).result()

    def close(self) -> None:
        """End what is under way, and the processes."""
        for stop in list(self._stops):
            stop()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, executor: ThreadPoolExecutor, function: Callable, *args):
        stop = _Stop()
        self._stops.add(stop)
        try:
            return await asyncio.wrap_future(executor.submit(function, *args, stop))
        finally:
            stop()  # where this task was cancelled; else there is nothing left to end
            self._stops.discard(stop)

    def _fetch(self, source, stop: "_Stop") -> bytes:
        with _named(source):
            return _fetch(source, self.limits, self.allow_files, self.allow_private, stop)

    def _decode(self, sources, encoded: list[bytes], stop: "_Stop") -> list[Image.Image]:
        images, num_pixels = [], 0
        with stop.after(self.limits.decode_timeout):
            for position, source in enumerate(sources, 1):
                with _at(position), _named(source):
                    images.append(self._decoder().decode(encoded.pop(0), stop))
                num_pixels += images[-1].width * images[-1].height
                if num_pixels > self.limits.max_pixels:
                    raise ImageError(
                        f"Images 1 to {position} have {num_pixels:,} pixels together, more than the "
                        f"{self.limits.max_pixels:,} allowed in a request."
                    )
        return images

    def _decode_one(self, source, encoded: bytes, stop: "_Stop") -> Image.Image:
        with stop.after(self.limits.decode_timeout), _named(source):
            return self._decoder().decode(encoded, stop)

    def _decoder(self) -> "_Decoder":
        if not hasattr(self._of_thread, "decoder"):
            self._of_thread.decoder = _Decoder(self.limits)
        return self._of_thread.decoder


@contextmanager
def _at(position: int) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"Image {position}: {error}") from error.__cause__


class _Stop:
    """Ends what a thread waits for, from outside: at a time limit, or when nobody waits for the thread any more."""

    def __init__(self):
        self.is_set = False
        self._actions: list[Callable] = []
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.is_set = True
            for action in self._actions:
                with suppress(OSError):
                    action()

    @contextmanager
    def ending_by(self, action: Callable) -> Iterator[None]:
        """While the block runs, `action` is what ends it."""
        with self._lock:
            self._actions.append(action)
        try:
            if self.is_set:
                self()
            yield
        finally:
            with self._lock:
                self._actions.remove(action)

    @contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        """Stop what the block does when it has run for so long."""
        timer = threading.Timer(seconds, self)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


# In isolated mode nothing is imported from the working directory before the path is the parent's.
_DECODE = """
import json, sys
sys.path[:], *limits = json.loads(sys.argv[1])
from modeling_deco.utils.decoding import serve_pictures
serve_pictures(*limits)
"""


class _Decoder:
    """A process that decodes one picture at a time. Used by one thread."""

    def __init__(self, limits: ImageLimits):
        self.limits = limits
        self.process = None

    def __del__(self):
        self._end()

    def decode(self, encoded: bytes, stop: _Stop) -> Image.Image:
        """
        Raises:
            ImageError: it cannot be decoded, or not within the limits.
        """
        is_whole = False
        try:
            if self.process is None or self.process.poll() is not None:  # or the system, short of memory, killed it
                self._end()
                self._start(stop)
            with stop.ending_by(self.process.kill):
                answer = self._ask(encoded)
            is_whole = True
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            if stop.is_set:
                seconds = f"{self.limits.decode_timeout:g} seconds"
                raise ImageError(f"it took longer than {seconds} to decode") from error
            if isinstance(error, RuntimeError):
                raise
            raise ImageError("it is broken (the decoder crashed)") from error  # or answers what it should not
        finally:
            if not is_whole:
                self._end()
        if isinstance(answer, str):
            raise ImageError(answer)
        return answer

    def _start(self, stop: _Stop) -> None:
        path = [*sys.path, str(Path(__file__).parents[2])]
        arguments = json.dumps([path, self.limits.max_pixels, self.limits.decode_memory, self.limits.decode_timeout])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _DECODE, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff and others write there about broken pictures
            env=os.environ
            | {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"},  # more count against the limit of memory
        )
        with stop.ending_by(self.process.kill):
            is_ready = self.process.stdout.readline(len(READY)) == READY
        if not is_ready:
            raise RuntimeError(f"Pictures cannot be decoded: {sys.executable!r} could not start a process for it.")

    def _ask(self, encoded: bytes) -> Image.Image | str:
        """The picture, or why there is none."""
        requests, answers = self.process.stdin, self.process.stdout
        requests.write(LENGTH.pack(len(encoded)))
        requests.write(encoded)
        requests.flush()
        header = json.loads(answers.readline(10_000))
        if "error" in header:
            return str(header["error"])
        width, height = header["size"]
        if not 0 < width * height <= self.limits.max_pixels:
            raise ValueError("no picture that was asked for is so large")
        return Image.frombytes("RGB", (width, height), answers.read(3 * width * height))

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(OSError):  # what it has not read cannot be written
                self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


# --- downloads -------------------------------------------------------------------------------------------------------


def _download(url: str, limits: ImageLimits, allow_private: bool, stop: _Stop) -> bytes:
    too_long = ImageError(f"it took longer than {limits.timeout:g} seconds")
    with stop.after(limits.timeout), _Connector(allow_private, limits, stop) as connector:
        try:
            if urllib.parse.urlsplit(url).username is not None:
                raise ImageError("URLs with a user name are not read")
            request = urllib.request.Request(url, headers={"User-Agent": "modeling-deco", "Accept": "image/*"})
            with _opener(connector, allow_private).open(request, timeout=limits.timeout) as response:
                encoded = response.read(limits.max_bytes + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if stop.is_set:
                raise too_long from error
            reason = getattr(error, "reason", error)  # urllib wraps what a connection raises
            if isinstance(reason, ImageError):
                raise reason from error
            if isinstance(error, urllib.error.HTTPError):
                reason = f"the server answered {error.code} {error.reason}"
            reason = getattr(reason, "strerror", None) or one_line(reason)
            raise ImageError(reason) from error
    if stop.is_set:  # a connection that was shut down looks like the end of the file
        raise too_long
    return _bounded(encoded, limits)


class _Connector:
    """Opens sockets, to public addresses alone unless told otherwise, and shuts them down at a stop: the time limit of
    a socket is about each packet, and a server that sends one byte a second would never reach it."""

    def __init__(self, allow_private: bool, limits: ImageLimits, stop: _Stop):
        self.allow_private = allow_private
        self.limits = limits
        self.stop = stop
        self.connections = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.connections.close()

    def connect(self, address, timeout, source_address=None) -> socket.socket:
        host, port = address
        error = OSError(f"{host!r} has no address")
        for family, kind, protocol, _, place in self._look_up(host, port):
            if not (self.allow_private or _is_public(place[0])):
                raise ImageError(f"{host!r} is not a public address ({place[0]})")
            # to this address, and not to the name, which might resolve to another one the next time
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(self.limits.connect_timeout)
            twin = self.connections.enter_context(connection.dup())  # TLS takes the descriptor of what it wraps
            self.connections.enter_context(self.stop.ending_by(partial(twin.shutdown, socket.SHUT_RDWR)))
            try:
                connection.connect(place)
            except OSError as refused:
                connection.close()
                seconds = f"{self.limits.connect_timeout:g} seconds"
                error = OSError(f"no connection in {seconds}") if isinstance(refused, TimeoutError) else refused
                continue
            if self.stop.is_set:  # before there was a connection to shut down
                connection.close()
                break
            connection.settimeout(timeout)
            return connection
        raise error

    def _look_up(self, host: str, port: int) -> list[tuple]:
        """`getaddrinfo`, which cannot be stopped, in a thread that can be left alone."""
        answers = queue.SimpleQueue()

        def ask():
            try:
                answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except Exception as error:
                answers.put(error)

        with self.stop.ending_by(lambda: answers.put(TimeoutError())):
            threading.Thread(target=ask, daemon=True).start()
            found = answers.get()
        if isinstance(found, Exception):
            raise found
        return found


# IPv6 prefixes whose last 32 bits are an IPv4 address: IPv4-compatible, IPv4-mapped, NAT64 (RFC 6052)
_EMBEDDING = [ipaddress.ip_network(prefix) for prefix in ("::/96", "::ffff:0:0/96", "64:ff9b::/96")]
# tunnels and local NAT64 (RFC 8215), which lead to an IPv4 address that is written elsewhere
_TUNNELS = [ipaddress.ip_network(prefix) for prefix in ("2001::/32", "2002::/16", "64:ff9b:1::/48")]


def _is_public(ip: str) -> bool:
    address = ipaddress.ip_address(ip.partition("%")[0])
    if address.version == 6:
        if any(address in network for network in _TUNNELS):
            return False
        if any(address in network for network in _EMBEDDING):
            address = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast


def _opener(connector: _Connector, allow_private: bool) -> urllib.request.OpenerDirector:
    """urllib without its handlers of files, FTP and data, to which a redirect could lead."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(_connection_class(http.client.HTTPConnection, connector), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(_connection_class(http.client.HTTPSConnection, connector), request)

    class Redirects(urllib.request.HTTPRedirectHandler):
        def http_error_302(self, request, response, *answer):
            response.close()  # or its body would be read to the end, wherever that is
            return super().http_error_302(request, response, *answer)

        http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(None if allow_private else {}),
        urllib.request.UnknownHandler(),
        Http(),
        Https(),
        urllib.request.HTTPDefaultErrorHandler(),
        Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _connection_class(base: type, connector: _Connector) -> type:
    class Connection(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._create_connection = connector.connect  # private, seen in Python 3.10 to 3.14

    return Connection
