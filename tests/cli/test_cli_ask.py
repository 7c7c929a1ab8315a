"""`deco ask`: only the answer on stdout, one line on stderr for bad input."""

import errno
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import tiny_videos
import torch
import transformers
import typer
from PIL import Image
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app
from modeling_deco.cli.common import write
from modeling_deco.inference import generation, loading
from modeling_deco.worlds.digits.scenes import render

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scene():
    return render("test", index=10, seed=2026, min_digits=4)


@pytest.fixture
def picture(scene, tmp_path):
    path = tmp_path / "digits.png"
    scene.image.save(path)
    return str(path)


def ask(*arguments):
    model = [] if "--model" in arguments else ["--model", str(SHIPPED_CHECKPOINT)]
    return CliRunner().invoke(app, ["ask", *arguments, *model])


@pytest.mark.newest
def test_the_answer_alone_goes_to_stdout(scene, picture):
    digit = scene.digits[0]
    result = ask(picture, f"What colour is the {digit.value}?")
    assert (result.exit_code, result.stdout) == (0, f"{digit.value} {digit.colour}.\n")


def test_json_reports_what_was_used(scene, picture):
    question = "How many digits are there?"
    start = time.monotonic()
    report = json.loads(ask(picture, picture, question, "--pooled-grid-size", "3x4", "--json").stdout)
    elapsed = time.monotonic() - start
    processor = transformers.AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT)
    num_words = len(processor.tokenizer(f"<user>{question}<assistant>")["input_ids"])
    assert (report["pooled_grid_size"], report["num_image_tokens"]) == ([3, 4], 24)
    assert report["num_prompt_tokens"] in (24 + num_words, 24 + num_words + 1)  # with the token of the beginning
    assert 0 < report["seconds"] < elapsed
    assert (report["question"], report["images"]) == (question, [picture, picture])
    assert report["answer"].endswith("digits.")
    for option, grid in (
        ([], [6, 6]),
        (["--pooled-grid-size", "3"], [3, 3]),
        (["--max-image-tokens", "30"], [5, 5]),
        (["--tiles", "4"], [6, 6]),
    ):
        report = json.loads(ask(picture, "Is there a 7?", "--json", *option).stdout)
        assert (report["pooled_grid_size"], report["num_image_tokens"]) == (grid, grid[0] * grid[1])
        assert "relevance" not in report


def test_an_answer_is_written_while_it_is_generated(monkeypatch):
    """Each piece is flushed before the next one is asked for, also into a pipe; white space around it is not."""
    flushed = [""]

    class Stdout(io.StringIO):
        def flush(self):
            flushed[0] = self.getvalue()

    def pieces():
        for piece, before in [(" \n", ""), (" 7", ""), (" re", "7"), ("d. ", "7 re"), (" ", "7 red.")]:
            assert flushed[0] == before
            yield piece
        return "more"

    monkeypatch.setattr(sys, "stdout", Stdout())
    assert write(pieces()) == ("7 red.", "more")
    assert sys.stdout.getvalue() == "7 red.\n"
    assert write(pieces_of("a", "b"), quiet=True) == ("ab", None)
    assert sys.stdout.getvalue() == "7 red.\n"


def pieces_of(*pieces, error=None):
    yield from pieces
    if error is not None:
        raise error


def test_what_stops_an_answer_ends_its_line(capsys):
    with pytest.raises(ValueError, match="NaN"):
        write(pieces_of("7 ", "re", error=ValueError("NaN")))
    assert capsys.readouterr().out == "7 re\n"
    with pytest.raises(typer.Exit) as end:
        write(pieces_of("7", error=KeyboardInterrupt()))
    assert end.value.exit_code == 130
    assert write(pieces_of("7", error=KeyboardInterrupt()), stoppable=True) == ("7", None)


def test_relevance_is_drawn_of_the_same_answer_with_one_pass_of_the_tower(scene, picture, tmp_path, monkeypatch):
    looks, load = [], loading.load

    def counting_load(*args, **kwargs):
        model, processor = load(*args, **kwargs)
        model.model.vision_tower.register_forward_pre_hook(lambda module, args: looks.append(module))
        return model, processor

    monkeypatch.setattr(loading, "load", counting_load)
    digit, drawing = scene.digits[0], tmp_path / "relevance.png"
    drawing.write_text("of an earlier run")
    question = f"What colour is the {digit.value}?"
    alone, sizes = ask(picture, question), {}
    for level in ("query", "both"):
        result = ask(picture, question, "--relevance", str(drawing), "--relevance-level", level)
        assert (result.exit_code, result.stdout) == (0, alone.stdout)
        with Image.open(drawing) as image:
            assert image.format == "PNG"
            sizes[level] = image.size
    assert len(looks) == 3
    assert sizes["both"][1] > 1.9 * sizes["query"][1]
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", "relevance.png"}


