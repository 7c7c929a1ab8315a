# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Sockets that are bound before a model is loaded, so that a wrong address fails early."""

import socket


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that is bound to an address and does not listen yet. Port 0 selects a free port.

    Raises:
        ValueError: the address does not belong to this machine, or the port is in use; one line.
    """
    if not 0 <= port < 65536:  # getaddrinfo would take the last 16 bits
        raise ValueError(f"Cannot listen on {host} port {port}: a port is a number from 0 to 65535.")
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
    """The number of files and sockets that this process may have open at once."""
    try:
        import resource
    except ImportError:  # Windows does not count sockets as files
        return 2048
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft
