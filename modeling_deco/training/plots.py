# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Plots of a training run."""

from pathlib import Path


def plot_training(log_history: list[dict], path: Path) -> Path:
    """Plot loss and token accuracy over steps, of training and, if there was any, of evaluation.

    Args:
        log_history: a trainer's `state.log_history`.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), ("loss", "mean_token_accuracy"), ("Loss", "Token accuracy"), strict=True
    ):
        for prefix, style in (("", "-"), ("eval_", "o-")):
            points = [(log["step"], log[prefix + name]) for log in log_history if prefix + name in log]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, label="evaluation" if prefix else "training", markersize=4
                )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
    return path
