# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Every command that a document shows is understood by its program, and the first example runs.

Commands of programs that are not installed here are parsed where they are, by the slow tests of vLLM and lmms-eval.
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import click
import pytest
import typer
from transformers import HfArgumentParser
from trl import TrlParser

import modeling_deco
from modeling_deco.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "MODEL_CARD.md", "CONTRIBUTING.md", "benchmarks/SCALING.md")
PROGRAMS = ("accelerate", "cat", "deco", "hf", "make", "pip", "printf", "python", "ray", "vllm")
# which test reads the README's commands of a program that has an environment of its own
ELSEWHERE = {"vllm serve": "test_vllm.py", "lmms_eval": "test_lmms_eval.py"}
UNTESTED = "ray start"  # nothing here installs Ray


def commands() -> list[str]:
    """Lines of bash blocks, and what stands between backticks and begins like a command."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            found += block.replace("\\\n", " ").splitlines()
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        found += [code for code in re.findall(r"`([^`]+)`", prose) if code.startswith(PROGRAMS) and " " in code]
    lines = (re.sub(r"\s+#\s.*", "", " ".join(line.split())) for line in found)
    return sorted({line for line in lines if line and not line.startswith(("#", "for ")) and line != "done"})


def of_program(*programs: str) -> list[str]:
    """Commands of these programs; those that are checked elsewhere are left out."""
    return [line for line in commands() if _program(line) in programs and not any(part in line for part in ELSEWHERE)]


def of_python() -> list[str]:
    """Commands of Python, by itself and on many processes; those of recipes/sft.py are in test_sft.py."""
    lines = of_program("python") + [line for line in of_program("accelerate") if "launch -m modeling_deco" in line]
    return [line for line in lines if "recipes/sft.py" not in line]


def _program(line: str) -> str:
    """The one that gets what others pipe into it, without variables of the environment."""
    words = shlex.split(line.rpartition("|")[2] if line.startswith(("cat", "printf")) else line)
    return next(word for word in words if "=" not in word)


def test_every_command_has_a_test():
    known = [*of_program("deco", "make", "pip", "hf"), *of_python()]
    known += [line for line in commands() if "recipes/sft.py" in line]  # which test_sft.py has
    known += [line for line in commands() if any(part in line for part in (*ELSEWHERE, UNTESTED))]
    assert set(commands()) - set(known) == set()
    assert len(known) >= 50
    for part, name in ELSEWHERE.items():
        assert part in (ROOT / "tests" / name).read_text()


@pytest.mark.parametrize("line", of_program("deco"))
def test_a_command_of_deco_is_understood(line):
    words = shlex.split(line.rpartition("|")[2] if "|" in line else line)
    words = words[words.index("deco") + 1 :]
    group = typer.main.get_command(app)
    if words[0].startswith("--"):
        assert words[0] in {option for parameter in group.params for option in parameter.opts}
        return
    context = click.Context(group, info_name="deco")
    name, command, arguments = group.resolve_command(context, words)
    command.make_context(name, [argument for argument in arguments if argument != "..."], parent=context)


class Understood(Exception):
    """The program has read its arguments, and would begin."""


@pytest.mark.parametrize("line", of_python())
def test_a_command_of_python_is_understood(line, monkeypatch):
    words = shlex.split(line.replace("accelerate launch", "python"))[1:]
    if words[0] == "-m":
        words = words[1:]
        assert words[0].startswith("modeling_deco.")
        path = words[0].removeprefix("modeling_deco.").replace(".", "/") + ".py"
    else:
        path = words[0]
    arguments = [word for word in words[1:] if word != "..." and not re.fullmatch(r"\[.*\]", word)]
    if line.startswith("accelerate"):  # the YAML's precision is for GPUs
        arguments += ["--use_cpu", "true", "--bf16", "false"]

    def after(parse):
        def parsed(*args, **kwargs):
            parse(*args, **kwargs)
            raise Understood

        return parsed

    def run(function):
        single = typer.Typer()
        single.command()(function)
        typer.main.get_command(single).make_context(path, list(arguments))
        raise Understood

    for parser, method in (
        (argparse.ArgumentParser, "parse_args"),
        (HfArgumentParser, "parse_args_into_dataclasses"),
        (TrlParser, "parse_args_and_config"),
    ):
        monkeypatch.setattr(parser, method, after(getattr(parser, method)))
    monkeypatch.setattr(typer, "run", run)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / Path(path).parent)
    with pytest.raises(Understood):
        runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("line", of_program("make"))
def test_a_target_exists(line):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = [word for word in shlex.split(line)[1:] if "=" not in word]
    assert set(words) <= set(targets)


@pytest.mark.parametrize("line", of_program("pip"))
def test_what_is_installed_has_its_extras(line):
    assert set(re.findall(r"\.\[(\w+)\]", line)) <= set(metadata("modeling-deco").get_all("Provides-Extra"))
    for file in re.findall(r"-r (\S+)", line):
        assert (ROOT / file).is_file()


@pytest.mark.parametrize("line", of_program("hf"))
def test_a_command_of_the_hub_exists(line):
    words = [Path(sys.executable).with_name("hf"), *shlex.split(line)[1:], "--help"]
    assert subprocess.run(words, capture_output=True).returncode == 0


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_python_in_documents_is_python():
    for name in DOCUMENTS:
        for block in python_blocks(name):
            compile(block, name, "exec")


def test_the_first_example_answers(tmp_path, monkeypatch):
    from modeling_deco.worlds.digits.scenes import render

    scene = render("test", index=10, seed=2026, min_digits=4)
    (tmp_path / "demo").mkdir()
    scene.image.save(tmp_path / "demo" / "digits.png")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(python_blocks("README.md")[0], "README.md", "exec"), namespace)
    colour = next(digit.colour for digit in scene.digits if digit.value == 7)
    assert namespace["answer"][0]["generated_text"].strip() == f"7 {colour}."


def test_names_that_documents_import_exist():
    for name in DOCUMENTS:
        for block in python_blocks(name):
            for imported in re.findall(r"^from modeling_deco import ([\w, ]+)", block, re.MULTILINE):
                for attribute in imported.split(","):
                    assert hasattr(modeling_deco, attribute.split(" as ")[0].strip()), attribute


def test_links_within_the_repository_lead_somewhere():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        anchors = {
            re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, target
            elif not target.startswith("http"):
                assert (ROOT / name).parent.joinpath(target).exists(), target


def test_the_table_of_speed_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "inference.json").read_text())
    table = []
    for row in measured["results"]["0.5b, batch 1"]:
        seconds = {name: times["median"] for name, times in row["seconds"].items()}
        name = f"{row['model']}, {row['image_tokens']}" + (", int8" if row["variant"] == "int8" else "")
        times = [f"{seconds[part]:.2f}" for part in ("vision_tower", "language_model", "first_token")]
        ratios = [f"{row['first_token_speedup']:.2f}", f"{row['first_token_speedup_alike']:.2f}"]
        ratios += [f"{row['prefill_over_limit']:.3f}", f"{row['decode_tokens_per_second']:.1f}"]
        sizes = [f"{row['kv_cache_bytes'] / 1e6:.1f} MB", f"{row['peak_bytes'] / 1e9:.2f} GB"]
        table.append("| " + " | ".join([name, *times, *ratios, *sizes]) + " |")
    assert "\n".join(table) in (ROOT / "README.md").read_text()


def test_the_first_thirty_lines_say_what_it_is_and_how_to_use_it():
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    for words in ("-> vision tower", "pip install", "pipeline(", "](#try-it)"):
        assert words in head


def test_programs_of_the_documents_are_known():
    assert shutil.which("make")
    assert {_program(line) for line in commands()} <= {*PROGRAMS, "recipes/gpu_check.sh"}
