# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The figure of `deco budgets`: agreement and time by the number of tokens, drawn by matplotlib."""

from typing import Any

from .agreement import CONFIDENCE


def plot_budgets(summary: dict[str, Any]):
    """Draw what `summarize` returns.

    Returns:
        A matplotlib `Figure`: save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Drawing budgets needs matplotlib: pip install matplotlib") from None
    figure = Figure(dpi=120, figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_agreement(left, summary)
    _draw_times(right, summary)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        tokens = sorted({row["num_image_tokens"] for row in summary["grids"]})
        axes.set_xticks(tokens, [str(number) for number in tokens])
        axes.minorticks_off()
        axes.set_xlabel("tokens per image")
        axes.grid(alpha=0.3)
    return figure


def _draw_agreement(axes, summary: dict[str, Any]) -> None:
    rows = summary["grids"][:-1]
    tokens = [row["num_image_tokens"] for row in rows]
    agreed = [row["agreement"] for row in rows]
    for kind in rows[0]["agreement_by_kind"]:
        shares = [100 * row["agreement_by_kind"][kind]["share"] for row in rows]
        axes.plot(tokens, shares, "o-", label=kind, markersize=3, linewidth=1, alpha=0.7)
    shares = [100 * part["share"] for part in agreed]
    below = [100 * (part["share"] - part["low"]) for part in agreed]
    above = [100 * (part["high"] - part["share"]) for part in agreed]
    label = f"all, with {100 * CONFIDENCE:.0f} % interval"
    axes.errorbar(tokens, shares, (below, above), fmt="ko-", label=label, markersize=5, capsize=3)
    axes.axhline(
        100 * summary["target"], color="grey", linestyle="--", label=f"target {100 * summary['target']:.4g} %"
    )
    axes.set_ylim(top=101)
    axes.set_title(f"Answers equal to those at {summary['grids'][-1]['num_image_tokens']} tokens")
    axes.set_ylabel("%")
    axes.legend(fontsize="small")


def _draw_times(axes, summary: dict[str, Any]) -> None:
    tokens = [row["num_image_tokens"] for row in summary["grids"]]
    times = [row["first_token_seconds"] for row in summary["grids"]]
    medians = [1000 * time["median"] for time in times]
    below = [1000 * (time["median"] - time["low"]) for time in times]
    above = [1000 * (time["high"] - time["median"]) for time in times]
    axes.errorbar(tokens, medians, (below, above), fmt="o-", label="median and quartiles", markersize=4, capsize=3)
    tower = 1000 * summary["vision_tower_seconds"]
    axes.axhline(tower, color="grey", linestyle=":", label="vision tower, the same at each grid")
    axes.set_ylim(bottom=0)
    axes.set_title("Time to the first token")
    axes.set_ylabel("ms")
    axes.legend(fontsize="small")
