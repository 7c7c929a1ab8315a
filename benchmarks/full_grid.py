# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A library of the benchmarks: digits models that have only seen the full grid, their training and their answers.

The tower is that of `backbones/digits`, which has never seen a pooled picture. It is frozen, and its features are
computed once. The Llama is that of `backbones/digits` too, and the Qwen2 is trained from random weights. Each seed
gives them a new projector and trains both with it, at 144 tokens per picture.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import typer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, Qwen2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_deco import DecoForConditionalGeneration, DecoModel, pool_patch_grid
from modeling_deco.configuration_deco import IMAGE_POSITIONS
from modeling_deco.positions import image_offsets
from modeling_deco.training.collator import IGNORE_INDEX, PADDING, SHARED, expand_images
from modeling_deco.training.feature_cache import PATCHES
from modeling_deco.utils.staging import staged_file
from modeling_deco.worlds.digits.deco_model import build_model, whiten_projector
from modeling_deco.worlds.digits.processor import build_processor
from modeling_deco.worlds.digits.questions import KINDS, TRAINING_KINDS, Question, questions, score
from modeling_deco.worlds.digits.scenes import render
from modeling_deco.worlds.digits.tokenizer import WORDS
from modeling_deco.worlds.digits.tower_model import PATCH_GRID, PATCH_SIZE, patch_features, pixel_values
from modeling_deco.worlds.digits.training import build_optimizer

BACKBONES = Path(__file__).with_name("backbones") / "digits"
FULL = PATCH_GRID
DISTANCES = ("fixed", "varied")  # between a picture and a question, in training at the full grid
KEPT, NUMBERED = IMAGE_POSITIONS  # "patch", "sequence"
TRAINED_GRIDS = (2, 3, 4, 6) * 2 + (FULL,)  # one of them for each step of elastic training
SLOT = 8  # tokens of the longest answer and its end
LANGUAGE_MODELS = {
    "llama": (LlamaConfig, {"rope_theta": 1e4}),
    "qwen2": (Qwen2Config, {"rope_theta": 1e6}),  # biases for queries, keys and values; the base of Qwen2.5
}


# --- pictures --------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """A question about a picture, with the ids of its text and of the answer that is learned, with its end."""

    question: Question
    asked: list[int]
    answer: list[int]


@dataclass
class Pictures:
    """Pictures as `features (pictures, 144, width)` of the frozen tower, and the questions about each of them."""

    features: torch.Tensor
    turns: list[list[Turn]]

    def __len__(self) -> int:
        return len(self.turns)

    def take(self, indices) -> "Pictures":
        return Pictures(self.features[indices], [self.turns[index] for index in indices])


def load_tower() -> nn.Module:
    return DecoModel.from_pretrained(BACKBONES, dtype="float32").vision_tower.eval()


@torch.inference_mode()
def read_pictures(tower, processor, split: str, indices: range, kinds=KINDS, side: int = FULL) -> Pictures:
    """Render pictures and encode them.

    Args:
        side: patches on a side. Below the tower's own, the picture is scaled down, and the tower interpolates its
            position embeddings.
    """
    features, turns = [], []
    for start in tqdm(range(indices.start, indices.stop, 64), desc=f"encode {split}", disable=len(indices) < 1000):
        scenes = [render(split, index, min_digits=2) for index in range(start, min(start + 64, indices.stop))]
        if side == FULL:
            features.append(patch_features(tower, torch.stack([pixel_values(scene) for scene in scenes])))
        else:
            pixels = torch.stack([pixel_values(scene) for scene in scenes])
            size = side * PATCH_SIZE
            pixels = nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
            outputs = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
            features.append(outputs.hidden_states[-1][:, 1:])
        for index, scene in enumerate(scenes, start=start):
            asked = questions(scene, np.random.default_rng([indices.start, index]), kinds)
            turns.append([turn_of(processor.tokenizer, question, question.answer) for question in asked])
    return Pictures(torch.cat(features).bfloat16().clone(), turns)


def turn_of(tokenizer, question: Question, answer: str) -> Turn:
    ids = tokenizer([question.text, answer], add_special_tokens=False)["input_ids"]
    return Turn(question, ids[0], ids[1] + [tokenizer.eos_token_id])


# --- batches ---------------------------------------------------------------------------------------------------------


