# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page's parts and events, without a browser; tests/browser has one."""

import html
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from huggingface_hub import SpaceCard
from PIL import Image

from modeling_deco import SHIPPED_CHECKPOINT, explain
from modeling_deco.inference import load
from modeling_deco.recipes.digits.world import render

gr = pytest.importorskip("gradio")
page_module = pytest.importorskip("modeling_deco.page")

ROOT = Path(__file__).parents[1]
QUESTION = "What colour is the 2?"


@pytest.fixture(scope="module")
def shipped():
    return load(str(SHIPPED_CHECKPOINT))


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder


@pytest.fixture
def upload(uploads):
    """What an event gets of an uploaded picture: 7 yellow, 1 green, 2 purple, 4 white."""
    path = uploads / "digits.png"
    render("test", index=46, seed=2026, min_digits=3).image.save(path)
    return {"path": str(path)}


def event(page, name):
    (function,) = (entry.fn for entry in page.fns.values() if entry.name == name)
    return function


def component(page, name):
    (found,) = (entry for entry in page.blocks.values() if getattr(entry, "elem_id", None) == name)
    return found


def ask(page, upload, question=QUESTION, side=6, session=None):
    *_, (*_, session) = event(page, "ask")(upload, question, side, session)
    return session


def word(index):
    return gr.EventData(None, {"word": index})


def test_examples_are_held_out_scans_and_their_questions_are_answered(shipped):
    scenes = {"1.png": 46, "2.png": 22, "3.png": 35, "4.png": 43}
    answers = {"1.png": "2 purple.", "2.png": "9 1 2 3.", "3.png": "6 10 4 14 11.", "4.png": "6 left of 1 no."}
    for file, question in page_module.SHIPPED_EXAMPLES:
        path = SHIPPED_CHECKPOINT / "examples" / file
        scene = render("test", index=scenes[file], seed=2026, min_digits=3)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(scene.image))
        assert path.stat().st_size < 20_000
        assert explain(*shipped, str(path), question).answer == answers[file]
    assert len(page_module.SHIPPED_EXAMPLES) == len(list((SHIPPED_CHECKPOINT / "examples").iterdir())) == 4


def test_a_model_with_one_grid_has_no_slider_and_no_comparison(uploads):
    model = tiny.build_model(projector_type="qformer", projector_config={"hidden_size": 32, "num_attention_heads": 4})
    page = page_module.build_page(model, tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE))
    assert not component(page, "budget").visible
    (button,) = (entry for entry in page.blocks.values() if getattr(entry, "value", None) == "Compare budgets")
    assert not button.visible


def test_a_model_with_one_grid_answers_at_it(uploads, upload):
    model = tiny.build_model(projector_type="qformer", projector_config={"hidden_size": 32, "num_attention_heads": 4})
    page = page_module.build_page(model, tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE), max_new_tokens=3)
    session = ask(page, upload, "what", side=5)
    assert {side: row["Tokens"] for side, row in session.costs.items()} == {None: 9}


@pytest.mark.parametrize(
    ("patch_grid", "pooled_grid_size", "sides"),
    [
        ((6, 6), 3, (3, 6)),
        ((6, 12), 3, (3, 6)),  # the largest square
        ((6, 6), [2, 4], (2, 6)),  # 8 tokens are no square; 2 x 2 is the next below
        ((6, 12), [6, 12], (6, 6)),
        ((1, 1), 1, (1, None)),
    ],
)
def test_the_slider_is_of_square_grids_that_the_model_takes(patch_grid, pooled_grid_size, sides):
    config = SimpleNamespace(patch_grid=patch_grid, takes_any_grid=True)
    assert page_module._sides(config, SimpleNamespace(pooled_grid_size=pooled_grid_size)) == sides


def test_relevance_is_computed_once_for_all_words_of_an_answer(shipped, upload, monkeypatch):
    calls = []
    monkeypatch.setattr(
        page_module, "explain", lambda *args, **kwargs: calls.append(kwargs) or explain(*args, **kwargs)
    )
    page = page_module.build_page(*shipped)
    show_word = event(page, "show_word")
    session = ask(page, upload, side=3)
    captions = [show_word(session, word(index))[1] for index in (0, 1, 0)]
    assert calls == [{"answer": "2 purple.", "pooled_grid_size": 3}]
    assert [re.findall("“(.*)”", caption) for caption in captions] == [["2"], ["purple"], ["2"]]
    session = ask(page, upload, side=6, session=session)
    show_word(session, word(1))
    assert calls[1:] == [{"answer": "2 purple.", "pooled_grid_size": 6}]


