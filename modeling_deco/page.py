# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page of `deco page` and of a Hub Space: a picture, a question, a token budget, and what each word rests on.

Nothing is asked of other hosts, neither by the server nor by the browser, once the model is loaded.
"""

import html
import io
import math
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from . import SHIPPED_CHECKPOINT
from .configuration_deco import num_image_tokens, parse_grid
from .costs import peak_gpu_memory, prefill_seconds, reset_peak_gpu_memory
from .errors import one_line
from .images import UNTRUSTED_LIMITS, ImageError, read_image
from .inference import encode, load, stream
from .info import format_size, kv_cache_bytes
from .prompt_cache import PromptCache
from .relevance import Relevance, describe_peak, draw_heat_map, explain
from .sockets import bind

try:
    import gradio as gr
    from gradio.utils import get_upload_folder
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"The page needs {error.name}: pip install 'modeling-deco[page]'") from None

# Drawn by recipes/digits/world.py from held-out scans, with questions in the shipped checkpoint's vocabulary.
SHIPPED_EXAMPLES = [
    ("1.png", "What colour is the 2?"),
    ("2.png", "Read the digits."),
    ("3.png", "Where is the 6?"),
    ("4.png", "Is the 6 left of the 1?"),
]
SHIPPED_ABOUT = "It knows handwritten digits and nothing else: how many, which, what colour, where."

CSS = """
#picture img, #map img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#examples .container { width: 4.5rem; height: 4.5rem; }
"""

_ANSWER_CSS = """
p { margin: 1em 0 0; min-height: 1.6em; font-size: 1.6em; line-height: 1.6; }
p { white-space: pre-wrap; overflow-wrap: anywhere; }
button { padding: 0 0.1em; border: none; border-bottom: 2px dotted; background: none; color: inherit; font: inherit; }
button:hover { cursor: pointer; background: var(--color-accent-soft); }
button[aria-pressed=true] { border-color: transparent; background: var(--color-accent); color: white; }
"""

_COSTS_CSS = """
table, p { width: 100%; margin: 1.5em 0 0; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4em 0.8em 0.4em 0; text-align: left; vertical-align: top; }
td { border-top: 1px solid var(--border-color-primary); }
td:last-child { overflow-wrap: anywhere; }
"""

# Which word is pressed is told here and not by the server, whose new HTML would take the keyboard's focus away.
_ANSWER_JS = """
element.addEventListener('click', (event) => {
    const word = event.target.closest('button');
    if (!word) return;
    element.querySelectorAll('button').forEach((one) => one.setAttribute('aria-pressed', one === word));
    trigger('click', {word: Number(word.dataset.word)});
});
"""

_MAX_QUESTION_LENGTH = 2000  # characters

_CAPTION = "Click a word of the answer to see what it rests on."

# The slider's line of text, as the slider moves; `_budget` writes the same where the page begins.
_BUDGET_JS = "(n) => ({__type__: 'update', info: `${n} x ${n} = ${n * n} tokens for the picture`})"


@dataclass
class _Answer:
    """An answer on the page, and where it came from.

    Attributes:
        path: of the picture, in the folder for uploads.
        side: of its grid; None for the processor's own.
        relevance: of the words, once one has been clicked.
    """

    path: str
    question: str
    side: int | None
    text: str
    relevance: Relevance | None = None


@dataclass
class _Session:
    """What a browser's tab has asked last, the rows of its table by grid side, and the answer that it shows."""

    path: str
    question: str
    answer: _Answer | None = None
    costs: dict[int | None, dict] = field(default_factory=dict)


