# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`serve` and `deco serve`: their options, what they refuse before they listen, and how they end."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import openai
import pytest
from asking import COLOUR_ANSWER, COLOUR_QUESTION, PICTURE, about, answer, ask, client, half_open, post
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app
from modeling_deco.serving import ServerOptions, build_app, serve


@contextmanager
def serving(*arguments, max_open_files: int = 1024):
    """`deco serve` in a process: the process, its port, and a list that has the whole of its stderr at the end."""
    limit = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, [{max_open_files}] * 2); "
    command = [sys.executable, "-m", "modeling_deco.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{limit} os.execv(sys.executable, {command})"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = []
    try:
        for line in process.stderr:
            log.append(line)
            if announced := re.search(r"deco-digits is served at http://127\.0\.0\.1:(\d+)/v1$", line):
                break
        yield process, int(announced[1]), log
        stdout, stderr = process.communicate(timeout=60)
        assert stdout == ""
        log.append(stderr)
    finally:
        process.kill()


@pytest.mark.slow
def test_serve_answers_logs_no_content_and_ends_with_ctrl_c():
    with serving() as (process, port, log):
        assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER
        with pytest.raises(openai.BadRequestError), client(port) as asking:
            asking.models.list(extra_headers={"Host": "evil.example"})
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    log = "".join(log)
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in log
    assert "Traceback" not in log
    assert not any(secret in log for secret in (COLOUR_QUESTION, COLOUR_ANSWER, PICTURE[-40:]))


@pytest.mark.slow
def test_serve_ends_on_sigterm():
    with serving() as (process, port, log):
        assert post(port, None, "GET", "/health")[0] == 200
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    assert "Traceback" not in "".join(log)


@pytest.mark.slow
def test_half_open_connections_beyond_the_open_files_do_not_block_others():
    with serving(max_open_files=96) as (process, port, log):
        with ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(half_open(port))
                if _ % 100 == 99:
                    start = time.monotonic()
                    assert post(port, None, "GET", "/health")[0] == 200
                    assert time.monotonic() - start < 5
            assert ask(port, "Is there a 7?", max_tokens=1)
        process.terminate()
    assert "Traceback" not in "".join(log)
    assert len("".join(log)) < 10_000


def test_the_commands_defaults_are_the_servers(monkeypatch):
    given = []
    monkeypatch.setattr("modeling_deco.serving.serve", lambda model, *, options, **rest: given.append(options))
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    assert given == [ServerOptions()]


def test_the_commands_options_reach_the_server(monkeypatch):
    given = []
    monkeypatch.setattr("modeling_deco.serving.serve", lambda model, **arguments: given.append((model, arguments)))
    options = "--revision main --pooled-grid-size 3x4 --max-new-tokens 9 --temperature 0.5 --seed 7 --system Be.brief"
    options += " --image-positions patch"
    places = "--device cpu --dtype float32 --4bit --int8 --host 0.0.0.0 --port 9 --api-key k --max-connections 5"
    result = CliRunner().invoke(app, ["serve", "mine", *options.split(), *places.split()])
    assert result.exit_code == 0, result.stderr
    ((model, arguments),) = given
    assert arguments.pop("options") == ServerOptions(
        api_key="k",
        pooled_grid_size=[3, 4],
        max_new_tokens=9,
        temperature=0.5,
        seed=7,
        system="Be.brief",
        max_connections=5,
    )
    assert (model, arguments) == (
        "mine",
        {
            "revision": "main",
            "device": "cpu",
            "dtype": "float32",
            "in_4bit": True,
            "in_int8": True,
            "image_positions": "patch",
            "host": "0.0.0.0",
            "port": 9,
            "served_model_name": None,
        },
    )


def test_the_command_refuses_a_budget_that_does_not_fit_the_model():
    result = CliRunner().invoke(app, ["serve", str(SHIPPED_CHECKPOINT), "--port", "0", "--pooled-grid-size", "13"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"deco serve: .*13 x 13.*12 x 12.*\n", result.stderr)


def test_the_command_refuses_a_folder_without_all_weights(tmp_path):
    folder = shutil.copytree(SHIPPED_CHECKPOINT, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "multi_modal_projector" not in name}
    assert len(kept) == len(weights) - 4
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["serve", str(folder), "--port", "0"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"deco serve: .*multi_modal_projector.*\n", result.stderr)


def test_a_wrong_address_model_or_key_is_refused_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken_port = taken.getsockname()[1]
        for arguments, message in [
            ({"port": taken_port}, rf"Cannot listen on 127\.0\.0\.1 port {taken_port}: Address already in use"),
            ({"host": "192.0.2.1", "port": 0}, "Cannot assign requested address"),
            ({"port": 65536}, "port 65536: a port is a number from 0 to 65535"),
            ({"port": 0}, r"^There is no folder no/such/model; a Hub id would be owner/name"),
            ({"port": 0, "options": ServerOptions(api_key="")}, "The API key is empty; set one, or leave it out"),
        ]:
            with pytest.raises(ValueError, match=message):
                serve("no/such/model", **arguments)
    result = CliRunner().invoke(app, ["serve", "no/such/model", "--port", "65536"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "deco serve: Cannot listen on 127.0.0.1 port 65536: a port is a number from 0 to 65535.\n"
    )


def test_a_model_that_cannot_be_served_is_refused(shipped):
    llava = SimpleNamespace(config=SimpleNamespace(model_type="llava"))
    with pytest.raises(ValueError, match="mine is a 'llava' model, not a DeCo"):
        build_app(llava, shipped[1], "mine")
    with pytest.raises(ValueError, match="'mine' has no chat template"):
        build_app(shipped[0], SimpleNamespace(chat_template=None), "mine")


def test_without_its_libraries_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("modeling_deco.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r'^The server needs .*: pip install "\.\[serve\]" in a clone'):
        import modeling_deco.serving  # noqa: F401
