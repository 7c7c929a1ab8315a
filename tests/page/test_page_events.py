# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page's events, called as gradio calls them. tests/browser has a browser."""

import json
import re
import threading
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil

from modeling_deco import SHIPPED_CHECKPOINT, DecoProcessor, explain
from modeling_deco.inference import costs
from modeling_deco.page import events as events_module
from modeling_deco.page.encoded_images import EncodedImages
from modeling_deco.page.events import PageEvents, grid_sides, shown_errors
from modeling_deco.page.server import EXAMPLES
from modeling_deco.worlds.digits.scenes import render

QUESTION = "What colour is the 2?"


@pytest.fixture
def events(shipped, uploads):
    return PageEvents(*shipped, max_new_tokens=128)


def ask(events, upload, question=QUESTION, side=6, session=None):
    *_, (*_, session) = events.ask(upload, question, side, session)
    return session


def compare(events, upload, question=QUESTION, session=None):
    *_, (_, session) = events.compare(upload, question, session)
    return session


def word(index):
    return gr.EventData(None, {"word": index})


def test_examples_are_held_out_scans_and_their_questions_are_answered(shipped):
    scenes = {"1.png": 46, "2.png": 22, "3.png": 35, "4.png": 43}
    answers = {"1.png": "2 purple.", "2.png": "9 1 2 3.", "3.png": "6 10 4 14 11.", "4.png": "6 left of 1 no."}
    questions = json.loads((SHIPPED_CHECKPOINT / EXAMPLES).read_text())["questions"]
    for file, question in questions.items():
        path = SHIPPED_CHECKPOINT / "examples" / file
        scene = render("test", index=scenes[file], seed=2026, min_digits=3)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(scene.image))
        assert path.stat().st_size < 20_000
        assert explain(*shipped, str(path), question).answer == answers[file]
    assert len(questions) == len(list((SHIPPED_CHECKPOINT / "examples").glob("*.png"))) == 4


def test_a_model_with_one_grid_answers_at_it(upload):
    model = tiny.build_model(projector_type="qformer", projector_config={"hidden_size": 32, "num_attention_heads": 4})
    events = PageEvents(model, tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE), max_new_tokens=3)
    session = ask(events, upload, "what", side=5)
    session = compare(events, upload, "what", session)
    assert {side: row["Image tokens"] for side, row in session.costs.items()} == {None: 9}


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
def test_the_slider_has_the_square_grids_that_the_model_takes(patch_grid, pooled_grid_size, sides):
    config = SimpleNamespace(patch_grid=patch_grid, takes_any_grid=True)
    assert grid_sides(config, SimpleNamespace(pooled_grid_size=pooled_grid_size)) == sides


# --- maps ------------------------------------------------------------------------------------------------------------


def test_relevance_is_computed_once_for_all_words_of_an_answer(events, upload, monkeypatch):
    calls = []
    monkeypatch.setattr(
        events_module, "explain", lambda *args, **kwargs: calls.append(kwargs) or explain(*args, **kwargs)
    )
    session = ask(events, upload, side=3)
    captions = [events.show_word(session, word(index))[1] for index in (0, 1, 0)]
    assert calls == [{"answer": "2 purple.", "pooled_grid_size": 3}]
    assert [re.findall("“(.*)”", caption) for caption in captions] == [["2"], ["purple"], ["2"]]
    session = ask(events, upload, side=6, session=session)
    events.show_word(session, word(1))
    assert calls[1:] == [{"answer": "2 purple.", "pooled_grid_size": 6}]


def test_a_map_belongs_to_the_budget_of_its_answer(shipped, events, upload):
    peaks = []
    for side in (1, 12):
        session = ask(events, upload, side=side)
        drawn = events.show_word(session, word(1))[0]["value"]
        green = np.asarray(drawn.convert("RGB").resize((12, 12), Image.Resampling.BOX))[..., 1]
        relevance = explain(*shipped, upload["path"], QUESTION, pooled_grid_size=side)
        peaks.append((int(green.argmax()), int(relevance.by_word().text_to_patch[1].argmax())))
    assert all(drawn == expected for drawn, expected in peaks)
    assert peaks[0] != peaks[1]


