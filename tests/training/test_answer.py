# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's own answers as training data: what is asked and written, and runs that are killed or share the work."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from random import Random

import pyarrow.parquet as pq
import pytest
import tiny
import tiny_training
from datasets import Dataset
from filelock import FileLock
from llava_records import human, record, talk, write
from PIL import Image

from modeling_deco.inference.generation import encode
from modeling_deco.inference.loading import load
from modeling_deco.inference.questions import Question
from modeling_deco.training import load_data
from modeling_deco.training.answer import Answerer, TransformersEngine, VLLMEngine, answer_data, engines, run
from modeling_deco.training.answer.answerer import select_questions
from modeling_deco.training.answer.engines import Answer
from modeling_deco.training.answer.output import Output

QUESTIONS = {"what": ["what is this ?", "what is the dog ?"], "colour": ["is the cat red ?", "is this blue ?"]}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.json"
    path.write_text(json.dumps(QUESTIONS))
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven pictures in two folders, one of which is broken, a note and a hidden file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep").mkdir()
    for seed in range(6):
        tiny.picture(seed).save(folder / ("deep" if seed % 2 else "") / f"{seed}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.md").write_text("these are pictures")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model, processor = load(checkpoint, device="cpu", dtype="float32")
    return model.eval(), processor


@pytest.fixture
def answer(checkpoint, pictures, questions, loaded, tmp_path, monkeypatch, own_cache):
    """A function that runs the command in this process, and returns the folder."""
    monkeypatch.setattr(engines, "load", lambda *args, **kwargs: loaded)

    def answer(name="own", images=pictures, **options):
        settings = {"questions": questions, "max_new_tokens": 4, "shard_size": 2, "batch_size": 3} | options
        answer_data(model=str(checkpoint), images=str(images), out=tmp_path / name, **settings)
        return tmp_path / name

    return answer


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(folder):
    return [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def texts_of(row):
    return [part["text"] for message in row["messages"] for part in message["content"] if part["type"] == "text"]


def manifest_of(folder):
    return json.loads((folder / "answers.json").read_text())


def alone(loaded, *parts, max_new_tokens=4):
    """The answer of plain `generate` to one conversation at the full grid."""
    model, processor = loaded
    messages = [
        {
            "role": "assistant" if turn % 2 else "user",
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
                for part in content
            ],
        }
        for turn, content in enumerate(parts)
    ]
    inputs = encode(processor, messages, 6)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class SaysNothing:
    """An engine that has no answer to questions with a word, and repeats the others."""

    batch_size = 2

    def __init__(self, word):
        self.word, self.asked = word, []

    def __call__(self, conversations, seed=0):
        texts = [conversation[-1]["content"][-1]["text"] for conversation in conversations]
        self.asked += conversations
        return [Answer("" if self.word in text else text.upper()) for text in texts]


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_kinds_come_up_before_one_comes_up_again():
    asked = [Question(kind, text) for kind, texts in QUESTIONS.items() for text in texts]
    chosen = [select_questions(asked, Random(seed), 3) for seed in range(50)]
    assert all({question.kind for question in first[:2]} == {"what", "colour"} for first in chosen)
    assert all(len(set(three)) == 3 for three in chosen)
    assert len({tuple(three) for three in chosen}) > 5
    assert select_questions(asked, Random(1), 9) == select_questions(asked, Random(1), 4)
    lines = [Question("", str(number)) for number in range(9)]
    counts = Counter(line for seed in range(60) for line in select_questions(lines, Random(seed), 3))
    assert len(counts) == 9
    assert max(counts.values()) < 40


def test_batched_answers_are_those_of_generate_alone(answer, loaded, pictures, caplog):
    caplog.set_level("INFO")
    folder = answer()
    rows = rows_of(folder)
    assert [row["id"] for row in rows] == [
        f"{name}-{turn}"
        for name in ("0.png", "2.png", "4.png", "deep/1.png", "deep/3.png", "deep/5.png")
        for turn in (1, 2)
    ]
    for row in rows:
        assert row["images"] == [{"bytes": None, "path": str(pictures / row["id"][:-2])}]
        question, said = texts_of(row)
        assert said == alone(loaded, [Image.open(row["images"][0]["path"]), question])
        assert "<" not in said
    assert len({texts_of(row)[1] for row in rows}) > 4
    manifest = manifest_of(folder)
    assert manifest["counts"] == {"questions": 14, "answers": 12, "empty": 0, "unanswered": 2, "cut": 12}
    assert manifest["kinds"] == {"colour": 7, "what": 7}
    assert manifest["pooled_grid_size"] == [6, 6]
    (fault,) = manifest["faults"]
    assert fault.startswith("broken.jpg: the image")
    assert "1 of 7 rows cannot be read or asked: broken.jpg" in caplog.text
    assert "1 files are not read, since their names are not those of pictures: notes.md" in caplog.text


