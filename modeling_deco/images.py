# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures from wherever a user has them: paths, URLs, data URLs, standard input, uploads.

What the command line, the server and the page show to the model goes through `read_image`: it bounds size and time,
turns a picture upright, and reads every mode that Pillow knows.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .errors import one_line
from .pixels import open_image, to_rgb


class ImageError(ValueError):
    """A picture cannot be read; the message is one line that names it and says why."""


@dataclass(frozen=True)
class ImageLimits:
    """How large a picture may be, and how long it may take to come.

    Attributes:
        max_bytes: of a download, a data URL, an upload, a pipe; a file of one's own may be larger.
        max_pixels: width times height, known before anything is decoded. Default: where Pillow sees a bomb.
        timeout: seconds that a download may take, redirects included; the look-up of a name has limits of its own.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 178_956_970
    timeout: float = 15.0


# For what anybody may send to a server: a photograph of 50 megapixels.
UNTRUSTED_LIMITS = ImageLimits(max_pixels=50_000_000)


def read_image(
    source: str | Path | bytes | BinaryIO,
    *,
    limits: ImageLimits = ImageLimits(),  # noqa: B008  frozen
    allow_files: bool = True,
    allow_private: bool = True,
) -> Image.Image:
    """Read a picture, whole.

    Args:
        source: path, `file:`, `http:`, `https:` or `data:` URL, an encoded picture as bytes, or an open binary file.
        limits: see `ImageLimits`.
        allow_files: whether strings may name files. Turn it off for what strangers send.
        allow_private: whether URLs may lead, at once or by redirects, to addresses that are not public: this machine,
            its network, a cloud's metadata service. Where not, proxies are not used either, since they would connect.

    Returns:
        An upright (EXIF) RGB image. Transparent parts are white; 16-bit grey is scaled to 8 bit, and so is floating
        point, which counts from 0 to 1 or, where it exceeds 1, to 255; of an animation it is the first frame.

    Raises:
        ImageError: it cannot be read, is too large, takes too long, or is not allowed.
    """
    name = _name(source)
    try:
        if isinstance(source, Path):
            return _read_file(source, limits)
        if isinstance(source, bytes):
            return _decode(io.BytesIO(_bounded(source, limits)), limits)
        if not isinstance(source, str):
            return _decode(io.BytesIO(_bounded(source.read(limits.max_bytes + 1), limits)), limits)
        scheme = source.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return _decode(io.BytesIO(_download(source, limits, allow_private)), limits)
        if scheme == "data":
            return _decode(io.BytesIO(_bounded(_data_of_url(source, limits), limits)), limits)
        if not allow_files:
            raise ImageError("only http, https and data URLs are read")
        return _read_file(_path_of_url(source) if scheme == "file" else Path(source), limits)
    except ImageError as error:
        raise ImageError(f"{name} cannot be read: {error}.") from error.__cause__
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror or error}.") from error


def _name(source) -> str:
    if isinstance(source, str) and source[:5].lower() != "data:":
        shown = re.sub(r"^(https?://)[^/@]*@", r"\1...@", source, flags=re.IGNORECASE)  # no passwords in logs
        return f"The image {shown if len(shown) <= 120 else shown[:117] + '...'!r}"
    return f"The image {str(source)!r}" if isinstance(source, Path) else "The image"


def _bounded(encoded: bytes, limits: ImageLimits) -> bytes:
    if not encoded:
        raise ImageError("it is empty")
    if len(encoded) > limits.max_bytes:
        raise ImageError(f"it has more than {limits.max_bytes / 2**20:.4g} MiB")
    return encoded


def _read_file(path: Path, limits: ImageLimits) -> Image.Image:
    if not path.exists():
        raise ImageError("there is no such file")
    if path.is_dir():
        raise ImageError("it is a folder")
    if path.is_file():
        return _decode(path, limits)
    with path.open("rb") as pipe:  # or a device, which has no end
        return _decode(io.BytesIO(_bounded(pipe.read(limits.max_bytes + 1), limits)), limits)


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
        return urllib.parse.unquote_to_bytes(data)
    if len(data) > limits.max_bytes * 4 // 3 + 4:  # before it is held twice
        return _bounded(data.encode(), limits)
    try:
        return base64.b64decode(urllib.parse.unquote_to_bytes(data), validate=True)
    except binascii.Error as error:
        raise ImageError("its data are not base64") from error


# --- decoding --------------------------------------------------------------------------------------------------------


def _decode(file: Path | BinaryIO, limits: ImageLimits) -> Image.Image:
    try:
        with open_image(file) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise ImageError(f"its {width} x {height} pixels are more than the {limits.max_pixels:,} allowed")
            image.load()
            return to_rgb(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(str(error)) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"it has more than the {limits.max_pixels:,} pixels allowed") from error
    except Exception as error:  # decoders raise many kinds on broken files
        if isinstance(error, OSError) and error.strerror:  # the file system's
            raise
        raise ImageError(f"it is broken ({one_line(error)})") from error


# --- downloads -------------------------------------------------------------------------------------------------------


def _download(url: str, limits: ImageLimits, allow_private: bool) -> bytes:
    deadline = time.monotonic() + limits.timeout
    with _Connector(allow_private, deadline) as connector:
        try:
            if urllib.parse.urlsplit(url).username is not None:
                raise ImageError("URLs with a user name are not read")
            request = urllib.request.Request(url, headers={"User-Agent": "modeling-deco", "Accept": "image/*"})
            with _opener(connector, allow_private).open(request, timeout=limits.timeout) as response:
                encoded = response.read(limits.max_bytes + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise ImageError(f"it took longer than {limits.timeout:g} seconds") from error
            reason = getattr(error, "reason", error)  # urllib wraps what a connection raises
            if isinstance(reason, ImageError):
                raise reason from error
            if isinstance(error, urllib.error.HTTPError):
                reason = f"the server answered {error.code} {error.reason}"
            reason = getattr(reason, "strerror", None) or one_line(reason)
            raise ImageError(reason) from error
    if time.monotonic() >= deadline:  # a connection that was shut down looks like the end of the file
        raise ImageError(f"it took longer than {limits.timeout:g} seconds")
    return _bounded(encoded, limits)


class _Connector:
    """Opens sockets, to public addresses alone unless told otherwise, and shuts them down at a deadline: the time
    limit of a socket is about each packet, and a server that sends one byte a second would never reach it."""

    def __init__(self, allow_private: bool, deadline: float):
        self.allow_private = allow_private
        self.deadline = deadline
        self.sockets: list[socket.socket] = []
        self.timer = threading.Timer(max(0.0, deadline - time.monotonic()), self.shut_down)
        self.timer.daemon = True

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *exception):
        self.timer.cancel()
        for connection in self.sockets:
            connection.close()

    def shut_down(self):
        for connection in self.sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def connect(self, address, timeout, source_address=None) -> socket.socket:
        host, port = address
        error = None
        for _, _, _, _, (ip, *_) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not (self.allow_private or _is_public(ip)):
                raise ImageError(f"{host!r} is not a public address ({ip})")
            timeout = self.deadline - time.monotonic()
            if timeout <= 0:
                raise TimeoutError
            try:  # to this address, and not to the name, which might resolve to another one the next time
                connection = socket.create_connection((ip, port), timeout, source_address)
            except OSError as refused:
                error = refused
                continue
            self.sockets.append(connection.dup())  # TLS takes the descriptor of the socket that it wraps
            if time.monotonic() >= self.deadline:  # the timer may have passed in between
                self.shut_down()
            return connection
        raise error or OSError(f"{host!r} has no address")


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
    """urllib without its handlers of files, FTP and data, which a redirect could lead to."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(_connection_class(http.client.HTTPConnection, connector), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(_connection_class(http.client.HTTPSConnection, connector), request)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(None if allow_private else {}),
        urllib.request.UnknownHandler(),
        Http(),
        Https(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
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