def test_a_word_that_the_answer_does_not_have_is_refused(events, upload):
    session = ask(events, upload)
    for data in ({"word": 7}, {"word": "0"}, {"word": None}, {"word": [0]}, {}):
        with pytest.raises(gr.Error, match=r"^'The answer has no such word\.'$"):
            events.show_word(session, gr.EventData(None, data))
    with pytest.raises(gr.Error, match=r"This session has expired\. Ask again\."):
        events.show_word(None, word(0))


def test_a_new_question_keeps_the_shown_answer_until_it_is_asked(events, upload):
    session = ask(events, upload)
    session = compare(events, upload, "Read the digits.", session)
    assert {row["Answer"] for row in session.costs.values()} >= {"7 1 2 4."}
    assert "“purple”" in events.show_word(session, word(1))[1]


# --- what is refused -------------------------------------------------------------------------------------------------

NOT_UPLOADED = "The image cannot be read: it was not uploaded, or the upload has expired. Upload it again."


def test_only_files_of_the_upload_folder_are_read_and_links_are_not_followed(events, uploads, monkeypatch):
    example = SHIPPED_CHECKPOINT / "examples" / "1.png"
    (uploads / "link.png").symlink_to(example)
    paths = [str(uploads / ".." / "uploads-of-others" / "x.png"), str(example), str(uploads / "link.png")]
    paths += [str(uploads / name) for name in ("gone.png", "", "x" * 5000, "x\0")]
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    for upload in [*({"path": path} for path in [*paths, 1, None, ["a"]]), "digits.png", 1, [], {}]:
        for call in (events.ask(upload, QUESTION, 6, None), events.compare(upload, QUESTION, None)):
            with pytest.raises(gr.Error) as caught:
                next(call)
            assert caught.value.message == NOT_UPLOADED
        assert events.check(upload) is None
        assert warnings.pop() == NOT_UPLOADED


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "Write a question first."),
        (1, "Write a question first."),
        (None, "Write a question first."),
        ("a" * 2001, "The question has 2,001 characters, more than the 2,000 allowed."),
    ],
)
def test_a_question_that_the_box_cannot_send_is_refused(events, upload, question, message):
    for call in (events.ask(upload, question, 6, None), events.compare(upload, question, None)):
        with pytest.raises(gr.Error) as caught:
            next(call)
        assert caught.value.message == message


def test_images_have_the_limits_of_untrusted_images(events, uploads):
    Image.new("1", (8000, 8000)).save(uploads / "large.png")
    with pytest.raises(gr.Error, match="more than the 50,000,000 pixels allowed"):
        next(events.ask({"path": str(uploads / "large.png")}, QUESTION, 6, None))


def test_a_budget_that_the_slider_cannot_send_is_refused(events, upload):
    for side in (13, 0, -1, 2.5, 6.0, True, None, "6", [3, 4], {"x": 1}, 10**400):
        with pytest.raises(gr.Error) as caught:
            next(events.ask(upload, QUESTION, side, None))
        assert caught.value.message == "The token budget must be a whole number from 1 to 12."