def test_questions_of_the_rows_are_asked_in_their_conversation_or_alone(answer, loaded, tmp_path):
    data = tiny_training.save_dataset(tmp_path / "data", tiny_training.conversations(8))
    asked = {row["id"]: row for row in rows_of(data)}
    pictures = {example["id"]: example["images"] for example in tiny_training.conversations(8)}
    folder = answer(images=data, questions=None)
    for row in rows_of(folder):
        first, said, *later = texts_of(row)
        given = asked[row["id"]]
        assert row["images"] == given["images"]
        assert [first, *later[::2]] == texts_of(given)[::2]
        shown = pictures[row["id"]]
        assert said == alone(loaded, [*shown, first])
        if later:
            assert later[1] == alone(loaded, [*shown, first], [said], [later[0]])
    assert len(rows_of(folder)) == 8
    folder = answer("alone", images=data, questions=None, independent_turns=True)
    for row in rows_of(folder):
        questions, answers = texts_of(row)[::2], texts_of(row)[1::2]
        assert answers == [alone(loaded, [*pictures[row["id"]], question]) for question in questions]


def test_a_picture_of_independent_turns_is_one_row(answer, loaded):
    first, *_ = rows_of(answer(independent_turns=True, questions_per_image=3))
    assert first["id"] == "0.png"
    assert [[part["type"] for part in message["content"]] for message in first["messages"][::2]] == [
        ["image", "text"],
        ["text"],
        ["text"],
    ]
    image = Image.open(first["images"][0]["path"])
    for question, said in zip(texts_of(first)[::2], texts_of(first)[1::2], strict=True):
        assert said == alone(loaded, [image, question])


def test_an_answer_that_is_empty_is_left_out_and_its_images_go_to_the_next_question():
    row = {
        "id": 7,
        "image": tiny.picture(0),
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "."},
            {"role": "user", "content": "two"},
        ],
    }
    for independent in (False, True):
        engine = SaysNothing("one")
        answered = Answerer(engine, independent_turns=independent)([row])
        assert engine.asked[1][0]["content"] == [
            {"type": "image", "image": row["image"]},
            {"type": "text", "text": "two"},
        ]
        assert answered.rows[0]["messages"] == [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "TWO"}]},
        ]
        assert answered.counts == {"questions": 2, "empty": 1, "answers": 1, "cut": 0}
        assert answered.rows[0]["images"][0]["bytes"].startswith(b"\x89PNG")
    assert Answerer(SaysNothing("o"))([row]).rows == []


def test_a_question_that_cannot_be_asked_is_named_and_the_rest_of_its_batch_is_answered(loaded):
    rows = [
        {"id": name, "messages": [{"role": "user", "content": text}]}
        for name, text in [("good", "what ?"), ("long", "what " * 300), ("strange", "what \ud800 ?")]
    ]
    answered = Answerer(TransformersEngine(*loaded, max_new_tokens=3))(rows)
    assert [row["id"] for row in answered.rows] == ["good"]
    long, strange = answered.faults
    assert long.startswith("long: The prompt has ")
    assert strange.startswith("strange: ")
    assert "not valid Unicode" in strange
    assert answered.counts["unanswered"] == 2


def test_sampling_depends_on_the_seed_alone(answer):
    folders = [answer(str(number), temperature=2.0, seed=seed) for number, seed in enumerate((1, 1, 2))]
    first, second, third = (list(map(texts_of, rows_of(folder))) for folder in folders)
    assert first == second != third


# --- where the pictures come from ------------------------------------------------------------------------------------


def test_pictures_come_from_files_of_every_layout(answer, pictures, tmp_path):
    paths = ["deep/1.png", "0.png"]
    conversations = talk("<image>\nwhat is this ?", "a cat .", "what ?", "a dog .")
    bytes_of = [(pictures / path).read_bytes() for path in paths]
    (tmp_path / "list.txt").write_text("\n".join(paths) + "\n")
    write(tmp_path / "paths.json", paths)
    write(tmp_path / "llava.json", [record(path, path, conversations) for path in paths])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"id": path, "image": path}) + "\n" for path in paths))
    Dataset.from_dict({"photo": [str(pictures / path) for path in paths]}).cast_column(
        "photo", tiny_training.FEATURES["images"].feature
    ).save_to_disk(tmp_path / "saved")
    Dataset.from_dict({"image": [{"bytes": encoded, "path": None} for encoded in bytes_of]}).to_parquet(
        tmp_path / "rows.parquet"
    )
    for name in ("list.txt", "paths.json", "llava.json", "rows.jsonl"):
        rows = rows_of(answer(f"of {name}", tmp_path / name, image_root=pictures, questions_per_image=1))
        assert [row["id"] for row in rows] == [f"{path}-1" for path in paths], name
        assert [row["images"][0]["path"] for row in rows] == [str(pictures / path) for path in paths]
    for name in ("saved", "rows.parquet"):
        rows = rows_of(answer(f"of {name}", tmp_path / name))
        assert [row["images"][0]["bytes"] for row in rows[::2]] == bytes_of
    rows = rows_of(answer("llava", tmp_path / "llava.json", image_root=pictures, questions=None))
    assert [texts_of(row)[::2] for row in rows] == [["what is this ?", "what ?"]] * 2