def build_page(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    name: str = "DeCo",
    about: str = "",
    examples: list[tuple[str, str]] | None = None,
    max_new_tokens: int = 128,
) -> gr.Blocks:
    """The page for one model, without its style, which `launch` adds (`CSS`).

    One request runs at a time, in the order in which they came; what a browser tab has asked is known to it alone.

    Args:
        model: a `DecoForConditionalGeneration`.
        processor: its `DecoProcessor`, with a chat template.
        name: the model's, in the title.
        about: a sentence on it, in Markdown.
        examples: paths of pictures, each with a question.
        max_new_tokens: longest answer, in tokens.
    """
    default_side, largest_side = _sides(model.config, processor)
    dtype = model.get_input_embeddings().weight.dtype
    prompts = PromptCache(model)

    def check(upload):
        """Tell of a file that is no picture when it comes, and take it off the page."""
        try:
            _read(_path(upload))
        except ImageError as error:
            gr.Warning(html.escape(str(error)))
            return None
        return gr.skip()

    def ask(upload, question, side, session):
        side = side if largest_side else None
        with _shown_errors():
            budget = _budget(grid(side))
        session, messages = _begin(upload, question, session)
        yield _answer_html("", budget), None, _CAPTION, gr.skip(), session
        text = ""
        for text in write(messages, side):
            yield _answer_html(text, budget), *[gr.skip()] * 4
        text = text.strip()
        session.answer = _Answer(session.path, session.question, side, text)
        yield _answer_html(text or "(no answer)", budget, clickable=bool(text)), *[gr.skip()] * 3, session
        session.costs[side] = measure(messages, side, text)
        yield *[gr.skip()] * 3, _costs_html(session.costs.values()), session

    def compare(upload, question, session):
        session, messages = _begin(upload, question, session)
        for side in sorted({default_side, *(largest_side >> power for power in range(4))} - {0}):
            *_, text = "", *write(messages, side)
            session.costs[side] = measure(messages, side, text.strip())
            yield _costs_html(session.costs.values()), session

    def show_word(session, event: gr.EventData):
        if session is None or session.answer is None:
            raise gr.Error("This page was left for too long; ask again.", print_exception=False)
        answer = session.answer
        if answer.relevance is None:
            with _shown_errors():
                answer.relevance = _explain(model, processor, answer)
        index = answer.relevance.word_ids.index(event.word)
        word, peak = answer.relevance.tokens[index], describe_peak(answer.relevance, index)
        caption = f"“{word}” rests on the bright patches ({peak})."
        return gr.update(value=_draw(answer.relevance, index), alt_text=caption), html.escape(caption), session

    def grid(side):
        return processor.pooled_grid_size if side is None else side

    def write(messages, side):
        """The answer so far, each time that it grows."""
        reset_peak_gpu_memory()
        budget = {"pooled_grid_size": side, "max_new_tokens": max_new_tokens}
        text = ""
        with _shown_errors():
            for piece in stream(model, processor, messages, **budget, prompt_cache=prompts):
                text += piece
                yield text

    def measure(messages, side, text):
        """A row of the table, for the budget that has just been answered at."""
        tokens = num_image_tokens(grid(side))
        with _shown_errors():
            seconds = prefill_seconds(model, encode(processor, messages, side).to(model.device))
        row = {"Tokens": tokens, "Prefill": f"{1000 * seconds:.3g} ms"}
        row["KV cache"] = format_size(kv_cache_bytes(model.config.get_text_config(), tokens, dtype))
        if model.device.type == "cuda":
            row["Peak GPU memory"] = format_size(peak_gpu_memory() - prompts.num_bytes)  # of this question alone
        return row | {"Answer": text}

    with gr.Blocks(title=f"DeCo: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        session = gr.State(None, time_to_live=3600)
        gr.Markdown(f"# {name}\n{about}")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=320, elem_id="picture")
                placeholder = examples[0][1] if examples else "What is in the picture?"
                question = gr.Textbox(label="Question", placeholder=placeholder, max_length=_MAX_QUESTION_LENGTH)
                if examples:
                    rows = [list(example) for example in examples]
                    gr.Examples(
                        rows, [picture, question], cache_examples=False, visible_columns=[0], elem_id="examples"
                    )
                side = gr.Slider(
                    1,
                    largest_side or default_side + 1,  # gradio wants it above the minimum
                    default_side,
                    step=1,
                    precision=0,
                    label="Token budget",
                    info=_budget(default_side),
                    elem_id="budget",
                    visible=largest_side is not None,
                )
                button = gr.Button("Ask", variant="primary")
            with gr.Column():
                answer = gr.HTML(
                    _answer_html("", "It appears here, word by word."),
                    label="Answer",
                    show_label=True,
                    container=True,
                    css_template=_ANSWER_CSS,
                    js_on_load=_ANSWER_JS,
                    elem_id="answer",
                )
                word_map = gr.Image(
                    label="What a word rests on",
                    show_label=False,
                    format="png",
                    height=320,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="map",
                )
                caption = gr.HTML(_CAPTION, js_on_load=None, elem_id="caption")
                costs = gr.HTML(
                    _costs_html([]),
                    label="What each budget costs",
                    show_label=True,
                    container=True,
                    css_template=_COSTS_CSS,
                    apply_default_css=False,
                    js_on_load=None,
                    elem_id="costs",
                )
                comparison = gr.Button("Compare budgets", visible=largest_side is not None)

        side.change(None, side, side, js=_BUDGET_JS)
        # gradio does not preprocess, since it would open the picture itself, and fail in its own words
        raw = {"preprocess": False, "api_visibility": "private"}
        picture.upload(check, picture, picture, **raw, show_progress="hidden")
        one_at_a_time = raw | {"concurrency_id": "model", "concurrency_limit": 1}
        gr.on(
            [button.click, question.submit],
            ask,
            [picture, question, side, session],
            [answer, word_map, caption, costs, session],
            show_progress_on=answer,
            **one_at_a_time,
        )
        comparison.click(
            compare,
            [picture, question, session],
            [costs, session],
            show_progress_on=[costs, comparison],
            **one_at_a_time,
        )
        answer.click(show_word, session, [word_map, caption, session], show_progress_on=word_map, **one_at_a_time)
    return page


def launch(
    model: str = str(SHIPPED_CHECKPOINT),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    open_browser: bool = False,
    max_new_tokens: int = 128,
    **load_arguments,
) -> None:
    """Load a model and serve its page, until interrupted.

    Args:
        model: folder or Hub id.
        host: `"0.0.0.0"` to be reached from other machines.
        port: default: the first that is free from 7860 on; 0 is any that is free.
        share: also ask gradio.live for a public address, through which everything goes.
        open_browser: show the page here.
        max_new_tokens: longest answer, in tokens.
        load_arguments: of `modeling_deco.inference.load`.

    Raises:
        ValueError: host and port cannot be listened on.
        OSError, ValueError, ImportError: see `load`.
    """
    host = host.strip("[]")
    with bind(host, port or 0) as listener:  # gradio learns it only with a model, and then tries for long
        port = None if port is None else listener.getsockname()[1]
    loaded, processor = load(model, **load_arguments)
    is_shipped = Path(model).exists() and Path(model).samefile(SHIPPED_CHECKPOINT)
    about = f"{loaded.num_parameters() / 1e6:.1f} M parameters. "
    with tempfile.TemporaryDirectory(prefix="deco-page-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # of this page alone, and gone with it
        page = build_page(
            loaded,
            processor,
            name=Path(model).resolve().name,
            about=about + (SHIPPED_ABOUT if is_shipped else ""),
            examples=[(str(SHIPPED_CHECKPOINT / "examples" / file), text) for file, text in SHIPPED_EXAMPLES]
            if is_shipped
            else None,
            max_new_tokens=max_new_tokens,
        )
        page.queue(max_size=64, api_open=False).launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=share,
            inbrowser=open_browser,
            max_file_size=UNTRUSTED_LIMITS.max_bytes,
            theme=_theme(),
            css=CSS,
            footer_links=["gradio", "settings"],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
        )


def _theme() -> gr.themes.Base:
    # served by this server; of gradio 6.31's other fonts, also the default one, the semibold has no letters
    font = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))
    return gr.themes.Default(primary_hue="indigo", font=[font, "sans-serif"])


