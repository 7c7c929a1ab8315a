# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of the page that change: texts, the answer, the table of costs, and a word's map."""

import io
import re
from collections.abc import Iterable
from html import escape
from itertools import count

from matplotlib.figure import Figure
from PIL import Image

from ..configuration_deco import parse_grid
from ..relevance import Relevance
from ..relevance.figure import describe_peak, draw_heat_map

NO_ANSWER_YET = "The answer appears here as it is generated."
NO_MAP_YET = "Click a word of the answer to see which patches of the image it is based on."


def budget_text(pooled_grid_size, of_what: str = "the image") -> str:
    """The line below the slider and below the answer."""
    rows, cols = parse_grid(pooled_grid_size)
    return f"{rows} x {cols} = {rows * cols} tokens for {of_what}"


def budget_js(of_what: str = "the image") -> str:
    """`budget_text` in the browser, while the slider moves."""
    return f"(n) => ({{__type__: 'update', info: `${{n}} x ${{n}} = ${{n * n}} tokens for {of_what}`}})"


def answer_html(text: str, note: str, clickable: bool = False) -> str:
    """The answer. If it is `clickable`, each word with a letter or digit is a button: these words have maps."""
    parts, words = re.split(r"(\s+)", text), count()
    for index, part in enumerate(parts):
        parts[index] = escape(part)
        if part.strip():
            word = next(words)
            if clickable and any(character.isalnum() for character in part):
                parts[index] = f'<button type="button" data-word="{word}" aria-pressed="false">{parts[index]}</button>'
    return f'<p aria-live="polite">{"".join(parts)}</p><small>{note}</small>'


def costs_html(rows: Iterable[dict]) -> str:
    """A table with a row for each budget."""
    rows = sorted(rows, key=lambda row: row["Image tokens"])
    if not rows:
        return "<p>The table gets a row for each token budget that you use.</p>"
    lines = ["".join(f"<th scope='col'>{name}</th>" for name in rows[0])]
    lines += ["".join(f"<td>{escape(str(value))}</td>" for value in row.values()) for row in rows]
    table = f"<table aria-label='Cost of each token budget'>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    is_partial = any(row["Prefill"].endswith("*") for row in rows)
    return table + ("<small>* for the question only: the image was in the prompt cache</small>" if is_partial else "")


def map_caption(words: Relevance, index: int) -> str:
    """The line below a word's map, and its alternative text."""
    word = f"“{words.tokens[index]}”"
    if words.text_to_patch[index].max() == 0:
        return f"{word} is not based on any patch."
    return f"{word} is based on the bright patches. Highest relevance: {describe_peak(words, index)}."


def draw_map(words: Relevance, index: int) -> Image.Image:
    """A word's heat map over the image."""
    height, width = words.image.shape[:2]
    figure = Figure(figsize=(4.8, 4.8 * height / width), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_heat_map(axes, words, index)
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


ANSWER_CSS = """
p { margin: 1em 0 0; min-height: 1.6em; font-size: 1.6em; line-height: 1.6; }
p { white-space: pre-wrap; overflow-wrap: anywhere; }
button { padding: 0 0.1em; border: none; border-bottom: 2px dotted; background: none; color: inherit; font: inherit; }
button:hover { cursor: pointer; background: var(--color-accent-soft); }
button[aria-pressed=true] { border-color: transparent; background: var(--color-accent); color: white; }
"""

# The browser marks the pressed word itself: new HTML from the server would take the keyboard's focus away.
ANSWER_JS = """
element.addEventListener('click', (event) => {
    const word = event.target.closest('button');
    if (!word) return;
    element.querySelectorAll('button').forEach((one) => one.setAttribute('aria-pressed', one === word));
    trigger('click', {word: Number(word.dataset.word)});
});
"""

COSTS_CSS = """
table, p { width: 100%; margin: 1.5em 0 0; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4em 0.8em 0.4em 0; text-align: left; vertical-align: top; }
td { border-top: 1px solid var(--border-color-primary); }
td:last-child { overflow-wrap: anywhere; }
"""