def test_the_map_is_that_of_the_budget_that_was_asked_at(shipped, upload):
    page = page_module.build_page(*shipped)
    peaks = []
    for side in (1, 12):
        session = ask(page, upload, side=side)
        drawn = event(page, "show_word")(session, word(1))[0]["value"]
        green = np.asarray(drawn.convert("RGB").resize((12, 12), Image.Resampling.BOX))[..., 1]
        relevance = explain(*shipped, upload["path"], QUESTION, pooled_grid_size=side)
        peaks.append((int(green.argmax()), int(relevance.by_word().text_to_patch[1].argmax())))
    assert all(drawn == expected for drawn, expected in peaks)
    assert peaks[0] != peaks[1]


def test_another_question_keeps_the_shown_answer_until_it_is_asked(shipped, upload):
    page = page_module.build_page(*shipped)
    session = ask(page, upload)
    *_, (_, session) = event(page, "compare")(upload, "Read the digits.", session)
    assert {row["Answer"] for row in session.costs.values()} >= {"7 1 2 4."}
    assert "“purple”" in event(page, "show_word")(session, word(1))[1]


def test_a_path_outside_of_the_uploads_is_not_read(shipped, uploads):
    page = page_module.build_page(*shipped)
    outside = {"path": str(uploads / ".." / "uploads-of-others" / "x.png")}
    for path in (outside, {"path": str(SHIPPED_CHECKPOINT / "examples" / "1.png")}):
        with pytest.raises(gr.Error, match="it was not uploaded"):
            next(event(page, "ask")(path, QUESTION, 6, None))


def test_a_link_out_of_the_uploads_is_not_followed(shipped, uploads):
    (uploads / "x.png").symlink_to(SHIPPED_CHECKPOINT / "examples" / "1.png")
    page = page_module.build_page(*shipped)
    with pytest.raises(gr.Error, match="it was not uploaded"):
        next(event(page, "ask")({"path": str(uploads / "x.png")}, QUESTION, 6, None))


@pytest.mark.parametrize(
    "path",
    ["gone.png", "", "x" * 5000, "x\0", 1, None, ["a"]],
    ids=["gone", "folder", "long", "null", "number", "none", "list"],
)
def test_an_upload_that_is_not_there_is_told_without_folders_of_the_server(shipped, uploads, path):
    upload = {"path": str(uploads / path) if isinstance(path, str) else path}
    page = page_module.build_page(*shipped)
    with pytest.raises(gr.Error) as caught:
        next(event(page, "compare")(upload, QUESTION, None))
    assert caught.value.message == "The image cannot be read: it was not uploaded, or too long ago."


@pytest.mark.parametrize("upload", ["digits.png", 1, [], {}])
def test_an_upload_of_another_form_is_told(shipped, uploads, upload, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    page = page_module.build_page(*shipped)
    with pytest.raises(gr.Error, match="it was not uploaded"):
        next(event(page, "ask")(upload, QUESTION, 6, None))
    assert event(page, "check")(upload) is None
    assert warnings == ["The image cannot be read: it was not uploaded, or too long ago."]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", r"^Write a question first\.$"),
        (1, r"^Write a question first\.$"),
        (None, r"^Write a question first\.$"),
        ("a" * 2001, r"^The question has 2,001 characters, more than the 2,000 allowed\.$"),
    ],
)
def test_a_question_that_the_box_does_not_have_is_told(shipped, upload, question, message):
    page = page_module.build_page(*shipped)
    for call in (event(page, "ask")(upload, question, 6, None), event(page, "compare")(upload, question, None)):
        with pytest.raises(gr.Error) as caught:
            next(call)
        assert re.search(message, caught.value.message)


def test_pictures_have_the_limit_of_what_strangers_send(shipped, uploads):
    Image.new("1", (8000, 8000)).save(uploads / "large.png")
    page = page_module.build_page(*shipped)
    with pytest.raises(gr.Error, match="8000 x 8000 pixels are more than the 50,000,000 allowed"):
        next(event(page, "ask")({"path": str(uploads / "large.png")}, QUESTION, 6, None))


@pytest.mark.parametrize(("side", "message"), [(13, "13 x 13"), (0, "positive int"), (2.5, "positive int")])
def test_a_budget_that_the_slider_does_not_have_is_told(shipped, upload, side, message):
    with pytest.raises(gr.Error, match=message):
        list(event(page_module.build_page(*shipped), "ask")(upload, QUESTION, side, None))


def test_markup_in_an_answer_or_error_stays_text(uploads):
    evil = "<img src=x onerror=alert(1)> & more"
    shown = page_module._answer_html(evil, "note", clickable=True)
    assert "<img" not in shown
    assert html.unescape(re.sub("<[^>]*>", "", shown)) == evil + "note"
    with pytest.raises(gr.Error) as caught, page_module._shown_errors():
        raise ValueError(evil)
    assert "<img" not in caught.value.message


def test_words_that_have_maps_are_buttons_with_their_index():
    shown = page_module._answer_html("one -- two\n three!", "", clickable=True)
    assert re.findall(r'data-word="(\d+)"[^>]*>([^<]*)<', shown) == [("0", "one"), ("2", "two"), ("3", "three!")]
    assert "<button" not in page_module._answer_html("one two", "")


def test_the_next_question_about_a_picture_does_not_look_again_but_to_measure(shipped, upload, monkeypatch):
    model, looks, measured = shipped[0], [], []

    def measure(model, inputs):
        num_looks = len(looks)
        seconds = prefill_seconds(model, inputs, repeats=1)
        measured.append(len(looks) - num_looks)
        return seconds

    prefill_seconds = page_module.prefill_seconds
    monkeypatch.setattr(page_module, "prefill_seconds", measure)
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: looks.append(1))
    page = page_module.build_page(*shipped)
    sessions = [ask(page, upload, question) for question in (QUESTION, "How many digits are there?", QUESTION)]
    hook.remove()
    assert (len(looks), measured) == (1 + 3, [1, 1, 1])
    assert sessions[0].answer.text == sessions[2].answer.text != sessions[1].answer.text


def test_leaving_stops_the_generation(shipped, upload, monkeypatch):
    closed = threading.Event()

    def endless(*args, **kwargs):
        try:
            while True:
                yield "word "
        finally:
            closed.set()

    monkeypatch.setattr(page_module, "stream", endless)
    answers = event(page_module.build_page(*shipped), "ask")(upload, QUESTION, 6, None)
    for _ in range(3):
        next(answers)
    answers.close()
    assert closed.is_set()


def test_events_that_use_the_model_run_one_at_a_time(shipped, uploads):
    page = page_module.build_page(*shipped)
    limits = {entry.name: (entry.concurrency_id, entry.concurrency_limit) for entry in page.fns.values()}
    assert {limits[name] for name in ("ask", "compare", "show_word")} == {("model", 1)}


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 99999, "Cannot listen on 127.0.0.1 port 99999: there is no such port."),
        ("192.0.2.7", None, "Cannot listen on 192.0.2.7 port 0: Cannot assign requested address."),
    ],
)
def test_an_address_that_is_not_ours_is_refused_before_the_model_is_loaded(socket_enabled, host, port, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        page_module.launch("no/such/model", host=host, port=port)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(socket_enabled):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"Cannot listen on 127\.0\.0\.1 port {port}: Address already in use"):
            page_module.launch("no/such/model", port=port)


@pytest.mark.parametrize("port", [None, 0])
def test_the_address_is_free_again_when_gradio_takes_it(socket_enabled, shipped, uploads, monkeypatch, port):
    launched = {}
    monkeypatch.setattr(page_module, "load", lambda model: shipped)
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **arguments: launched.update(arguments))
    page_module.launch(port=port)
    assert launched["server_name"] == "127.0.0.1"
    assert (launched["server_port"] is None) == (port is None)
    with socket.create_server(("127.0.0.1", launched["server_port"] or 0)) as listener:
        assert launched["server_port"] in (None, listener.getsockname()[1])


def test_importing_the_package_and_the_command_line_does_not_import_gradio():
    code = "import sys, modeling_deco, modeling_deco.cli; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_gradio_the_page_says_what_to_install():
    code = "import sys; sys.modules['gradio'] = None; import modeling_deco.page"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "ImportError: The page needs gradio: pip install 'modeling-deco[page]'"


def test_the_space_is_pinned_and_says_what_it_is():
    card = SpaceCard.load(ROOT / "examples" / "space" / "README.md").data
    assert (card.sdk, card.sdk_version, card.app_file, card.license) == ("gradio", "6.31.0", "app.py", "apache-2.0")
    lines = (ROOT / "examples" / "space" / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\d.]+", line) for line in lines)


@pytest.mark.slow
def test_the_space_starts(tmp_path):
    app = ROOT / "examples" / "space" / "app.py"
    process = subprocess.Popen(
        [sys.executable, "-u", str(app)],
        cwd=tmp_path,
        env={**os.environ, "MODEL_ID": str(SHIPPED_CHECKPOINT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("Running on local URL:  http://0.0.0.0:" in line for line in process.stdout)
    finally:
        process.terminate()
        process.wait()
