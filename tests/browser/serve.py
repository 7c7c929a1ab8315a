# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Serve the page for the tests: slowly enough that users meet, and with a word on each address that is not local."""

import sys
import time

from modeling_deco.page import app as page

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
page.stream = slowly(page.stream)
page.launch(*sys.argv[1:])
