# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo in lmms-eval: lmms-eval's command on a task of the digits world, compared with our own evaluation.

lmms-eval is installed once, at exact versions, into a folder of its own under `.cache`.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from documents import commands
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.worlds.digits.evaluate import accuracy_by_kind, answer
from modeling_deco.worlds.digits.questions import KINDS, questions
from modeling_deco.worlds.digits.scenes import render

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements-lmms-eval.txt")
NUM_PICTURES = 20

TASK = """\
task: digits_world
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: questions.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
process_results: !function utils.process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""

UTILS = """\
from modeling_deco.worlds.digits.questions import Question, score


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc):
    return doc["text"]


def process_results(doc, results):
    question = Question(doc["kind"], doc["text"], doc["answer"], doc["box"])
    return {"accuracy": float(score(question, results[0]))}
"""


@pytest.fixture(scope="session")
def harness():
    """A folder for PYTHONPATH, with lmms-eval and what it needs."""
    pins = REQUIREMENTS.read_text()
    version = re.search(r"^lmms-eval==(.+)$", pins, flags=re.MULTILINE)[1]
    folder = ROOT / ".cache" / f"lmms-eval-{version}-{sys.implementation.cache_tag}"
    installed = folder / REQUIREMENTS.name
    if not installed.exists() or installed.read_text() != pins:
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as directory:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(REQUIREMENTS)]
            subprocess.run([*pip, "--target", f"{directory}/packages"], check=True)
            Path(directory, "packages", REQUIREMENTS.name).write_text(pins)
            if folder.exists():
                folder.rename(f"{directory}/old")
            Path(directory, "packages").rename(folder)
    return folder


@pytest.fixture(scope="session")
def asked():
    """Pictures and questions of `accuracy_by_kind`."""
    scenes = [render("test", index, min_digits=2, max_digits=4) for index in range(NUM_PICTURES)]
    return [
        (scene.image, question)
        for index, scene in enumerate(scenes)
        for question in questions(scene, np.random.default_rng(index), KINDS)
    ]


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory, asked):
    import datasets

    folder = tmp_path_factory.mktemp("tasks") / "digits_world"
    folder.mkdir()
    rows = [{"image": image, **asdict(question)} for image, question in asked]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.to_parquet(folder / "questions.parquet")
    (folder / "digits_world.yaml").write_text(TASK)
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.fixture(scope="session")
def run(harness, tmp_path_factory):
    """Run Python offline, on the CPU, where lmms-eval is installed; returns its stdout."""
    home = tmp_path_factory.mktemp("hf_home")

    def run_python(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(harness), "HF_HOME": str(home), "NO_COLOR": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        process = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    return run_python


@pytest.fixture(scope="session")
def evaluate(run, task_folder, tmp_path_factory):
    """Results and samples of `python -m lmms_eval --model deco`."""

    def run_lmms_eval(model_args, *options, launcher=()):
        output = tmp_path_factory.mktemp("output")
        log = run(
            *launcher,
            *("-m", "lmms_eval", "--model", "deco", "--model_args", f"pretrained={SHIPPED_CHECKPOINT},{model_args}"),
            *("--tasks", "digits_world", "--include_path", str(task_folder)),
            *("--output_path", str(output), "--log_samples", *options),
        )
        found = list(output.rglob("*_results.json"))
        assert len(found) == 1, log
        (results,), (samples,) = found, list(output.rglob("*_samples_*.jsonl"))
        samples = [json.loads(line) for line in samples.read_text().splitlines()]
        return json.loads(results.read_text()), sorted(samples, key=lambda sample: sample["doc_id"]), log

    return run_lmms_eval


@pytest.fixture(scope="session")
def shipped():
    return (
        AutoModelForImageTextToText.from_pretrained(SHIPPED_CHECKPOINT),
        AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT),
    )


def own_answers(shipped, asked, grid):
    return answer(*shipped, [image for image, _ in asked], [question.text for _, question in asked], grid)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "grid", "batch_size"), [("2", 2, 7), ("3x4", [3, 4], 1)])
def test_lmms_eval_finds_what_our_own_evaluation_finds(evaluate, shipped, asked, size, grid, batch_size):
    results, samples, _ = evaluate(f"pooled_grid_size={size}", "--batch_size", str(batch_size))
    assert [sample["filtered_resps"] for sample in samples] == own_answers(shipped, asked, grid)
    rows = accuracy_by_kind(*shipped, "test", NUM_PICTURES, grid).values()
    num_right = sum(row["accuracy"] / 100 * row["questions"] for row in rows)
    assert 0 < num_right < len(asked)
    assert results["results"]["digits_world"]["accuracy,none"] == pytest.approx(num_right / len(asked), abs=1e-9)


@pytest.mark.slow
def test_two_processes_answer_as_one(evaluate, shipped, asked):
    # what accelerate launch starts on GPUs; on CPUs it starts one process whatever it is told
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ("--batch_size", "4", "--limit", "37")  # 19 and 18 requests
    results, samples, log = evaluate("pooled_grid_size=2", *options, launcher=launcher)
    assert [sample["doc_id"] for sample in samples] == list(range(37))
    assert [sample["filtered_resps"] for sample in samples] == own_answers(shipped, asked[:37], 2)
    assert results["results"]["digits_world"]["accuracy,none"] == np.mean([sample["accuracy"] for sample in samples])
    assert "Running on rank 1" in log


PARSE_COMMANDS = """
import inspect, json, shlex, sys
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string