# --- parts -----------------------------------------------------------------------------------------------------------


def _sides(config, processor) -> tuple[int, int | None]:
    """Sides of the square grid nearest below the processor's and of the largest; None where there is no choice."""
    side, largest = math.isqrt(num_image_tokens(processor.pooled_grid_size)), min(config.patch_grid)
    return min(side, largest), largest if config.takes_any_grid and largest > 1 else None


def _budget(pooled_grid_size) -> str:
    rows, cols = parse_grid(pooled_grid_size)
    return f"{rows} x {cols} = {rows * cols} tokens for the picture"


def _path(upload):
    # a request that no browser made may hold anything
    return upload.get("path") if isinstance(upload, dict) else None


def _read(path: str) -> Image.Image:
    try:
        # gradio checks where a path leads only if the request says that it is one
        file = Path(path).resolve()
        file.relative_to(Path(get_upload_folder()).resolve())
        encoded = file.read_bytes()
    except (TypeError, ValueError, OSError):  # no text, elsewhere, gone: errors that name folders of this machine
        raise ImageError("The image cannot be read: it was not uploaded, or too long ago.") from None
    return read_image(encoded, limits=UNTRUSTED_LIMITS)


@contextmanager
def _shown_errors():
    """Errors become one line on the page; those that are not the user's are printed here, too."""
    try:
        yield
    except Exception as error:
        is_users = isinstance(error, (OSError, ValueError))
        raise gr.Error(html.escape(one_line(error)), print_exception=not is_users) from error


def _begin(upload: dict | None, question: str, session: _Session | None) -> tuple[_Session, list[dict]]:
    """The session as it goes on, with an empty table for another picture or question, and the model's messages."""
    question = question.strip() if isinstance(question, str) else ""
    if len(question) > _MAX_QUESTION_LENGTH:
        message = f"The question has {len(question):,} characters, more than the {_MAX_QUESTION_LENGTH:,} allowed."
        raise gr.Error(message, print_exception=False)
    if upload is None or not question:
        missing = "Choose a picture" if upload is None else "Write a question"
        raise gr.Error(f"{missing} first.", title="Not yet", print_exception=False)
    path = _path(upload)
    with _shown_errors():
        content = [{"type": "image", "image": _read(path)}, {"type": "text", "text": question}]
    if session is None or (session.path, session.question) != (path, question):
        session = _Session(path, question, session and session.answer)
    return session, [{"role": "user", "content": content}]


def _explain(model, processor, answer: _Answer) -> Relevance:
    image = _read(answer.path)
    words = explain(
        model, processor, image, answer.question, answer=answer.text, pooled_grid_size=answer.side
    ).by_word()
    return replace(words, query_to_patch=torch.empty(0))  # by far the largest part, which is not drawn


def _answer_html(text: str, note: str, clickable: bool = False) -> str:
    """The answer, with a button for each word that holds a letter or digit: these have maps."""
    parts, words = re.split(r"(\s+)", text), count()
    for index, part in enumerate(parts):
        parts[index] = html.escape(part)
        if part.strip():
            word = next(words)
            if clickable and any(character.isalnum() for character in part):
                parts[index] = f'<button type="button" data-word="{word}" aria-pressed="false">{parts[index]}</button>'
    return f'<p aria-live="polite">{"".join(parts)}</p><small>{note}</small>'


def _costs_html(rows: Iterable[dict]) -> str:
    """A table, with a row for each budget."""
    rows = sorted(rows, key=lambda row: row["Tokens"])
    if not rows:
        return "<p>A row for each budget that you ask at.</p>"
    lines = ["".join(f"<th scope='col'>{name}</th>" for name in rows[0])]
    lines += ["".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) for row in rows]
    return f"<table aria-label='What each budget costs'>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _draw(words: Relevance, index: int) -> Image.Image:
    height, width = words.image.shape[:2]
    figure = Figure(figsize=(4.8, 4.8 * height / width), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_heat_map(axes, words, index)
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


__all__ = ["build_page", "launch"]