def test_options_reach_the_model(picture, monkeypatch):
    given_options, load, stream = {}, loading.load, generation.stream

    def recording_load(model, **given):
        given_options.update(given)
        return load(model)

    def recording_stream(model, processor, inputs, **given):
        given_options.update(given, prompt=inputs["input_ids"][0].tolist(), tokenizer=processor.tokenizer)
        return stream(model, processor, inputs, max_new_tokens=2)

    monkeypatch.setattr(loading, "load", recording_load)
    monkeypatch.setattr(generation, "stream", recording_stream)
    options = "--temperature 0.5 --seed 3 --device cpu --dtype bfloat16 --int8 --4bit --revision v1 --max-new-tokens 9"
    options += " --image-positions patch"
    assert ask(picture, "Is there a 7?", *options.split(), "--system", "Read the digits.").exit_code == 0
    prompt, tokenizer = given_options.pop("prompt"), given_options.pop("tokenizer")
    system, question = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Read", "there"))
    assert prompt.index(system[0]) < prompt.index(question[0])
    assert given_options == {
        "temperature": 0.5,
        "seed": 3,
        "device": "cpu",
        "dtype": "bfloat16",
        "in_int8": True,
        "in_4bit": True,
        "revision": "v1",
        "image_positions": "patch",
        "max_new_tokens": 9,
    }


