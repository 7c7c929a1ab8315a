# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Table and figures of a comparison, from the results of its runs."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ... import explain
from ...inference import load
from ...relevance.figure import draw_heat_map
from .scenes import render

# the three abilities that the paper's abstract names, and the kinds of questions that test them here
GROUPS = {
    "recognition": ("existence", "count", "colour"),
    "localization": ("relation", "locate"),
    "open-ended": ("read",),
}
NAMES = {
    "mlp": "none (MLP)",
    "avg_pool": "average pooling (DeCo)",
    "qformer": "Q-Former",
    "resampler": "resampler",
    "c_abstractor": "C-Abstractor",
    "d_abstractor": "D-Abstractor",
}
COLOURS = {name: f"C{index}" for index, name in enumerate(("avg_pool", "qformer", "resampler", "c_abstractor"))}
COLOURS |= {"d_abstractor": "C4", "mlp": "0.4"}
NUM_SHOWN = 4  # columns of the figure with relevance maps


def by_projector_and_tokens(results: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Results of all seeds by `(projector_type, num_tokens)`, sorted by tokens and then in the order of `NAMES`."""
    found = defaultdict(list)
    for result in results:
        found[result["projector_type"], result["num_tokens"]].append(result)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], list(NAMES).index(item[0][0]))))


def group_accuracy(accuracy: dict, group: str) -> float:
    """Mean over the kinds of questions of a group, in percent."""
    values = [accuracy[kind] for kind in GROUPS[group]]
    return mean(value["accuracy"] if isinstance(value, dict) else value for value in values)


def steps_to(result: dict, threshold: float) -> int | None:
    """The first step of the curve at which the mean of the three groups is at least `threshold` percent."""
    for point in result["curve"]:
        if mean(group_accuracy(point["accuracy"], group) for group in GROUPS) >= threshold:
            return point["step"]
    return None


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def table(results: list[dict], threshold: float) -> str:
    """A Markdown table: one row per projector and token count, with mean and standard deviation over seeds."""
    lines = [
        f"| projector | tokens | parameters | {' | '.join(GROUPS)} | pointing game | steps to {threshold:g} % | s |",
        "|---" * (len(GROUPS) + 6) + "|",
    ]
    for (projector_type, num_tokens), runs in by_projector_and_tokens(results).items():
        steps = [steps_to(run, threshold) for run in runs]
        cells = [
            NAMES[projector_type],
            str(num_tokens),
            f"{runs[0]['parameters']:,}",
            *(mean_and_spread([group_accuracy(run["accuracy"], group) for run in runs]) for group in GROUPS),
            mean_and_spread([run["pointing_game"]["gae"]["hit_rate"] for run in runs]),
            ", ".join("-" if step is None else str(step) for step in steps),
            mean_and_spread([run["seconds"] for run in runs], digits=0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    chance = mean(result["pointing_game"]["chance"]["hit_rate"] for result in results)
    notes = (
        "Accuracy on test scans in percent, mean ± standard deviation over seeds. Pointing game: hit rate of GAE, for "
        f"the abstractors of gradient x input; chance is {chance:.1f}. Steps: for each seed, the step at which the "
        f"mean of the three groups reaches {threshold:g} % on validation scans (-: never). s: seconds of training."
    )
    return "\n".join([*lines, "", notes]) + "\n"


# --- figures ---------------------------------------------------------------------------------------------------------


def plot_curves(results: list[dict]) -> Figure:
    """Loss and accuracy against steps. Each token count has a row; thin lines are seeds, thick lines their mean."""
    found = by_projector_and_tokens(results)
    uncompressed = {key: runs for key, runs in found.items() if key[0] == "mlp"}
    budgets = sorted({tokens for projector, tokens in found if projector != "mlp"}) or sorted({t for _, t in found})
    columns = ["loss", *GROUPS]
    figure = Figure(figsize=(4 * len(columns), 3.3 * len(budgets)), layout="constrained")
    grid = figure.subplots(len(budgets), len(columns), squeeze=False)
    for row, budget in zip(grid, budgets, strict=True):
        shown = {key: runs for key, runs in found.items() if key[1] == budget} | uncompressed
        for axes, column in zip(row, columns, strict=True):
            for (projector_type, num_tokens), runs in shown.items():
                lines = [_curve(run, column) for run in runs]
                style = {"color": COLOURS[projector_type], "linestyle": "--" if projector_type == "mlp" else "-"}
                for steps, values in lines:
                    axes.plot(steps, values, linewidth=0.6, alpha=0.5, **style)
                axes.plot(
                    lines[0][0],
                    np.mean([values for _, values in lines], axis=0),
                    linewidth=2,
                    label=f"{NAMES[projector_type]}, {num_tokens} tokens",
                    **style,
                )
            axes.set(title=f"{column}, {budget} tokens", xlabel="step")
            axes.set_ylabel("loss" if column == "loss" else "accuracy, % (validation)")
            axes.grid(alpha=0.3)
            if column == "loss":
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 101)
        row[-1].legend(fontsize=8, loc="upper left")
    return figure


def _curve(run: dict, column: str) -> tuple[list[int], list[float]]:
    if column == "loss":
        steps, values = zip(*run["loss"], strict=True)
        return list(steps), list(values)
    return (
        [point["step"] for point in run["curve"]],
        [group_accuracy(point["accuracy"], column) for point in run["curve"]],
    )


def plot_tokens(results: list[dict]) -> Figure:
    """Accuracy on test scans against tokens per image: mean and standard deviation over seeds."""
    found = by_projector_and_tokens(results)
    tokens = sorted({num_tokens for _, num_tokens in found})
    figure = Figure(figsize=(4 * len(GROUPS), 3.6), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(GROUPS)), GROUPS, strict=True):
        for projector_type in NAMES:
            points = {
                num_tokens: [group_accuracy(run["accuracy"], group) for run in runs]
                for (name, num_tokens), runs in found.items()
                if name == projector_type
            }
            if points:
                axes.errorbar(
                    list(points),
                    [mean(values) for values in points.values()],
                    [stdev(values) if len(values) > 1 else 0 for values in points.values()],
                    fmt="o-",
                    markersize=4,
                    capsize=3,
                    color=COLOURS[projector_type],
                    label=NAMES[projector_type],
                )
        axes.set(title=group, xscale="log", xlabel="tokens per image", xticks=tokens, xticklabels=tokens)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend(fontsize=8)
    return figure


def plot_relevance_grid(folders: dict[str, Path], max_digits: int = 4) -> Figure:
    """Relevance of the patches for the colour word of an answer: a row per projector, on test pictures.

    Args:
        folders: the folder of each trained model, by the name to show.
    """
    scenes = [render("test", index, min_digits=2, max_digits=max_digits) for index in range(NUM_SHOWN)]
    figure = Figure(figsize=(2.2 * NUM_SHOWN + 0.6, 2.2 * (len(folders) + 1)), layout="constrained")
    grid = figure.subplots(len(folders) + 1, NUM_SHOWN, squeeze=False)
    asked = [scene.digits[index % len(scene.digits)] for index, scene in enumerate(scenes)]
    for axes, scene, digit in zip(grid[0], scenes, asked, strict=True):
        axes.imshow(scene.image, interpolation="nearest")
        axes.set_title(f"What colour is the {digit.value}?\n{digit.value} {digit.colour}.", fontsize=9)
    for row, (name, folder) in zip(grid[1:], folders.items(), strict=True):
        model, processor = load(folder)
        for axes, scene, digit in zip(row, scenes, asked, strict=True):
            question, answer = f"What colour is the {digit.value}?", f"{digit.value} {digit.colour}."
            relevance = explain(model, processor, scene.image, question, answer).average([digit.colour])
            draw_heat_map(axes, relevance, 0)
            _draw_box(axes, digit.box)
        row[0].set_ylabel(name, fontsize=9)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure


def _draw_box(axes, box) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="cyan", linewidth=1))


def write_report(results: list[dict], args) -> None:
    """Write `results.json`, `table.md` and the figures to `args.output_dir`.

    Args:
        args: the comparison's `CompareArguments`.
    """
    out = Path(args.output_dir)
    (out / "table.md").write_text(table(results, args.threshold), encoding="utf-8")
    (out / "results.json").write_text(json.dumps({"arguments": vars(args), "results": results}) + "\n")
    plot_curves(results).savefig(out / "curves.png", dpi=100)
    plot_tokens(results).savefig(out / "tokens.png", dpi=110)
    folders = {
        f"{NAMES[result['projector_type']]}\n{result['num_tokens']} tokens": Path(result["folder"], "model")
        for result in results
        if result["seed"] == args.seeds[0] and result["pooled_grid_size"] >= max(args.pooled_grid_sizes)
    }
    plot_relevance_grid(folders, args.max_digits).savefig(out / "relevance.png", dpi=110)