task_names, tasks = TaskManager("ERROR").all_tasks, []
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = shlex.split(command.partition("-m lmms_eval ")[2])
    _, args = parse_eval_args()
    arguments = simple_parse_args_string(args.model_args).keys()
    assert arguments <= inspect.signature(get_model(args.model)).parameters.keys(), arguments
    tasks.append(args.tasks.split(","))
    assert set(tasks[-1]) <= set(task_names), tasks[-1]
print(json.dumps(tasks))
"""


@pytest.mark.slow
def test_lmms_eval_parses_the_documented_commands_and_knows_their_tasks(run):
    lines = [line for line in commands() if "-m lmms_eval " in line]
    tasks = json.loads(run("-c", PARSE_COMMANDS, json.dumps(lines)).splitlines()[-1])
    named = {name for names in tasks for name in names}
    assert {"pope", "mme", "gqa", "textvqa_val", "refcoco_bbox_rec_val"} <= named


TRAPS = """
from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_doc_to_text, mme_process_results
from lmms_eval.tasks.pope.utils import pope_aggregate_yes_ratio, pope_process_results
from lmms_eval.tasks.refcoco.utils_rec import parse_float_sequence_within
from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text
from lmms_eval.utils import load_yaml_config
import lmms_eval.tasks

folder = lmms_eval.tasks.__path__[0]
pope = {"answer": "yes", "question_id": 0}
scores = {text: pope_process_results(pope, [text])["pope_accuracy"]["score"] for text in ("Yes", "Yes.", "7 yes")}
assert scores == {"Yes": 1.0, "Yes.": 0.0, "7 yes": 0.0}
assert pope_aggregate_yes_ratio([pope_process_results(pope, ["no"])["pope_yes_ratio"]]) == 1.0

mme = {"answer": "Yes", "question_id": 0, "category": "count", "question": "Is it? Please answer yes or no."}
assert mme_process_results(mme, ["Yes."])["mme_perception_score"]["score"] == 1.0
try:
    mme_aggregate_results([mme_process_results(mme, ["Yes."])["mme_perception_score"]])
except AssertionError as error:
    assert "pairwise" in str(error)
else:
    raise AssertionError
post_prompt = load_yaml_config(f"{folder}/mme/mme.yaml")["lmms_eval_specific_kwargs"]["default"]
assert mme_doc_to_text(mme, post_prompt) == "Is it?\\nAnswer the question using a single word or phrase."

