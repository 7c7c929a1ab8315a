# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page's layout: which components it has, and which events they start."""

import gradio as gr
from transformers import PreTrainedModel, ProcessorMixin

from .events import MAX_QUESTION_LENGTH, PageEvents
from .rendering import (
    ANSWER_CSS,
    ANSWER_JS,
    COSTS_CSS,
    NO_ANSWER_YET,
    NO_MAP_YET,
    answer_html,
    budget_js,
    budget_text,
    costs_html,
)

CSS = """
#picture img, #map img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#examples .container { width: 4.5rem; height: 4.5rem; }
"""


def build_page(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    name: str = "DeCo",
    about: str = "",
    examples: list[tuple[str, str]] | None = None,
    max_new_tokens: int = 128,
) -> gr.Blocks:
    """The page of one model, without its style, which `build_app` adds.

    One request runs at a time, in the order of arrival. Each browser tab sees only its own questions.

    Args:
        model: a `DecoForConditionalGeneration`.
        processor: its `DecoProcessor`, with a chat template.
        name: the model's name, for the title.
        about: a sentence about the model, in Markdown.
        examples: paths of images, each with a question.
        max_new_tokens: maximum length of an answer.
    """
    events = PageEvents(model, processor, max_new_tokens)
    with gr.Blocks(title=f"DeCo: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        session = gr.State(None, time_to_live=3600)
        gr.Markdown(f"# {name}\n{about}")
        with gr.Row():
            with gr.Column():
                image, video, question, side, ask = _inputs(events, examples)
            with gr.Column():
                answer, word_map, caption, costs, compare = _outputs(events)

        side.change(None, side, side, js=budget_js(events.of_what))
        # Without preprocessing: gradio would open the image itself, and fail with its own messages.
        raw = {"preprocess": False, "api_visibility": "private"}
        image.upload(events.check, image, image, **raw, show_progress="hidden")
        videos = [] if video is None else [video]
        if video is not None:
            video.upload(events.check_video, video, video, **raw)
        one_at_a_time = raw | {"concurrency_id": "model", "concurrency_limit": 1}
        gr.on(
            [ask.click, question.submit],
            events.ask,
            [image, question, side, session, *videos],
            [answer, word_map, caption, costs, session],
            show_progress_on=answer,
            **one_at_a_time,
        )
        compare.click(
            events.compare,
            [image, question, session, *videos],
            [costs, session],
            show_progress_on=[costs, compare],
            **one_at_a_time,
        )
        answer.click(
            events.show_word, session, [word_map, caption, session], show_progress_on=word_map, **one_at_a_time
        )
    return page


def _inputs(events: PageEvents, examples: list[tuple[str, str]] | None):
    """The left column: image, video, question, token budget, and the button that asks."""
    image = gr.Image(label="Image", sources=["upload", "clipboard"], height=320, elem_id="picture")
    video = None
    if events.takes_videos:
        video = gr.Video(label="Video", sources=["upload"], height=240, elem_id="video")
    placeholder = examples[0][1] if examples else "What is in the image?"
    question = gr.Textbox(label="Question", placeholder=placeholder, max_length=MAX_QUESTION_LENGTH)
    if examples:
        rows = [list(example) for example in examples]
        gr.Examples(rows, [image, question], cache_examples=False, visible_columns=[0], elem_id="examples")
    side = gr.Slider(
        1,
        events.largest_side or events.default_side + 1,  # gradio needs a maximum above the minimum
        events.default_side,
        step=1,
        precision=0,
        label="Token budget",
        info=budget_text(events.default_side, events.of_what),
        elem_id="budget",
        visible=events.largest_side is not None,
    )
    return image, video, question, side, gr.Button("Ask", variant="primary")


def _outputs(events: PageEvents):
    """The right column: answer, a word's map and its caption, table of costs, and the button that compares budgets."""
    answer = gr.HTML(
        answer_html("", NO_ANSWER_YET),
        label="Answer",
        show_label=True,
        container=True,
        css_template=ANSWER_CSS,
        js_on_load=ANSWER_JS,
        elem_id="answer",
    )
    word_map = gr.Image(
        label="Map of a word",
        show_label=False,
        format="png",
        height=320,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="map",
    )
    caption = gr.HTML(NO_MAP_YET, js_on_load=None, elem_id="caption")
    costs = gr.HTML(
        costs_html([]),
        label="Cost of each token budget",
        show_label=True,
        container=True,
        css_template=COSTS_CSS,
        apply_default_css=False,
        js_on_load=None,
        elem_id="costs",
    )
    return answer, word_map, caption, costs, gr.Button("Compare budgets", visible=events.largest_side is not None)
