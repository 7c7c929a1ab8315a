# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Download images within a time limit, by default only from public addresses."""

import http.client
import ipaddress
import queue
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack
from functools import partial

from ..utils.decoding import ImageError
from ..utils.errors import one_line
from .limits import ImageLimits, Stop


def download(url: str, limits: ImageLimits, allow_private: bool, stop: Stop) -> bytes:
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
    return encoded


class _Connector:
    """Opens sockets, by default only to public addresses, and shuts them down when the download is stopped.

    The timeout of a socket applies to each packet: a server that sends one byte a second would never reach it.
    """

    def __init__(self, allow_private: bool, limits: ImageLimits, stop: Stop):
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
            # connect to the address that was checked: the name may resolve to another one the next time
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(self.limits.connect_timeout)
            twin = self.connections.enter_context(
                connection.dup()
            )  # TLS takes over the descriptor of the socket that it wraps
            self.connections.enter_context(self.stop.ending_by(partial(twin.shutdown, socket.SHUT_RDWR)))
            try:
                connection.connect(place)
            except OSError as refused:
                connection.close()
                seconds = f"{self.limits.connect_timeout:g} seconds"
                error = OSError(f"no connection in {seconds}") if isinstance(refused, TimeoutError) else refused
                continue
            if self.stop.is_set:  # stopped before there was a connection to shut down
                connection.close()
                break
            connection.settimeout(timeout)
            return connection
        raise error

    def _look_up(self, host: str, port: int) -> list[tuple]:
        """Call `getaddrinfo`, which cannot be stopped, in a thread that can be abandoned."""
        answers: queue.SimpleQueue = queue.SimpleQueue()

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
# tunnels and local NAT64 (RFC 8215), which lead to an IPv4 address that is not in these bits
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
    """urllib without its handlers for files, FTP and data, to which a redirect could lead."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(_connection_class(http.client.HTTPConnection, connector), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(_connection_class(http.client.HTTPSConnection, connector), request)

    class Redirects(urllib.request.HTTPRedirectHandler):
        def http_error_302(self, request, response, *answer):
            response.close()  # otherwise its body would be read to the end, which may never come
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


def _connection_class(base, connector: _Connector):
    """A class of connections that are opened by `connector`."""

    class Connection(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._create_connection = connector.connect  # private, seen in Python 3.10 to 3.14

    return Connection
