# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Run functions in processes that have not imported DeCo, several a second.

One process imports what is slow to import, and forks for each function.
"""

import inspect
import json
import os
import subprocess
import sys
import textwrap

_SERVER = """
import importlib, json, os, sys, traceback

setup = json.loads(sys.stdin.readline())

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in setup["blocked"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
for module in setup["modules"]:
    try:
        importlib.import_module(module)
    except ImportError:
        pass
answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            request = json.loads(line)
            names = {}
            exec(request["source"], names)
            answer = {"result": names[request["name"]](*request["arguments"])}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\\n")
        answers.flush()
        os._exit(0)
    os.waitpid(child, 0)
os._exit(0)
"""


class FreshProcesses:
    """Calls functions in fresh processes: `run(function, *arguments)`.

    A function imports what it needs, sees nothing of its module, and takes and returns what JSON can hold.

    Args:
        modules: imported once for all, where they are installed.
        blocked: packages that cannot be imported, as where they are not installed.
        environment: more environment variables.
    """

    def __init__(self, modules=(), blocked=(), environment=None):
        self.server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._send({"modules": list(modules), "blocked": list(blocked)})

    def _send(self, message):
        self.server.stdin.write(json.dumps(message) + "\n")
        self.server.stdin.flush()

    def run(self, function, *arguments):
        source = textwrap.dedent(inspect.getsource(function))
        self._send({"source": source, "name": function.__name__, "arguments": [str(entry) for entry in arguments]})
        answer = json.loads(self.server.stdout.readline())
        if "error" in answer:
            raise AssertionError(f"{function.__name__} failed in a fresh process:\n{answer['error']}")
        return answer["result"]

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