def single_turns(turns: list[Turn], tokenizer, slot: int | None = None) -> dict[str, list[int]]:
    """The questions about a picture as samples of their own in one row: each attends to the picture and to itself, and
    stands right behind the picture.

    Args:
        slot: give every answer so many tokens.
    """
    bos, user, image, assistant, _ = marks(tokenizer)
    row = {"input_ids": [bos, user, image], "labels": [IGNORE_INDEX] * 3, "owners": [SHARED] * 3}
    for owner, turn in enumerate(turns, start=1):
        answer = turn.answer + [tokenizer.eos_token_id] * ((slot or 0) - len(turn.answer))
        row["input_ids"] += [*turn.asked, assistant, *answer]
        row["labels"] += [IGNORE_INDEX] * (len(turn.asked) + 1) + answer
        row["owners"] += [owner] * (len(turn.asked) + 1 + len(answer))
    return row


def conversation(turns: list[Turn], tokenizer, rng: np.random.Generator) -> dict[str, list[int]]:
    """A conversation: words before the picture, words behind it, and the questions in random order, each after the
    earlier ones and their answers. So a question is 0 to about 130 positions behind the picture."""
    bos, user, image, assistant, _ = marks(tokenizer)
    words = [tokenizer.convert_tokens_to_ids(word) for word in WORDS if not word.isdigit()]
    before, behind = (list(rng.choice(words, rng.integers(0, 41) * rng.integers(0, 2))) for _ in range(2))
    ids = [bos, user, *before, image, *behind]
    labels = [IGNORE_INDEX] * len(ids)
    for place, index in enumerate(rng.permutation(len(turns))):
        asked = [user] * (place > 0) + turns[index].asked + [assistant]
        ids += asked + turns[index].answer
        labels += [IGNORE_INDEX] * len(asked) + turns[index].answer
    return {"input_ids": [int(token) for token in ids], "labels": labels, "owners": [SHARED] * len(ids)}


