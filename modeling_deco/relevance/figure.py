# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Heat maps of relevance over the picture, drawn by matplotlib."""

import math

import torch

from .explain import Relevance
from .maps import spread

LEVELS = ("patch", "query", "both")
_MAX_COLUMNS = 6
_PANEL_WIDTH = 1.9  # inches
_LONGEST_TITLE = 20  # characters, which is what fits above a panel


def plot_relevance(relevance: Relevance, level: str = "patch"):
    """Draw the image and, for each word of the answer, its heat map over the grey image.

    Each map is scaled to its own maximum. The caption compares that maximum with those of the other words: it is low
    for a word that does not depend on the image.

    Args:
        relevance: maps of tokens or words. Tokens are averaged by word.
        level: `"patch"` for Text-to-Patch. `"query"` for Text-to-Query on the pooled grid, without the image if
            queries have no position in it. `"both"` for both, one below the other.

    Returns:
        A matplotlib `Figure`: save it with `figure.savefig(path)`, or show it in a notebook after `%matplotlib inline`
        as the last expression of a cell.

    Raises:
        ValueError: an unknown level.
        ImportError: matplotlib is missing.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Drawing relevance needs matplotlib: pip install matplotlib") from None
    words = relevance.by_word()
    levels = ("patch", "query") if level == "both" else (level,)
    num_panels = 1 + len(words.tokens)
    num_columns = min(num_panels, _MAX_COLUMNS)
    num_rows = math.ceil(num_panels / num_columns) * len(levels)
    height, width = words.image.shape[:2]
    size = (_PANEL_WIDTH * num_columns + 1, (_PANEL_WIDTH * height / width + 0.4) * num_rows)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for index, drawn_level in enumerate(levels):
        panels = grid[index :: len(levels)].flatten()
        _draw_picture(panels[0], words, drawn_level)
        for word, axes in enumerate(panels[1:num_panels]):
            heat_map = _draw_word(axes, words, word, drawn_level)
    # the colour bar is as high as the first row of panels
    bar = figure.colorbar(heat_map, ax=grid[:, -1], fraction=0.08, shrink=1 / num_rows, anchor=(0, 1), ticks=[0, 1])
    bar.ax.set_yticklabels(["0", "max"], size="small")
    bar.set_label("relevance", size="small", labelpad=-12)
    return figure


def _draw_picture(axes, words: Relevance, level: str) -> None:
    axes.imshow(words.image)
    if level == "patch":
        title = f"{_by(words.patch_grid)} patches"
    elif words.has_grid:
        overview = f"{_by(words.overview_grid)} + " if words.overview_grid is not None else ""
        title = f"{overview}{_by(words.pooled_grid)} tokens"
    else:
        title = f"{math.prod(words.pooled_grid)} tokens, no grid"
    axes.set_title(title, size="medium")


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _draw_word(axes, words: Relevance, index: int, level: str):
    """Draw the heat map of a word with its title and caption, and return it for the colour bar."""
    heat_map = draw_heat_map(axes, words, index, level)
    word = words.tokens[index]
    if len(word) > _LONGEST_TITLE:
        word = word[: _LONGEST_TITLE - 3] + "..."
    axes.set_title(word, parse_math=False, weight="bold", size="medium")
    peak = describe_peak(words, index, level)
    axes.text(0.5, -0.02, peak, transform=axes.transAxes, ha="center", va="top", size="x-small", color="0.4")
    return heat_map


def draw_heat_map(axes, relevance: Relevance, index: int, level: str = "patch"):
    """Draw the heat map of one entry on matplotlib's `axes`, over the grey image if its grid has a position there.

    Returns:
        matplotlib's image of the map, scaled to its own maximum, for a colour bar.
    """
    maps, grid = _maps(relevance, level)
    heat = maps[index].unflatten(0, grid).numpy()
    heat = heat / (heat.max() or 1)
    height, width = relevance.image.shape[:2]
    opacity = 1
    if level == "patch" or relevance.has_grid:
        axes.imshow(relevance.image.mean(-1), cmap="gray", vmin=0, vmax=1.8 * 255)
        opacity = 0.1 + 0.6 * heat  # the image shows through
    return axes.imshow(
        heat, cmap="inferno", vmin=0, vmax=1, alpha=opacity, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
    )


def describe_peak(relevance: Relevance, index: int, level: str = "patch") -> str:
    """The highest value of an entry's map, relative to the highest of all entries. It is low for an entry that is not
    based on the image."""
    maps, _ = _maps(relevance, level)
    highest = maps.max().item()
    return f"{maps[index].max().item() / highest:.0%} of the answer's maximum" if highest > 0 else "no relevance"


def _maps(relevance: Relevance, level: str) -> tuple[torch.Tensor, tuple[int, int]]:
    if level == "patch":
        return relevance.text_to_patch, relevance.patch_grid
    grid, text_to_query = relevance.pooled_grid, relevance.text_to_query
    if relevance.overview_grid is None:
        return text_to_query, grid
    overview, whole = text_to_query.tensor_split([math.prod(relevance.overview_grid)], dim=1)
    return overview @ spread(relevance.overview_grid, grid) + whole, grid
