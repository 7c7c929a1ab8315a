# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Videos on the page."""

import gradio as gr
import pytest
import tiny
import tiny_videos

from modeling_deco.page import build_page
from modeling_deco.page import events as events_module
from modeling_deco.page.events import PageEvents
from modeling_deco.page.rendering import budget_js, budget_text


@pytest.fixture(scope="module")
def made():
    model = tiny.build_family("llava_next_video", pooled_grid_size=2)
    model.generation_config.suppress_tokens = [*range(4), *range(tiny.IMAGE_TOKEN_ID, tiny.VOCAB_SIZE)]
    return model, tiny.build_family_processor(model.config)


@pytest.fixture
def upload(uploads):
    def save(name, content):
        (uploads / name).write_bytes(content)
        return {"path": str(uploads / name)}

    return save


def test_a_video_is_asked_about(made, upload):
    model, processor = made
    events = PageEvents(model, processor, max_new_tokens=4)
    video = upload("clip.mp4", tiny_videos.video(30))
    assert events.check_video(video) == gr.skip()
    *_, (shown, _, _, costs, session) = events.ask(None, "what ?", 2, None, {"video": video})
    assert "<button" not in shown  # words of an answer about a video have no maps
    assert session.answer is None
    assert session.costs[2]["Image tokens"] == 3 * 9
    assert ">27<" in costs
    looks = []
    hook = model.model.vision_tower.register_forward_hook(lambda *call: looks.append(1))
    *_, (shown, _, _, _, session) = events.ask(None, "what ?", 1, session, video)
    hook.remove()
    assert looks == []  # its frames are kept
    assert "3 x 3 = 9 tokens for each frame of the video" in shown
    with pytest.raises(gr.Error, match="Budgets are compared on an image"):
        list(events.compare(None, "what ?", session, video))


def test_a_file_that_is_no_video_is_removed(made, upload, monkeypatch):
    warnings = []
    monkeypatch.setattr(events_module.gr, "Warning", warnings.append)
    events = PageEvents(*made, max_new_tokens=4)
    for given in (upload("a.mp4", b"text"), {"path": "/etc/passwd"}, {"path": ["a"]}, None):
        assert events.check_video(given) is None
    assert "its content is not a video" in warnings[0]
    assert "was not uploaded" in warnings[1]


def test_the_page_has_a_video_where_the_model_takes_one(made):
    for built, number in ((made, 1), ((tiny.build_model(), tiny.build_processor()), 0)):
        assert sum(isinstance(block, gr.Video) for block in build_page(*built).blocks.values()) == number


def test_the_budget_is_that_of_a_view():
    assert budget_text(3, "each view of the image") == "3 x 3 = 9 tokens for each view of the image"
    assert "`${n} x ${n} = ${n * n} tokens for the image`" in budget_js()