def test_a_seed_determines_what_is_sampled(picture, tmp_path):
    options = ("--temperature", "9", "--max-new-tokens", "3")
    answers = [ask(picture, "Read the digits.", *options, "--seed", seed).stdout for seed in "121"]
    assert answers[0] == answers[2] != answers[1]
    relevance = ("--relevance", str(tmp_path / "map.png"))
    assert ask(picture, "Read the digits.", *options, "--seed", "1", *relevance).stdout == answers[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], r"greater than or equal to 0|-1.* not in the range"),
        (["--seed", "-1"], r"greater than or equal to 0|-1.* not in the range"),
        (["--dtype", "int8"], r"The dtype must be one of auto, float32, float16, bfloat16, got 'int8'"),
        (["--device", "gpu"], r"The device must be cpu, cuda, cuda:N or mps, got 'gpu'"),
        (["--relevance", "map.png", "--system", "Be brief."], r"--relevance does not support --system"),
    ],
)
def test_wrong_options_are_refused(options, message, picture):
    result = ask(picture, "Is there a 7?", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(message, result.stderr)


def test_a_question_with_an_image_token_is_one_line(picture):
    result = ask(picture, "What is <image>?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "deco ask: The text contains '<image>', which marks an image; leave it out.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "Is there a 7?"], r"The image 'missing\.png' cannot be read: there is no such file"),
        (
            ["{picture}", "Is there a 7?", "--pooled-grid-size", "13"],
            r"13 x 13 is larger than the 12 x 12 patches of image 1",
        ),
        (["{picture}", "Is there a 7?", "--pooled-grid-size", "0"], r"pooled_grid_size must be .* got \[0, 0\]"),
        (
            ["{picture}", "Is there a 7?", "--pooled-grid-size", "4,4"],
            r"'4,4' is neither a number .* nor ROWSxCOLS",
        ),
        (
            ["{picture}", "Is there a 7?", "--pooled-grid-size", "4", "--max-image-tokens", "16"],
            r"Give either pooled_grid_size or max_image_tokens, not both",
        ),
        (["{picture}", "Is there a 7?", "--tiles", "5"], r"tiles"),
        (["{picture}", "Is there a 7?", "--model", "no/such/model"], r"no/such/model"),
        (["{picture}", "Is there a 7?", "--model", "/no/folder"], r"There is no folder /no/folder;"),
        (
            ["{picture}", "Is there a 7?", "--model", "{picture}"],
            r"\.png is a file; a model is a folder or a Hub id\.",
        ),
        (["{picture}"], r'It needs an image and a question: deco ask digits\.png "Read the digits\."'),
        ([], r"It needs an image and a question"),
        (["{picture}", " "], r"It needs an image and a question"),
        (["{picture}", "7 " * 2000], r"The prompt has 20\d\d tokens, but the model's context is 1024; shorten it"),
        (["-", "-", "Is there a 7?"], r"stdin \(-\) has one image, and - is given more than once"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(arguments, message, picture):
    result = ask(*[argument.format(picture=picture) for argument in arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(message, result.stderr)
    assert result.stderr.startswith("deco ask: ")
    assert result.stderr.count("\n") == 1


def test_json_names_the_drawing(picture, tmp_path):
    drawing = str(tmp_path / "relevance.png")
    report = json.loads(ask(picture, "How many digits are there?", "--relevance", drawing, "--json").stdout)
    assert (report["answer"], report["relevance"]) == ("4 digits.", drawing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--relevance", "map.jpg"], r"--relevance writes a PNG file; 'map\.jpg' does not end in \.png"),
        (["--relevance", "missing/map.png"], r"--relevance: there is no folder 'missing' that can be written to"),
        (["--relevance", "{folder}"], r"--relevance: '.*folder\.png' is a folder"),
        (["--relevance", "map.png", "--relevance-level", "word"], r"must be one of patch, query, both, got 'word'"),
        (["other.png", "--relevance", "map.png"], r"--relevance explains an answer about one image, got 2"),
        (["--relevance-level", "query"], r"--relevance-level has no effect without --relevance"),
    ],
)
def test_relevance_is_refused_before_the_model_is_loaded(arguments, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    arguments = [argument.format(folder=tmp_path / "folder.png") for argument in arguments]
    result = ask("missing.png", *arguments, "Is there a 7?", "--model", "no/such/model")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(message, result.stderr)
    assert result.stderr.startswith("deco ask: ")
    assert result.stderr.count("\n") == 1


def test_relevance_without_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_deco.cli.common.find_spec", lambda name: None if name == "matplotlib" else True)
    result = ask("missing.png", "Is there a 7?", "--model", "no/such/model", "--relevance", str(tmp_path / "map.png"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "deco ask: --relevance needs matplotlib: pip install matplotlib\n"


def test_a_drawing_that_fails_leaves_the_old_one_and_the_answer(picture, tmp_path, monkeypatch):
    drawing = tmp_path / "relevance.png"
    drawing.write_text("of an earlier run")

    def fail(self, path, **kwargs):
        Path(path).write_text("half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    result = ask(picture, "Is there a 7?", "--relevance", str(drawing))
    assert result.exit_code == 2
    assert result.stdout.startswith("7 ")
    assert result.stderr == f"deco ask: --relevance {str(drawing)!r} cannot be written: No space left on device.\n"
    assert drawing.read_text() == "of an earlier run"
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", "relevance.png"}


@pytest.mark.parametrize("missing", ["accelerate", "bitsandbytes"])
def test_4_bits_without_their_libraries_are_one_line_on_stderr_and_exit_code_2(missing, picture, monkeypatch):
    monkeypatch.setattr(
        "modeling_deco.inference.quantization.find_spec", lambda name: None if name == missing else True
    )
    result = ask(picture, "Is there a 7?", "--4bit")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"deco ask: --4bit needs {missing}: pip install {missing}\n"


def test_an_image_is_read_from_stdin_and_from_a_home_folder_in_quotes(scene, picture, monkeypatch):
    answer = " ".join(str(digit.value) for digit in scene.digits) + ".\n"
    result = CliRunner().invoke(app, ["ask", "-", "Read the digits."], input=Path(picture).read_bytes())
    assert (result.exit_code, result.stdout) == (0, answer)
    result = CliRunner().invoke(app, ["ask", "-", "Read the digits."], input=b"no picture")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("deco ask: The image cannot be read: its content is not an image")
    monkeypatch.setenv("HOME", str(Path(picture).parent))
    assert ask("~/digits.png", "Read the digits.").stdout == answer


def test_several_images_keep_their_order(picture, monkeypatch):
    asked, encode = [], generation.encode
    monkeypatch.setattr(generation, "encode", lambda *args, **budget: asked.append(args[1]) or encode(*args, **budget))
    other = str(Path(picture).with_name("other.png"))
    Image.new("RGB", (8, 8)).save(other)
    report = json.loads(ask(picture, other, picture, "Which?", "--json").stdout)
    assert report["images"] == [picture, other, picture]
    assert report["num_image_tokens"] == 3 * 36
    ((message,),) = asked
    assert [part["image"].size for part in message["content"][:-1]] == [(96, 96), (8, 8), (96, 96)]
    assert message["content"][-1] == {"type": "text", "text": "Which?"}


def spoil_weights(folder: Path):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def spoil_template(folder: Path):
    (folder / "chat_template.jinja").write_text("{% for message in")


def spoil_config(folder: Path):
    (folder / "config.json").write_text("[]")


def spoil_json(folder: Path):
    (folder / "config.json").write_text('{"model_type":')


def spoil_grid(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pooled_grid_size": "abc"}))


def spoil_width(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))


def without_template(folder: Path):
    (folder / "chat_template.jinja").unlink()


SPOILS = [spoil_weights, spoil_template, spoil_config, spoil_json, spoil_grid, spoil_width, without_template]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_broken_checkpoint_is_one_line(spoil, picture, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED_CHECKPOINT, folder)
    spoil(folder)
    result = ask(picture, "Is there a 7?", "--model", str(folder))
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"deco ask: .*\n", result.stderr)
    assert len(result.stderr) < 500
    assert str(folder) in result.stderr or spoil is spoil_template


def test_another_model_is_refused_before_it_answers(picture, tmp_path):
    transformers.VipLlavaConfig().save_pretrained(tmp_path)
    result = ask(picture, "Is there a 7?", "--model", str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is a 'vipllava' model, not a DeCo" in result.stderr
    assert "deco convert makes one of a LLaVA" in result.stderr


@pytest.mark.slow
def test_a_reader_who_leaves_is_not_an_error(picture):
    command = [sys.executable, "-m", "modeling_deco.cli", "ask", picture, "Is there a 7?"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9")]
)
def test_a_lack_of_memory_is_one_line_and_exit_code_1(error, picture, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("modeling_deco.inference.loading.AutoProcessor.from_pretrained", fail)
    result = ask(picture, "Is there a 7?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "deco ask: out of memory. Choose a smaller --pooled-grid-size, or --4bit.\n"


def test_a_defect_is_not_reported_as_bad_input(picture, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr("modeling_deco.inference.generation.stream", fail)
    result = ask(picture, "Is there a 7?")
    assert (result.exit_code, str(result.exception)) == (1, "a defect")


# --- videos and views ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A folder with a model of views and videos."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    model = tiny.build_family("llava_next_video")
    model.generation_config.suppress_tokens = [*range(4), *range(tiny.IMAGE_TOKEN_ID, tiny.VOCAB_SIZE)]
    model.save_pretrained(folder)
    tiny.build_family_processor(model.config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip"  # its content says that it is a video
    path.write_bytes(tiny_videos.video(40))
    return str(path)


def test_a_video_is_known_by_its_content(clip, picture, clip_model):
    options = ["--model", clip_model, "--json", "--max-new-tokens", "4"]
    report = json.loads(ask(clip, "what ?", *options).stdout)
    assert (report["num_frames"], report["num_video_tokens"], report["num_image_tokens"]) == ([4], 4 * 9, 0)
    more = ["--fps", "5", "--max-frames", "6", "--pooled-video-grid-size", "1x2", "--frames-per-token-grid", "2"]
    report = json.loads(ask(clip, picture, clip, "what ?", *more, "--timestamps", *options).stdout)
    assert (report["num_frames"], report["num_video_tokens"]) == ([6, 6], 2 * 3 * 2)
    assert report["pooled_video_grid_size"] == [1, 2]
    assert report["num_image_tokens"] > 9
    assert report["num_prompt_tokens"] > report["num_video_tokens"] + report["num_image_tokens"] + 2 * 3 * 2
    plain = ask(clip, "what ?", *options[:2], *options[3:])
    assert (plain.exit_code, plain.stdout.strip() != "", plain.stderr) == (0, True, "")


def test_a_budget_of_tokens_gives_the_largest_grid(picture, clip_model):
    options = ["--model", clip_model, "--json", "--max-new-tokens", "2"]
    counts = []
    for most in (30, 60):
        counts.append(json.loads(ask(picture, "what ?", "--max-image-tokens", str(most), *options).stdout))
        assert most / 2 < counts[-1]["num_image_tokens"] <= most
    assert counts[0]["pooled_grid_size"] < counts[1]["pooled_grid_size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{picture}", "?", "--fps", "2"], "--fps has no effect without a video"),
        (["{picture}", "?", "--timestamps"], "--timestamps has no effect without a video"),
        (["{clip}", "?", "--relevance", "a.png"], "--relevance explains an answer about an image, not about a video"),
        (["{clip}", "?"], "The model takes no videos"),
        (["{picture}", "?", "--tiles", "3"], "tiles must be a square number"),
        (["{broken}", "?", "--model", "{model}"], "The video '.*' cannot be read: its content is not a video"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_video_or_view_is_one_line(arguments, message, clip, picture, clip_model, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(tiny_videos.video(5)[:200])
    names = {"clip": clip, "picture": picture, "broken": str(broken), "model": clip_model}
    result = ask(*(argument.format(**names) for argument in arguments))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert re.search(message, result.stderr)