@pytest.mark.parametrize(
    ("error", "message", "printed"),
    [
        (ValueError("a  line\nand <b>more</b>"), "a line and &lt;b&gt;more&lt;/b&gt;", False),
        (OSError("/secret/folder is full"), "The page failed; its log says why.", True),
        (KeyError("x"), "The page failed; its log says why.", True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Out of memory. Choose a", False),
    ],
)
def test_errors_of_the_user_are_shown_and_others_are_only_logged(error, message, printed):
    with pytest.raises(gr.Error) as caught, shown_errors():
        raise error
    assert caught.value.message.startswith(message)
    assert caught.value.print_exception == printed


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def looks(shipped):
    """A list that grows with each call of the vision tower."""
    looks = []
    hook = shipped[0].model.vision_tower.register_forward_hook(lambda *call: looks.append(1))
    yield looks
    hook.remove()


def test_an_image_is_encoded_once_for_all_questions_and_budgets(events, upload, looks):
    session = compare(events, upload)
    assert sorted(session.costs) == [1, 3, 6, 12]
    session = ask(events, upload, side=5, session=session)
    session = ask(events, upload, "How many digits are there?", side=5, session=session)
    assert len(looks) == 1
    for index in (0, 1):
        events.show_word(session, word(index))
    assert len(looks) == 2  # the second is the differentiated pass


def test_a_new_image_is_encoded(events, uploads, upload, looks):
    other = uploads / "other.png"
    render("test", index=35, seed=2026, min_digits=3).image.save(other)
    answers = [ask(events, one, "Read the digits.").answer.text for one in (upload, {"path": str(other)}, upload)]
    assert len(looks) == 2
    assert answers[0] == answers[2] != answers[1]


def test_the_least_recently_used_image_is_evicted(shipped, looks):
    model = shipped[0]
    images = EncodedImages(model, max_images=2)
    with images.in_use():
        for seed in (0, 1, 0, 2, 0, 1):  # 1 is evicted when 2 comes
            model.model.get_image_features(torch.full((1, 3, 96, 96), float(seed)))
    assert len(looks) == 4
    assert len(images.kept) == 2


@pytest.mark.parametrize("vision", ["clip", "siglip2"])
def test_answers_from_an_encoded_image_are_those_of_the_model(upload, vision):
    model = tiny.build_model(vision)
    image_processor = (
        Siglip2ImageProcessorPil(patch_size=4, max_num_patches=40)
        if vision == "siglip2"
        else CLIPImageProcessorPil(size={"height": 24, "width": 48}, do_center_crop=False)
    )
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), 3, chat_template=tiny.CHAT_TEMPLATE)
    model.generation_config.suppress_tokens = [*range(4), *range(tiny.IMAGE_TOKEN_ID, tiny.VOCAB_SIZE)]
    events = PageEvents(model, processor, max_new_tokens=5)
    session = None
    for side in (6, 1, 3, 2, 6):
        session = ask(events, upload, "what is this", side, session)
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
        assert session.costs[side]["Image tokens"] == side * side
        assert len(session.answer.text.split()) == 5


def test_the_prefill_time_is_that_of_the_answer(shipped, events, upload, monkeypatch):
    clock = [0.0]

    def passes(seconds):
        return lambda module, args: clock.insert(0, clock[0] + seconds)

    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    model = shipped[0]
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(passes(0.3)),
        model.model.multi_modal_projector.register_forward_hook(lambda *call: passes(0.02)(*call[:2])),
        model.lm_head.register_forward_pre_hook(passes(0.1)),  # for each token; only the first counts
    ]
    session = ask(events, upload)
    session = compare(events, upload, session=session)  # the tower does not run, but its time is in each row
    for hook in hooks:
        hook.remove()
    assert [row["Prefill"] for row in session.costs.values()] == ["420 ms"] * 4


def test_a_prefill_without_the_image_is_marked(events, upload):
    *_, (*_, costs, session) = events.ask(upload, QUESTION, 6, None)
    assert "*" not in costs
    *_, (*_, costs, session) = events.ask(upload, "How many digits are there?", 6, session)
    assert " ms *</td>" in costs
    assert "* for the question only: the image was in the prompt cache" in costs


def test_the_model_is_unchanged_after_an_answer(shipped, events, upload):
    model = shipped[0]
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    answers = events.ask(upload, QUESTION, 6, None)
    for _ in range(2):
        next(answers)
    answers.close()
    assert "get_image_features" not in vars(model.model)
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


def test_leaving_stops_the_generation(events, upload, monkeypatch):
    closed = threading.Event()

    def endless(*args, **kwargs):
        try:
            while True:
                yield "word "
        finally:
            closed.set()

    monkeypatch.setattr(events_module, "stream", endless)
    answers = events.ask(upload, QUESTION, 6, None)
    for _ in range(3):
        next(answers)
    answers.close()
    assert closed.is_set()
