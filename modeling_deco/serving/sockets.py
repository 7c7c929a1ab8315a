# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the server and the page listen, which is known before a model is loaded for nothing."""

import socket


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket of that address, which does not listen yet. Port 0 is a free one.

    Raises:
        ValueError: the address is not this machine's, or the port is taken; one line that says so.
    """
    if not 0 <= port < 65536:  # of which the look-up would take the last 16 bits
        raise ValueError(f"Cannot listen on {host} port {port}: there is no such port.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from error
    return listener


def max_open_files() -> int:
    """Files and sockets that this process may have open at once."""
    try:
        import resource
    except ImportError:  # Windows, whose sockets are not counted among its files
        return 2048
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft
