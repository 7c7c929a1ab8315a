# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page's parts and events, without a browser; tests/browser has one."""

import asyncio
import html
import inspect
import io
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import SpaceCard
from PIL import Image
from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil

from modeling_deco import SHIPPED_CHECKPOINT, DecoProcessor, explain
from modeling_deco.inference import costs
from modeling_deco.inference.generation import load
from modeling_deco.worlds.digits.scenes import render

gr = gradio = pytest.importorskip("gradio")
page_module = pytest.importorskip("modeling_deco.page.app")
TestClient = pytest.importorskip("starlette.testclient").TestClient

ROOT = Path(__file__).parents[2]
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
    with pytest.raises(gr.Error, match="more than the 50,000,000 pixels allowed"):
        next(event(page, "ask")({"path": str(uploads / "large.png")}, QUESTION, 6, None))


@pytest.mark.parametrize("side", [13, 0, -1, 2.5, 6.0, True, None, "6", [3, 4], {"x": 1}, 10**400])
def test_a_budget_that_the_slider_does_not_have_is_told(shipped, upload, side):
    with pytest.raises(gr.Error) as caught:
        next(event(page_module.build_page(*shipped), "ask")(upload, QUESTION, side, None))
    assert caught.value.message == "The token budget must be a whole number from 1 to 12."


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


@pytest.fixture
def looks(shipped):
    """A list that grows with each call of the vision tower."""
    looks = []
    hook = shipped[0].model.vision_tower.register_forward_hook(lambda *call: looks.append(1))
    yield looks
    hook.remove()


def compare(page, upload, question=QUESTION, session=None):
    *_, (_, session) = event(page, "compare")(upload, question, session)
    return session


def test_a_question_looks_at_its_picture_once_at_all_budgets(shipped, upload, looks):
    page = page_module.build_page(*shipped)
    session = ask(page, upload)
    assert len(looks) == 1
    session = compare(page, upload, session=session)
    session = ask(page, upload, side=5, session=session)
    session = ask(page, upload, "How many digits are there?", side=5, session=session)
    assert len(looks) == 1
    event(page, "show_word")(session, word(0))
    event(page, "show_word")(session, word(1))
    assert len(looks) == 2  # of the pass that is differentiated


def test_budgets_are_compared_with_one_look(shipped, upload, looks):
    session = compare(page_module.build_page(*shipped), upload)
    assert sorted(session.costs) == [1, 3, 6, 12]
    assert len(looks) == 1


def test_another_picture_is_looked_at(shipped, uploads, upload, looks):
    other = uploads / "other.png"
    render("test", index=35, seed=2026, min_digits=3).image.save(other)
    page = page_module.build_page(*shipped)
    answers = [ask(page, one, "Read the digits.").answer.text for one in (upload, {"path": str(other)}, upload)]
    assert len(looks) == 2
    assert answers[0] == answers[2] != answers[1]


def test_the_pictures_that_are_kept_are_the_latest(shipped, looks):
    model = shipped[0]
    pictures = page_module._EncodedPictures(model, max_pictures=2)
    with pictures.in_use():
        for seed in (0, 1, 0, 2, 0, 1):  # 1 is the oldest when 2 comes
            model.model.get_image_features(torch.full((1, 3, 96, 96), float(seed)))
    assert len(looks) == 4
    assert len(pictures.kept) == 2


@pytest.mark.parametrize("vision", ["clip", "siglip2"])
def test_answers_from_a_picture_that_was_kept_are_those_of_the_model(uploads, upload, vision):
    model = tiny.build_model(vision)
    image_processor = (
        Siglip2ImageProcessorPil(patch_size=4, max_num_patches=40)
        if vision == "siglip2"
        else CLIPImageProcessorPil(size={"height": 24, "width": 48}, do_center_crop=False)
    )
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), 3, chat_template=tiny.CHAT_TEMPLATE)
    model.generation_config.suppress_tokens = [*range(4), *range(tiny.IMAGE_TOKEN_ID, tiny.VOCAB_SIZE)]
    page = page_module.build_page(model, processor, max_new_tokens=5)
    session = None
    for side in (6, 1, 3, 2, 6):
        session = ask(page, upload, "what is this", side, session)
        content = [{"type": "image", "image": Image.open(upload["path"])}, {"type": "text", "text": "what is this"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"pooled_grid_size": side},
        )
        expected = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        assert session.answer.text == processor.decode(expected, skip_special_tokens=True).strip()
        assert session.costs[side]["Tokens"] == side * side
        assert len(session.answer.text.split()) == 5


def test_the_prefill_that_is_shown_is_that_of_the_answer(shipped, upload, monkeypatch):
    clock = [0.0]

    def passes(seconds):
        return lambda module, args: clock.insert(0, clock[0] + seconds)

    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    model, page = shipped[0], page_module.build_page(*shipped)
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(passes(0.3)),
        model.model.multi_modal_projector.register_forward_hook(lambda *call: passes(0.02)(*call[:2])),
        model.lm_head.register_forward_pre_hook(passes(0.1)),  # for each token, of which the first counts
    ]
    session = ask(page, upload)
    session = compare(page, upload, session=session)  # the tower does not run, but its time is in each row
    for hook in hooks:
        hook.remove()
    assert [row["Prefill"] for row in session.costs.values()] == ["420 ms"] * 4


def test_a_prefill_without_the_picture_is_marked(shipped, upload):
    page = page_module.build_page(*shipped)
    *_, (*_, costs, session) = event(page, "ask")(upload, QUESTION, 6, None)
    assert "*" not in costs
    *_, (*_, costs, session) = event(page, "ask")(upload, "How many digits are there?", 6, session)
    assert " ms *</td>" in costs
    assert "* of the question alone: the picture was in the prompt cache" in costs


def test_the_model_is_as_it_was_after_an_answer(shipped, upload):
    model = shipped[0]
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    answers = event(page_module.build_page(*shipped), "ask")(upload, QUESTION, 6, None)
    for _ in range(2):
        next(answers)
    answers.close()
    assert "get_image_features" not in vars(model.model)
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


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


@pytest.fixture
def launch(socket_enabled, shipped, uploads, monkeypatch):
    """`launch`, which returns where and what it would serve, in place of serving it."""
    loads, shared = [], []

    def run(server, sockets):
        launched.append((sockets[0].getsockname(), server))

    def load_shipped(model, **arguments):
        loads.append(arguments)
        return shipped

    launched = []
    monkeypatch.setattr(page_module, "load", load_shipped)
    monkeypatch.setattr(page_module._Server, "run", run)
    monkeypatch.setattr(page_module, "setup_tunnel", lambda *arguments: shared.append(arguments) or "https://x.live")

    def launch(**arguments):
        page_module.launch(**arguments)
        ((address, server),) = launched
        return SimpleNamespace(address=address, server=server, app=server.config.app, loads=loads, shared=shared)

    return launch


def test_the_default_port_is_the_first_free_one_from_7860_on(launch):
    with socket.create_server(("127.0.0.1", 0)):
        taken = []
        for port in (7860, 7861):
            try:
                taken.append(socket.create_server(("127.0.0.1", port)))
            except OSError:
                pass  # by another process
        try:
            assert 7862 <= launch().address[1] < 7960
        finally:
            for one in taken:
                one.close()


WARNING = "There is no password: whoever reaches the page can use it. DECO_PASSWORD sets one.\n"


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        ({}, ""),
        ({"host": "::1"}, ""),
        ({"host": "0.0.0.0"}, WARNING),
        ({"host": "0.0.0.0", "password": "secret"}, ""),
        ({"share": True}, WARNING),
        ({"share": True, "password": "secret"}, ""),
    ],
)
def test_who_can_be_reached_without_a_password_is_warned(launch, capsys, arguments, warning):
    launched = launch(port=0, **arguments)
    assert capsys.readouterr() == ("", warning)
    assert launched.app.routes[-1].app.auth is None or "password" in arguments


def test_a_shared_page_is_announced_under_both_addresses_and_nothing_else_is_said(launch, capsys, monkeypatch):
    launched = launch(port=0, share=True, password="secret")
    port = launched.address[1]
    ((host, local_port, token, *others),) = launched.shared
    assert (host, local_port, others) == ("127.0.0.1", port, [None, None])
    assert len(token) > 30
    inspect.signature(gradio.networking.setup_tunnel).bind(host, local_port, token, *others)
    expected = f"Running on local URL:  http://127.0.0.1:{port}\nRunning on public URL: https://x.live"
    assert launched.server.announcement == expected


def test_an_empty_password_is_refused():
    with pytest.raises(ValueError, match=r"^The password is empty\.$"):
        page_module.launch(password="")


# --- what anybody may send -------------------------------------------------------------------------------------------


@pytest.fixture
def client(shipped, uploads):
    """Clients of the page's application: `client(password=..., hosts=...)`."""
    with ExitStack() as stack:

        def build(**arguments):
            page = page_module.build_page(*shipped)
            app = page_module.build_app(page, **arguments)
            client = stack.enter_context(TestClient(app, base_url="http://127.0.0.1"))
            client.events = {entry.name: number for number, entry in page.fns.items()}
            return client

        yield build


def send(client, *names_and_bytes):
    files = [("files", (name, content, "image/png")) for name, content in names_and_bytes]
    return client.post("/gradio_api/upload", files=files)


def join(client, name, *data, **fields):
    """What the page answers to an event, all of it as one text."""
    request = {"data": data, "fn_index": client.events[name], "session_hash": "me", **fields}
    joined = client.post("/gradio_api/queue/join", json=request)
    return client.get("/gradio_api/queue/data?session_hash=me").text if joined.is_success else joined.text


def picture_bytes(index=46):
    file = io.BytesIO()
    render("test", index=index, seed=2026, min_digits=3).image.save(file, format="PNG")
    return file.getvalue()


def test_an_upload_is_asked_about(client):
    client = client()
    (path,) = send(client, ("digits.png", picture_bytes())).json()
    said = join(client, "ask", {"path": path, "meta": {"_type": "gradio.FileData"}}, QUESTION, 6, None)
    assert ">purple.</button>" in said.replace("\\u003c", "<").replace('\\"', '"')


FILE_DATA = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "meta", [{}, FILE_DATA, {**FILE_DATA, "url": "file:///etc/passwd"}], ids=["none", "file", "url"]
)
@pytest.mark.parametrize("name", ["ask", "compare", "check"])
def test_a_request_cannot_name_files_of_the_server(client, tmp_path, uploads, name, meta):
    secret = tmp_path / "secret.svg"  # of which gradio thinks lightly
    secret.write_bytes(picture_bytes())
    client = client()
    data = [{"path": str(secret), **meta}, QUESTION, 6, None]
    said = join(client, name, *data[: {"ask": 4, "compare": 3, "check": 1}[name]])
    assert "tokens for the picture" not in said
    assert str(tmp_path) not in said
    assert not list(uploads.rglob("secret*"))
    assert client.get(f"/gradio_api/file={secret}").status_code in (403, 404)


@pytest.mark.parametrize(
    ("name", "data", "fields"),
    [
        ("ask", [], {}),
        ("ask", ["x"] * 9, {}),
        ("ask", [{"path": {"path": 1}}, [], {}, {"path": "x"}], {}),
        ("show_word", [{"answer": {"path": "/etc/passwd"}}], {"event_data": {"word": 0}}),
        ("show_word", [None], {"event_data": {"word": [0]}}),
        ("show_word", [None], {}),
        ("compare", [None, None, None], {}),
    ],
)
def test_what_no_browser_sends_is_refused_without_a_traceback(client, name, data, fields):
    said = join(client(), name, *data, **fields)
    assert '"success":false' in said.replace(" ", "") or "detail" in said
    assert "Traceback" not in said
    assert "site-packages" not in said


def test_a_word_that_the_answer_does_not_have_is_told(shipped, upload):
    page = page_module.build_page(*shipped)
    session = ask(page, upload)
    for data in ({"word": 7}, {"word": "0"}, {"word": None}, {"word": [0]}, {}):
        with pytest.raises(gr.Error, match=r"^'The answer has no such word\.'$"):
            event(page, "show_word")(session, gr.EventData(None, data))


@pytest.mark.parametrize(
    ("error", "message", "printed"),
    [
        (ValueError("a  line\nand more"), "a line and more", False),
        (OSError("/secret/folder is full"), "The page failed; its log says why.", True),
        (KeyError("x"), "The page failed; its log says why.", True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "There is not enough memory", False),
    ],
)
def test_only_what_a_user_can_change_is_told_and_the_rest_is_logged(error, message, printed):
    with pytest.raises(gr.Error) as caught, page_module._shown_errors():
        raise error
    assert caught.value.message.startswith(message)
    assert caught.value.print_exception == printed


def test_a_password_is_needed_for_all_that_the_page_has(client):
    client = client(password="geheim ü")
    image = picture_bytes()
    assert send(client, ("x.png", image)).status_code == 401
    assert "Not authenticated" in join(client, "ask", None, QUESTION, 6, None)
    for path in ("config", "gradio_api/queue/data?session_hash=me", "gradio_api/upload_progress?upload_id=1"):
        assert client.get(f"/{path}").status_code == 401
    assert client.get("/gradio_api/file=/etc/passwd").status_code == 401
    assert "Compare budgets" not in client.get("/").text
    for password in ("", "geheim u", "geheim ü ", "\ud800".encode(errors="surrogatepass")):
        assert client.post("/login", data={"username": "x", "password": password}).status_code in (400, 422)
    assert client.post("/login", data={"username": "any", "password": "geheim ü"}).status_code == 200
    assert send(client, ("x.png", image)).status_code == 200
    assert "Compare budgets" in client.get("/").text


def test_what_the_page_does_not_need_is_not_there(client):
    client = client()
    for path in ("info", "config", "openapi.json", "proxy=https://x.hf.space/", "stream/a/1/2/playlist.m3u8"):
        expected = 200 if path in ("info",) else 404
        assert client.get(f"/gradio_api/{path}").status_code == expected
    for path in ("/monitoring", "/docs", "/redoc", "/openapi.json", "/gradio_api/deep_link", "/gradio_api/dev/reload"):
        assert client.get(path).status_code == 404
    for path in ("call/ask", "api/ask", "run/ask", "component_server", "process_recording", "vibe-edit", "stream/1"):
        assert client.post(f"/gradio_api/{path}", json={"data": []}).status_code == 404
    for method in ("put", "delete", "patch", "options"):
        assert getattr(client, method)("/gradio_api/upload").status_code == 404


def test_the_model_is_not_run_beside_the_queue(client):
    client = client()
    for name in ("ask", "compare", "show_word", "check"):
        request = {"data": [None] * 4, "fn_index": client.events[name]}
        assert client.post("/gradio_api/run/predict", json=request).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1"}, 200),
        ({"Origin": "https://x.live", "X-Forwarded-Host": "x.live"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Origin": "http://evil.example@127.0.0.1"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_use_the_page(client, headers, status):
    assert client().post("/gradio_api/cancel", json=CANCEL, headers=headers).status_code == status


CANCEL = {"session_hash": "me", "fn_index": 1, "event_id": "x"}


def test_a_name_that_leads_to_this_machine_is_not_the_page(client):
    client = client(hosts=["127.0.0.1", "localhost"])
    assert client.get("/config").status_code == 200
    assert client.get("/config", headers={"Host": "rebound.example"}).status_code == 400


def test_requests_have_a_length_that_is_bounded(client):
    client = client()

    def chunks():
        yield b"{}"

    assert client.post("/gradio_api/queue/join", content=chunks()).status_code == 411
    assert client.post("/gradio_api/queue/join", content=b" " * (2**20 + 1)).status_code == 413
    too_large = send(client, ("a.png", bytes(20 * 2**20)), ("b.png", bytes(13 * 2**20)))
    assert (too_large.status_code, "the maximum of 33,619,968" in too_large.text) == (413, True)


def test_the_oldest_uploads_make_room_for_new_ones(client, uploads, monkeypatch):
    monkeypatch.setattr(page_module, "_MAX_UPLOADS", 5 * 2**16)
    example = uploads / "example.png"
    example.write_bytes(bytes(10))
    client = client()
    for number in range(8):
        (path,) = send(client, (f"{number}.png", bytes(number + 1))).json()
        os.utime(path, (1000 + number, 1000 + number))
    left = {path.name for path in uploads.rglob("*.png")}
    assert left == {"example.png", "3.png", "4.png", "5.png", "6.png", "7.png"}


def test_a_request_that_does_not_arrive_ends(client, monkeypatch):
    monkeypatch.setattr(page_module, "_BODY_TIMEOUT", 0.2)
    ended = []

    async def app(scope, receive, send):
        ended.extend([await receive(), await receive()])

    async def receive():
        if not ended_parts:
            ended_parts.append(1)
            return {"type": "http.request", "body": b"a", "more_body": True}
        await asyncio.Event().wait()

    ended_parts = []
    headers = [(b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": headers, "state": {}}
    asyncio.run(page_module._Gate(app, Path("none"))(scope, receive, None))
    assert [message["type"] for message in ended] == ["http.request", "http.disconnect"]


def test_importing_the_package_and_the_command_line_does_not_import_gradio():
    code = "import sys, modeling_deco, modeling_deco.cli; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_gradio_the_page_says_what_to_install():
    code = "import sys; sys.modules['gradio'] = None; import modeling_deco.page.app"
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
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("Running on local URL:  http://0.0.0.0:" in line for line in process.stderr)
    finally:
        process.terminate()
        process.wait()
