# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""One-minute clips: the shipped checkpoint, which has only seen pictures, learns questions about order and time.

    OMP_NUM_THREADS=1 python benchmarks/videos.py

A clip has 60 frames, one a second. Each frame gets a small grid of tokens, and neighbouring frames may be averaged.
The vision tower is frozen, so frames are encoded once, and the language model learns for a few hundred steps, each
with another budget of tokens. Then it answers questions about held-out clips at every budget, also with the frames in
random order. Some clips are also written as MP4, and read back from there. About an hour on one core. Finished cells
are kept in --runs, so the same command resumes. The results are written to results/videos.json and videos.png, and
the last line of the output is the same JSON.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from full_grid import Cells, Turn, cross_entropy, drafted_answers, log, single_turns, train, turn_of
from matplotlib.figure import Figure
from shapes import RESULTS
from torch.nn.utils.rnn import pad_sequence

from modeling_deco import SHIPPED_CHECKPOINT, DecoForConditionalGeneration, DecoProcessor, pool_patch_grid
from modeling_deco.inference import load
from modeling_deco.training.collator import IGNORE_INDEX, PADDING, SHARED, independent_mask
from modeling_deco.utils.measure import command, environment, write_report
from modeling_deco.utils.staging import staged_file
from modeling_deco.worlds.digits.clip_questions import CLIP_KINDS, build_clip_tokenizer, clip_questions, score_clip
from modeling_deco.worlds.digits.clips import NUM_SECONDS, Clip, render_clip, write_video
from modeling_deco.worlds.digits.tower_model import PATCH_GRID, patch_features, pixel_values
from modeling_deco.worlds.digits.training import build_optimizer
from modeling_deco.worlds.evaluation import summary


