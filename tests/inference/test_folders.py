# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders that would hang a command or take all memory end it in one line, soon."""

import json
import os
import shutil
import time
from functools import partial

import hostile
import pytest
import tiny
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app
from modeling_deco.inference import costs, folders
from modeling_deco.utils.child_process import run_within_limits


def pipe_for(name):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def endless(name):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return spoil


def huge(name):
    def spoil(folder):
        with open(folder / name, "w") as file:
            file.truncate(5 << 30)  # a hole: it takes no place on the disk

    return spoil


def deep(name):
    return lambda folder: (folder / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def config(part=None, **changes):
    def spoil(folder):
        content = json.loads((folder / "config.json").read_text())
        (content if part is None else content[part]).update(changes)
        hostile.write_json(folder / "config.json", content)

    return spoil


def template(text):
    def spoil(folder):
        (folder / "chat_template.jinja").write_text(text)

    return spoil


def index(file):
    """An index that names `file`, and a pipe in a folder, which blocks whoever opens it."""

    def spoil(folder):
        (folder / "model.safetensors").unlink()
        (folder / "sub").mkdir()
        os.mkfifo(folder / "sub" / "pipe.safetensors")
        hostile.write_json(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": file}})

    return spoil


def image_side(folder):
    name = "processor_config.json" if (folder / "processor_config.json").exists() else "preprocessor_config.json"
    text = (folder / name).read_text()
    settings = json.loads(text)
    (settings.get("image_processor") or settings).update(size={"height": 10**6, "width": 10**6})
    hostile.write_json(folder / name, settings)


def exploding_tokenizer(folder):
    """Each of 10 steps makes 64 letters of one."""
    content = json.loads((folder / "tokenizer.json").read_text())
    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}
    content["normalizer"] = {"type": "Sequence", "normalizers": [longer] * 10}
    hostile.write_json(folder / "tokenizer.json", content)


def exploding_decoder(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    longer = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 64}
    content["decoder"] = {"type": "Sequence", "decoders": [longer] * 10}
    hostile.write_json(folder / "tokenizer.json", content)


def added_tokens(number):
    def spoil(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        token = content["added_tokens"][0]
        content["added_tokens"] += [{**token, "id": 1000 + n, "content": f"<{n}>"} for n in range(number)]
        hostile.write_json(folder / "tokenizer.json", content)

    return spoil


METADATA = {
    "pipe": (pipe_for("config.json"), r"config\.json is a pipe or a device"),
    "pipe for weights": (pipe_for("model.safetensors"), r"model\.safetensors is a pipe or a device"),
    "pipe for a card": (pipe_for("README.md"), r"README\.md is a pipe or a device"),
    "endless": (endless("config.json"), r"config\.json is a pipe or a device"),
    "endless tokenizer": (endless("tokenizer.json"), r"tokenizer\.json is a pipe or a device"),
    "huge": (huge("config.json"), r"config\.json has 5,368,709,120 bytes; such a file may have at most 4,194,304"),
    "huge tokenizer": (
        huge("tokenizer.json"),
        r"tokenizer\.json has 5,368,709,120 bytes; such a file may have at most 67,108,864",
    ),
    "huge template": (huge("chat_template.jinja"), r"chat_template\.jinja has 5,368,709,120 bytes"),
    "deep": (deep("config.json"), r"config\.json is nested too deeply"),
    "layers": (
        config("text_config", num_hidden_layers=1_000_000),
        r"num_hidden_layers .* is 1000000; .* at most 1,024",
    ),
    "tower": (config("vision_config", num_hidden_layers=10**6), r"num_hidden_layers .* is 1000000; .* at most 1,024"),
    "projector": (config(projector_num_layers=10**7), r"projector_num_layers .* is 10000000; .* at most 1,024"),
    "image size": (config("vision_config", image_size=10**6), r"image_size .* is 1000000; .* at most 16,384"),
    "two sides": (config("vision_config", image_size=[10**6, 14]), r"image_size .* is 1000000; .* at most 16,384"),
    "vocabulary": (config("text_config", vocab_size=10**12), r"vocab_size .* at most 4,194,304"),
    "width": (config("text_config", intermediate_size=10**12), r"intermediate_size .* at most 4,194,304"),
    "long list": (
        lambda folder: hostile.write_json(folder / "generation_config.json", {"suppress_tokens": [5] * 30_000}),
        r"generation_config\.json has 210,0\d\d bytes; such a file may have at most 65,536",
    ),
    "code of the Hub": (
        config(attn_implementation="evil/kernel"),
        r"attn_implementation in .* is 'evil/kernel', which is code of the Hub and is not run",
    ),
    "code of the Hub for a part": (
        config("text_config", _experts_implementation={"text_config": "evil/kernel@main"}),
        r"_experts_implementation in .* is 'evil/kernel@main', which is code of the Hub",
    ),
    "added tokens": (added_tokens(32_800), r"tokenizer\.json adds 32,8\d\d tokens .* at most 32,768"),
    "special tokens": (
        lambda folder: hostile.edit_json(folder / "tokenizer_config.json", extra_special_tokens=["<a>"] * 32_769),
        r"tokenizer_config\.json adds 32,769 tokens .* at most 32,768",
    ),
    "shard elsewhere": (index("../model.safetensors"), r"names '\.\./model\.safetensors', .* not a file beside it"),
    "shard in a folder": (index("sub/pipe.safetensors"), r"names 'sub/pipe\.safetensors', .* not a file beside it"),
    "shard without a name": (index(5), r"cannot be loaded"),
    "infinite": (config("text_config", hidden_size=float("inf")), r"hidden_size .* is inf; .* at most 4,194,304"),
}
ENCODING = {
    "repetition": template("{{ 'a' * 8000000000 }}"),
    "padding": template("{{ '%09999999999d' % 1 }}"),
    "doubling": template(
        "{% set n = namespace(x='aaaaaaaa') %}"
        "{% for i in range(50) %}{% set n.x = n.x ~ n.x ~ n.x ~ n.x ~ n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "system message": template(
        "{% if messages[0]['role'] == 'system' %}{{ 'a' * 8000000000 }}{% endif %}{{ '<image>' }}"
    ),
    "second question": template(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{% if messages | length == 3 %}{{ 'a' * 8000000000 }}{% endif %}{{ '<image>' }}"
    ),
    "recursion": template("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"),
    "image side": image_side,
    "tokenizer": exploding_tokenizer,
    "decoder": exploding_decoder,
}


@pytest.fixture
def deco(tmp_path):
    return shutil.copytree(SHIPPED_CHECKPOINT, tmp_path / "deco", ignore=shutil.ignore_patterns("*.py"))


def run(*arguments):
    start = time.monotonic()
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert time.monotonic() - start < 60
    return result


def assert_one_line(result, match):
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert pytest.raises(ValueError, match=match).matches(ValueError(result.stderr)), result.stderr


@pytest.mark.parametrize(
    ("command", "kind"), [*(("info", kind) for kind in METADATA), ("ask", "pipe"), ("ask", "code of the Hub")]
)
def test_what_would_hang_is_refused(command, kind, deco, tmp_path):
    spoil, match = METADATA[kind]
    spoil(deco)
    tiny.picture(0).save(tmp_path / "a.png")
    arguments = ["info", deco] if command == "info" else ["ask", tmp_path / "a.png", "What is this?", "--model", deco]
    assert_one_line(run(*arguments), match)


@pytest.mark.parametrize("kind", ENCODING)
def test_what_explodes_when_a_question_is_encoded_is_refused(kind, deco, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "run_within_limits", partial(run_within_limits, num_bytes=1 << 28))  # sooner
    ENCODING[kind](deco)
    tiny.picture(0).save(tmp_path / "a.png")
    result = run("ask", tmp_path / "a.png", "What is this?", "--model", deco)
    assert_one_line(result, r"its chat template, tokenizer or image processor takes more than 10 seconds or 0.25 GB")
    assert run("info", deco).exit_code == 0  # which encodes nothing


def test_a_card_of_references_is_not_written_out(deco):
    """Nine lists of nine references each: 80 bytes a line, and 9 ** 30 words when it is printed."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 31))]
    (deco / "README.md").write_text(
        "---\n" + "\n".join([*lines, "license: *a30", "base_model: [a/b, *a30]"]) + "\n---\n"
    )
    result = run("info", deco, "--json")
    assert (result.exit_code, json.loads(result.stdout)["license"]) == (0, None)


def test_a_function_is_stopped_after_its_time():
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^The loop takes more than 0\.2 seconds or 2 GB\.$"):
        run_within_limits(lambda: [None for _ in iter(int, 1)], "The loop", seconds=0.2)
    assert time.monotonic() - start < 5


def test_a_function_within_its_limits_gives_its_result_and_an_error_gives_none():
    assert run_within_limits(lambda: {"text": "é" * 10**6}, "It") == {"text": "é" * 10**6}
    assert run_within_limits(lambda: 1 / 0, "It") is None


def test_a_training_run_with_long_logs_is_no_attack(deco):
    (deco / "trainer_state.json").write_text(" " * (5 << 20))
    hostile.write_json(deco / "conversion_report.json", {"num_bytes": 10**12})
    (deco / "broken").symlink_to("nowhere")
    folders.check_folder(deco)


def test_a_card_too_long_for_yaml_is_not_read(deco):
    (deco / "README.md").write_text("---\nlicense: mit\n" + "a: 1\n" * 700_000 + "---\n")
    start = time.monotonic()
    assert costs.describe(deco)["license"] is None
    assert time.monotonic() - start < 10
