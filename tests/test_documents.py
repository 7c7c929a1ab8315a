# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The documents are true: programs accept the commands, the examples run, tables show what was measured, links work.

The commands of programs that are not installed here are parsed by the slow tests of vLLM and lmms-eval.
"""

import argparse
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import typer.core
from accelerate.commands.launch import launch_command_parser
from documents import DOCUMENTS, PROGRAMS, ROOT, blocks, commands, prose, text
from transformers import HfArgumentParser
from trl import TrlParser

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app

RESULTS = ROOT / "benchmarks" / "results"
# which test reads the commands of a program that has an environment of its own
ELSEWHERE = {"vllm serve": "integrations/test_vllm.py", "lmms_eval": "integrations/test_lmms_eval.py"}
UNTESTED = "ray start"  # nothing here installs Ray
# what a shortened command leaves out ("..."), and the precision of the YAML files, which is for GPUs
REST_OF_SFT = {"--data_path": "unused", "--output_dir": "unused", "--model_name_or_path": "unused"}
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


def program(line: str) -> str:
    """The first word: behind variables of the environment, and behind the last pipe."""
    words = shlex.split(line.rpartition("|")[2] if line.startswith(("cat", "printf")) else line)
    return next(word for word in words if "=" not in word)


def check_each(lines: list[str], check) -> None:
    """Fail with every line that `check` refuses, and its error; an exit is one, as of argparse."""
    problems = []
    for line in lines:
        try:
            check(line)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            problems.append(f"{line}\n    {error!r}")
    assert not problems, "\n".join(problems)


def of_program(*names: str) -> list[str]:
    """Commands of these programs that are checked here."""
    lines = [line for line in commands() if not any(part in line for part in (*ELSEWHERE, UNTESTED))]
    return [line for line in lines if program(line) in names]


# --- commands --------------------------------------------------------------------------------------------------------


def test_every_command_has_a_test():
    checked = of_program("accelerate", "deco", "hf", "make", "pip", "python", "source")
    elsewhere = [line for line in commands() if any(part in line for part in (*ELSEWHERE, UNTESTED))]
    assert set(commands()) - {*checked, *elsewhere} == set()
    assert len(checked) >= 80
    for part, name in ELSEWHERE.items():
        assert part in (ROOT / "tests" / name).read_text()


def test_deco_understands_its_commands():
    group = typer.main.get_command(app)

    def check(line):
        words = shlex.split(line.rpartition("|")[2] if "|" in line else line)
        words = words[words.index("deco") + 1 :]
        if words[0].startswith("--"):
            assert words[0] in {option for parameter in group.params for option in parameter.opts}
            return
        if len(words) == 1:  # a mention in a sentence
            assert words[0] in group.commands
            return
        name, command, arguments = group.resolve_command(click.Context(group, info_name="deco"), words)
        command.make_context(name, [argument for argument in arguments if argument != "..."])

    check_each(of_program("deco"), check)


class Understood(BaseException):
    """The program has read its arguments, and would begin. No program catches this."""


def test_scripts_and_modules_understand_their_commands(monkeypatch):
    def after(parse):
        def parsed(*args, **kwargs):
            parse(*args, **kwargs)
            raise Understood

        return parsed

    def invoke(*args):
        raise Understood

    def check(line):
        words = shlex.split(re.sub(r"\$(RANK|grid)|\[.*?\]", lambda match: "3" if match[1] else "", line))
        if words == ["accelerate", "launch"]:
            return
        if words[0] == "accelerate":
            launch = launch_command_parser().parse_args(words[2:])
            words = ["python", launch.training_script, *launch.training_script_args]
            assert not launch.module
        module = words[1] == "-m"
        path, *arguments = [word for word in words[1 + module :] if word != "..."]
        if arguments in ([], ["--help"]):  # nothing to parse
            assert find_spec(path) if module else (ROOT / path).is_file()
            return
        if path == "recipes/sft.py":
            arguments += ON_CPU
            for option, value in REST_OF_SFT.items():
                arguments += [] if option in arguments else [option, value]
        elif line.startswith("accelerate"):
            arguments += ON_CPU
        with monkeypatch.context() as patch:
            for parser, method in (
                (argparse.ArgumentParser, "parse_args"),
                (HfArgumentParser, "parse_args_into_dataclasses"),
                (TrlParser, "parse_args_and_config"),
            ):
                patch.setattr(parser, method, after(getattr(parser, method)))
            patch.setattr(typer.core.TyperCommand, "invoke", invoke)
            patch.setattr(sys, "argv", [path, *arguments])
            patch.syspath_prepend(ROOT / Path(path).parent)
            with pytest.raises(Understood):
                (runpy.run_module if module else runpy.run_path)(path, run_name="__main__")

    monkeypatch.chdir(ROOT)
    check_each(of_program("python", "accelerate"), check)


def test_make_has_the_targets():
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    assert {word for line in of_program("make") for word in shlex.split(line)[1:] if "=" not in word} <= targets


def test_pip_finds_the_extras_and_files():
    lines = "\n".join(of_program("pip"))
    extras = {extra for names in re.findall(r"\.\[([\w,]+)\]", lines) for extra in names.split(",")}
    assert extras
    assert extras <= set(metadata("modeling-deco").get_all("Provides-Extra"))
    assert all((ROOT / file).is_file() for file in re.findall(r"-r (\S+)", lines))


def test_hf_has_the_commands():
    def check(line):
        words = [Path(sys.executable).with_name("hf"), *shlex.split(line)[1:], "--help"]
        subprocess.run(words, capture_output=True, check=True)

    check_each(of_program("hf"), check)


def test_the_programs_are_known():
    assert shutil.which("make")
    assert {program(line) for line in commands()} <= {*PROGRAMS}


# --- Python ----------------------------------------------------------------------------------------------------------


def test_python_in_documents_compiles_and_its_imports_exist():
    for name in DOCUMENTS:
        for block in blocks("python", name):
            compile(block, name, "exec")
            for line in re.findall(r"^from modeling_deco.*$", block, re.MULTILINE):
                exec(line, {})


def test_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    from modeling_deco.worlds.digits.scenes import render

    readme = text("README.md")
    assert 0 < readme.index("make demo") < readme.index("demo/digits.png")  # which draws it
    scene = render("test", index=10, seed=2026, min_digits=4)
    (tmp_path / "demo").mkdir()
    scene.image.save(tmp_path / "demo" / "digits.png")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python", "README.md"):
        exec(compile(block, "README.md", "exec"), namespace)
    colour = next(digit.colour for digit in scene.digits if digit.value == 7)
    assert namespace["answer"][0]["generated_text"].strip() == f"7 {colour}."
    digits = " ".join(str(digit.value) for digit in scene.digits)
    assert namespace["text"].strip().endswith(f"{digits}.")
    assert f'"{digits}."' in readme
    assert f'"7 {colour}."' in readme


@pytest.mark.slow
def test_the_readme_trains(tmp_path):
    (block,) = [block for block in blocks("bash", "README.md") if "recipes/sft.py" in block]
    script = block.replace('pip install ".[train]"\n', "").replace("--num-pictures 2000", "--num-pictures 64")
    script = script.replace("demo/digits.png", str(SHIPPED_CHECKPOINT / "digits.png")).replace("runs/", f"{tmp_path}/")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(["bash", "-ec", script], cwd=ROOT, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE)
    assert run.returncode == 0
    assert re.fullmatch(rb"8 \d+ \d+ \d+ \d+\.", run.stdout.splitlines()[-1])


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_tables_of_speed_show_what_was_measured():
    measured = json.loads((RESULTS / "inference.json").read_text())
    short, full = [], []
    for row in measured["results"]["0.5b, batch 1"]:
        seconds = {name: f"{times['median']:.2f}" for name, times in row["seconds"].items()}
        name = f"{row['model']}, {row['image_tokens']}" + (", int8" if row["variant"] == "int8" else "")
        speed_up, alike = f"{row['first_token_speedup']:.2f}", f"{row['first_token_speedup_alike']:.2f}"
        rest = [f"{row['decode_tokens_per_second']:.1f}"]
        rest += [f"{row['kv_cache_bytes'] / 1e6:.1f} MB", f"{row['peak_bytes'] / 1e9:.2f} GB"]
        short.append([name, seconds["first_token"], speed_up, *rest])
        times = [seconds[part] for part in ("vision_tower", "language_model", "first_token")]
        full.append([name, *times, speed_up, alike, f"{row['prefill_over_limit']:.3f}", *rest])
    assert as_table([row for row in short if not re.search(", (36|64)", row[0])]) in text("README.md")
    assert as_table(full) in text("docs/speed.md")


@pytest.mark.parametrize("shape", ["next", "onevision"])
def test_the_tables_of_high_resolution_show_what_was_measured(shape):
    measured, table = json.loads((RESULTS / "views" / "inference.json").read_text()), []
    assert measured["command"] in text("docs/speed.md").replace(" \\\n   ", "")
    for row in measured["results"][f"{shape}, batch 1"]:
        seconds = (row["seconds"][part]["median"] for part in ("vision_tower", "language_model", "first_token"))
        ratios = [f"{row['first_token_speedup']:.2f}", f"{row['prefill_over_limit']:.3f}"]
        sizes = [f"{row['kv_cache_bytes'] / 1e6:.1f} MB", f"{row['peak_bytes'] / 1e9:.2f} GB"]
        name = f"{row['model']}, {row['image_tokens']:,}"
        table.append([name, *(f"{value:.2f}" for value in seconds), *ratios, *sizes])
    assert as_table(table) in text("docs/speed.md")


def test_the_tables_of_accuracy_show_what_was_measured():
    rows = map(json.loads, (RESULTS / "digits_accuracy.jsonl").read_text().splitlines())
    table = [
        [str(math.prod(row["pooled_grid_size"])), *(f"{kind['accuracy']:.1f}" for kind in row["accuracy"].values())]
        for row in rows
        if not row["in_4bit"] and not row["in_int8"]
    ]
    assert as_table([row for row in table if row[0] in ("4", "9", "36", "144")]) in text("README.md")
    measured, table = json.loads((RESULTS / "positions.json").read_text())["untrained"], []
    for tokens in ("144", "36"):
        found = [measured[f"llama {distances}"]["average pooling"][tokens] for distances in ("fixed", "varied")]
        read = [
            by.get(positions, by["sequence"])["read"] for by in found for positions in ("patch", "sequence")
        ]  # at the full grid both are the same
        table.append([tokens, *(f"{value['mean']:.0f} ± {value['error']:.0f}" for value in read)])
    assert as_table(table) in text("README.md")


def test_the_comparison_shows_what_was_measured():
    table = (RESULTS / "compare_projectors" / "table.md").read_text().split("\n\n")[0]
    assert table.split("\n", 2)[2] in text("docs/projectors.md")


def test_the_tables_of_positions_show_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    positions, without_labels = import_module("positions"), import_module("without_labels")
    page = text("docs/positions.md")
    measured = json.loads((RESULTS / "positions.json").read_text())
    tables = [positions.table(measured, name) for name in positions.LANGUAGE_MODELS]
    tables += [positions.table_of_ways(measured, f"llama {distances}") for distances in positions.DISTANCES]
    tables += [positions.table_of_training(measured)]
    measured = json.loads((RESULTS / "without_labels.json").read_text())
    tables += [without_labels.table(measured, distances) for distances in positions.DISTANCES]
    assert [rows[0] for rows in tables if as_table(rows) not in page] == []


def test_the_table_of_clips_shows_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measured = json.loads((RESULTS / "videos.json").read_text())
    assert as_table(import_module("videos").table(measured)) in text("docs/clips.md")


def test_the_tables_of_tiles_show_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measured, tiles = json.loads((RESULTS / "tiles.json").read_text()), import_module("tiles")
    for rows in (tiles.table(measured, "36"), tiles.table_of_tokens(measured)):
        assert as_table(rows) in text("docs/tiles.md")


def as_table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# --- the form of the documents ---------------------------------------------------------------------------------------


def anchors(name: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text(name), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_table_of_high_resolution_shows_what_the_views_are():
    from transformers import LlavaNextConfig, LlavaOnevisionConfig

    from modeling_deco.views import Views, num_map_tokens

    text = (ROOT / "docs/high_resolution.md").read_text()
    onevision = {"vision_aspect_ratio": LlavaOnevisionConfig().vision_aspect_ratio}
    models = {
        "NeXT": Views((336, 336), (24, 24), LlavaNextConfig().image_grid_pinpoints, image_newline=True),
        "OneVision": Views(
            (384, 384), (27, 27), LlavaOnevisionConfig().image_grid_pinpoints, image_newline=True, **onevision
        ),
    }
    header, _, *rows = (line for line in text.splitlines() if line.startswith("|"))
    columns = re.findall(r"(NeXT|OneVision), (\d+) x", header)
    assert len(rows) >= 4
    for row in rows:
        (width, height), counts = map(int, re.findall(r"\d+", row)[:2]), list(map(int, re.findall(r"\d+", row)[2:]))
        expected = [
            num_map_tokens(models[name].image_maps((height, width), (int(side), int(side)))) for name, side in columns
        ]
        assert counts == expected, row


def test_links_within_the_repository_lead_somewhere():
    broken = []
    for name in (*DOCUMENTS, "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
            path, _, anchor = target.partition("#")
            if target.startswith("http"):
                continue
            document = (ROOT / name).parent.joinpath(path).resolve() if path else ROOT / name
            if not document.exists() or (anchor and anchor not in anchors(document.relative_to(ROOT).as_posix())):
                broken.append((name, target))
    assert broken == []


def test_files_that_documents_name_exist():
    path = re.compile(r"(?:benchmarks|conversion|docs|examples|modeling_deco|recipes|tests)/[\w./-]+\.\w+")
    named = {
        (name, code) for name in DOCUMENTS for code in re.findall(r"`([^`\s]+)`", prose(name)) if path.fullmatch(code)
    }
    assert [(name, code) for name, code in sorted(named) if not (ROOT / code).exists()] == []


def test_the_readme_is_short_and_begins_with_what_it_is_and_how_to_use_it():
    lines = text("README.md").splitlines()
    assert len(lines) <= 180
    for words in (
        "-> vision tower",
        "No DeCo weights for photographs",
        "make demo",
        "pip install",
        "pipeline(",
        "](#ask)",
    ):
        assert words in "\n".join(lines[:45])