textvqa = load_yaml_config(f"{folder}/textvqa/textvqa_val.yaml")
doc = {"question": "Is it IBM?", "ocr_tokens": ["x"]}
asked = textvqa_doc_to_text(doc, textvqa["lmms_eval_specific_kwargs"]["default"])
assert asked == "Is it ibm?\\nAnswer the question using a single word or phrase."
refcoco = load_yaml_config(f"{folder}/refcoco/refcoco_bbox_rec_val.yaml")
for task in (textvqa, refcoco):
    assert task["generation_kwargs"] == {"until": ["ASSISTANT:"]}
for name in ("pope/pope", "mme/mme", "gqa/gqa"):
    assert load_yaml_config(f"{folder}/{name}.yaml")["dataset_kwargs"]["token"] is True

assert parse_float_sequence_within("It is [0.1, 0.20, 1, 0.4].") == [0.1, 0.2, 1.0, 0.4]
assert parse_float_sequence_within("0.1, 0.2, 0.3, 0.4") == [0, 0, 0, 0]
print("all")
"""


@pytest.mark.slow
def test_the_tasks_have_the_traps_that_the_guide_names(run):
    assert run("-c", TRAPS).splitlines()[-1] == "all"


# --- the class -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deco(harness):
    """The module of the model class; lmms-eval can be imported while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(harness))
        yield importlib.import_module("modeling_deco.integrations.lmms_eval")
    for name in [*sys.modules]:
        if name.partition(".")[0] == "lmms_eval" or name == "modeling_deco.integrations.lmms_eval":
            del sys.modules[name]


@pytest.fixture
def lm(deco, checkpoint):
    return deco.Deco(str(checkpoint), batch_size=2)


def image(seed):
    return {"type": "image", "url": tiny.picture(seed)}


def text(words):
    return {"type": "text", "text": words}


def request(lm, messages, doc_id=0, task="cats", context="", **generation_kwargs):
    """A request as lmms-eval makes it; the document holds the messages."""
    from lmms_eval.api.instance import Instance

    lm.task_dict.setdefault(task, {"test": {}})["test"][doc_id] = {task: messages}
    arguments = (context, lambda doc: doc[task], generation_kwargs, doc_id, task, "test")
    return Instance("generate_until", arguments, 0, {"task": task, "doc_id": doc_id, "repeats": 1})


def ask(lm, words="what is this ?", **generation_kwargs):
    """The one answer to a question about a picture."""
    messages = [{"role": "user", "content": [image(0), text(words)]}]
    (result,) = lm.generate_until([request(lm, messages, **generation_kwargs)])
    return result