class Budget(NamedTuple):
    """Tokens of a clip: the grid of a frame, and how many neighbouring frames are averaged."""

    grid: int
    frames: int

    @property
    def num_tokens(self) -> int:
        return -(-NUM_SECONDS // self.frames) * self.grid**2


TRAINED_BUDGETS = (Budget(3, 2), Budget(3, 3), Budget(2, 1), Budget(2, 2), Budget(2, 3))
BUDGETS = (Budget(3, 1), *TRAINED_BUDGETS, Budget(1, 1), Budget(2, 5))
KEPT_GRID = 6  # frames are stored at this grid, of which all grids above are divisors
IN_ORDER, SHUFFLED = ORDERS = ("in order", "random order")


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured."""

    pool: int = 2400  # training clips
    test: int = 200  # each with one question of every kind
    steps: int = 2400
    batch_size: int = 16
    files: int = 10  # test clips that are also asked from an MP4 file


SMALL = Sizes(pool=3, test=2, steps=2, batch_size=2, files=1)


# --- clips -----------------------------------------------------------------------------------------------------------


@dataclass
class Clips:
    """Clips without their frames, and the features of these.

    Attributes:
        clips: what happens in each clip.
        features: of each clip, `(different frames, 36, width)`.
        seconds: of each clip, the index of the frame of each second.
    """

    clips: list[Clip]
    features: list[torch.Tensor]
    seconds: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.clips)

    def take(self, indices) -> "Clips":
        return Clips(*([values[index] for index in indices] for values in (self.clips, self.features, self.seconds)))


@torch.inference_mode()
def read_clips(tower, split: str, num_clips: int) -> Clips:
    """Render clips and encode their frames. A frame that is the same as the one before is encoded once."""
    read = Clips([], [], [])
    for index in range(num_clips):
        clip = render_clip(split, index)
        places = {id(frame): second for second, frame in reversed(list(enumerate(clip.frames)))}
        different = sorted(places.values())
        pixels = torch.stack([pixel_values(clip.scene(second)) for second in different])
        with torch.autocast("cpu", torch.bfloat16):
            features = patch_features(tower, pixels)
        pooled = pool_patch_grid(features, (PATCH_GRID, PATCH_GRID), (KEPT_GRID, KEPT_GRID))
        read.clips.append(Clip((), clip.actors))
        read.features.append(pooled.bfloat16())
        read.seconds.append(torch.tensor([different.index(places[id(frame)]) for frame in clip.frames]))
        if (index + 1) % 100 == 0:
            log(f"{index + 1} clips of {split}")
    return read


def training_clips(tower, sizes: Sizes, folder: Path) -> Clips:
    path = folder / f"clips-{sizes.pool}.pt"
    if not path.exists():
        with staged_file(path) as incomplete:
            torch.save(read_clips(tower, "train", sizes.pool), incomplete)
    return torch.load(path, weights_only=False)


def frame_grids(read: Clips, budget: Budget, order: list[np.ndarray] | None = None) -> torch.Tensor:
    """The pooled features of clips at a budget: `(clips, tokens, width)`.

    Args:
        order: seconds of each clip in the order in which they are shown. Default: as they are.
    """
    pooled = []
    for index, (features, seconds) in enumerate(zip(read.features, read.seconds, strict=True)):
        grids = pool_patch_grid(features, (KEPT_GRID, KEPT_GRID), (budget.grid, budget.grid))
        shown = grids[seconds if order is None else seconds[order[index]]]
        means = [frames.float().mean(0) for frames in shown.split(budget.frames)]
        pooled.append(torch.cat(means))
    return torch.stack(pooled)


# --- model -----------------------------------------------------------------------------------------------------------


def build_model() -> tuple[DecoForConditionalGeneration, DecoProcessor]:
    """The shipped checkpoint with a token for videos and the words of questions about clips."""
    model, processor = load(SHIPPED_CHECKPOINT, device="cpu", dtype="float32")
    tokenizer = build_clip_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.config.video_token_id = tokenizer.video_token_id
    model.model.vision_tower.requires_grad_(False)
    return model, DecoProcessor(
        processor.image_processor, tokenizer, processor.pooled_grid_size, patch_size=processor.patch_size
    )


def clip_inputs(rows: list[dict], num_tokens: int, tokenizer) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels`, the mask of independent questions, and positions in sequence, for rows of `single_turns`
    about one clip each."""
    batch = {}
    fill = {"input_ids": tokenizer.pad_token_id, "labels": IGNORE_INDEX, "owners": PADDING}
    video = {"input_ids": tokenizer.video_token_id, "labels": IGNORE_INDEX, "owners": SHARED}
    for name, value in fill.items():
        ids = [torch.tensor(row[name][:2] + [video[name]] * num_tokens + row[name][3:]) for row in rows]
        batch[name] = pad_sequence(ids, batch_first=True, padding_value=value)
    mask = independent_mask(batch.pop("owners"))
    return batch | {"attention_mask": mask, "position_ids": (mask[:, 0].sum(-1) - 1).clamp(min=0)}


def logits_of(model, inputs: dict, features: torch.Tensor) -> torch.Tensor:
    is_video = inputs["input_ids"] == model.config.video_token_id
    with torch.autocast("cpu", torch.bfloat16):
        projected = model.model.multi_modal_projector.project(features)
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        embeddings = embeddings.masked_scatter(is_video[..., None], projected.to(embeddings.dtype))
        outputs = model(
            inputs_embeds=embeddings,
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            image_positions="sequence",
        )
    return outputs.logits.float()


def turns_of(clip: Clip, tokenizer, rng: np.random.Generator) -> list[Turn]:
    return [turn_of(tokenizer, question, question.answer) for question in clip_questions(clip, rng)]


def trained_model(tower, sizes: Sizes, seed: int, folder: Path) -> tuple[DecoForConditionalGeneration, DecoProcessor]:
    """The model after training, from `folder` if it is there."""
    torch.manual_seed(seed)  # of the rows of new words
    model, processor = build_model()
    saved = folder / f"model-{seed}.pt"
    if saved.exists():
        model.load_state_dict(torch.load(saved))
        return model.eval(), processor
    rng, tokenizer, losses = np.random.default_rng(seed), processor.tokenizer, []
    budgets = [TRAINED_BUDGETS[index] for index in rng.integers(len(TRAINED_BUDGETS), size=sizes.steps)]

    def loss_of(read: Clips, step: int) -> torch.Tensor:
        budget = budgets[step]
        rows = [single_turns(turns_of(clip, tokenizer, rng), tokenizer) for clip in read.clips]
        inputs = clip_inputs(rows, budget.num_tokens, tokenizer)
        loss = cross_entropy(logits_of(model, inputs, frame_grids(read, budget)), inputs["labels"])
        losses.append(loss.item())
        if len(losses) % 25 == 0:
            log(f"seed {seed}: step {step + 1}, loss {np.mean(losses[-25:]):.3f}")
        return loss

    optimizer = build_optimizer(model, 0.01, 2e-3, 0)
    train(model, training_clips(tower, sizes, folder), loss_of, optimizer, sizes.steps, sizes.batch_size, seed)
    with staged_file(saved) as incomplete:
        torch.save(model.state_dict(), incomplete)
    return model.eval(), processor


def measure(model, processor, test: Clips, budget: Budget, order: str) -> dict[str, list[bool]]:
    """By kind of question, whether each answer is right."""
    tokenizer = processor.tokenizer
    turns = [turns_of(clip, tokenizer, np.random.default_rng(index)) for index, clip in enumerate(test.clips)]
    shown = None
    if order == SHUFFLED:
        shown = [np.random.default_rng([1, index]).permutation(NUM_SECONDS) for index in range(len(test))]
    features = frame_grids(test, budget, shown)

    def predict(indices: list[int], rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = clip_inputs(rows, budget.num_tokens, tokenizer)
        return logits_of(model, inputs, features[indices]), inputs["labels"]

    right: dict[str, list[bool]] = {kind: [] for kind in CLIP_KINDS}
    for clip, asked, texts in zip(test.clips, turns, drafted_answers(turns, tokenizer, predict), strict=True):
        for turn, text in zip(asked, texts, strict=True):
            right[turn.question.kind].append(score_clip(turn.question, text, clip))
    return right


def from_files(model, processor, sizes: Sizes, budget: Budget) -> dict[str, int]:
    """Answers of `generate` from MP4 files, compared with those from the frames as they were drawn."""
    same = total = 0
    for index in range(sizes.files):
        clip = render_clip("test", index)
        texts = [question.text for question in clip_questions(clip, np.random.default_rng(index))]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.mp4")
            write_video(clip.frames, path)
            found, expected = (
                answers_about(model, processor, video, texts, budget) for video in (str(path), list(clip.frames))
            )
        same += sum(one == other for one, other in zip(found, expected, strict=True))
        total += len(texts)
    return {"questions": total, "same_answers": same}


@torch.inference_mode()
def answers_about(model, processor, video, texts: list[str], budget: Budget) -> list[str]:
    """The answers of `generate` to questions about a video: a file, or its frames."""
    prompts = [f"<bos><user><video>{text}<assistant>" for text in texts]
    inputs = processor(
        text=prompts,
        videos=[video] * len(texts),
        pooled_video_grid_size=budget.grid,
        frames_per_token_grid=budget.frames,
        fps=1,
        max_frames=NUM_SECONDS,
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False, image_positions="sequence")
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --- report ----------------------------------------------------------------------------------------------------------


def over_clips(cells: list[dict]) -> dict:
    """Accuracy and standard error over clips by kind of question, over cells of different seeds."""
    return {kind: summary(list(zip(*(cell[kind] for cell in cells), strict=True))) for kind in CLIP_KINDS}


def guesses(num_clips: int) -> dict[str, float]:
    """Percentage of right answers by guesses that know which digits a clip has, and nothing of time."""
    numbers = [len(render_clip("test", index).actors) for index in range(num_clips)]
    one_of_all = round(100 * float(np.mean([1 / number for number in numbers])), 1)
    one_of_others = round(100 * float(np.mean([1 / (number - 1) for number in numbers])), 1)
    return {"first": one_of_all, "before": one_of_others, "changed": one_of_all, "direction": 25.0}


def table(report: dict) -> list[list[str]]:
    """Rows of tokens, the grid of a frame, averaged frames, the order, then the kinds of questions."""
    rows = []
    for row in report["accuracy"]:
        values = [row["accuracy"][kind] for kind in CLIP_KINDS]
        numbers = [f"{value['accuracy']:.0f} ± {value['standard_error']:.0f}" for value in values]
        rows.append([str(row["tokens"]), f"{row['grid']} x {row['grid']}", str(row["frames"]), row["order"], *numbers])
    return rows


def draw(report: dict, path: Path) -> None:
    """Accuracy by budget, a line for each kind of question."""
    rows = sorted((row for row in report["accuracy"] if row["order"] == IN_ORDER), key=lambda row: row["tokens"])
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for kind in CLIP_KINDS:
        values = [row["accuracy"][kind] for row in rows]
        points, errors = ([value[name] for value in values] for name in ("accuracy", "standard_error"))
        axes.errorbar(range(len(rows)), points, errors, fmt="o-", label=kind, markersize=4, linewidth=1.3)
    trained = [tuple(budget.values()) for budget in report["trained_budgets"]]
    labels = [
        f"{row['tokens']}\n{row['grid']} x {row['grid']}, {row['frames']}"
        + ("" if (row["grid"], row["frames"]) in trained else "\nnot trained")
        for row in rows
    ]
    axes.set(xticks=range(len(rows)), xticklabels=labels, ylim=(0, 101), ylabel="accuracy, %")
    axes.set_xlabel("tokens per clip; grid of a frame, frames averaged")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main(
    seeds: Annotated[list[int], typer.Option("--seed", help="Seeds of clips, questions and budgets.")] = [1],  # noqa: B006
    small: Annotated[bool, typer.Option("--small", help="A few steps and clips, to see that it runs.")] = False,
    finished: Annotated[
        bool, typer.Option("--finished", help="Report the finished cells, and measure no more.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder for models and finished cells.")] = Path("runs/videos"),
    out: Annotated[Path, typer.Option(help="Folder for videos.json and videos.png.")] = RESULTS,
) -> None:
    """Train on clips for a short time, and ask about held-out ones at several budgets."""
    torch.set_num_threads(1)
    sizes, cells = SMALL if small else Sizes(), Cells(runs / "cells", finished)
    known: dict = {}

    def once(name, make):
        return known[name] if name in known else known.setdefault(name, make())

    def tower():
        return once("tower", lambda: load(SHIPPED_CHECKPOINT, device="cpu", dtype="float32")[0].model.vision_tower)

    def model(seed: int):
        return once(seed, lambda: trained_model(tower(), sizes, seed, runs))

    def cell(seed: int, budget: Budget, order: str) -> dict:
        return measure(*model(seed), once("test", lambda: read_clips(tower(), "test", sizes.test)), budget, order)

    rows = []
    for order in ORDERS:
        for budget in BUDGETS if order == IN_ORDER else (Budget(2, 1),):
            name = f"{budget.grid} {budget.frames} {order}"
            found = [cells.get(f"{name} {seed}", cell, seed, budget, order) for seed in seeds]
            found = [measured for measured in found if measured is not None]
            if found:
                row = {"tokens": budget.num_tokens, **budget._asdict(), "order": order, "seeds": len(found)}
                rows.append(row | {"accuracy": over_clips(found)})
    files = cells.get("files", lambda: from_files(*model(seeds[0]), sizes, Budget(2, 1)))
    report = {
        "command": command(),
        "sizes": asdict(sizes),
        "trained_budgets": [budget._asdict() for budget in TRAINED_BUDGETS],
        "accuracy": rows,
        "guesses": guesses(sizes.test),
        "files": files,
        "environment": environment("cpu", "av"),
    }
    for row in table(report):
        typer.echo("".join(f"{value:>13}" for value in row))
    write_report(report, out / "videos.json")
    draw(report, out / "videos.png")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
