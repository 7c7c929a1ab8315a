# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page's components, texts and routes to its events, without a browser."""

import html
import re

import tiny

from modeling_deco.page import build_page
from modeling_deco.page.rendering import answer_html


def component(page, name):
    (found,) = (entry for entry in page.blocks.values() if getattr(entry, "elem_id", None) == name)
    return found


def test_a_model_with_one_grid_has_no_slider_and_no_comparison(uploads):
    model = tiny.build_model(projector_type="qformer", projector_config={"hidden_size": 32, "num_attention_heads": 4})
    page = build_page(model, tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE))
    assert not component(page, "budget").visible
    (button,) = (entry for entry in page.blocks.values() if getattr(entry, "value", None) == "Compare budgets")
    assert not button.visible
    limits = {entry.name: (entry.concurrency_id, entry.concurrency_limit) for entry in page.fns.values()}
    assert {limits[name] for name in ("ask", "compare", "show_word")} == {("model", 1)}  # one at a time


def test_markup_in_an_answer_stays_text():
    evil = "<img src=x onerror=alert(1)> & more"
    shown = answer_html(evil, "note", clickable=True)
    assert "<img" not in shown
    assert html.unescape(re.sub("<[^>]*>", "", shown)) == evil + "note"


def test_words_that_have_maps_are_buttons_with_their_index():
    shown = answer_html("one -- two\n three!", "", clickable=True)
    assert re.findall(r'data-word="(\d+)"[^>]*>([^<]*)<', shown) == [("0", "one"), ("2", "two"), ("3", "three!")]
    assert "<button" not in answer_html("one two", "")