def test_rows_that_cannot_be_read_are_named(answer, pictures, tmp_path):
    records = [
        record("good", "0.png"),
        record("gone", "gone.png"),
        {"id": "bare", "image": "0.png"},
        3,
        record("odd", "0.png", [{"from": "robot", "value": "<image>"}]),
        record("mute", "0.png", [human("<image>")]),
    ]
    write(tmp_path / "llava.json", records)
    folder = answer(images=tmp_path / "llava.json", image_root=pictures, questions=None)
    assert [row["id"] for row in rows_of(folder)] == ["good"]
    gone, bare, number, odd, mute = manifest_of(folder)["faults"]
    assert gone == f"gone: there is no image {str(pictures / 'gone.png')!r}"
    assert bare == "bare: it has no questions"
    assert number == "3: it has no questions"
    assert odd.startswith("odd: 'conversations' is not a list of turns")
    assert mute == "mute: it has no questions"


# --- killed, continued, shared ---------------------------------------------------------------------------------------


@pytest.fixture
def whole(answer):
    """What an uninterrupted run writes."""
    return files_of(answer("whole"))


def counting(loaded, limit, action):
    """An engine that calls `action` in place of its batch number `limit`."""
    engine, calls = TransformersEngine(*loaded, max_new_tokens=4, batch_size=3), []

    class Counting:
        batch_size = 3

        def __call__(self, conversations, seed=0):
            calls.append(conversations)
            if len(calls) == limit:
                action()
            return engine(conversations, seed)

    return lambda *args, **kwargs: Counting()


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(limit, answer, whole, loaded, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_engine", counting(loaded, limit, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        child = os.fork()
        if child == 0:
            try:
                answer()
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    folder = answer()
    assert files_of(folder) == whole
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "point", ["write a shard", "write the manifest", "write the card", "rename the data", "clean"]
)
def test_a_run_that_ends_while_it_writes_goes_on(point, answer, whole, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    place = {
        "write a shard": ("modeling_deco.training.answer.output.row_groups", 1),
        "write the manifest": ("modeling_deco.training.answer.output.Output._write_manifest", 2),
        "write the card": ("modeling_deco.training.answer.output.write_card", 1),
        "rename the data": ("pathlib.Path.rename", 1),
        "clean": ("modeling_deco.training.answer.output.Output._clean", 1),
    }
    name, nth = place[point]
    with monkeypatch.context() as patch:
        if nth == 2:
            original = Output._write_manifest
            patch.setattr(name, lambda self, results: killed() if results else original(self, results))
        else:
            patch.setattr(name, killed)
        with pytest.raises(Killed):
            answer()
    assert files_of(answer()) == whole


def test_a_shard_that_another_process_answers_is_left_to_it(answer, whole, tmp_path, caplog):
    caplog.set_level("INFO")
    place = tmp_path / "own" / ".incomplete"
    place.mkdir(parents=True)
    with FileLock(place / "00002.lock"):
        folder = answer()
        assert "Other processes still answer" in caplog.text
        assert [path.name[6:11] for path in sorted((place / "data").iterdir())] == ["00000", "00001", "00003"]
        assert not (folder / "data").exists()
    assert files_of(answer()) == whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert files_of(answer()) == whole  # a complete run is left as it is
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_new_tokens": 5}, "a run with max_new_tokens 4, not 5"),
        ({"questions": "general"}, "a run with questions "),
        ({"grid": "3"}, r"pooled_grid_size \[6, 6\], not \[3, 3\]"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"batch_size": 4}, "batch_size 3, not 4"),
    ],
)
def test_a_run_is_not_continued_with_other_arguments(changed, message, answer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "answer_shards", lambda *args: None)
        answer()
    with pytest.raises(ValueError, match=message) as error:
        answer(**changed)
    assert "Continue it with its own arguments, or name another folder." in str(error.value)


