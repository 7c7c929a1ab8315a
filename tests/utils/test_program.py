# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How programs end: exit code and one line, also where stdout or stderr takes nothing."""

import os
import subprocess
import sys

import pytest

needs_full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
PROGRAM = """
import sys
from modeling_deco.utils.program import run

def main():
    {}

run("deco", main, bad_input=(ValueError,))
"""


def end(shell_command, main="pass"):
    """Exit code, stdout and stderr of a program in a shell's redirections; $RUN is the program. Without
    PYTHONUNBUFFERED, with which Python finds out earlier what it cannot write."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHON": sys.executable, "PROGRAM": PROGRAM.format(main)}
    command = shell_command.replace("$RUN", '"$PYTHON" -c "$PROGRAM"').replace(
        "$DECO", '"$PYTHON" -m modeling_deco.cli'
    )
    process = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        ("print('answer')", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.stdin.isatty() or sys.stdin.buffer.read()", 0, ""),
        ("sys.exit('no data')", 1, "no data\n"),
        ("raise ValueError('rows:\\n 0')", 2, "deco: rows: 0\n"),
        ("open('/no/such/file')", 1, "deco: [Errno 2] No such file or directory: '/no/such/file'\n"),
    ],
)
def test_a_program_ends_with_its_exit_code_and_one_line(main, code, message):
    for streams in ("", "<&-"):
        assert end(f"$RUN {streams}", main)[::2] == (code, message)


def test_an_error_of_no_known_kind_keeps_its_traceback():
    code, _, stderr = end("$RUN", "{}['key']")
    assert code == 1
    assert "Traceback" in stderr


@needs_full_disk
@pytest.mark.parametrize("main", ["print('answer')", "print('answer', flush=True)", "sys.stdout.write('a' * 10**6)"])
def test_an_output_that_cannot_be_written_is_one_line_and_exit_code_1(main):
    assert end("$RUN >/dev/full", main)[::2] == (1, "deco: the output cannot be written: No space left on device\n")


@needs_full_disk
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", ">/dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-"])
def test_an_error_that_cannot_be_told_keeps_its_exit_code(redirection):
    assert end(f"$RUN {redirection}", "print('answer'); raise ValueError('no')")[0] == 2


def test_a_reader_who_leaves_ends_it_in_silence():
    code, _, stderr = end("$RUN | true; exit ${PIPESTATUS[0]}", "import time; time.sleep(0.2); print('a' * 10**6)")
    assert (code, stderr) == (1, "")


def test_a_closed_stdout_is_not_the_next_file_that_is_opened(tmp_path):
    path = tmp_path / "weights"
    assert end("$RUN >&-", f"open({str(path)!r}, 'w'); import os; os.write(1, b'printed')") == (0, "", "")
    assert path.read_text() == ""


@needs_full_disk
def test_the_command_line_ends_so_too():
    assert end("$DECO --version >/dev/full")[::2] == (
        1,
        "deco: the output cannot be written: No space left on device\n",
    )
    code, _, stderr = end("$DECO nonsense 2>/dev/full")
    assert (code != 0, stderr) == (True, "")
