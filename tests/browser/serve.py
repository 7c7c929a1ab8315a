# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Serve the page for the tests: slowly, so that users wait for each other, and report each foreign address."""

import sys
import time

from modeling_deco.page import events, launch

LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", None)


def report(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        address = arguments[1][0]
    elif event == "socket.getaddrinfo":
        address = arguments[0]
    else:
        return
    if address not in LOCAL:
        sys.stderr.write(f"FOREIGN {address}\n")


def slowly(stream):
    def pieces(*args, **kwargs):
        for piece in stream(*args, **kwargs):
            yield piece
            time.sleep(0.3)

    return pieces


sys.addaudithook(report)
events.stream = slowly(events.stream)
launch(*sys.argv[1:])