# messages, and the same in the tiny checkpoint's format: words, and image tokens for the seeds of pictures
CONVERSATIONS = [
    ([("user", [text("what is red ?")])], ["user : what is red ?"], []),
    ([("user", [image(0), text("what is this ?")])], ["user :", 4, "what is this ?"], [0]),
    (
        [("user", [image(1), text("the cat"), image(2), text("is this a dog ?")])],
        ["user :", 4, "the cat", 4, "is this a dog ?"],
        [1, 2],
    ),
    (
        [("user", [image(3), text("two ?")]), ("assistant", [text("two .")]), ("user", [text("is this the dog ?")])],
        ["user :", 4, "two ? assistant : two . user : is this the dog ?"],
        [3],
    ),
    (
        [("user", [image(4), image(5), text("a <image> ? two <image> .")])],
        ["user : a", 4, "? two", 4, "."],
        [4, 5],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_requests_are_answered_in_their_order_as_each_alone(deco, checkpoint, batch_size):
    lm = deco.Deco(str(checkpoint), pooled_grid_size=2, batch_size=batch_size)
    requests, expected = [], []
    for index, (messages, parts, seeds) in enumerate(CONVERSATIONS):
        messages = [{"role": role, "content": content} for role, content in messages]
        # two tasks in turn, whose documents have the same numbers; lm takes longer contexts first
        requests.append(request(lm, messages, index // 2, ["cats", "dogs"][index % 2], "x" * index))
        inputs = tiny.batch(tiny.prompt(*parts, "assistant :"))
        if seeds:
            pictures = [tiny.picture(seed) for seed in seeds]
            inputs["pixel_values"] = lm.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            inputs["pooled_grid_sizes"] = torch.tensor([[2, 2]] * len(seeds))
        generated = lm.model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        words = [tiny.WORDS[token - len(tiny.SPECIAL_TOKENS)] for token in generated.tolist()]
        expected.append((" ".join(words), inputs["input_ids"].shape[1], 6))
    results = lm.generate_until(requests)
    counts = [(result.text, result.token_counts.input_tokens, result.token_counts.output_tokens) for result in results]
    assert counts == expected
    assert len({answer for answer, _, _ in expected}) == len(expected)


@pytest.mark.slow
def test_requests_with_other_generation_arguments_are_answered_apart(lm):
    messages = [{"role": "user", "content": [text("what is red ?")]}]
    lengths = [3, 5, 3, 1]
    requests = [request(lm, messages, max_new_tokens=length) for length in lengths]
    assert [len(result.text.split()) for result in lm.generate_until(requests)] == lengths


@pytest.mark.slow
def test_a_rank_without_requests_answers_none(lm):
    assert lm.generate_until([]) == []


@pytest.mark.slow
def test_an_answer_ends_before_the_first_stop_string(lm):
    words = ask(lm).text.split()
    assert words == ["cat", "this", "cat", "this", "user", "this"]
    for until, num_words in (("user", 4), (["dog", "user"], 4), (["user", "this user"], 3), (["this"], 1)):
        assert ask(lm, until=until).text.split() == words[:num_words]
    assert ask(lm, until="this user").token_counts.output_tokens == 5
    for until in (None, [], [""], ["\n\n"]):
        assert ask(lm, until=until).text.split() == words


@pytest.mark.slow
def test_generation_ends_at_a_stop_string_in_each_row_of_a_batch(lm):
    def asked(until):
        contents = [[image(0), text("what is this ?")], [text("red ?")]]
        messages = [[{"role": "user", "content": content}] for content in contents]
        return lm.generate_until([request(lm, messages[index], index, until=until) for index in range(2)])

    whole = [result.text.split() for result in asked([])]
    stop = next(word for word in whole[0] if word not in whole[1])
    stopped, other = asked([stop])
    assert stopped.token_counts.output_tokens == whole[0].index(stop) + 1
    assert other.text.split() == whole[1]
    assert other.token_counts.output_tokens == 6


@pytest.mark.slow
def test_a_stop_string_that_ends_the_prompt_does_not_end_the_answer(lm):
    assert ask(lm, until=["assistant :", "?"], words="what ?") == ask(lm, words="what ?")  # as in TextVQA and RefCOCO


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({}, {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.2, "do_sample": False}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {"do_sample": True, "temperature": None}),
        ({"num_beams": 3, "max_new_tokens": 4}, {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}),
        ({"max_new_tokens": None}, {"max_new_tokens": 1024}),
    ],
)
def test_generation_arguments_of_tasks(lm, monkeypatch, asked, used):
    lm.model.generation_config.max_new_tokens = None
    given = {}
    monkeypatch.setattr(lm.model, "generate", lambda **kwargs: given.update(kwargs) or kwargs["input_ids"])
    ask(lm, **asked)
    assert {name: given.get(name) for name in used} == used


@pytest.mark.slow
def test_the_checkpoint_limits_answers_if_the_task_does_not(lm):
    assert ask(lm).token_counts.output_tokens == 6
    assert ask(lm, max_new_tokens=2).token_counts.output_tokens == 2


@pytest.mark.slow
def test_beams_give_one_answer_for_each_request(lm):
    assert len(ask(lm, num_beams=3, until=["cat dog"]).text.split()) == 6


@pytest.fixture
def warned(deco, monkeypatch):
    """Warnings, which the library gives once per process."""
    warnings = []
    monkeypatch.setattr(deco.logger, "warning_once", warnings.append)
    return warnings


@pytest.mark.slow
def test_generation_arguments_without_effect_are_named(lm, warned):
    ask(lm, image_aspect_ratio="original", temperature=0, num_beams=1, max_new_tokens=1)
    assert len(warned) == 1
    assert "image_aspect_ratio" in warned[0]


@pytest.mark.slow
def test_a_prompt_beyond_the_context_is_warned_of(lm, warned):
    ask(lm, words="cat " * 236)  # 256 tokens with the other 3, the picture's 9, "assistant :" and the answer's 6
    assert warned == []
    ask(lm, words="cat " * 237)
    assert len(warned) == 1
    assert "context of 256 tokens" in warned[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pool": 3, "max_batch_size": 4},
            r"pool, max_batch_size is not an argument of --model deco; use pretrained, .*",
        ),
        ({"pretrained": 7}, r"pretrained must be text, got 7"),
        ({"pretrained": None}, r"pretrained must be text, got None"),
        ({"revision": 1234}, r"revision must be text, got 1234"),
        ({"batch_size": "auto"}, r"--batch_size must be a positive integer, got 'auto'"),
        ({"batch_size": 0}, r"--batch_size must be a positive integer, got 0"),
        ({"pooled_grid_size": "4,4"}, r"'4,4' is neither a number \(8\) nor ROWSxCOLS \(8x12\)"),
        ({"pooled_grid_size": "[4,4]"}, r"'\[4,4\]' is neither a number \(8\) nor ROWSxCOLS \(8x12\)"),
        ({"pooled_grid_size": 0}, r"pooled_grid_size must be .* got \[0, 0\]"),
        ({"pooled_grid_size": "2x7"}, r"2 x 7 is larger than the 6 x 6 patches"),
        ({"max_image_tokens": 0}, r"max_image_tokens must be a positive int, got 0"),
        ({"tiles": 4}, r"tiles=4 needs the processor's patch_size, which is not set"),
        ({"fps": 2}, r"takes no videos"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(deco, checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        deco.Deco(**{"pretrained": str(checkpoint), **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, {"device": "cpu", "dtype": "auto", "revision": "main", "in_4bit": False}),
        ({"device": "cuda:1"}, {"device": "cuda:1"}),
        ({"device_map": "auto"}, {"device": None}),
        ({"dtype": "float16", "attn_implementation": "eager"}, {"dtype": "float16", "attn_implementation": "eager"}),
        ({"revision": "v1"}, {"revision": "v1"}),
    ],
)
def test_arguments_of_loading(deco, checkpoint, monkeypatch, given, used):
    load, arguments = deco.load, {}

    def recording_load(name, **given):
        arguments.update(given)
        return load(name)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(deco, "load", recording_load)
    deco.Deco(str(checkpoint), **given)
    assert {name: arguments[name] for name in used} == used


@pytest.mark.slow
def test_a_checkpoint_without_its_projector_is_refused(deco, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if "projector" not in key}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for 4 of the model's 64 tensors: model\.multi_modal"):
        deco.Deco(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["device", "device_map"])
def test_one_device_for_several_processes_is_refused(deco, checkpoint, monkeypatch, name):
    monkeypatch.setattr(deco.Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="device and device_map need a single process; each of 2 processes"):
        deco.Deco(str(checkpoint), **{name: "cpu"})


@pytest.mark.slow
def test_another_kind_of_model_is_refused(deco, tmp_path):
    from transformers import LlavaNextConfig

    config = LlavaNextConfig(vision_config=tiny.VISION_CONFIGS["clip"], text_config=tiny.TEXT_CONFIGS["llama"])
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'llava_next' model, not a DeCo"):
        deco.Deco(str(tmp_path))


@pytest.mark.slow
def test_each_picture_is_encoded_once(lm):
    looks = []
    hook = lm.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: looks.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        ask(lm)
        pictures = [{"role": "user", "content": [image(0), image(1), text("what ?")]}]
        lm.generate_until([request(lm, pictures, doc_id=31)])
    finally:
        hook.remove()
    assert looks == [1, 2]


@pytest.mark.slow
def test_nan_logits_are_an_error(lm):
    weight = lm.model.lm_head.weight.data
    kept = weight.clone()
    weight.fill_(float("nan"))
    try:
        with pytest.raises(ValueError, match=r"The model's logits are NaN"):
            ask(lm)
    finally:
        weight.copy_(kept)


@pytest.mark.slow
def test_dtype_and_4_bits(deco):
    import bitsandbytes as bnb

    # not the tiny one: some CPUs' 4-bit kernels want rows of 64 weights
    lm = deco.Deco(str(SHIPPED_CHECKPOINT), dtype="bfloat16", load_in_4bit=True)
    layers = lm.model.model.language_model.layers
    assert isinstance(layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert lm.model.dtype == torch.bfloat16
    assert ask(lm, "Read the digits.").text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "DeCo reads text, images and videos; cats has audio"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "DeCo reads whole videos; cats asks for a part of one"),
        # as in EgoTempo
        ({"type": "video", "url": {"path": "a.mp4", "video_start": 0}}, "cats asks for a part of one"),
    ],
)
def test_audio_and_parts_of_videos_are_refused(lm, part, message):
    messages = [{"role": "user", "content": [part, text("what ?")]}]
    with pytest.raises(NotImplementedError, match=message):
        lm.generate_until([request(lm, messages, doc_id=17)])


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    """A folder with a tiny model that cuts pictures into views and takes videos."""
    folder = tmp_path_factory.mktemp("onevision")
    model = tiny.build_family("llava_onevision")
    model.save_pretrained(folder)
    tiny.build_family_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A file with a video of six seconds."""
    import av

    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height = 40, 30
        for seed in range(12):
            container.mux(stream.encode(av.VideoFrame.from_image(tiny.picture(seed))))
        container.mux(stream.encode(None))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_args", "options"),
    [
        ({}, {}),
        (
            {"pooled_video_grid_size": "2x1", "fps": 2, "max_frames": 5, "frames_per_token_grid": 2},
            {"pooled_video_grid_size": [2, 1], "fps": 2, "max_frames": 5, "frames_per_token_grid": 2},
        ),
        ({"max_image_tokens": 20, "add_timestamps": False}, {"max_image_tokens": 20, "add_timestamps": False}),
    ],
)
def test_videos_and_views_are_prepared_as_by_the_processor(deco, onevision, clip, model_args, options):
    lm = deco.Deco(str(onevision), batch_size=2, **model_args)
    contents = [
        [{"type": "video", "url": clip}, text("what is this ?")],
        [image(1), text("two ?")],
        [{"type": "video", "url": clip}, image(2), text("a <image> ? the <video> .")],
    ]
    prompts = ["<video>what is this ? ", "<image>two ? ", "a <image> ? the <video> . "]
    pictures, videos = [None, [tiny.picture(1)], [tiny.picture(2)]], [[clip], None, [clip]]
    messages = [[{"role": "user", "content": content}] for content in contents]
    results = lm.generate_until([request(lm, one, index, max_new_tokens=6) for index, one in enumerate(messages)])
    for result, prompt, images, video in zip(results, prompts, pictures, videos, strict=True):
        chat = f"<s>user : {prompt}assistant : "
        inputs = lm.processor(images, chat, video, return_tensors="pt", add_special_tokens=False, **options)
        generated = lm.model.generate(**inputs, do_sample=False, max_new_tokens=6)
        length = inputs["input_ids"].shape[1]
        assert result.token_counts.input_tokens == length
        assert result.text == lm.processor.decode(generated[0, length:], skip_special_tokens=True)


@pytest.mark.slow
def test_the_document_of_a_broken_image_is_named(lm, deco, monkeypatch):
    said = []
    monkeypatch.setattr(deco.logger, "error", said.append)
    messages = [{"role": "user", "content": [{"type": "image", "url": "missing.png"}, text("what ?")]}]
    with pytest.raises(ValueError, match=r"'missing\.png'.* cannot be read"):
        lm.generate_until([request(lm, messages, doc_id=17)])
    assert said == ["DeCo failed at one of these documents: cats 17"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["loglikelihood", "generate_until_multi_round"])
def test_other_kinds_of_requests_are_refused(lm, method):
    with pytest.raises(NotImplementedError, match="DeCo supports generate_until tasks only"):
        getattr(lm, method)([])