def marks(tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids(["<bos>", "<user>", "<image>", "<assistant>", "<eos>"])


def model_inputs(rows: list[dict[str, list[int]]], grid: int, processor, image_positions: str) -> dict:
    """The model's inputs for rows with one picture each, with `labels`, and without the pictures."""
    fill = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX, "owners": PADDING}
    batch: dict = {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    batch["patch_features"] = {PATCHES: torch.empty(0)}  # the pictures are added by `logits_of`
    inputs = expand_images(batch, grid, processor)
    del inputs["pixel_values"]
    return inputs | {"image_positions": image_positions}


Reduce = Callable[[DecoForConditionalGeneration, torch.Tensor, int], torch.Tensor]


def pooled(model, features: torch.Tensor, grid: int) -> torch.Tensor:
    """DeCo: average pooling, then the MLP."""
    return model.model.multi_modal_projector(features, (FULL, FULL), (grid, grid))


def pooled_after_mlp(model, features: torch.Tensor, grid: int) -> torch.Tensor:
    return pool_patch_grid(model.model.multi_modal_projector.project(features), (FULL, FULL), (grid, grid))


def central_patches(model, features: torch.Tensor, grid: int) -> torch.Tensor:
    """One patch of each window instead of their mean."""
    return model.model.multi_modal_projector.project(features[:, image_offsets((FULL, FULL), (grid, grid))])


def as_it_is(model, features: torch.Tensor, grid: int) -> torch.Tensor:
    """The picture was scaled down, so there are no more patches than tokens."""
    return model.model.multi_modal_projector.project(features)


def logits_of(model, inputs: dict, features: torch.Tensor, grid: int, reduce: Reduce = pooled) -> torch.Tensor:
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.autocast("cpu", torch.bfloat16):
        encoded = BaseModelOutputWithPooling(pooler_output=list(reduce(model, features, grid)))
        return model(**inputs, mm_encoder_outputs={"image": encoded}).logits.float()


# --- answers ---------------------------------------------------------------------------------------------------------


def greedy_answers(
    model, processor, pictures: Pictures, grid: int, image_positions: str, reduce: Reduce = pooled
) -> list[list[str]]:
    """The model's greedy answers to all questions about each picture."""
    model.eval()

    def predict(indices: list[int], rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = model_inputs(rows, grid, processor, image_positions)
        return logits_of(model, inputs, pictures.features[indices], grid, reduce), inputs["labels"]

    return drafted_answers(pictures.turns, processor.tokenizer, predict)


@torch.inference_mode()
def drafted_answers(
    all_turns: list[list[Turn]],
    tokenizer,
    predict: Callable[[list[int], list[dict]], tuple[torch.Tensor, torch.Tensor]],
) -> list[list[str]]:
    """Greedy answers to all questions about each picture.

    All questions about a picture are one row, and all tokens of an answer are predicted at once from a draft, at first
    the reference. The predictions are the next draft, until nothing changes: then each token is the most likely one
    behind those before it, which is what `generate` writes. Most answers need one or two passes.

    Args:
        all_turns: the questions about each picture.
        predict: from indices of pictures and their rows, as `single_turns` makes them, to logits and labels.
    """
    eos = tokenizer.eos_token_id
    drafts = [[(turn.answer + [eos] * SLOT)[:SLOT] for turn in turns] for turns in all_turns]
    active = list(range(len(all_turns)))
    for _ in range(SLOT + 1):
        changed = []
        for start in range(0, len(active), 50):
            chunk = active[start : start + 50]
            rows = [
                single_turns(
                    [turn._replace(answer=d) for turn, d in zip(all_turns[i], drafts[i], strict=True)], tokenizer
                )
                for i in chunk
            ]
            logits, labels = predict(chunk, rows)
            is_answer = labels != IGNORE_INDEX
            for index, row, mask in zip(chunk, logits.argmax(-1)[:, :-1], is_answer[:, 1:], strict=True):
                new = [cut(answer, eos) for answer in row[mask].view(-1, SLOT).tolist()]
                if new != [cut(answer, eos) for answer in drafts[index]]:
                    changed.append(index)
                drafts[index] = new
        active = changed
        if not active:
            break
    return [tokenizer.batch_decode(answers, skip_special_tokens=True) for answers in drafts]


def cut(answer: list[int], eos: int) -> list[int]:
    """An answer with nothing but ends behind its end."""
    end = answer.index(eos) if eos in answer else len(answer)
    return answer[:end] + [eos] * (len(answer) - end)


def accuracy(model, processor, pictures: Pictures, grid: int, image_positions: str, reduce: Reduce = pooled) -> dict:
    """Percentage of right answers by kind of question; there is one of each kind about a picture."""
    answers = greedy_answers(model, processor, pictures, grid, image_positions, reduce)
    return accuracy_of(pictures, answers)


def accuracy_of(pictures: Pictures, answers: list[list[str]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for turns, texts in zip(pictures.turns, answers, strict=True):
        for turn, text in zip(turns, texts, strict=True):
            right.setdefault(turn.question.kind, []).append(score(turn.question, text))
    return {kind: round(100 * float(np.mean(right[kind])), 2) for kind in KINDS if kind in right}


# --- training --------------------------------------------------------------------------------------------------------


def cosine_rate(step: int, num_steps: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / num_steps))


def order(num_pictures: int, num_steps: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of the pictures of each step; every picture is used once before any is used again."""
    rng = np.random.default_rng(seed)
    left: list[int] = []
    for _ in range(num_steps):
        while len(left) < batch_size:
            left += rng.permutation(num_pictures).tolist()
        yield left[:batch_size]
        left = left[batch_size:]


def train(
    model,
    pictures: Pictures,
    loss_of: Callable[[Pictures, int], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    batch_size: int,
    seed: int,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """Train with warm-up and a cosine schedule.

    Args:
        loss_of: from the pictures of a step and its number.
        after: is called with the number of finished steps.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step, indices in enumerate(order(len(pictures), num_steps, batch_size, seed)):
        model.train()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * cosine_rate(step, num_steps, warmup=max(1, min(50, num_steps // 10)))
        loss = loss_of(pictures.take(indices), step)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after(step + 1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# --- starts ----------------------------------------------------------------------------------------------------------


def build_start(language_model: str, processor) -> DecoForConditionalGeneration:
    """An untrained projector and an untrained language model behind the trained tower, which is frozen."""
    config_class, special = LANGUAGE_MODELS[language_model]
    rope_parameters = {"rope_type": "default", **special}
    model = build_model(BACKBONES, processor, text_config_class=config_class, rope_parameters=rope_parameters)
    model.model.vision_tower.requires_grad_(False)
    pixels = torch.stack([pixel_values(render("train", index, min_digits=2)) for index in range(96)])
    whiten_projector(model, pixels)
    return model


def adamw(model, rate: float) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured."""

    seeds: tuple[int, ...] = (1, 2, 3)
    pool: int = 9600  # training pictures
    test: int = 150  # pictures for tables, each with one question of every kind
    validation: int = 100  # pictures for curves
    scratch_steps: int = 400
    start_steps: int = 150
    varied_steps: int = 100
    batch_size: int = 24
    elastic_steps: int = 100
    elastic_points: tuple[int, ...] = (0, 25, 50, 100)
    tuning_steps: int = 100
    tuning_points: tuple[int, ...] = (0, 25, 50, 100)
    num_pictures: tuple[int, ...] = (32, 160, 1600)


SMALL = Sizes(
    pool=24,
    test=4,
    validation=2,
    scratch_steps=2,
    start_steps=2,
    varied_steps=2,
    batch_size=4,
    elastic_steps=2,
    elastic_points=(0, 2),
    tuning_steps=2,
    tuning_points=(0, 2),
    num_pictures=(8,),
)


class World:
    """The processor and the pictures of a benchmark, kept in `folder`."""

    def __init__(self, folder: Path, sizes: Sizes):
        self.folder, self.sizes = folder, sizes
        self.processor, self.tower = build_processor(FULL), load_tower()
        self.test = read_pictures(self.tower, self.processor, "test", range(sizes.test))
        self.validation = read_pictures(self.tower, self.processor, "validation", range(sizes.validation))
        self._pool, self._smaller = None, {}

    @property
    def pool(self) -> Pictures:
        """Training pictures."""
        path = self.folder / f"pictures-{self.sizes.pool}.pt"
        if self._pool is None and path.exists():
            self._pool = torch.load(path, weights_only=False)
        if self._pool is None:
            self._pool = read_pictures(self.tower, self.processor, "train", range(self.sizes.pool), TRAINING_KINDS)
            with staged_file(path) as incomplete:
                torch.save(self._pool, incomplete)
        return self._pool

    @property
    def one_of_each(self) -> Pictures:
        """Training pictures with one question of every kind."""
        one_each = [list({turn.question.kind: turn for turn in turns}.values()) for turns in self.pool.turns]
        return Pictures(self.pool.features, one_each)

    def smaller(self, grid: int) -> Pictures:
        """The test pictures, scaled down so that the tower gives `grid` patches on a side."""
        if grid not in self._smaller:
            indices = range(self.sizes.test)
            self._smaller[grid] = read_pictures(self.tower, self.processor, "test", indices, side=grid)
        return self._smaller[grid]

    def row(self, turns: list[Turn], distances: str, rng: np.random.Generator) -> dict[str, list[int]]:
        tokenizer = self.processor.tokenizer
        return single_turns(turns, tokenizer) if distances == "fixed" else conversation(turns, tokenizer, rng)


def start(world: World, language_model: str, distances: str, seed: int) -> DecoForConditionalGeneration:
    """A model that was trained at the full grid only, from `world.folder` if it is there.

    With fixed distances a new projector and a language model that was trained before are trained together. With varied
    distances that model is trained further, on conversations.
    """
    if distances == "varied":
        return _trained(
            world,
            f"{language_model}-varied-{seed}",
            lambda: start(world, language_model, "fixed", seed),
            lambda model: adamw(model, 1e-3),
            world.sizes.varied_steps,
            seed,
            distances,
        )

    def build():
        model = build_start(language_model, world.processor)
        warm = warm_language_model(world, language_model)
        model.model.language_model.load_state_dict(warm.model.language_model.state_dict())
        return model

    num_steps = world.sizes.start_steps
    return _trained(world, f"{language_model}-fixed-{seed}", build, muon, num_steps, seed, "fixed")


def warm_language_model(world: World, language_model: str) -> DecoForConditionalGeneration:
    """A model whose language model has learned the questions at the full grid."""
    if language_model == "llama":
        return DecoForConditionalGeneration.from_pretrained(BACKBONES, dtype="float32")
    build = partial(build_start, language_model, world.processor)
    pictures = with_fewer_questions(world.pool, {"existence": 2, "locate": 2})
    return _trained(world, f"{language_model}-base", build, muon, world.sizes.scratch_steps, 1, "fixed", pictures)


def muon(model) -> torch.optim.Optimizer:
    return build_optimizer(model, 0.02, 2e-3, 0)


def with_fewer_questions(pictures: Pictures, most: dict[str, int]) -> Pictures:
    """The first questions of each kind: as many as `most` says, or one."""
    kept = []
    for turns in pictures.turns:
        by_kind: dict[str, list[Turn]] = defaultdict(list)
        for turn in turns:
            by_kind[turn.question.kind].append(turn)
        kept.append([turn for kind, found in by_kind.items() for turn in found[: most.get(kind, 1)]])
    return Pictures(pictures.features, kept)


def _trained(
    world: World,
    name: str,
    build: Callable,
    optimizer_of: Callable,
    num_steps: int,
    seed: int,
    distances: str,
    pictures: Pictures | None = None,
) -> DecoForConditionalGeneration:
    """The model of this name, which is built and trained at the full grid if it is not in `world.folder`."""
    folder = world.folder / "starts" / name
    if (folder / "finished.json").exists():
        model = DecoForConditionalGeneration.from_pretrained(folder, dtype="float32")
        model.model.vision_tower.requires_grad_(False)
        return model
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, losses = build(), []
    model.model.vision_tower.requires_grad_(False)
    began = time.process_time()

    def loss_of(pictures: Pictures, step: int) -> torch.Tensor:
        rows = [world.row(turns, distances, rng) for turns in pictures.turns]
        inputs = model_inputs(rows, FULL, world.processor, "sequence")
        loss = cross_entropy(logits_of(model, inputs, pictures.features, FULL), inputs["labels"])
        losses.append(loss.item())
        return loss

    def report(step: int) -> None:
        if step % 25 == 0:
            seconds = time.process_time() - began
            log(f"{name}: step {step}, loss {np.mean(losses[-25:]):.3f}, {seconds:.0f} s")

    train(model, pictures or world.pool, loss_of, optimizer_of(model), num_steps, world.sizes.batch_size, seed, report)
    model.save_pretrained(folder)
    world.processor.save_pretrained(folder)
    finished = {"steps": num_steps, "cpu_seconds": round(time.process_time() - began, 1)}
    finished["accuracy"] = accuracy(model, world.processor, world.validation, FULL, "sequence")
    log(f"{name}: {finished}")
    (folder / "finished.json").write_text(json.dumps(finished) + "\n")
    return model


def log(line: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)


class Cells:
    """Results that are kept one by one, so that a run resumes.

    Args:
        only_finished: measure nothing more.
    """

    def __init__(self, folder: Path, only_finished: bool = False):
        self.folder, self.only_finished = folder, only_finished
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, measure: Callable[..., dict], *args) -> dict | None:
        """The cell of this name, which is measured by `measure(*args)` if it is not there; or None."""
        path = self.folder / f"{name.replace(' ', '-')}.json"
        if not path.exists() and self.only_finished:
            return None
        if not path.exists():
            began = time.process_time()
            cell = {"result": measure(*args), "cpu_seconds": round(time.process_time() - began, 1)}
            with staged_file(path) as incomplete:
                incomplete.write_text(json.dumps(cell) + "\n", encoding="utf-8")
            log(f"{name}: {cell['cpu_seconds']} s")
        return json.loads(path.read_text(encoding="utf-8"))["result"]


# --- reports ---------------------------------------------------------------------------------------------------------


def mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Mean over seeds, and its standard error if there are several."""
    error = round(float(np.std(values, ddof=1) / len(values) ** 0.5), 1) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 1), "error": error}


def over_seeds(by_seed: list):
    """The same nested dicts with `mean_and_error` in place of numbers."""
    if isinstance(by_seed[0], dict):
        return {key: over_seeds([found[key] for found in by_seed]) for key in by_seed[0]}
    return mean_and_error(by_seed)


def of_seeds(cells: dict[str, dict | None]) -> dict[str, list[dict]]:
    """The finished cells by their names without the seed, which ends a name."""
    groups = defaultdict(list)
    for name, cell in cells.items():
        if cell is not None:
            groups[name.rsplit(" ", 1)[0]].append(cell)
    return groups


def over_seeds_of(cells: dict[str, dict | None]) -> dict:
    """`over_seeds` of the finished cells, by their names without the seed."""
    return {name: over_seeds(found) for name, found in of_seeds(cells).items()}


def num_seeds(cells: dict[str, dict | None]) -> dict[str, int]:
    return {name: len(found) for name, found in of_seeds(cells).items()}


def shown(value: dict[str, float]) -> str:
    error = "" if value["error"] is None else f" ± {value['error']:.0f}"
    return f"{value['mean']:.0f}{error}"


def plot(axes, x: list[int], points: list[dict], line: str, colour: str, label: str) -> None:
    values, errors = [point["mean"] for point in points], [point["error"] or 0 for point in points]
    axes.errorbar(x, values, errors, fmt=line, color=colour, label=label, markersize=4, linewidth=1.4)
