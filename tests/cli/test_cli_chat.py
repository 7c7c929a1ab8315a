# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco chat`: only answers on stdout; commands; an error leaves the conversation unchanged."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
import tiny_videos
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app
from modeling_deco.cli import chat as chat_module
from modeling_deco.inference.loading import load
from modeling_deco.worlds.digits.scenes import render


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Two scenes of held-out handwriting, and the files that they are in."""
    folder, scenes = tmp_path_factory.mktemp("pictures"), []
    for index in (10, 11):
        scene = render("test", index=index, seed=2026, min_digits=4)
        scene.image.save(folder / f"{index}.png")
        scenes.append((scene, str(folder / f"{index}.png")))
    return scenes


def chat(*arguments, say: str):
    model = [] if arguments and not arguments[0].startswith("--") else [str(SHIPPED_CHECKPOINT)]
    return CliRunner().invoke(app, ["chat", *model, *arguments], input=say)


def read(scene) -> str:
    return " ".join(str(digit.value) for digit in scene.digits) + "."


def test_answers_alone_go_to_stdout_and_a_later_question_is_about_the_same_picture(scenes):
    (scene, path), _ = scenes
    digit = scene.digits[0]
    result = chat("--image", path, say=f"Read the digits.\n\nWhat colour is the {digit.value}?\n")
    assert (result.exit_code, result.stdout) == (0, f"{read(scene)}\n{digit.value} {digit.colour}.\n")


@pytest.fixture
def conversation(scenes):
    """A conversation with the first scene shown, and a list of the number of images in each call of the tower."""
    model, processor = load(str(SHIPPED_CHECKPOINT))
    looks = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: looks.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    conversation = chat_module.Conversation(model, processor, None, 32)
    conversation.take(f"/image {scenes[0][1]}")
    return conversation, looks


def test_an_image_is_encoded_once_in_a_conversation(conversation, scenes, capsys):
    conversation, looks = conversation
    for line in ("Read the digits.", "How many digits are there?", f"/image {scenes[1][1]}", "Read the digits."):
        conversation.take(line)
    assert looks == [1, 1]
    assert capsys.readouterr().out.startswith(f"{read(scenes[0][0])}\n4 ")


@pytest.mark.parametrize(("line", "num_looks"), [("/clear", 2), ("/pooled-grid-size 4", 2), ("/help", 1)])
def test_a_command_after_which_nothing_can_be_reused_frees_its_memory(conversation, scenes, line, num_looks):
    conversation, looks = conversation
    conversation.take("Read the digits.")
    conversation.take(line)
    assert (conversation.prompt_cache.num_bytes == 0) == (num_looks == 2)
    if line == "/clear":
        conversation.take(f"/image {scenes[0][1]}")
    conversation.take("Read the digits.")
    assert looks == [1] * num_looks


def test_images_are_added_and_cleared(scenes):
    (scene, path), (other, other_path) = scenes
    result = chat(say=f"/image {path}\nRead the digits.\n/clear\n/image {other_path}\nRead the digits.\n")
    assert result.stdout == f"{read(scene)}\n{read(other)}\n"
    assert result.stderr.count("Image added: 96 x 96 pixels.") == 2


def test_the_budget_changes_within_the_conversation(scenes, monkeypatch):
    import modeling_deco.inference.generation

    (_, path), _ = scenes
    grids, stream = [], modeling_deco.inference.generation.stream

    def recording_stream(*arguments, pooled_grid_size, **kwargs):
        grids.append(pooled_grid_size)
        return stream(*arguments, pooled_grid_size=pooled_grid_size, **kwargs)

    monkeypatch.setattr(modeling_deco.inference.generation, "stream", recording_stream)
    say = "Is there a 7?\n/pooled-grid-size 3\nIs there a 7?\n/pooled-grid-size 2x4\nIs there a 7?\n"
    result = chat("--image", path, say=say)
    assert grids == [None, [3, 3], [2, 4]]
    assert "3 x 3 = 9 tokens per image." in result.stderr
    assert result.exit_code == 0


@pytest.mark.parametrize(
    "typed", ["~/a picture.png", "'~/a picture.png'", '"{home}/a picture.png"', r"~/a\ picture.png"]
)
def test_a_path_may_be_typed_as_in_a_shell(typed, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(scenes[0][1], tmp_path / "a picture.png")
    result = chat(say=f"/image {typed.format(home=tmp_path)}\n")
    assert (result.exit_code, result.stderr) == (0, "Image added: 96 x 96 pixels.\n\n")


def test_options_reach_every_answer(scenes, monkeypatch):
    """The conversation has one seed: later answers continue its random sequence."""
    import modeling_deco.inference.generation
    import modeling_deco.inference.loading

    (_, path), _ = scenes
    given_options, stream, loaded = [], modeling_deco.inference.generation.stream, {}

    def recording_load(model, **given):
        loaded.update(given)
        return load(model)

    def recording_stream(model, processor, messages, **given):
        given.pop("prompt_cache")
        given_options.append({"first": messages[0], "turns": len(messages), **given})
        return stream(model, processor, messages, max_new_tokens=8)

    monkeypatch.setattr(modeling_deco.inference.loading, "load", recording_load)
    monkeypatch.setattr(modeling_deco.inference.generation, "stream", recording_stream)
    options = "--temperature 0.5 --seed 3 --device cpu --dtype bfloat16 --int8 --4bit --revision v1 --max-new-tokens 9"
    options += " --image-positions patch"
    say = "Is there a 7?\nRead the digits.\n/clear\nIs there a 7?\n"
    result = chat("--image", path, "--system", "Be brief.", *options.split(), say=say)
    assert result.exit_code == 0
    quantized = {"in_int8": True, "in_4bit": True}
    assert loaded == {"device": "cpu", "dtype": "bfloat16", **quantized, "revision": "v1", "image_positions": "patch"}
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    same = {"first": system, "pooled_grid_size": None, "max_new_tokens": 9, "temperature": 0.5}
    assert given_options == [
        {**same, "turns": 2, "seed": 3},
        {**same, "turns": 4, "seed": None},
        {**same, "turns": 2, "seed": None},
    ]


def test_a_system_message_that_the_template_drops_is_refused_before_the_first_question(scenes, tmp_path):
    folder = shutil.copytree(SHIPPED_CHECKPOINT, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages if message['role'] != 'system' %}<user>{% endfor %}"
    )
    result = chat(str(folder), "--system", "Be brief.", say="")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "deco chat: The chat template ignores system messages; leave the system message out.\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image", r"/image needs a path or URL"),
        ("/image missing.png", r"The image 'missing\.png' cannot be read: there is no such file"),
        ("/pooled-grid-size", r"The pooled grid size '' is neither a number"),
        ("/pooled-grid-size 0", r"pooled-grid-size must be a positive int"),
        ("/pooled-grid-size 13", r"13 x 13 is larger than the 12 x 12 patches"),
        ("/help me", None),
        ("/unknown", r"'/unknown' is not a command; /help lists all commands"),
    ],
)
def test_a_script_ends_at_its_first_error(line, message, scenes):
    (scene, path), _ = scenes
    result = chat("--image", path, say=f"{line}\nRead the digits.\n")
    if message is None:
        assert (result.exit_code, result.stdout) == (0, f"{read(scene)}\n")
        return
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"deco chat: .*{message}.*\n", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png"], r"The image 'missing\.png' cannot be read"),
        (["--pooled-grid-size", "a"], r"'a' is neither a number"),
        (["--pooled-grid-size", "13"], r"13 x 13 is larger than the 12 x 12 patches"),
        (["no/such/model"], r"no/such/model"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    result = chat(*arguments, say="")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"deco chat: .*{message}.*\n", result.stderr)


def test_exit_ends_before_the_rest(scenes):
    (_, path), _ = scenes
    result = chat("--image", path, say="/exit\nRead the digits.\n")
    assert (result.exit_code, result.stdout) == (0, "")


def test_on_a_terminal_an_error_does_not_end_the_conversation(scenes):
    """A real terminal for stdin and stderr, a pipe for stdout."""
    (scene, path), _ = scenes
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "modeling_deco.cli", "chat"], stdin=other_end, stdout=subprocess.PIPE, stderr=other_end
    )
    os.close(other_end)
    os.write(terminal, f"/image missing.png\n/image {path}\nRead the digits.\n/exit\n".encode())
    stdout, _ = process.communicate(timeout=120)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert (process.returncode, stdout.decode()) == (0, f"{read(scene)}\n")
    assert "'missing.png' cannot be read" in shown
    assert "> " in shown


def test_too_little_memory_on_a_terminal_does_not_end_the_conversation(capsys):
    class Full(chat_module.Conversation):
        def answer(self, question):
            raise MemoryError

    assert chat_module._take(Full(None, None, None, 8), "Read the digits.")
    assert capsys.readouterr().err.startswith("deco chat: out of memory. Choose a smaller --pooled-grid-size")


@pytest.mark.slow
def test_an_interrupted_script_is_not_a_success(scenes):
    (_, path), _ = scenes
    code = (  # a shell's background jobs, and so their children, ignore the interrupt by default
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"from modeling_deco.cli import app; app({['chat', '--image', path]!r})"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        process.stdin.write("Is there a 7?\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith("7 ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


def test_a_video_in_a_conversation(tmp_path):
    model = tiny.build_family("llava_next_video")
    model.generation_config.suppress_tokens = [*range(4), *range(tiny.IMAGE_TOKEN_ID, tiny.VOCAB_SIZE)]
    path = tmp_path / "clip.mp4"
    path.write_bytes(tiny_videos.video(30))
    processor = tiny.build_family_processor(model.config)
    conversation = chat_module.Conversation(model, processor, {"max_image_tokens": 40}, 3, frames={"fps": 2})
    looks = []
    model.model.vision_tower.register_forward_hook(lambda *call: looks.append(1))
    assert conversation.take(f"/video {path}")
    for question in ("what ?", "a cat ?"):
        conversation.take(question)
    assert len(conversation.messages) == 4
    assert len(looks) == 1  # the frames are encoded once
    with pytest.raises(ValueError, match=r"^/video needs a path or URL"):
        conversation.take("/video")