def test_other_pictures_are_refused_when_a_run_is_continued(answer, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    tiny.picture(0).save(images / "a.png")
    answer(images=images)
    tiny.picture(0).save(images / "b.png")
    with pytest.raises(ValueError, match="a run with images_digest"):
        answer(images=images)


@pytest.mark.slow
def test_two_processes_of_a_launch_write_what_one_writes(answer, whole, checkpoint, pictures, questions, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = ["--model", checkpoint, "--images", pictures, "--questions", questions, "--out", tmp_path / "own"]
    words += ["--max-new-tokens", "4", "--shard-size", "2", "--batch-size", "3", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "modeling_deco.training.answer", *map(str, words)], check=True, env=environment)
    assert files_of(tmp_path / "own") == whole


# --- the result ------------------------------------------------------------------------------------------------------


def test_the_recipe_trains_on_the_answers(answer, tmp_path):
    checkpoint = tiny_training.save_checkpoint(tmp_path / "model")
    folder = answer(independent_turns=True)
    assert load_data(str(folder)).column_names == ["id", "messages", "images"]
    trainer = tiny_training.run(checkpoint, folder, tmp_path / "out", independent_turns=True)
    assert trainer.state.global_step == 1


def test_a_shard_without_answers_can_be_loaded(answer, pictures, tmp_path):
    (tmp_path / "list.txt").write_text("broken.jpg\n0.png\n")
    folder = answer(images=tmp_path / "list.txt", image_root=pictures, shard_size=1)
    assert load_data(str(folder))["id"][:] == ["0.png-1", "0.png-2"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "nowhere"}, "--images nowhere is neither a folder, nor a file, nor the Hub id"),
        ({"grid": "7"}, r"--grid=\[7, 7\]: 7 x 7 is larger than the 6 x 6 patches"),
        ({"grid": "x"}, "'x' is neither a number"),
        ({"engine": "gguf"}, "--engine must be one of transformers, vllm, got 'gguf'"),
        ({"engine": "vllm"}, "--engine vllm needs vLLM, which is not installed: pip install vllm"),
        ({"questions_per_image": 5}, "--questions-per-image 5 is more than the 4 questions"),
        ({"questions": "gone.txt"}, "'gone.txt' cannot be read"),
        ({"revision": "v1", "images": "gone/"}, "--images gone/ is neither"),
    ],
)
def test_bad_arguments_are_one_line(options, message, answer, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        answer(**options)
    assert "\n" not in str(error.value)


def test_folders_that_do_not_fit_are_refused(answer, checkpoint, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures and no data set, nothing"):
        answer(images=tmp_path / "empty")
    (tmp_path / "empty" / "notes.md").touch()
    with pytest.raises(ValueError, match=r"only notes\.md"):
        answer(images=tmp_path / "empty")
    with pytest.raises(ValueError, match=r"has other files, such as notes\.md; name an empty folder"):
        answer("empty")
    with pytest.raises(ValueError, match="own is inside --images"):
        answer_data(model=str(checkpoint), images=str(pictures), out=pictures / "own")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        answer("file")
    (tmp_path / "list.txt").write_text("broken.jpg\n")
    with pytest.raises(ValueError, match=r"None of the 2 questions has an answer; broken\.jpg: the image"):
        answer(images=tmp_path / "list.txt", image_root=pictures)


# --- vLLM ------------------------------------------------------------------------------------------------------------


class FakeVLLM:
    """Stands for the module `vllm`: it keeps what it is given, refuses prompts that are too long, and answers."""

    def __init__(self):
        self.options, self.requests = None, []
        self.LLM, self.SamplingParams = self.build, lambda **options: options

    def build(self, **options):
        self.options = options
        return self

    def generate(self, prompts, sampling_params, use_tqdm):
        assert not use_tqdm
        if any(len(prompt["prompt"]) > 200 for prompt in prompts):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        self.requests += zip(prompts, sampling_params, strict=True)
        choice = type("Choice", (), {"text": " two . ", "finish_reason": "length"})
        return [type("Output", (), {"outputs": [choice]}) for _ in prompts]


def test_vllm_gets_the_prompt_the_pictures_and_the_grid(checkpoint, pictures, monkeypatch):
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(engines, "find_spec", lambda name: fake)
    engine = VLLMEngine(checkpoint, max_new_tokens=4, dtype="float32")
    assert fake.options == {"model": str(checkpoint), "revision": None, "dtype": "float32"}
    rows = [{"id": "a", "images": [str(pictures / "0.png")]}, {"id": "b", "images": [str(pictures / "2.png")]}]
    answered = Answerer(engine, [Question("what", "what is this ?"), Question("long", "what " * 100)])(rows)
    assert len(answered.rows) == 2
    assert [fault[:12] for fault in answered.faults] == ["a: The decod", "b: The decod"]
    assert answered.counts == {"questions": 4, "answers": 2, "unanswered": 2, "cut": 2}
    (first, sampling), _ = fake.requests
    assert first["prompt"] == "<s>user : <image>what is this ? assistant : "
    assert first["mm_processor_kwargs"] == {"pooled_grid_size": [6, 6]}
    assert first["multi_modal_data"]["image"][0].size == (40, 30)
    assert sampling == {"temperature": 0.0, "max_tokens": 4, "seed": sampling["seed"], "skip_special_tokens": True}
